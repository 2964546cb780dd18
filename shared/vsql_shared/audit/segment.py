"""A segment of a chain in the archive, read back: the export format with proofs, one chain, line by line.

Not here: making one (export.py, archive.py), and where it lies (objects/). Pure: lines in, head out. Rules:

* Nothing of a segment is believed but by signatures: each entry's, and that of the checkpoint it ends with.
* A segment is verified at its place: behind the head of the one before, under the numbers its name has.
* Lines and their count are bounded; malformed ones raise DecodeError, what does not verify ChainError,
  SignatureError.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from vsql_shared.audit.base import GONE, Base
from vsql_shared.audit.chain import Accepted, ChainHead, ChainReader
from vsql_shared.audit.checkpoint import Log, Opened
from vsql_shared.audit.dsse import MAX_DOCUMENT_SIZE
from vsql_shared.audit.export_format import FORMAT, VERSION, readable
from vsql_shared.errors import ChainError, DecodeError
from vsql_shared.names import topic_part

if TYPE_CHECKING:
    from vsql_shared.audit.entries import AuditEntry
    from vsql_shared.crypto.signing import TrustStore

MAX_LINE = 8 * MAX_DOCUMENT_SIZE
"""Bytes: a document in base64, its fields in hex and in JSON beside it."""
_CHUNK = 1 << 16
_NAME = re.compile(r"([0-9]{12,19})-([0-9]{12,19})\.jsonl")
SUFFIX = ".jsonl"


class Place(NamedTuple):
    """Which entries of a chain a segment has."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """The last part of its object's key; names sort as the segments do."""
        return f"{self.first:012d}-{self.last:012d}{SUFFIX}"


def parse_name(name: str) -> Place:
    """The place a segment's name says. Raises DecodeError."""
    found = _NAME.fullmatch(name)
    place = None if found is None else Place(int(found[1]), int(found[2]))
    if place is None or not 0 < place.first <= place.last or place.name != name:
        raise DecodeError(f"{name[:200]!r} is no name of a segment")
    return place


def place_of(key: str) -> tuple[Place, ...]:
    """The place the key of an object says; none where it is no segment's."""
    try:
        return (parse_name(key.rpartition("/")[2]),)
    except DecodeError:
        return ()


def folder(prefix: str, log: Log) -> str:
    """What the keys of a chain's segments begin with."""
    return f"{prefix}/{topic_part(log.cluster)}/{'.'.join(map(topic_part, log.chain.split('.')))}/"


class Verified(NamedTuple):
    """A segment that holds: the chain's head behind it, its checkpoint, what time and tables it covers.

    `kept`: hashes of the entries that stay in the database when the others are pruned.
    """

    head: ChainHead
    checkpoint: Opened
    note: str
    entries: int
    first_time: int
    last_time: int
    tables: frozenset[str]
    kept: tuple[bytes, ...]


def lines(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Lines of a stream, without their ends. Raises DecodeError for one that is too long."""
    rest = b""
    while chunk := read(_CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > MAX_LINE:
            raise DecodeError(f"segment: a line of more than {MAX_LINE} bytes")
    if rest:
        raise DecodeError("segment: cut in the middle of a line")


def log_of(first_lines: Iterable[bytes]) -> Log:
    """Whose a segment says it is; believed once it verifies. Raises DecodeError."""
    rows = iter(first_lines)
    cluster = _member(next(rows, b""), "header").get("cluster")
    chain = _member(next(rows, b""), "entry").get("chain")
    if not isinstance(cluster, str) or not isinstance(chain, str):
        raise DecodeError("segment: its cluster or its chain is no text")
    log = Log(cluster, chain)
    try:
        log.origin.encode()
        log.writer  # noqa: B018 - raises for what is no chain
    except UnicodeEncodeError as error:
        raise DecodeError("segment: its cluster or its chain holds what is no character") from error
    except ChainError as error:
        raise DecodeError(f"segment: {error.message}") from error
    return log


def verify(
    found: Iterable[bytes],
    log: Log,
    place: Place,
    start: ChainHead,
    trust: TrustStore,
    keys: Iterable[tuple[str, bytes]],
    *,
    cosigned: bool = True,
) -> Verified:
    """Give what a segment proves. `start`: the head behind the segment before; `keys` as for a Base.

    1. Its header says format, version and cluster (another kind of file).
    2. It begins at its place, with the tree of all entries before (an older, a swapped, a missing one).
    3. Each entry is the chain's next, signed by its writer (altered, cut out, moved), and what is written
       beside it is what was signed.
    4. It ends at its place, and its end says so (cut off).
    5. The checkpoint is of exactly these entries, signed and cosigned (a history of somebody's making).
    """
    rows = iter(found)
    # 1.
    header = _member(next(rows, b""), "header")
    said = (header.get("format"), header.get("version"), header.get("cluster"))
    if said != (FORMAT, VERSION, log.cluster):
        raise DecodeError(f"segment: its header says {_short(said)}, expected {FORMAT} of {log.cluster}")
    # 2.
    if place.first != start.sequence + 1:
        raise ChainError(
            f"chain {log.chain}: a segment is missing: {start.sequence + 1} is due, this one begins at"
            f" {place.first}"
        )
    # 3.
    reader = ChainReader(log.cluster, log.chain, log.writer, trust, start)
    times: list[int] = []
    tables: set[str] = set()
    kept: list[bytes] = []
    ended: dict[str, Any] | None = None
    for line in rows:
        if ended is not None:
            raise DecodeError("segment: a line behind its end")
        if line.startswith(b'{"end"'):
            ended = _member(line, "end")
            continue
        entry = _entry(reader, _member(line, "entry"), place)
        times = [times[0] if times else entry.event_timestamp, entry.event_timestamp]
        tables.update(entry.tables_affected)
        kept += [] if entry.event_type in GONE else [reader.head.entry_hash]
    # 4.
    head = reader.head
    if ended is None or head.sequence != place.last:
        raise ChainError(
            f"chain {log.chain}: the segment is cut: it ends at {head.sequence}, not at {place.last}"
        )
    note = _end(ended, log, place, start, head)
    # 5.
    opened = Base(head, note).verify(log, keys, cosigned=cosigned)
    count = place.last - place.first + 1
    return Verified(head, opened, note, count, times[0], times[-1], frozenset(tables), tuple(kept))


def _entry(reader: ChainReader, item: dict[str, Any], place: Place) -> AuditEntry:
    due = reader.head.sequence + 1
    where = f"{reader.chain}/{due}"
    if (item.get("chain"), item.get("sequence")) != (reader.chain, due) or due > place.last:
        raise ChainError(
            f"chain {reader.chain}: entry {due} is due, there stands entry {_short(item.get('sequence'))} of"
            f" {_short(item.get('chain'))}",
            record=where,
        )
    try:
        encoded = base64.b64decode(item.get("document") or "", validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DecodeError(f"segment, entry {where}: no document in base64") from error
    found = reader.accept(encoded, where)
    if not isinstance(found, Accepted):
        raise ChainError(f"chain {reader.chain}: entry {due} does not belong to the chain", record=where)
    if item.get("hash") != found.entry_hash.hex() or item.get("entry") != readable(found.entry):
        raise ChainError(
            f"chain {reader.chain}: what is written beside entry {due} is not what was signed", record=where
        )
    return found.entry


def _end(ended: dict[str, Any], log: Log, place: Place, start: ChainHead, head: ChainHead) -> str:
    """The checkpoint of the end line, once the rest of that line is as it must be."""
    chains = ended.get("chains")
    mine = chains.get(log.chain) if isinstance(chains, dict) and len(chains) == 1 else None
    count = place.last - place.first + 1
    wanted = {
        "entries": count,
        "first_sequence": place.first,
        "last_sequence": place.last,
        "last_hash": head.entry_hash.hex(),
        "before": [one.hex() for one in start.tree],
    }
    if not isinstance(mine, dict) or ended.get("entries") != count:
        raise DecodeError("segment: its end is not that of one chain")
    note = mine.pop("checkpoint", None)
    if mine != wanted or not isinstance(note, str):
        wrong = sorted(name for name in {*mine, *wanted} if mine.get(name) != wanted.get(name))
        raise ChainError(
            f"chain {log.chain}: the end of the segment differs in {_short(', '.join(wrong) or 'checkpoint')}"
        )
    return note


def _member(line: bytes, name: str) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise DecodeError(f"segment: a line of more than {MAX_LINE} bytes")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"segment: no {name} line: not JSON") from error
    found = value.get(name) if isinstance(value, dict) and len(value) == 1 else None
    if not isinstance(found, dict):
        raise DecodeError(f"segment: expected one {name} in a line")
    return found


def _short(value: object) -> str:
    return repr(value)[:200]
