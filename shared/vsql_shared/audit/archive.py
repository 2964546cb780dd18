"""Segments of this node's chains: which are due, how one gets into the archive, what may be pruned after it.

Not here: the object store (objects/), verifying a segment's bytes (segment.py), what a producer does about a
base (vsql_producers/prune_orders.py). Procedure for each segment (docs/design/0020):

1. It begins behind the last one that is archived, and ends at a checkpoint another node has cosigned: what
   nobody else has signed stays on-line. All of its entries are older than the months that stay on-line.
2. Every entry is verified as it is written: signature, link, order; and the checkpoint held against them.
3. The object is put with its checksum and its lock in one request, where there is none under its name. Where
   there is one, that one is taken if it verifies. What an earlier run stored and did not note (a crash, a
   restore) is taken before anything is cut: later runs cut elsewhere, and would leave it for a year.
4. It is read back, version by version: bytes, every signature, the lock. Only then its row is written.

So the row means: this segment was in the archive, whole and locked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from vsql_shared.audit import cosigned, segment
from vsql_shared.audit.base import head_value, parse_head
from vsql_shared.audit.bases import pinned, start_of
from vsql_shared.audit.chain import EMPTY_HEAD, Accepted, ChainHead, ChainReader, writer_of
from vsql_shared.audit.checkpoint import Checkpoint, Log, open_checkpoint, split_view
from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.export import Part, export
from vsql_shared.audit.rows import timestamp
from vsql_shared.audit.segment import Place, Verified
from vsql_shared.audit.tree import root_of
from vsql_shared.errors import ChainError, DecodeError, RecordError, RefusedError, VerificationError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.audit.links import Linked
    from vsql_shared.crypto.signing import Signer, TrustStore
    from vsql_shared.objects.s3 import S3Store, Stored, Version

_LOCK = 0x76_73_71_6C_61_72_63_68  # "vsqlarch": one archives or prunes at a time


class Row(NamedTuple):
    """A row of vsql_sync.audit_segments."""

    chain: str
    place: Place
    bucket: str
    key: str
    version: str
    sha256: bytes
    size: int
    retain_until: datetime
    head: ChainHead
    note: str


class Plan(NamedTuple):
    """What is due of a chain: the segments, and the entries that wait for a co-signature."""

    chain: str
    start: ChainHead
    segments: tuple[Place, ...]
    waiting: int


@dataclass(frozen=True, slots=True)
class Node:
    """Who archives: its database, its keys, the bucket."""

    conn: Connection
    cluster: str
    name: str
    trust: TrustStore
    prefix: str
    retain_months: int
    segment_entries: int

    def log(self, chain: str) -> Log:
        """A chain as a log."""
        return Log(self.cluster, chain)

    def key(self, chain: str, place: Place) -> str:
        """Where a segment lies."""
        return segment.folder(self.prefix, self.log(chain)) + place.name


def hold_alone(conn: Connection) -> None:
    """Raise RefusedError while another process archives or prunes here; held until the session ends."""
    row = conn.execute("SELECT pg_catalog.pg_try_advisory_lock(%s)", (_LOCK,)).fetchone()
    if row is None or not row[0]:
        raise RefusedError(
            "another process archives or prunes this node's trail", hint="wait until it has ended"
        )


def chains(conn: Connection) -> list[str]:
    """This node's own chains, by name."""
    with errors("reading this node's chains"):
        rows = conn.execute("SELECT chain FROM vsql_sync.chain_heads WHERE own ORDER BY 1").fetchall()
    return [name for (name,) in rows]


def own_chains(node: Node, only: str | None = None) -> list[str]:
    """This node's chains, or the one that is named. Raises RefusedError where it has none of that name."""
    known = chains(node.conn)
    if only is not None and only not in known:
        raise RefusedError(
            f"node {node.name} has no chain {only!r}", hint="`syncctl audit list` shows the chains it has"
        )
    return [one for one in known if only in (None, one)]


def before(conn: Connection, months: int) -> datetime:
    """So many months ago, by the database's clock."""
    row = conn.execute("SELECT now() - make_interval(months => %s)", (months,)).fetchone()
    assert row is not None  # noqa: S101 - a SELECT of one row
    moment: datetime = row[0]
    return moment.astimezone(UTC)


def rows_of(conn: Connection, chain: str) -> list[Row]:
    """The archived segments of a chain, in order. Raises DecodeError for a row somebody altered."""
    with errors("reading the archived segments"):
        found = conn.execute(
            "SELECT chain, first_sequence, last_sequence, bucket, object_key, object_version, sha256, bytes,"
            " retain_until, head, note FROM vsql_sync.audit_segments WHERE chain = %s"
            " ORDER BY first_sequence",
            (chain,),
        ).fetchall()
    return [
        Row(name, Place(first, last), bucket, key, version, bytes(digest), size, until, _head(head), note)
        for name, first, last, bucket, key, version, digest, size, until, head, note in found
    ]


def _head(text: str) -> ChainHead:
    try:
        return parse_head(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DecodeError("vsql_sync.audit_segments: a head is not JSON") from error


def plan(node: Node, chain: str, cutoff: datetime) -> Plan:
    """What of a chain is due: older than `cutoff`, as are all entries before it."""
    done = rows_of(node.conn, chain)
    start = done[-1].head if done else EMPTY_HEAD
    with errors("looking for what is due"):
        row = node.conn.execute(
            "SELECT coalesce((SELECT min(sequence) - 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %(chain)s"
            " AND event_timestamp >= %(cutoff)s), (SELECT max(sequence) FROM vsql_sync.vsql_sync_audit"
            " WHERE chain = %(chain)s), 0)",
            {"chain": chain, "cutoff": cutoff},
        ).fetchone()
        due = int(row[0]) if row else 0
    sizes = cosigned.sizes(node.conn, chain, start.sequence, due)
    places = cut(start.sequence, sizes, node.segment_entries)
    last = places[-1].last if places else start.sequence
    return Plan(chain, start, tuple(places), max(0, due - last))


def cut(start: int, sizes: list[int], most: int) -> list[Place]:
    """Segments behind `start` that end at these sizes, in order.

    Each is as long as it may be, and none longer than `most` unless there is no size to end it before.
    """
    out: list[Place] = []
    for at, size in enumerate(sizes):
        after = sizes[at + 1] if at + 1 < len(sizes) else None
        begun = out[-1].last if out else start
        if after is None or after - begun > most:
            out.append(Place(begun + 1, size))
    return out


def archive(
    node: Node, store: S3Store, signer: Signer, chain: str, start: ChainHead, place: Place, now: datetime
) -> Row:
    """Steps 2 to 4 for one segment; `now` decides how long it is locked."""
    log, key = node.log(chain), node.key(chain, place)
    until = _later(node.conn, now, node.retain_months)
    with tempfile.TemporaryFile() as file:
        # 2.
        digest = _write(node, signer, log, start, place, now, file)
        size = file.tell()
        file.seek(0)
        # 3.
        store.put(key, file, size, digest, until)
    # 4.
    stored = store.look(key)
    if stored is None:
        raise RecordError(f"{key} was stored and is not there", record=key)
    return _note(node, store, log, stored, place, start)


def _note(node: Node, store: S3Store, log: Log, stored: Stored, place: Place, start: ChainHead) -> Row:
    """Step 4: read it back, and write its row."""
    key = stored.key
    verified, digest, size = read_back(node, store, log, stored, place, start)
    if stored.sha256 and stored.sha256 != digest:
        raise RecordError(f"{key}: the store says another SHA-256 than its bytes have", record=key)
    _require_here(node.conn, log, verified.head)
    kept = store.require_locked(stored, needed_until(node, verified))
    row = Row(
        log.chain, place, store.bucket, key, stored.version, digest, size, kept, verified.head, verified.note
    )
    _insert(node.conn, row)
    return row


def _require_here(conn: Connection, log: Log, head: ChainHead) -> None:
    """The segment is of the history this node has: of one it had before a restore, it is not noted."""
    with errors("looking for a segment's last entry"):
        rows = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = %s",
            (log.chain, head.sequence),
        ).fetchall()
    here = [document_hash(bytes(one)) for (one,) in rows]
    pruned = start_of(conn, log)
    if head.sequence == pruned.sequence:
        here = [pruned.entry_hash]
    if head.entry_hash not in here and (here or head.sequence > pruned.sequence):
        raise ChainError(
            f"chain {log.chain}: entry {head.sequence} of the segment is not the one this node has",
            record=f"{log.chain}/{head.sequence}",
        )


def adopt(node: Node, store: S3Store, chain: str) -> list[Row]:
    """Note the segments an earlier run stored, one behind the other: of each place, the longest that holds.

    What does not hold is left as it is; `syncctl audit archive --verify` names it.
    """
    log = node.log(chain)
    rows = rows_of(node.conn, chain)
    known = {(row.key, row.version) for row in rows}
    head = rows[-1].head if rows else EMPTY_HEAD
    found = [
        (place, one)
        for one in store.versions(segment.folder(node.prefix, log))
        if not one.deleted and (one.key, one.version) not in known
        for place in segment.place_of(one.key)
    ]
    out: list[Row] = []
    while True:
        here = sorted((one for one in found if one[0].first == head.sequence + 1), reverse=True)
        row = next((row for one in here if (row := _taken(node, store, log, one, head))), None)
        if row is None:
            return out
        out.append(row)
        head = row.head


def _taken(
    node: Node, store: S3Store, log: Log, found: tuple[Place, Version], start: ChainHead
) -> Row | None:
    place, version = found
    stored = store.look(version.key, version.version)
    try:
        return None if stored is None else _note(node, store, log, stored, place, start)
    except (VerificationError, DecodeError, RefusedError):
        return None


def needed_until(node: Node, verified: Verified) -> datetime:
    """How long a segment must be locked: the retention, counted from its last entry."""
    return _later(node.conn, timestamp(verified.last_time), node.retain_months)


def expired(node: Node, row: Row) -> bool:
    """Whether a segment's lock may have ended: by its row, and by its last entry's time and the retention."""
    if row.retain_until > before(node.conn, 0):
        return False
    return _later(node.conn, timestamp(row.head.event_timestamp), node.retain_months) < before(node.conn, 0)


def _later(conn: Connection, moment: datetime, months: int) -> datetime:
    row = conn.execute("SELECT %s::timestamptz + make_interval(months => %s)", (moment, months)).fetchone()
    assert row is not None  # noqa: S101 - a SELECT of one row
    until: datetime = row[0]
    return until.astimezone(UTC).replace(microsecond=0)


def _write(
    node: Node, signer: Signer, log: Log, start: ChainHead, place: Place, now: datetime, file: BinaryIO
) -> bytes:
    """Write the segment, each entry verified; gives its SHA-256. Raises ChainError, SignatureError."""
    reader = ChainReader(node.cluster, log.chain, writer_of(log.chain), node.trust, start)
    given = cosigned.note_of(node.conn, log, place.last)

    def sign(_: Log, linked: Linked) -> str:
        opened = open_checkpoint(given, pinned(node.conn))
        mine = Checkpoint(log, linked.size, root_of(linked.tree))
        if linked.last_hash != reader.head.entry_hash or linked.size != place.last:
            raise ChainError(f"chain {log.chain}: it changed while it was read", record=log.chain)
        if opened.checkpoint != mine:
            raise split_view(opened.checkpoint, f"this node's entries have root {mine.root.hex()}")
        return mine.signed_by(signer, int(now.timestamp()), opened.note).encode()

    digest = hashlib.sha256()
    part = Part(log.chain, start, place.last)
    for kind, value in export(node.conn, node.cluster, node.name, now, sign=sign, part=part):
        if kind == "entry":
            _accept(reader, value)
        line = json.dumps({kind: value}, ensure_ascii=False).encode() + b"\n"
        digest.update(line)
        file.write(line)
    return digest.digest()


def _accept(reader: ChainReader, item: dict[str, Any]) -> None:
    where = f"{item['chain']}/{item['sequence']}"
    if not isinstance(reader.accept(base64.b64decode(item["document"]), where), Accepted):
        raise ChainError(f"chain {reader.chain}: {where} does not belong to the chain", record=where)


def read_back(
    node: Node, store: S3Store, log: Log, stored: Stored, place: Place, start: ChainHead
) -> tuple[Verified, bytes, int]:
    """Read one version of an object and verify it as the segment it must be; with its SHA-256 and size."""
    digest, size = hashlib.sha256(), 0
    with store.read(stored.key, stored.version) as take:

        def counted(most: int) -> bytes:
            nonlocal size
            chunk = take(most)
            digest.update(chunk)
            size += len(chunk)
            return chunk

        keys = pinned(node.conn)
        verified = named(
            stored.key,
            lambda: segment.verify(segment.lines(counted), log, place, start, node.trust, keys),
        )
    return verified, digest.digest(), size


def named(key: str, check: Callable[[], Verified]) -> Verified:
    """What `check` gives; its errors name the object."""
    try:
        return check()
    except DecodeError as error:
        raise RecordError(f"{key}: {error.message}", record=key) from error
    except (ChainError, RecordError) as error:
        error.message = f"{key}: {error.message}"
        error.args = (error.message,)
        raise


def _insert(conn: Connection, row: Row) -> None:
    with errors("noting an archived segment"):
        conn.execute(
            "INSERT INTO vsql_sync.audit_segments (chain, first_sequence, last_sequence, bucket, object_key,"
            " object_version, sha256, bytes, retain_until, head, note)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                row.chain,
                row.place.first,
                row.place.last,
                row.bucket,
                row.key,
                row.version,
                row.sha256,
                row.size,
                row.retain_until,
                json.dumps(head_value(row.head), sort_keys=True),
                row.note,
            ),
        )
