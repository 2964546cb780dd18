"""What an incoming stream remembers in this node's database: progress, receipts, descriptors, decisions.

Not here: when any of it is written; the pipeline decides that. No function commits. Rules:

* Progress is written in the applying transaction and only moves forward; it stands at an entry after which
  no transaction is unfinished.
* A receipt stays until the acknowledgement that follows from it lies in Kafka.
* Decisions are never deleted: a record that was passed over once is passed over after every restart.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from vsql_consumers.collected import Decided, Decisions, TopicPartition
from vsql_consumers.unseal import Descriptor
from vsql_shared import lsn, names
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead
from vsql_shared.audit.entries import BATCH_SKIPPED
from vsql_shared.audit.rows import microseconds, parse, timestamp
from vsql_shared.audit.tree import decode_tree, encode_tree
from vsql_shared.changes import TableName, Transaction
from vsql_shared.errors import DivergedError, RefusedError
from vsql_shared.pg.connect import Connection
from vsql_shared.wire.pack import decode_relation


@dataclass(frozen=True, slots=True)
class Stream:
    """A row of vsql_sync.streams with direction 'in'."""

    chain: str
    kind: str
    publication: str
    origin: str
    target: str
    origin_name: str
    audit_partition: int
    ack_partition: int
    desired: str
    state: str
    copy_wanted: bool
    apply_mode: str = "transactional"


@dataclass(slots=True)
class Position:
    """How far a stream is: its chain's head, and the next offset to read in every partition."""

    head: ChainHead = EMPTY_HEAD
    audit_offset: int = 0
    offsets: dict[TopicPartition, int] = field(default_factory=dict)
    commit_time: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What this node says of a batch it applied or skipped; no manifest: one nobody could read.

    `detail` names the transactions of it that were passed over.
    """

    sequence: int
    epoch: int
    batch: int
    manifest: bytes
    merkle_root: bytes
    verdicts: Mapping[str, int]
    detail: Mapping[str, Any] = field(default_factory=dict)


def load_stream(conn: Connection, cluster: str, chain: str) -> Stream:
    """The incoming stream of this name. Raises RefusedError when there is none."""
    row = conn.execute(
        "SELECT chain, kind, publication, origin, target, origin_name, audit_partition, ack_partition,"
        " desired, state, copy_wanted, apply_mode"
        " FROM vsql_sync.streams WHERE chain = %s AND direction = 'in'",
        (chain,),
    ).fetchone()
    if row is None:
        raise RefusedError(
            f"this node has no incoming stream {chain!r}", hint="`syncctl node add-peer` makes it"
        )
    stream = Stream(*row)
    origin_name = row[5] or names.origin_name(cluster, stream.publication, stream.origin, stream.target)
    return replace(stream, origin_name=origin_name)


def stream_state(conn: Connection, chain: str) -> tuple[str, str] | None:
    """(state, desired) of an incoming stream, or None."""
    row = conn.execute(
        "SELECT state, desired FROM vsql_sync.streams WHERE chain = %s AND direction = 'in'", (chain,)
    ).fetchone()
    return None if row is None else (row[0], row[1])


def hold_reason(conn: Connection, stream: Stream, desired: str) -> tuple[str, str] | None:
    """(state, why) while a stream must not run; None when it may."""
    if desired != "running":
        return "paused", "paused by an operator"
    if stream.state == "DIVERGED":
        return "diverged", stream.chain
    if stream.kind == "live":
        copy = names.copy_chain(stream.publication, stream.origin, stream.target)
        found = stream_state(conn, copy)
        if found is not None and found[0] != "FINISHED":
            return "waiting", f"for its first copy ({found[0]})"
    return None


def set_stream_state(conn: Connection, chain: str, state: str, reason: str | None = None) -> None:
    """Record a stream's place in its life, of which FINISHED is the last; one that says so is left alone."""
    conn.execute(
        "UPDATE vsql_sync.streams SET state = %s, state_reason = %s"
        " WHERE chain = %s AND direction = 'in' AND state <> 'FINISHED'"
        " AND (state, state_reason) IS DISTINCT FROM (%s, %s)",
        (state, reason, chain, state, reason),
    )


def load_position(conn: Connection, chain: str) -> Position:
    """Where the stream goes on; the beginning of everything when it never applied anything."""
    row = conn.execute(
        "SELECT epoch, incarnation, sequence, entry_hash, batch, lsn_end::text, commit_time, audit_offset,"
        " offsets, tree FROM vsql_sync.apply_progress WHERE chain = %s",
        (chain,),
    ).fetchone()
    if row is None:
        return Position()
    epoch, incarnation, sequence, entry_hash, batch, end, commit_time, audit_offset, offsets, tree = row
    head = ChainHead(
        epoch=epoch,
        incarnation=incarnation.bytes,
        sequence=sequence,
        entry_hash=bytes(entry_hash),
        batch=batch,
        lsn_end=lsn.parse(end),
        tree=decode_tree(bytes(tree)),
    )
    places = {(topic, int(n)): at for topic, parts in offsets.items() for n, at in parts.items()}
    return Position(head, audit_offset, places, microseconds(commit_time) if commit_time else None)


def save_position(conn: Connection, chain: str, position: Position) -> None:
    """Write the progress, in the transaction of the changes it stands for."""
    offsets: dict[str, dict[str, int]] = {}
    for (topic, number), at in position.offsets.items():
        offsets.setdefault(topic, {})[str(number)] = at
    head = position.head
    # A part of a batch beyond it is still to be gone on with: entries before a batch may be committed alone.
    conn.execute(
        "WITH whole AS (DELETE FROM vsql_sync.partial_batches WHERE chain = %s AND sequence <= %s)"
        " INSERT INTO vsql_sync.apply_progress AS p (chain, epoch, incarnation, sequence, entry_hash, batch,"
        " lsn_end, commit_time, audit_offset, offsets, tree)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (chain) DO UPDATE SET (epoch, incarnation, sequence, entry_hash, batch, lsn_end,"
        " commit_time, audit_offset, offsets, tree, updated_at) = (excluded.epoch, excluded.incarnation,"
        " excluded.sequence, excluded.entry_hash, excluded.batch, excluded.lsn_end, excluded.commit_time,"
        " excluded.audit_offset, excluded.offsets, excluded.tree, now())",
        (
            chain,
            head.sequence,
            chain,
            head.epoch,
            uuid.UUID(bytes=head.incarnation),
            head.sequence,
            head.entry_hash,
            head.batch,
            lsn.text(head.lsn_end),
            None if position.commit_time is None else timestamp(position.commit_time),
            position.audit_offset,
            json.dumps(offsets),
            encode_tree(head.tree),
        ),
    )


class Partial(NamedTuple):
    """What was committed of a batch whose transactions are commits of their own: the first ones."""

    transactions: int
    verdicts: dict[str, int]


def load_partial(conn: Connection, chain: str, sequence: int, entry_hash: bytes) -> Partial:
    """What was committed of this batch, which is the next. Raises DivergedError: of another in its place."""
    row = conn.execute(
        "SELECT sequence, entry_hash, transactions, verdicts FROM vsql_sync.partial_batches"
        " WHERE chain = %s AND sequence >= %s",
        (chain, sequence),
    ).fetchone()
    if row is None:
        return Partial(0, {})
    if (row[0], bytes(row[1])) != (sequence, entry_hash):
        raise DivergedError(
            f"sequence {row[0]} of {chain} was committed in part, and the stream stands at {sequence} with"
            " another entry or before it: its progress was set back, or the chain is another one",
            hint="initialise this node anew; where its tables were emptied for that, DELETE the chain's row"
            " from vsql_sync.partial_batches, too",
        )
    return Partial(row[2], row[3])


def save_partial(conn: Connection, chain: str, sequence: int, entry_hash: bytes, done: Partial) -> None:
    """Note how many of a batch's transactions are committed, in the transaction of the last of them."""
    conn.execute(
        "INSERT INTO vsql_sync.partial_batches (chain, sequence, entry_hash, transactions, verdicts)"
        " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (chain) DO UPDATE SET (sequence, entry_hash, transactions,"
        " verdicts) = (excluded.sequence, excluded.entry_hash, excluded.transactions, excluded.verdicts)",
        (chain, sequence, entry_hash, done.transactions, json.dumps(done.verdicts)),
    )


SMALL = 4
"""So many rows travel as statements of their own, which need not wait for each other; more by COPY."""


def save_receipts(conn: Connection, chain: str, receipts: Sequence[Receipt]) -> None:
    """Write receipts, in the transaction of the changes they are about."""
    if len(receipts) <= SMALL:
        for one in receipts:
            conn.execute(
                "INSERT INTO vsql_sync.receipts (chain, sequence, epoch, batch, manifest, merkle_root,"
                " verdicts, detail) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    chain, one.sequence, one.epoch, one.batch, one.manifest, one.merkle_root,
                    json.dumps(dict(one.verdicts)), json.dumps(dict(one.detail)),
                ),
            )  # fmt: skip
        return
    with (
        conn.cursor() as cursor,
        cursor.copy(
            "COPY vsql_sync.receipts (chain, sequence, epoch, batch, manifest, merkle_root, verdicts, detail)"
            " FROM STDIN"
        ) as copy,
    ):
        for one in receipts:
            copy.write_row(
                (
                    chain,
                    one.sequence,
                    one.epoch,
                    one.batch,
                    one.manifest,
                    one.merkle_root,
                    json.dumps(dict(one.verdicts)),
                    json.dumps(dict(one.detail)),
                )
            )


def load_receipts(conn: Connection, chain: str, after: int, limit: int) -> list[Receipt]:
    """Receipts of entries beyond a sequence, oldest first, at most so many."""
    rows = conn.execute(
        "SELECT sequence, epoch, batch, manifest, merkle_root, verdicts, detail FROM vsql_sync.receipts"
        " WHERE chain = %s AND sequence > %s ORDER BY sequence LIMIT %s",
        (chain, after, limit),
    ).fetchall()
    return [Receipt(s, e, b, bytes(m), bytes(r), v, d) for s, e, b, m, r, v, d in rows]


def drop_receipts(conn: Connection, chain: str, up_to: int) -> None:
    """Forget receipts whose acknowledgements Kafka has."""
    conn.execute("DELETE FROM vsql_sync.receipts WHERE chain = %s AND sequence <= %s", (chain, up_to))


def load_descriptors(conn: Connection, chain: str) -> dict[bytes, Descriptor]:
    """Descriptors that came before the stored position."""
    rows = conn.execute(
        "SELECT hash, descriptor FROM vsql_sync.relation_descriptors WHERE chain = %s", (chain,)
    ).fetchall()
    return {bytes(name): Descriptor(decode_relation(bytes(text)), bytes(text)) for name, text in rows}


def save_descriptors(
    conn: Connection, chain: str, new: Mapping[bytes, Descriptor], *, forget_others: bool
) -> None:
    """Keep new descriptors; a new epoch sends all of them again, so older ones can go."""
    if forget_others:
        conn.execute("DELETE FROM vsql_sync.relation_descriptors WHERE chain = %s", (chain,))
    for name in sorted(new):  # one order, or those who apply side by side wait for each other
        conn.execute(
            "INSERT INTO vsql_sync.relation_descriptors (chain, hash, descriptor) VALUES (%s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            (chain, name, new[name].encoded),
        )


def load_decisions(conn: Connection, chain: str, ack_chain: str) -> Decisions:
    """Every decision on this stream, honoured before or not."""
    rows = conn.execute(
        "SELECT kind, topic, partition, kafka_offset, sequence FROM vsql_sync.decisions WHERE chain = %s",
        (chain,),
    ).fetchall()
    skipped = conn.execute(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = %s",
        (ack_chain, BATCH_SKIPPED),
    ).fetchall()
    return Decisions(
        ignored=frozenset((t, p, o) for kind, t, p, o, _ in rows if kind == "ignore-record"),
        skipped=frozenset(sequence for kind, _, _, _, sequence in rows if kind == "skip-batch"),
        skipped_batches=frozenset(_skipped_batches(bytes(row[0]) for row in skipped)),
        transactions=_load_decided(conn, chain),
    )


_DECIDED = {"skip-transaction": "skipped", "park-transaction": "parked"}
"""Kind of a decision → verdict on the changes of its transaction."""


def _load_decided(conn: Connection, chain: str) -> dict[Transaction, Decided]:
    rows = conn.execute(
        "SELECT id, kind, xid, commit_lsn::text, commit_time FROM vsql_sync.decisions"
        " WHERE chain = %s AND kind = ANY(%s)",
        (chain, list(_DECIDED)),
    ).fetchall()
    return {
        Transaction(xid, lsn.parse(at), microseconds(time)): Decided(number, _DECIDED[kind])
        for number, kind, xid, at, time in rows
    }


def _skipped_batches(documents: Iterable[bytes]) -> Iterable[tuple[int, int]]:
    for encoded in documents:
        entry = parse(encoded).entry
        yield entry.ref_epoch, entry.batch


def honour_decisions(conn: Connection, ids: Sequence[int]) -> None:
    """Note that decisions have done what they were for; in the transaction that passes their place."""
    conn.execute(
        "UPDATE vsql_sync.decisions SET honoured_at = now() WHERE id = ANY(%s) AND honoured_at IS NULL",
        (list(ids),),
    )


@dataclass(frozen=True, slots=True)
class OpenDecision:
    """A decision that has not done yet what it is for: it names a record, or an entry of the chain."""

    id: int
    place: tuple[str, int, int] | None
    sequence: int | None


def load_open_decisions(conn: Connection, chain: str) -> list[OpenDecision]:
    """Decisions that were not honoured yet."""
    rows = conn.execute(
        "SELECT id, topic, partition, kafka_offset, sequence FROM vsql_sync.decisions"
        " WHERE chain = %s AND honoured_at IS NULL",
        (chain,),
    ).fetchall()
    return [OpenDecision(n, (t, p, o) if t is not None else None, s) for n, t, p, o, s in rows]


def copy_lsns(conn: Connection, live_chain: str) -> dict[TableName, int]:
    """Tables that were copied: the position before which their changes came with the copy."""
    rows = conn.execute(
        "SELECT table_schema, table_name, copy_lsn::text FROM vsql_sync.table_sync"
        " WHERE chain = %s AND copy_lsn IS NOT NULL",
        (live_chain,),
    ).fetchall()
    return {TableName(schema, table): lsn.parse(at) for schema, table, at in rows}


def diverged_tables(conn: Connection, live_chain: str) -> dict[TableName, str]:
    """Tables that lack changes, and why."""
    rows = conn.execute(
        "SELECT table_schema, table_name, coalesce(reason, '') FROM vsql_sync.table_sync"
        " WHERE chain = %s AND state = 'DIVERGED'",
        (live_chain,),
    ).fetchall()
    return {TableName(schema, table): reason for schema, table, reason in rows}


def mark_table(conn: Connection, live_chain: str, table: TableName, state: str, **columns: Any) -> None:
    """Set a table's state in table_sync; `columns`: copy_lsn (int), copied_rows, reason."""
    at = columns.get("copy_lsn")
    conn.execute(
        "INSERT INTO vsql_sync.table_sync AS t (chain, table_schema, table_name, state, copy_lsn,"
        " copied_rows, reason) VALUES (%s, %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (chain, table_schema, table_name) DO UPDATE SET"
        " state = excluded.state, copy_lsn = coalesce(excluded.copy_lsn, t.copy_lsn),"
        " copied_rows = coalesce(excluded.copied_rows, t.copied_rows), reason = excluded.reason",
        (
            live_chain,
            table.schema,
            table.table,
            state,
            None if at is None else lsn.text(at),
            columns.get("copied_rows"),
            columns.get("reason"),
        ),
    )
