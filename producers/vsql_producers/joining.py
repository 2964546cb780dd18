"""Targets that join a stream which is at work: they begin where an epoch begins.

Not here: the copy itself (snapshot/) and what a target passes over (the consumer). Rules (docs/design/0006):

* Descriptors and records below an epoch may be gone when a target joins: whatever it must read has to come
  after an `epoch_opened`, because an epoch sends every descriptor again.
* An epoch names, in its opening, the targets that were registered before it. A live stream ends its epoch
  when another target was registered since: from its registration on nothing is deleted that it lacks.
* A first copy takes its snapshot only when the live stream's present epoch names its target. So every batch
  that ends beyond the snapshot lies in an epoch of which Kafka has everything.
* A target may say of a batch that its first copy covers it, once that copy is finished: every table of the
  batch was copied, and the batch ends at or below the position of each table's copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from vsql_shared import lsn, names
from vsql_shared.audit.entries import (
    COPY_FINISHED,
    EPOCH_OPENED,
    REPLICATION_BATCH,
    AuditEntry,
    canonical_json,
)
from vsql_shared.audit.rows import parse
from vsql_shared.audit.scope_history import SCOPE
from vsql_shared.changes import SIGNALS
from vsql_shared.errors import TransientError
from vsql_shared.pg.connect import Connection, errors

_TARGETS = "targets"
# A copy brings its sequences, and messages begin behind it: they are no tables of a copy.
_NO_TABLES = frozenset(str(name) for name in SIGNALS.values())


class TargetJoined(TransientError):
    """A target was registered after this epoch began: it cannot read what the epoch sent so far."""


def load_targets(conn: Connection, chain: str) -> frozenset[str]:
    """Names of a stream's registered targets."""
    with errors("reading the targets"):
        rows = conn.execute(
            "SELECT target FROM vsql_sync.stream_targets WHERE chain = %s AND target <> '*'", (chain,)
        ).fetchall()
    return frozenset(row[0] for row in rows)


def opening_detail(targets: Iterable[str], scope: str) -> str:
    """Detail of the `epoch_opened` entry of a live stream; `scope`: the SHA-256 of its scope."""
    return canonical_json({_TARGETS: sorted(targets), SCOPE: scope})


def require_no_new(conn: Connection, chain: str, known: frozenset[str]) -> None:
    """Raise TargetJoined when a target was registered that the present epoch does not name."""
    new = load_targets(conn, chain) - known
    if new:
        raise TargetJoined(
            f"target {', '.join(sorted(new))} joins stream {chain}: it begins with a new epoch",
            hint="nothing is to be done; the stream goes on",
        )


def require_named(conn: Connection, live_chain: str, target: str) -> None:
    """Raise TransientError until the live stream's present epoch names the target of a copy."""
    with errors("looking at the live stream's epoch"):
        row = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence DESC LIMIT 1",
            (live_chain, EPOCH_OPENED),
        ).fetchone()
    named = json.loads(parse(bytes(row[0])).entry.detail).get(_TARGETS, []) if row else []
    if target not in named:
        raise TransientError(
            f"the first copy waits for stream {live_chain} to open an epoch for target {target}",
            hint="the live stream must run; the copy follows",
        )


def uncovered(conn: Connection, chain: str, target: str, acked: int, sequence: int) -> str | None:
    """Why the target's first copy does not cover our manifests behind `acked` up to `sequence`.

    '' when it does; None when that cannot be said yet, because our table lacks the end of the copy: its
    reader may have it from Kafka before.
    """
    publication, origin = names.live_chain_of(chain).split(".")
    copy = names.copy_chain(publication, origin, target)
    said = f"target {target} says its first copy covers our manifest {sequence}, "
    if chain == copy:
        return said + "which is of that copy"
    with errors("reading the first copy's end"):
        end = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence DESC LIMIT 1",
            (copy, COPY_FINISHED),
        ).fetchone()
        manifests = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence > %s"
            " AND sequence <= %s AND event_type = %s ORDER BY sequence",
            (chain, acked, sequence, REPLICATION_BATCH),
        ).fetchall()
    if end is None:
        return None
    tables = json.loads(parse(bytes(end[0])).entry.detail)["tables"]
    copied = {name: lsn.parse(table["lsn"]) for name, table in tables.items() if name not in _NO_TABLES}
    last: AuditEntry | None = None
    for (document,) in manifests:
        last = parse(bytes(document)).entry
        missing = set(last.tables_affected) - _NO_TABLES - copied.keys()
        if missing:
            return (
                said + f"manifest {last.sequence} changes {', '.join(sorted(missing))}: the copy has it not"
            )
    if last is None or last.sequence != sequence or last.continues:
        return said + "which ends no batch"
    if last.batch_lsn_end > min(copied.values(), default=0):
        return said + f"which ends at {lsn.text(last.batch_lsn_end)}, beyond the copy"
    return ""
