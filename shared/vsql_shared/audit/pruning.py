"""What of a chain may be pruned, and the last step: rows that are archived leave the database.

Not here: archiving (archive.py), saying it in the chain and on the topic (vsql_producers/prune_orders.py).
A chain of a live stream is pruned up to the end of an archived segment, when (docs/design/0020)

1. every entry up to there is older than the months that stay on-line;
2. every target of the stream has acknowledged the batches up to there, without a mismatch, and one of them
   has cosigned the checkpoint of exactly these entries;
3. what its writer and its readers start from stays: the last opening of an epoch, the last batch that ended;
4. each segment, from the first entry that is still on-line, is in the archive: read back, verified, locked.

Whatever is not so is said, and nothing is pruned.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from vsql_shared.audit.archive import Node, Row, before, needed_until, read_back, rows_of
from vsql_shared.audit.base import GONE, Base, Kept
from vsql_shared.audit.bases import base_at, base_of, start_of
from vsql_shared.audit.chain import EMPTY_HEAD
from vsql_shared.audit.cosigned import cosigners
from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.entries import EPOCH_OPENED, REPLICATION_BATCH
from vsql_shared.audit.rows import parse
from vsql_shared.audit.store import load_head
from vsql_shared.audit.tree import MAX_SIZE
from vsql_shared.errors import ChainError, RecordError, RefusedError, SignatureError
from vsql_shared.pg import signers
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vsql_shared.audit.chain import ChainHead
    from vsql_shared.audit.checkpoint import Log
    from vsql_shared.objects.s3 import S3Store


class Candidate(NamedTuple):
    """How far a chain may be pruned as far as the database knows; '' or what is in the way of more."""

    log: Log
    segments: tuple[Row, ...]
    why: str


def live_chains(conn: Connection) -> list[str]:
    """The chains of this node's outgoing live streams."""
    with errors("reading the streams"):
        rows = conn.execute(
            "SELECT chain FROM vsql_sync.streams WHERE direction = 'out' AND kind = 'live' ORDER BY 1"
        ).fetchall()
    return [name for (name,) in rows]


def limits(conn: Connection, chain: str) -> dict[str, int]:
    """How far each of rules 2 and 3 lets the chain be pruned: reason → sequence."""
    with errors("looking how far a chain may be pruned"):
        targets = conn.execute(
            "SELECT target, acked_sequence, mismatch IS NOT NULL, held FROM vsql_sync.counted_targets"
            " WHERE chain = %s AND target <> '*' ORDER BY target",
            (chain,),
        ).fetchall()
        opened = conn.execute(
            "SELECT sequence FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence DESC LIMIT 1",
            (chain, EPOCH_OPENED),
        ).fetchone()
    if not targets:
        return {"the stream has no target that acknowledges it": 0}
    found = {
        f"target {target} has acknowledgements that do not hold"
        if wrong
        else f"a signing key of target {target} has ended, and its next one has not said where"
        if held
        else f"target {target} has acknowledged up to {acked}": 0 if wrong else int(acked)
        for target, acked, wrong, held in targets
    }
    # What goes on from the table goes back to its last batch that ended (store.load_head).
    found["its last epoch begins there"] = (int(opened[0]) if opened else 1) - 1
    found["its last batch is there"] = max(0, _last_ended(conn, chain) - 1)
    return found


def _last_ended(conn: Connection, chain: str) -> int:
    """Sequence of the last batch that ended its transaction; 0 where there is none."""
    last = MAX_SIZE
    while last > 0:
        row = conn.execute(
            "SELECT sequence, document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s"
            " AND sequence <= %s ORDER BY sequence DESC LIMIT 1",
            (chain, REPLICATION_BATCH, last),
        ).fetchone()
        if row is None:
            return 0
        if not parse(bytes(row[1])).entry.continues:
            return int(row[0])
        last = int(row[0]) - 1
    return 0


def young(conn: Connection, chain: str, online_months: int) -> dict[str, int]:
    """How far rule 1 lets the chain be pruned, where it does not let all of it."""
    with errors("looking for entries that stay on-line"):
        row = conn.execute(
            "SELECT min(sequence) - 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s"
            " AND event_timestamp >= %s",
            (chain, before(conn, online_months)),
        ).fetchone()
    if row is None or row[0] is None:
        return {}
    return {f"what follows is younger than {online_months} months": int(row[0])}


def candidate(node: Node, chain: str, online_months: int) -> Candidate:
    """Rules 1 to 3, and which archived segments are not pruned yet."""
    log = node.log(chain)
    base = base_of(node.conn, log)
    start = base.head.sequence if base else 0
    found = limits(node.conn, chain) | young(node.conn, chain, online_months)
    why = min(found, key=lambda one: found[one])
    segments, due = [], start + 1
    for one in rows_of(node.conn, chain):
        if one.place.last <= start:
            continue
        if one.place.first != due:
            why = f"no archived segment begins at {due}"
            break
        if one.place.last > found[why]:
            break
        segments.append(one)
        due = one.place.last + 1
    else:
        if found[why] >= due:
            why = f"entries from {due} on are not archived"
    return Candidate(log, tuple(segments), why)


def archived_below(node: Node, base: Base, log: Log) -> tuple[Row, ...]:
    """The archived segments from the first entry that is on-line to a base."""
    start = start_of(node.conn, log).sequence
    size = base.head.sequence
    return tuple(one for one in rows_of(node.conn, log.chain) if start < one.place.first <= size)


def require_archived(
    node: Node,
    store: S3Store,
    log: Log,
    segments: Sequence[Row],
    said: Callable[[str], None] = lambda _: None,
) -> Base:
    """Rule 4, and the base that follows. Raises RecordError, ChainError, SignatureError, RefusedError.

    Nothing the database says of a segment is believed: each is read behind the one before it.
    """
    base = base_of(node.conn, log)
    head = base.head if base else EMPTY_HEAD
    tables = set(base.tables if base else ())
    kept = base.kept if base else Kept()
    note = ""
    for row in segments:
        stored = store.look(row.key, row.version)
        if stored is None or row.bucket != store.bucket:
            raise RecordError(f"{row.key} is not in bucket {store.bucket} any more", record=row.key)
        verified, digest, _ = read_back(node, store, log, stored, row.place, head)
        if digest != row.sha256 or (stored.sha256 and stored.sha256 != digest):
            raise RecordError(f"{row.key} is not what was archived: it has another SHA-256", record=row.key)
        store.require_locked(stored, needed_until(node, verified))
        head, note = verified.head, verified.note
        tables |= verified.tables
        kept = reduce(Kept.take, verified.kept, kept)
        said(row.key)
    if not note:
        raise RefusedError(f"no archived segment of chain {log.chain} begins at {head.sequence + 1}")
    made = Base(head, note, tuple(sorted(tables)), kept)
    require_cosigned_by(node.conn, made, log)
    return made


def require_still_archived(
    node: Node, store: S3Store, base: Base, log: Log, said: Callable[[str], None] = lambda _: None
) -> None:
    """Rule 4 once more, for a base the chain says since an earlier run: the archive is what it was then."""
    made = require_archived(node, store, log, archived_below(node, base, log), said)
    if replace(made, note=base.note) != base:
        raise ChainError(
            f"chain {log.chain} says it was pruned at {base.head.sequence}, and the archive leads to entry"
            f" {made.head.sequence} with hash {made.head.entry_hash.hex()}",
            record=f"{log.chain}/{base.head.sequence}",
        )


def require_cosigned_by(conn: Connection, base: Base, log: Log, *, revoked: bool = True) -> None:
    """Raise unless the base holds and one of the stream's targets has cosigned it.

    `revoked`: also by a key that was revoked since. What the chain says already was cosigned when it did.
    """
    keys = [(one.node, one.public_key) for one in signers.load(conn)
            if revoked or not one.revoked or one.node == log.writer]  # fmt: skip
    opened = base.verify(log, keys)
    rows = conn.execute(
        "SELECT target FROM vsql_sync.stream_targets WHERE chain = %s AND target <> '*'", (log.chain,)
    ).fetchall()
    if cosigners(opened).isdisjoint(name for (name,) in rows):
        raise SignatureError(
            f"the checkpoint of {base.head.sequence} entries of {log.chain} is cosigned by no target of it",
            hint="targets cosign each audit.checkpoint_every; see `syncctl audit archive --cosigned`",
        )


def require_prunable(conn: Connection, log: Log, base: Base, online_months: int) -> None:
    """What the chain's writer holds an order to prune against, before it says so.

    The chain is a live stream's. The head at the base and the tables below are those its own rows give; rules
    1 to 3; and the archive's rows cover all of it, one behind the other.
    """
    if log.chain.count(".") != 1:
        raise RefusedError(f"chain {log.chain} is no live stream's: such chains are not pruned")
    require_cosigned_by(conn, base, log, revoked=False)
    size = base.head.sequence
    if replace(head_at(conn, log, size), tree=base.head.tree) != base.head:
        raise RefusedError(f"entry {size} of chain {log.chain} is not the one of the base")
    if base.tables != tables_at(conn, log, size):
        raise RefusedError(f"the batches up to entry {size} of chain {log.chain} name other tables")
    if base.kept != kept_at(conn, log, size):
        raise RefusedError(f"other entries up to {size} of chain {log.chain} are to be kept")
    if base_at(conn, log, size) not in (None, base):
        # The entry would stand beside a base it does not say, and the pruned chain begin at that one.
        raise RefusedError(f"another base of {size} entries of chain {log.chain} is noted already")
    found = limits(conn, log.chain) | young(conn, log.chain, online_months)
    why = min(found, key=lambda one: found[one])
    if size > found[why]:
        raise RefusedError(f"chain {log.chain} cannot be pruned up to {size}: {why}")
    with errors("looking what is archived"):
        covered = conn.execute(
            "SELECT coalesce(vsql_sync.archived_entries(%s, %s), 0)", (log.chain, size)
        ).fetchall()[0][0]
    if covered != size:
        raise RefusedError(f"chain {log.chain}: archived segments cover {covered} of {size} entries")


def head_at(conn: Connection, log: Log, size: int) -> ChainHead:
    """The head behind an entry, as this node's rows give it from the base on; without its tree."""
    start, head = start_of(conn, log), load_head(conn, log.chain, size)
    if head.lsn_end:
        return head
    # No transaction has ended since the base: what it says of batches holds on.
    opened = head.epoch != start.epoch
    return replace(
        head,
        batch=head.batch or start.batch,
        lsn_end=start.lsn_end,
        unfinished_from=head.unfinished_from if opened else start.unfinished_from or head.unfinished_from,
    )


def tables_at(conn: Connection, log: Log, size: int) -> tuple[str, ...]:
    """The tables batches up to an entry name, those below the base with them."""
    base = base_of(conn, log)
    with errors("reading which tables a chain names"):
        rows = conn.execute(
            "SELECT DISTINCT unnest(tables_affected) FROM vsql_sync.vsql_sync_audit"
            " WHERE chain = %s AND sequence <= %s",
            (log.chain, size),
        ).fetchall()
    return tuple(sorted({name for (name,) in rows} | set(base.tables if base else ())))


def kept_at(conn: Connection, log: Log, size: int) -> Kept:
    """What is kept of the entries up to one, those below the base with them."""
    base = base_of(conn, log)
    with errors("reading which entries of a chain are kept"):
        rows = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence <= %s"
            " AND event_type <> ALL(%s) ORDER BY sequence",
            (log.chain, size, list(GONE)),
        ).fetchall()
    return reduce(Kept.take, (document_hash(bytes(one)) for (one,) in rows), base.kept if base else Kept())


def delete(conn: Connection, base: Base, log: Log) -> tuple[int, int]:
    """Delete the rows up to a base the chain names; how many, and how many empty months went with them."""
    with errors("pruning the audit trail"), conn.transaction():
        row = conn.execute("SELECT vsql_sync.prune_audit(%s, %s)", (log.chain, base.head.sequence)).fetchone()
    with errors("dropping empty partitions of the audit trail"):
        dropped = conn.execute("SELECT vsql_sync.drop_empty_audit_partitions()").fetchone()
    return (int(row[0]) if row else 0), (int(dropped[0]) if dropped else 0)
