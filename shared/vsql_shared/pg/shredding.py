"""Operators' keys, and orders to destroy a KEK version, in this node's database.

Not here: what an order's bytes are (audit/shredding.py), destroying in the KMS (kms/), what a chain says.
Rules:

* requested → scheduled → destroyed, or cancelled before that. Scheduled and destroyed are two things: until
  its time has come, a second person's approval takes nothing away.
* Signatures are verified again whenever an order is used, not only when it is made: a row is no proof.
* An order covers the data keys of this node that no other KEK version wraps (coverage.py). What it covers is
  looked at again before it is carried out; if that has changed, it is not.
* The version that wraps, and one that a key in use lies under, are never destroyed.
* What time it is, the database says.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.entries import KEY_DESTROYED
from vsql_shared.audit.rows import microseconds, parse, timestamp
from vsql_shared.audit.shredding import (
    ShredOrder,
    destroyed,
    keys_hash,
    open_order,
    sign_order,
    verify_approval,
)
from vsql_shared.crypto.signing import PinnedKey, Signer, fingerprint
from vsql_shared.errors import RefusedError, UserError
from vsql_shared.names import live_chain_of
from vsql_shared.pg import commands, coverage, nodes, oplog
from vsql_shared.pg.connect import Connection, errors


@dataclass(frozen=True, slots=True)
class Row:
    """An order as the table has it."""

    id: int
    kms_provider: str
    kek_id: str
    document: bytes
    approver: str
    approval: bytes
    state: str
    not_before: int
    ended_at: int
    """µs since 1970; 0: not ended."""


@dataclass(frozen=True, slots=True)
class Done:
    """An order that was carried out, verified."""

    order: ShredOrder
    document: bytes
    approver: str
    approval: bytes
    destroyed_at: int
    deks: tuple[tuple[str, str], ...]


def operators(conn: Connection, *, present: bool = False) -> list[PinnedKey]:
    """Enrolled keys, `node` is the operator's name; `present`: only those that have not ended."""
    with errors("reading the operators' keys"):
        rows = conn.execute(
            "SELECT operator, public_key, fingerprint FROM vsql_sync.operator_keys"
            " WHERE ended_at IS NULL OR NOT %s ORDER BY operator",
            (present,),
        ).fetchall()
    return [PinnedKey(name, bytes(key), print_, revoked=False) for name, key, print_ in rows]


def enroll(conn: Connection, operator: str, public_key: bytes) -> str:
    """Make a person's key known; its fingerprint."""
    name, print_ = operator.strip(), fingerprint(public_key)
    if not name:
        raise UserError("an operator needs a name")
    with errors("enrolling an operator's key"), conn.transaction():
        taken = conn.execute(
            "SELECT operator FROM vsql_sync.operator_keys"
            " WHERE fingerprint = %(print)s OR operator = %(name)s AND ended_at IS NULL"
            " UNION ALL SELECT 'node ' || node_name FROM vsql_sync.signers WHERE fingerprint = %(print)s",
            {"print": print_, "name": name},
        ).fetchone()
        if taken is not None:
            raise RefusedError(
                f"the key or the name is taken, by {taken[0]}",
                hint="each operator has one key of their own; end the former one first",
            )
        conn.execute(
            "INSERT INTO vsql_sync.operator_keys (fingerprint, operator, public_key) VALUES (%s, %s, %s)",
            (print_, name, public_key),
        )
        oplog.record(conn, "operator.enroll", "operator", name, new={"fingerprint": print_})
    return print_


def end_operator(conn: Connection, operator: str, reason: str) -> str:
    """A person orders and approves nothing more; the fingerprint of their key."""
    if not reason.strip():
        raise UserError("the end of a key needs a reason", hint='--reason "…"; it is kept in the audit log')
    with errors("ending an operator's key"), conn.transaction():
        row = conn.execute(
            "UPDATE vsql_sync.operator_keys SET ended_at = now(), ended_reason = %s"
            " WHERE operator = %s AND ended_at IS NULL RETURNING fingerprint",
            (reason.strip(), operator),
        ).fetchone()
        if row is None:
            raise RefusedError(f"no operator {operator!r} is enrolled", hint="see `syncctl key inventory`")
        oplog.record(conn, "operator.end", "operator", operator, new={"reason": reason.strip()})
    return str(row[0])


def request(
    conn: Connection, signer: Signer, provider: str, kek_id: str, reason: str, after: timedelta
) -> Row:
    """An order by `signer.node`, an enrolled operator. Raises RefusedError, SignatureError."""
    if not reason.strip():
        raise UserError("destroying a key needs a reason", hint='--reason "…"; it is kept in the order')
    here = nodes.local(conn)
    found = coverage.of(conn, provider, kek_id)
    coverage.require_unneeded(found, kek_id)
    now = _now(conn)
    order = ShredOrder(
        cluster=here.cluster,
        node=here.name,
        kms_provider=provider,
        kek_id=kek_id,
        operator=signer.node,
        reason=reason.strip(),
        requested_at=now,
        not_before=now + after // timedelta(microseconds=1),
        deks_sha256=keys_hash(found.deks),
        covers=found.covers,
    )
    document = sign_order(signer, order)
    open_order(document, operators(conn, present=True))
    with errors("ordering that a key is destroyed"), conn.transaction():
        row = conn.execute(
            "INSERT INTO vsql_sync.shred_orders (kms_provider, kek_id, document, not_before)"
            " SELECT %(provider)s, %(kek)s, %(document)s, %(at)s WHERE NOT EXISTS ("
            "   SELECT FROM vsql_sync.shred_orders"
            "   WHERE (kms_provider, kek_id) = (%(provider)s, %(kek)s) AND state <> 'cancelled')"
            " RETURNING id",
            {"provider": provider, "kek": kek_id, "document": document, "at": timestamp(order.not_before)},
        ).fetchone()
        if row is None:
            raise _ordered_before(conn, provider, kek_id)
        oplog.record(conn, "key.shred", "kek", kek_id, new={"order": row[0], "operator": signer.node})
    return load(conn, int(row[0]))


def _ordered_before(conn: Connection, provider: str, kek_id: str) -> RefusedError:
    known = [
        one
        for one in everything(conn)
        if (one.kms_provider, one.kek_id) == (provider, kek_id) and one.state != "cancelled"
    ]
    if not known:  # cancelled meanwhile
        return RefusedError(f"there was an order for {kek_id}", hint="give it again")
    number, state = known[0].id, known[0].state
    hint = f"`syncctl key shred --cancel {number}` withdraws it" if state != "destroyed" else ""
    return RefusedError(f"there is an order for {kek_id} already: {number}, {state}", hint=hint)


def _now(conn: Connection) -> int:
    """The database's time, µs since 1970: that of the machine the command runs on is its owner's."""
    with errors("asking what time it is"):
        return microseconds(conn.execute("SELECT pg_catalog.clock_timestamp()").fetchall()[0][0])


def load(conn: Connection, number: int) -> Row:
    """An order by its number. Raises RefusedError."""
    found = [row for row in everything(conn) if row.id == number]
    if not found:
        raise RefusedError(f"there is no order {number}", hint="see `syncctl key inventory`")
    return found[0]


def everything(conn: Connection) -> list[Row]:
    """All orders, oldest first; as the table has them, not verified."""
    with errors("reading the orders to destroy keys"):
        rows = conn.execute(
            "SELECT id, kms_provider, kek_id, document, coalesce(approver, ''), coalesce(approval, ''),"
            " state, not_before, ended_at FROM vsql_sync.shred_orders ORDER BY id"
        ).fetchall()
    return [
        Row(number, provider, kek, bytes(document), approver, bytes(approval), state,
            microseconds(at), microseconds(ended) if ended else 0)
        for number, provider, kek, document, approver, approval, state, at, ended in rows
    ]  # fmt: skip


def to_be_approved(conn: Connection, number: int) -> Row:
    """An order whose signed bytes say what its row says: nobody approves what they were not shown."""
    row = load(conn, number)
    if row.state != "requested":
        raise RefusedError(f"order {number} is {row.state}: there is nothing to approve")
    _ours(conn, row, open_order(row.document, operators(conn, present=True)))
    return row


def approve(conn: Connection, number: int, approver: str, approval: bytes) -> Row:
    """Take a second person's signature; the key is then scheduled for destruction."""
    row = to_be_approved(conn, number)
    name = verify_approval(row.document, approver, approval, operators(conn, present=True))
    with errors("approving an order"), conn.transaction():
        _move(conn, row, "scheduled", {"approver": approver, "approval": approval})
        oplog.record(conn, "key.approve", "kek", row.kek_id, new={"order": number, "operator": name})
    return load(conn, number)


def cancel(conn: Connection, number: int, reason: str) -> Row:
    """Withdraw an order that was not carried out."""
    if not reason.strip():
        raise UserError("cancelling an order needs a reason", hint='--reason "…"; it is kept with the order')
    row = load(conn, number)
    if row.state not in ("requested", "scheduled"):
        raise RefusedError(f"order {number} is {row.state}: it cannot be cancelled")
    said = {"order": number, "reason": reason.strip()}
    with errors("cancelling an order"), conn.transaction():
        _move(conn, row, "cancelled", {"reason": reason.strip()})
        oplog.record(conn, "key.cancel-shred", "kek", row.kek_id, new=said)
    return load(conn, number)


def _move(conn: Connection, row: Row, state: str, values: dict[str, Any]) -> None:
    with errors("changing an order"):
        moved = conn.execute(
            "UPDATE vsql_sync.shred_orders SET state = %(to)s,"
            " approver = coalesce(%(approver)s, approver), approval = coalesce(%(approval)s, approval),"
            " approved_at = CASE WHEN %(to)s = 'scheduled' THEN now() ELSE approved_at END,"
            " ended_at = CASE WHEN %(to)s IN ('destroyed', 'cancelled') THEN clock_timestamp() END,"
            " ended_reason = %(reason)s WHERE id = %(id)s AND state = %(from)s",
            {"approver": None, "approval": None, "reason": None}
            | values
            | {"to": state, "from": row.state, "id": row.id},
        ).rowcount
    if not moved:
        raise RefusedError(f"order {row.id} was changed by somebody else meanwhile", hint="look at it again")


def require_due(conn: Connection, number: int) -> tuple[Row, ShredOrder, coverage.Coverage]:
    """An order that may be carried out now. Raises RefusedError, SignatureError."""
    row = load(conn, number)
    if row.state != "scheduled":
        hint = "another operator approves it: `syncctl key approve`" if row.state == "requested" else ""
        raise RefusedError(f"order {number} is {row.state}, not scheduled", hint=hint)
    order = _verified(conn, row, operators(conn, present=True))
    if _now(conn) < order.not_before:
        raise RefusedError(
            f"order {number} may be carried out from {timestamp(order.not_before):%Y-%m-%d %H:%M:%S} UTC on"
        )
    found = coverage.of(conn, row.kms_provider, row.kek_id)
    coverage.require_unneeded(found, row.kek_id)
    if keys_hash(found.deks) != order.deks_sha256:
        raise RefusedError(
            f"order {number} covers other data keys than {row.kek_id} wraps alone now",
            hint="cancel it with `syncctl key shred --cancel`, and order anew",
        )
    return row, order, found


def _verified(conn: Connection, row: Row, keys: list[PinnedKey]) -> ShredOrder:
    """What the order's signed bytes say: the row's other columns are nobody's word."""
    verify_approval(row.document, row.approver, row.approval, keys)
    return _ours(conn, row, open_order(row.document, keys))


def _ours(conn: Connection, row: Row, order: ShredOrder) -> ShredOrder:
    here = nodes.local(conn)
    if (order.cluster, order.node) != (here.cluster, here.name):
        raise RefusedError(f"order {row.id} is one of node {order.node} in cluster {order.cluster}")
    if (order.kms_provider, order.kek_id) != (row.kms_provider, row.kek_id):
        raise RefusedError(f"order {row.id} is about {order.kek_id}, its row says {row.kek_id}")
    return order


def record_destroyed(conn: Connection, number: int) -> list[int]:
    """The KMS has destroyed it: mark what is gone, and have the chains say so; the commands' ids."""
    with errors("noting destroyed keys"), conn.transaction():
        conn.execute("LOCK TABLE vsql_sync.dek_wrappings IN SHARE MODE")  # require_alive
        row, _, found = require_due(conn, number)
        _move(conn, row, "destroyed", {})
        conn.execute(
            "UPDATE vsql_sync.deks SET state = 'destroyed', destroyed_by = %s,"
            " retired_at = coalesce(retired_at, now()) WHERE dek_id = ANY(%s)",
            (number, [dek_id for _, dek_id in found.deks]),
        )
        return _have_told(conn, number, row.kek_id, found.deks)


def tell_again(conn: Connection, number: int) -> list[int]:
    """Have the chains say it once more, where they do not name all keys; the commands' ids."""
    done = require_destroyed(conn, number)
    _, named = entries(conn, done)
    if named >= len(done.deks):
        raise RefusedError(f"order {number} was carried out, and its chains say so")
    with errors("noting destroyed keys"), conn.transaction():
        return _have_told(conn, number, done.order.kek_id, done.deks)


def _have_told(conn: Connection, number: int, kek_id: str, deks: tuple[tuple[str, str], ...]) -> list[int]:
    line = oplog.record(conn, "key.destroy", "kek", kek_id, new={"order": number})
    args, unfinished = {"order": number, "audit_log": line}, coverage.unfinished(conn)
    return [
        commands.request(conn, "producer", "key-destroyed", args, "", chain)
        for chain in sorted({_teller(of, unfinished) for of, _ in deks} & unfinished)
    ]


def _teller(chain: str, unfinished: set[str]) -> str:
    """The chain that names a chain's keys: itself, a first copy's live one, or any that is still written.

    A stream that was ended has no targets, but the proof needs an entry for every key.
    """
    live = live_chain_of(chain)
    others = sorted(unfinished, key=lambda one: (one != live_chain_of(one), one))
    return next((one for one in (chain, live, *others) if one in unfinished), live)


def told_by(conn: Connection, chain: str, deks: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    """Of these keys, those that `chain` names: by the chain they sealed."""
    unfinished = coverage.unfinished(conn)
    found: dict[str, list[str]] = {}
    for of, dek_id in deks:
        if _teller(of, unfinished) == chain:
            found.setdefault(of, []).append(dek_id)
    return found


def require_destroyed(conn: Connection, number: int) -> Done:
    """An order that was carried out, with what it destroyed. Raises RefusedError, SignatureError."""
    row = load(conn, number)
    if row.state != "destroyed":
        raise RefusedError(f"order {number} is {row.state}, not carried out")
    order = _verified(conn, row, operators(conn))
    deks = tuple(
        conn.execute(
            "SELECT chain, dek_id FROM vsql_sync.deks WHERE destroyed_by = %s ORDER BY 1, 2", (number,)
        ).fetchall()
    )
    if keys_hash(deks) != order.deks_sha256:
        raise RefusedError(f"the data keys marked as destroyed by order {number} are not those it covers")
    return Done(order, row.document, row.approver, row.approval, row.ended_at, deks)


def entries(conn: Connection, done: Done) -> tuple[list[bytes], int]:
    """The signed entries that say what an order destroyed, each key once; and how many keys they name.

    A worker that ended half-way said it again: of entries that say the same the first is taken.
    """
    with errors("reading what the chains say"):
        rows = conn.execute(
            "SELECT document FROM vsql_sync.audit_documents WHERE event_type = %s"
            " AND source_node_id = %s ORDER BY chain, sequence",
            (KEY_DESTROYED, done.order.node),
        ).fetchall()
    wanted = document_hash(done.document).hex()
    found: dict[tuple[str, ...], tuple[bytes, int]] = {}
    for (document,) in rows:
        said = destroyed(parse(bytes(document)).entry)
        if said.order == wanted:
            found.setdefault((said.chain, *said.deks), (bytes(document), len(said.deks)))
    return [document for document, _ in found.values()], sum(count for _, count in found.values())
