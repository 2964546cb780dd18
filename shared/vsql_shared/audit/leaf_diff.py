"""Names the sealed records in which source and target differ, in a range of batches: asks both databases.

Not here: what is proven by what (divergence.py), parsing what a database answers (leaf_answers.py).
Procedure; each step is one question to either side:

1. Signed entries: manifests from the source, acknowledgements from the target; every signature is verified.
2. A hash over the leaves of each batch that are kept.
3. All leaves of the batches in which those hashes, or the signed roots, differ: held against the signed
   roots, and compared.

Rules: only SELECT, in one read-only snapshot, so a standby and the role vsql_sync_viewer are enough. A range
is bounded in batches and tuples, what is fetched in bytes. Both sides are asked the same way, and every
question is counted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

from psycopg import Cursor

from vsql_shared.audit.chain import writer_of
from vsql_shared.audit.divergence import Divergence, Pair, affordable, comparable, judge, pair, runs
from vsql_shared.audit.dsse import AUDIT_ENTRY, document_hash, open_document
from vsql_shared.audit.entries import AuditEntry, signed_place
from vsql_shared.audit.leaf_answers import Kept, Row, parse_kept, parse_parts
from vsql_shared.changes import PartLeaves
from vsql_shared.crypto.signing import TrustStore
from vsql_shared.errors import ChainError, DecodeError, RecordError, RefusedError, SignatureError
from vsql_shared.names import ack_chain
from vsql_shared.pg.connect import Connection, errors

MAX_BATCHES = 20_000
"""Batches in a range: their entries are read and verified, about 200 µs each, and held: 2 KB each on either
side, more where a batch has many partitions."""
MAX_TUPLES = 20_000_000
"""Sealed records compared at a time: each database hashes all of them once."""
MAX_FETCHED_BYTES = 64 << 20
"""Of leaves fetched from either side to be held against the signed roots; beyond it "more" is said."""

# The first entry of a batch at or after the wanted one, found by halving: entries are in the order of their
# batches, and there is no index over batches, which every batch would pay for.
_ENTRIES = """
WITH RECURSIVE search (low, high) AS (
    SELECT 1::bigint, 1 + coalesce(
        (SELECT max(a.sequence) FROM vsql_sync.vsql_sync_audit a WHERE a.chain = %(chain)s), 0)
  UNION ALL
    SELECT CASE WHEN f.below THEN m.middle + 1 ELSE s.low END,
           CASE WHEN f.below THEN s.high ELSE m.middle END
    FROM search s
    CROSS JOIN LATERAL (SELECT (s.low + s.high) / 2 AS middle) m
    CROSS JOIN LATERAL (SELECT coalesce((
        SELECT a.batch < %(first)s FROM vsql_sync.vsql_sync_audit a
        WHERE a.chain = %(chain)s AND a.sequence >= m.middle AND a.batch > 0
        ORDER BY a.sequence LIMIT 1), false) AS below) f
    WHERE s.low < s.high
)
SELECT a.sequence, a.document FROM vsql_sync.vsql_sync_audit a
WHERE a.chain = %(chain)s AND a.sequence >= (SELECT max(low) FROM search) AND a.batch > 0
ORDER BY a.sequence LIMIT %(most)s
"""
_RANGE = (
    "chain = %(chain)s AND sequence BETWEEN %(first)s AND %(last)s"
    " AND sequence <@ %(sequences)s::int8multirange"
)
_KEPT = (
    "SELECT sequence, sum(octet_length(leaves))::bigint, sha256(string_agg("  # noqa: S608 - made of our own constants
    "int4send(part) || sha256(leaves), ''::bytea ORDER BY part))"
    f" FROM vsql_sync.batch_leaves WHERE {_RANGE} GROUP BY sequence"
)
_PARTS = (
    "SELECT sequence, part, leaves FROM vsql_sync.batch_leaves"  # noqa: S608 - made of our own constants
    f" WHERE {_RANGE} ORDER BY sequence, part"
)


class KeptLeaves:
    """One side: its database, and how often it was asked."""

    def __init__(self, conn: Connection, node: str) -> None:
        self.conn, self.node = conn, node
        self.asked = 0
        self.kept: dict[int, Kept] = {}
        """Manifest → what is kept of it."""
        self._range: dict[str, object] = {}
        self._sequences: frozenset[int] = frozenset()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """One state of the database for all questions, which change nothing."""
        with errors(f"asking node {self.node}"), self.conn.transaction():
            self.conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield

    @contextmanager
    def _rows(self, query: str, values: dict[str, object]) -> Iterator[Iterator[Row]]:
        """Row by row: what a database sends is not held before it was looked at.

        Who refuses a row leaves the rest unread: closing cancels it, so that the session can end in order.
        """
        self.asked += 1
        with (
            errors(f"asking node {self.node}"),
            self.conn.cursor() as cursor,
            closing(_streamed(cursor, query, values)) as rows,
        ):
            yield rows

    def entries(self, chain: str, first: int, last: int, trust: TrustStore) -> list[tuple[AuditEntry, bytes]]:
        """Entries of batches first … last of a chain with their hashes; each signature is verified."""
        most = last - first + 2
        out: list[tuple[AuditEntry, bytes]] = []
        with self._rows(_ENTRIES, {"chain": chain, "first": first, "most": most}) as rows:
            for row in islice(rows, most):
                entry, digest = _verified(row, chain, trust)
                if first <= entry.batch <= last:
                    out.append((entry, digest))
        return out

    def only(self, chain: str, sequences: Sequence[int]) -> None:
        """What the next questions are about: these manifests of a stream, in ascending order."""
        ranges = ",".join(f"[{run.first},{run.last}]" for run in runs(sequences))
        self._range = {
            "chain": chain, "first": sequences[0], "last": sequences[-1], "sequences": f"{{{ranges}}}",
        }  # fmt: skip
        self._sequences = frozenset(sequences)

    def look(self) -> None:
        """Fill `kept`."""
        with self._rows(_KEPT, self._range) as rows:
            self.kept = parse_kept(rows, self._sequences)

    def parts(self) -> dict[int, list[PartLeaves]]:
        """All leaves of these manifests."""
        sizes = {sequence: self.kept[sequence].nbytes for sequence in self._sequences}
        with self._rows(_PARTS, self._range) as rows:
            return parse_parts(rows, sizes)


def _streamed(
    cursor: Cursor[tuple[Any, ...]], query: str, values: dict[str, object]
) -> Generator[Row, None, None]:
    yield from cursor.stream(query.encode(), values, binary=True)


def _verified(row: Row, chain: str, trust: TrustStore) -> tuple[AuditEntry, bytes]:
    """An entry of the chain, by its signature. Raises VerificationError with its place."""
    if len(row) != 2 or not isinstance(row[1], bytes):
        raise RecordError("a row that holds no entry", record=chain)
    where, encoded = f"{chain}/{row[0] if isinstance(row[0], int) else '?'}", row[1]
    try:
        entry = AuditEntry.decode(open_document(trust, writer_of(chain), encoded, AUDIT_ENTRY, signed_place))
    except DecodeError as error:
        raise RecordError(f"not a signed entry: {error.message}", record=where) from error
    except SignatureError as error:
        error.record = error.record or where
        raise
    if entry.chain != chain:
        raise ChainError(f"an entry of chain {entry.chain}", record=where)
    return entry, document_hash(encoded)


def diff(
    source: KeptLeaves, target: KeptLeaves, chain: str, first: int, last: int, trust: TrustStore
) -> Divergence:
    """Compare batches first … last of a chain.

    Raises RefusedError for a range that holds nothing or too much, VerificationError for what is not signed
    as it must be, RecordError for answers of a wrong form.
    """
    count = last - first + 1
    if count > MAX_BATCHES:
        raise RefusedError(f"{count} batches, at most {MAX_BATCHES} at a time", hint="split the range")
    found = Divergence(chain, source.node, target.node, first, last)
    with source.snapshot(), target.snapshot():
        pairs = _pairs(found, source, target, trust)
        both = _both_keep(found, source, target, pairs)
        if both:
            _compare(found, source, target, both)
    # Both are asked the same; one of them is the peer.
    found.exchanges = max(source.asked, target.asked)
    return found


def _pairs(found: Divergence, source: KeptLeaves, target: KeptLeaves, trust: TrustStore) -> list[Pair]:
    """Step 1."""
    acks = target.entries(ack_chain(found.chain, target.node), found.first, found.last, trust)
    pairs = pair(found, source.entries(found.chain, found.first, found.last, trust), [one for one, _ in acks])
    if not pairs and not found.no_manifest:
        raise RefusedError(
            f"node {source.node} has no batch {found.first} to {found.last} in chain {found.chain}",
            hint="`syncctl audit list --event-type replication_batch` shows the batches it has",
        )
    return pairs


def _both_keep(
    found: Divergence, source: KeptLeaves, target: KeptLeaves, pairs: Sequence[Pair]
) -> list[Pair]:
    """Step 2: batches of which both sides keep leaves."""
    sequences = [one.manifest.sequence for one in pairs if one.rooted]
    if not sequences:
        return []
    for side in (source, target):
        side.only(found.chain, sequences)
        side.look()
    both = comparable(found, pairs, source.kept, target.kept)
    if found.tuples > MAX_TUPLES:
        raise RefusedError(
            f"{found.tuples} tuples in {found.compared} batches, at most {MAX_TUPLES} are compared at a time",
            hint="split the range",
        )
    return both


def _compare(found: Divergence, source: KeptLeaves, target: KeptLeaves, both: Sequence[Pair]) -> None:
    """Step 3."""
    suspect = [
        one
        for one in both
        if one.differs or source.kept[one.manifest.sequence] != target.kept[one.manifest.sequence]
    ]
    chosen = affordable(found, suspect, target.kept, MAX_FETCHED_BYTES)
    if not chosen:
        return
    parts = []
    for side in (source, target):
        side.only(found.chain, [one.manifest.sequence for one in chosen])
        parts.append(side.parts())
    for one in chosen:
        sequence = one.manifest.sequence
        judge(found, one, parts[0][sequence], parts[1][sequence])
