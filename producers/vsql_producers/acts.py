"""An operator's act as the chain has it: which, by whom, and a hash of the line that says why.

Not here: obeying (worker.py). Rules: the entry names a row of vsql_sync.audit_log (or, of a command nobody
logged, of vsql_sync.commands) and the SHA-256 of its canonical JSON (pg/oplog.py); the words stay in
that row. A worker that dies between the entry and its answer obeys again, and says so again: two entries name
one command.
"""

from __future__ import annotations

import hashlib
from typing import Any

from vsql_shared.pg import oplog
from vsql_shared.pg.commands import Command
from vsql_shared.pg.connect import Connection


def describe(conn: Connection, command: Command) -> dict[str, Any]:
    """Detail of the `operator_action` entry."""
    number = command.args.get("audit_log")
    text = oplog.line(conn, number) if isinstance(number, int) else None
    record = f"audit_log/{number}"
    if text is None:
        text, record = oplog.command(conn, command.id), f"commands/{command.id}"
    digest = hashlib.sha256((text or "").encode()).hexdigest()
    return {"act": command.verb, "command": command.id, "record": record, "sha256": digest}
