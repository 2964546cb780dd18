"""The node's own copy of the audit trail, and the heads it remembers of all chains.

Tables vsql_sync.vsql_sync_audit (entries this node signed) and vsql_sync.chain_heads. Not here: verifying
(verify.py, chain.py) and Kafka. Rules:

* The table holds what counts: an entry goes in once it is accepted, never a void one. `insert_entries`
  refuses (ChainError) entries that do not extend the remembered head of their chain, in the same
  transaction: a process that lost its epoch cannot write behind its successor's back.
* Insert on the session that holds the stream's advisory lock: then a successor has not even begun.
* Nothing here commits: the caller decides what else belongs to the transaction.
* Rows are only added. A head only moves forward.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import psycopg
from psycopg import sql

from vsql_shared import lsn
from vsql_shared.audit.base import base_in
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, acknowledges, advance
from vsql_shared.audit.entries import BATCH_EVENTS, EPOCH_OPENED, LAST, REPLICATION_BATCH
from vsql_shared.audit.rows import (
    COLUMNS,
    StoredDocument,
    columns_of,
    microseconds,
    parse,
    timestamp,
)
from vsql_shared.audit.tree import MAX_SIZE, Tree, decode_tree, encode_tree
from vsql_shared.errors import ChainError, DecodeError, TransientError
from vsql_shared.pg.connect import Connection, errors

PAGE = 500
"""Entries read at a time."""

PARTITIONS_SECONDS = 3600.0
"""How often a service that runs on looks whether the next month's partition is there."""

# A reader of the whole trail holds up whoever attaches a partition: that one waits so long, and comes again.
_PARTITION_LOCK_MS = 2000

_log = logging.getLogger(__name__)

_COPY = sql.SQL("COPY vsql_sync.vsql_sync_audit ({}, kafka_offset) FROM STDIN").format(
    sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
)
_READ_HEAD = (
    "SELECT epoch, incarnation, sequence, entry_hash, batch, lsn_end, unfinished_from, event_timestamp,"
    " system_identifier, timeline, tree, kafka_offset FROM vsql_sync.chain_heads WHERE chain = %s"
)
_WRITE_HEAD = (
    "INSERT INTO vsql_sync.chain_heads AS h (chain, own, epoch, incarnation, sequence, entry_hash, batch,"
    " lsn_end, unfinished_from, event_timestamp, system_identifier, timeline, tree, kafka_offset)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
    " ON CONFLICT (chain) DO UPDATE SET (epoch, incarnation, sequence, entry_hash, batch, lsn_end,"
    " unfinished_from, event_timestamp, system_identifier, timeline, tree, kafka_offset, remembered_at) ="
    " (excluded.epoch, excluded.incarnation, excluded.sequence, excluded.entry_hash, excluded.batch,"
    " excluded.lsn_end, excluded.unfinished_from, excluded.event_timestamp, excluded.system_identifier,"
    " excluded.timeline, excluded.tree, excluded.kafka_offset, now())"
    " WHERE h.sequence < excluded.sequence AND h.own = excluded.own"
)


def insert_entries(
    conn: Connection,
    entries: Sequence[tuple[bytes, int | None]],
    also: Callable[[Connection], None] | None = None,
) -> None:
    """Add accepted documents, oldest first, with their Kafka offsets, and move their chains' heads.

    One COPY and one update a chain, however many entries; `also` writes what belongs to them. Raises
    ChainError when they do not extend what the table has, DecodeError for what is no entry.
    """
    if not entries:
        return
    parsed = [parse(encoded, offset) for encoded, offset in entries]
    by_chain = sorted(parsed, key=lambda one: one.entry.chain)  # stable: order within a chain stays
    with errors("writing the audit trail"), conn.transaction():
        # In an order all writers have: the highest entry each key signed.
        last = {(one.document.signer, one.entry.chain): one.entry.sequence for one in by_chain}
        for (signer, chain), sequence in sorted(last.items()):
            conn.execute("SELECT vsql_sync.require_counted(%s, %s, %s)", (signer, chain, sequence))
        for chain, group in groupby(by_chain, key=lambda one: one.entry.chain):
            _move_head(conn, chain, list(group))
        with conn.cursor() as cursor, cursor.copy(_COPY) as copy:
            for stored in parsed:
                copy.write_row([*columns_of(stored).values(), stored.kafka_offset])
        for stored in parsed:
            _note_base(conn, stored)
        if also is not None:
            also(conn)


def _note_base(conn: Connection, stored: StoredDocument) -> None:
    """With the entry that says where its chain was pruned, the row that lets its older rows go."""
    base = base_in(stored.entry)
    if base is not None:
        conn.execute(
            # Not ON CONFLICT: a table with rules takes none. Whoever writes a chain has its head's lock.
            "INSERT INTO vsql_sync.audit_bases (chain, size, base)"
            " SELECT %(chain)s::text, %(size)s::bigint, %(base)s::text WHERE NOT EXISTS"
            " (SELECT FROM vsql_sync.audit_bases WHERE chain = %(chain)s::text AND size = %(size)s::bigint)",
            {"chain": stored.entry.chain, "size": base.head.sequence, "base": base.encode()},
        )


def _move_head(conn: Connection, chain: str, group: list[StoredDocument]) -> None:
    """Check that the group extends the remembered head, and remember its last entry."""
    row = conn.execute(_READ_HEAD + " FOR UPDATE", (chain,)).fetchone()
    head = _head_of(row) if row else EMPTY_HEAD
    for stored in group:
        head = advance(head, stored.entry, stored.entry_hash, "vsql_sync.vsql_sync_audit")
    if not _write_head(conn, chain, head, group[-1].kafka_offset, own=True):
        raise ChainError(
            f"chain {chain}: another process has written sequence {head.sequence} to the audit trail",
            record="vsql_sync.chain_heads",
            hint="this process has been replaced; it must stop",
        )


def remember_head(conn: Connection, chain: str, head: ChainHead, kafka_offset: int | None) -> bool:
    """Remember a verified head of a peer's chain; False when a head as high is remembered already."""
    with errors("remembering a chain's head"):
        return _write_head(conn, chain, head, kafka_offset, own=False)


def _write_head(conn: Connection, chain: str, head: ChainHead, offset: int | None, *, own: bool) -> bool:
    values = (
        chain,
        own,
        head.epoch,
        uuid.UUID(bytes=head.incarnation),
        head.sequence,
        head.entry_hash,
        head.batch,
        lsn.text(head.lsn_end),
        head.unfinished_from,
        timestamp(head.event_timestamp),
        head.system_identifier,
        head.timeline,
        encode_tree(head.tree),
        offset,
    )
    return conn.execute(_WRITE_HEAD, values).rowcount == 1


def move_offset(conn: Connection, chain: str, entry_hash: bytes, kafka_offset: int) -> None:
    """An own chain's head lies elsewhere in Kafka now: it was published again."""
    with errors("noting where a chain's head lies"):
        conn.execute(
            "UPDATE vsql_sync.chain_heads SET kafka_offset = %s WHERE chain = %s AND own AND entry_hash = %s",
            (kafka_offset, chain, entry_hash),
        )


def recall_head(conn: Connection, chain: str) -> tuple[ChainHead, int | None] | None:
    """The remembered head of a chain and its Kafka offset; None when nothing was remembered."""
    with errors("reading a chain's remembered head"):
        row = conn.execute(_READ_HEAD, (chain,)).fetchone()
    return None if row is None else (_head_of(row), row[-1])


def _head_of(row: tuple[Any, ...]) -> ChainHead:
    (
        epoch,
        incarnation,
        sequence,
        entry_hash,
        batch,
        lsn_end,
        unfinished,
        moment,
        system,
        timeline,
        tree,
        _,
    ) = row
    return ChainHead(
        epoch=epoch,
        incarnation=incarnation.bytes,
        sequence=sequence,
        entry_hash=bytes(entry_hash),
        batch=batch,
        lsn_end=lsn.parse(lsn_end),
        unfinished_from=unfinished,
        event_timestamp=microseconds(moment),
        system_identifier=system,
        timeline=timeline,
        tree=decode_tree(bytes(tree)),
    )


def load_head(conn: Connection, chain: str, upto: int = MAX_SIZE) -> ChainHead:
    """The head as the table's entries give it, read backwards from the last one; EMPTY_HEAD without any.

    Reads only as far as it must: to the last batch that finished its transaction. `upto`: the head behind
    that entry instead; a head that is not the last one remembered has no tree.
    """
    last: StoredDocument | None = None
    batch = lsn_end = unfinished = 0
    settled = False  # true once an epoch_opened was passed: fragments before it are void
    began = 0
    for stored in _backwards(conn, chain, upto):
        entry = stored.entry
        last = last or stored
        settled = settled or entry.event_type == EPOCH_OPENED
        if entry.event_type == EPOCH_OPENED and not acknowledges(chain):
            began = max(began, entry.batch_lsn_start)
        if entry.event_type not in BATCH_EVENTS or not entry.batch:
            continue
        batch = batch or entry.batch
        if not entry.continues:
            lsn_end = entry.batch_lsn_end
            break
        if entry.event_type == REPLICATION_BATCH and not settled:
            unfinished = entry.sequence
    if last is None:
        return EMPTY_HEAD
    return ChainHead(
        epoch=last.entry.epoch,
        incarnation=last.entry.incarnation,
        sequence=last.entry.sequence,
        entry_hash=last.entry_hash,
        batch=batch,
        lsn_end=max(lsn_end, began),
        unfinished_from=unfinished,
        event_timestamp=last.entry.event_timestamp,
        system_identifier=last.entry.system_identifier,
        timeline=last.entry.timeline,
        tree=_tree_at(conn, chain, last.entry_hash),
    )


def _tree_at(conn: Connection, chain: str, entry_hash: bytes) -> Tree:
    """The tree remembered with this head; empty where another one, or none, is remembered."""
    with errors("reading a chain's remembered head"):
        row = conn.execute(
            "SELECT tree FROM vsql_sync.chain_heads WHERE chain = %s AND entry_hash = %s", (chain, entry_hash)
        ).fetchone()
    return () if row is None else decode_tree(bytes(row[0]))


def last_transaction(conn: Connection, chain: str, lsn_end: int) -> tuple[int, int] | None:
    """(xid, commit time) of the transaction that ends where a chain does; None where no manifest says it."""
    for stored in islice(_backwards(conn, chain, MAX_SIZE), PAGE):
        if stored.entry.event_type == REPLICATION_BATCH:
            last = json.loads(stored.entry.detail).get(LAST)
            if last is not None and stored.entry.batch_lsn_end == lsn_end:
                return int(last[0]), int(last[1])
            if stored.entry.batch_lsn_end < lsn_end:
                return None
    return None


def _backwards(conn: Connection, chain: str, upto: int) -> Iterator[StoredDocument]:
    """Entries from the last one down; few are asked for first, because few are needed as a rule."""
    last, page = upto, 4
    while True:
        with errors("reading the audit trail"):
            rows = conn.execute(
                "SELECT document, kafka_offset, sequence FROM vsql_sync.vsql_sync_audit"
                " WHERE chain = %s AND sequence <= %s ORDER BY sequence DESC LIMIT %s",
                (chain, last, page),
            ).fetchall()
        for encoded, offset, _ in rows:
            yield parse(bytes(encoded), offset)
        if len(rows) < page:
            return
        last, page = rows[-1][2] - 1, PAGE


def iterate(conn: Connection, chain: str, from_sequence: int = 1) -> Iterator[StoredDocument]:
    """Entries of a chain from a sequence on, oldest first; parsed, not verified. Bounded memory."""
    at = from_sequence
    while True:
        with errors("reading the audit trail"):
            rows = conn.execute(
                "SELECT document, kafka_offset, sequence FROM vsql_sync.vsql_sync_audit"
                " WHERE chain = %s AND sequence >= %s ORDER BY sequence LIMIT %s",
                (chain, at, PAGE),
            ).fetchall()
        for encoded, offset, _ in rows:
            yield parse(bytes(encoded), offset)
        if len(rows) < PAGE:
            return
        at = rows[-1][2] + 1


def has_document(conn: Connection, chain: str, encoded: bytes) -> bool:
    """Whether the table has this very document of a chain. What is no entry it cannot have."""
    try:
        sequence = parse(encoded, None).entry.sequence
    except DecodeError:
        return False
    with errors("reading the audit trail"):
        row = conn.execute(
            "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = %s AND document = %s",
            (chain, sequence, encoded),
        ).fetchone()
    return row is not None


def ensure_partitions(conn: Connection) -> None:
    """Make this month's and the next month's partition; services call it at start."""
    with errors("making a partition of the audit trail"):
        conn.execute(
            "SELECT vsql_sync.ensure_audit_partition(now()),"
            " vsql_sync.ensure_audit_partition(now() + INTERVAL '1 month')"
        )


class PartitionKeeper:
    """`ensure_partitions` for a service that runs for months: at most once in `every` seconds."""

    def __init__(self, conn: Connection, every: float = PARTITIONS_SECONDS) -> None:
        self._conn, self._every = conn, every
        self._next: float | None = None

    def keep(self, now: float) -> bool:
        """Look after the partitions when it is time; False when it is not, or when a reader is in the way.

        `now` is any clock that does not go back. The first call only starts the interval: a service has just
        made them. Entries of a month without a partition are kept in the default one.
        """
        if self._next is None or now < self._next:
            self._next = now + self._every if self._next is None else self._next
            return False
        self._next = now + self._every
        try:
            with self._conn.transaction():
                self._conn.execute(f"SET LOCAL lock_timeout = {_PARTITION_LOCK_MS}")
                ensure_partitions(self._conn)
        except TransientError as error:
            if not isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
                raise
            _log.warning("a reader of the audit trail is in the way of its next partition; it is tried again")
            return False
        return True
