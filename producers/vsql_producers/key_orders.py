"""Operators' orders about KEKs, as a producer's worker obeys them: rotate, and say what was destroyed.

Not here: the commands' way (control.py), wrapping (keys.py), destroying itself (`syncctl key destroy` and the
KMS). Rules:

* An order that cannot be obeyed is answered so, and the stream goes on.
* What is said of destroyed keys is taken from an order with two valid signatures, and names exactly the keys
  the order covers; anything else is refused, whoever wrote the row.
* The entries stand in the chain before the command is answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vsql_shared.audit.entries import KEY_DESTROYED, KEY_ROTATED
from vsql_shared.audit.shredding import KEYS_PER_ENTRY, entry_details
from vsql_shared.errors import VsqlSyncError
from vsql_shared.pg import shredding

if TYPE_CHECKING:
    from vsql_producers.outlet import Outlet
    from vsql_shared.pg.commands import Command
    from vsql_shared.pg.connect import Connection

VERBS = frozenset({"rotate-kek", "key-destroyed"})


def obey(conn: Connection, command: Command, outlet: Outlet, chain: str) -> tuple[bool, str]:
    """Do it; (whether it was done, what to answer)."""
    try:
        if command.verb == "rotate-kek":
            return True, _rotate(outlet)
        return True, _say_destroyed(conn, command, outlet, chain)
    except VsqlSyncError as error:
        return False, str(error)


def _rotate(outlet: Outlet) -> str:
    before = outlet.keys.kek_id
    done = outlet.keys.rotate_kek()
    said = {
        "kek_id": done.kek_id,
        "rewrapped": list(done.rewrapped[:KEYS_PER_ENTRY]),
        "rewrapped_count": len(done.rewrapped),
        "left_count": len(done.left),
    }
    outlet.say(KEY_ROTATED, said)
    text = f"the next batch's data key is wrapped by {done.kek_id}; {len(done.rewrapped)} wrapped anew"
    if done.kek_id == before:
        text += "; that version was in use already, the KMS has no newer one"
    if done.left:
        text += f"; {len(done.left)} stay under older versions until their data is applied: {done.problem}"
    return text


def _say_destroyed(conn: Connection, command: Command, outlet: Outlet, chain: str) -> str:
    number = command.args.get("order")
    done = shredding.require_destroyed(conn, number if isinstance(number, int) else 0)
    mine = shredding.told_by(conn, chain, done.deks)
    for of, deks in sorted(mine.items()):
        for said in entry_details(done.order, done.document, done.approver, of, deks, done.destroyed_at):
            outlet.say(KEY_DESTROYED, said)
    return f"{sum(map(len, mine.values()))} data keys are named as destroyed"
