"""Verifying a node's audit trail: every row, every link, every signature, and the end of each chain.

Not here: a part of a chain (verify_range.py), comparing the two sides of a stream (compare.py), reading Kafka
(history.py). Rules:

* Only a signature makes an entry true. Everything else in the database is held against the signed documents.
* Each chain is read from its first entry; the first bad one is named, and what follows it proves nothing.
* A pruned chain is read from its base. The base's checkpoint must be signed and cosigned, and the chain
  itself must say, further on, that it was pruned there: else it was cut at its beginning.
* One snapshot (REPEATABLE READ) for all of it, so that a node at work verifies like one at rest.
* Somebody who owns the database and rewinds the trail *and* the heads remembered in it is only caught
  by those who remember the chain elsewhere: the peer (`PeerMemory`) and Kafka.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from psycopg import sql

from vsql_shared.audit.base import Base, base_in
from vsql_shared.audit.bases import base_of, pinned
from vsql_shared.audit.chain import EMPTY_HEAD, ChainReader, Void, hole_before, writer_of
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.cosigned import cosigners
from vsql_shared.audit.entries import EPOCH_OPENED, REPLICATION_BATCH, AuditEntry
from vsql_shared.audit.pruned import KeptSoFar, Wrong, kept_from, unarchived, unsaid
from vsql_shared.audit.rows import COLUMNS, columns_of, parse
from vsql_shared.errors import ChainError, DecodeError, SignatureError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

PAGE = 1000
"""Rows fetched at a time."""

TABLE = "vsql_sync.vsql_sync_audit"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and with which entry; `event_id` is None where the entry is not there."""

    chain: str
    sequence: int | None
    event_id: str | None
    what: str


@dataclass(slots=True)
class ChainReport:
    """What one chain holds, up to its end or its first bad entry.

    `tuples` counts the changes of all batches but those of abandoned fragments, which were sent again.
    """

    chain: str
    entries: int = 0
    batches: int = 0
    tuples: int = 0
    abandoned_tuples: int = 0
    first_time: int | None = None
    last_time: int | None = None
    epoch: int = 0
    sequence: int = 0
    entry_hash: bytes = b""
    problem: Problem | None = None
    holes: list[str] = field(default_factory=list)
    """What the source itself says it never sent."""
    pruned: int = 0
    """Entries up to here were pruned; they are in the archive."""
    _unfinished: int = 0
    _bases: set[str] = field(default_factory=set)

    def count(self, entry: AuditEntry, entry_hash: bytes) -> None:
        """Take one verified entry."""
        self.entries += 1
        self.first_time = entry.event_timestamp if self.first_time is None else self.first_time
        self.last_time = entry.event_timestamp
        self.epoch, self.sequence, self.entry_hash = entry.epoch, entry.sequence, entry_hash
        if entry.event_type == EPOCH_OPENED:
            self.tuples -= self._unfinished
            self.abandoned_tuples += self._unfinished
            self._unfinished = 0
        self.batches += entry.batch > 0
        self.tuples += entry.row_count
        if entry.event_type == REPLICATION_BATCH:
            self._unfinished = self._unfinished + entry.row_count if entry.continues else 0
        self.hear(base_in(entry))

    def hear(self, base: Base | None) -> None:
        """Take what a verified entry says of where the chain was pruned."""
        if base is not None:
            self._bases.add(base.encode())

    def says(self, base: Base) -> bool:
        """Whether a verified entry says that the chain was pruned there."""
        return base.encode() in self._bases


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one verification found."""

    chains: tuple[ChainReport, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems


def verify_table(conn: Connection, trust: TrustStore, cluster: str, chain: str | None = None) -> Report:
    """Verify one chain or all chains of this database's trail.

    `conn` must be in autocommit mode and outside of a transaction. Raises only when the database cannot be
    read; what is wrong with the trail is in the report.
    """
    with errors("reading the audit trail"), conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        names = [chain] if chain is not None else _chains(conn)
        heads = _own_heads(conn)
        reports = [_verify_chain(conn, trust, cluster, name, heads.get(name)) for name in names]
        warnings = _unprotected(conn) + _head_warnings(reports, heads)
        holes = [hole for one in reports for hole in one.holes]
        warnings += [f"{hole}; its targets must have been initialised anew" for hole in holes]
        problems = [report.problem for report in reports if report.problem]
        if chain is None:
            problems += _nameless(conn)
    return Report(tuple(reports), tuple(problems), tuple(warnings))


def known_bases(conn: Connection, peer: Connection, cluster: str, report: Report) -> Report:
    """Hold a peer's bases by this node's own keys: the peer pins whom it likes in its own database.

    Another target may be a stranger to this node, so that a base nobody known has cosigned is a warning. What
    this node was shown itself binds the base (compare.py, views.py).
    """
    keys = pinned(conn)
    problems, warnings = list(report.problems), list(report.warnings)
    for one in report.chains:
        if one.problem is not None or not one.pruned:
            continue
        try:
            base = base_of(peer, Log(cluster, one.chain))
            if base is not None and not cosigners(base.verify(Log(cluster, one.chain), keys, cosigned=False)):
                warnings.append(
                    f"chain {one.chain}: nobody this node knows has cosigned its base {one.pruned}"
                )
        except (ChainError, SignatureError, DecodeError) as error:
            problems.append(Problem(one.chain, one.pruned, None, error.message))
    return replace(report, problems=tuple(problems), warnings=tuple(warnings))


def noted_segments(conn: Connection, report: Report) -> list[Problem]:
    """Own chains that begin behind more than this node has archived: rule 4 of docs/design/0020."""
    return [
        Problem(one.chain, wrong.sequence, None, wrong.what)
        for one in report.chains
        if one.problem is None and one.pruned and (wrong := unarchived(conn, one.chain, one.pruned))
    ]


def has_chain(conn: Connection, chain: str) -> bool:
    """Whether there are entries under this name, or an own chain of this name is remembered."""
    with errors("reading the audit trail"):
        row = conn.execute(
            "SELECT EXISTS (SELECT FROM vsql_sync.vsql_sync_audit WHERE chain = %(chain)s)"
            " OR EXISTS (SELECT FROM vsql_sync.chain_heads WHERE own AND chain = %(chain)s)",
            {"chain": chain},
        ).fetchone()
    return row is not None and bool(row[0])


def _chains(conn: Connection) -> list[str]:
    """Chains with rows, and own chains that are remembered, rows or not."""
    rows = conn.execute(
        "SELECT DISTINCT chain FROM vsql_sync.vsql_sync_audit WHERE chain IS NOT NULL"
        " UNION SELECT chain FROM vsql_sync.chain_heads WHERE own ORDER BY 1"
    ).fetchall()
    return [name for (name,) in rows]


def _own_heads(conn: Connection) -> dict[str, tuple[int, bytes]]:
    rows = conn.execute("SELECT chain, sequence, entry_hash FROM vsql_sync.chain_heads WHERE own").fetchall()
    return {name: (sequence, bytes(entry_hash)) for name, sequence, entry_hash in rows}


def _verify_chain(
    conn: Connection, trust: TrustStore, cluster: str, chain: str, remembered: tuple[int, bytes] | None
) -> ChainReport:
    """Read a chain from its first row; then hold its end against the head remembered beside it."""
    report = ChainReport(chain)
    try:
        writer = writer_of(chain)
        base = base_of(conn, Log(cluster, chain))
    except (ChainError, SignatureError, DecodeError) as error:
        report.problem = Problem(chain, None, None, error.message)
        return report
    reader = ChainReader(cluster, chain, writer, trust, EMPTY_HEAD if base is None else base.head)
    report.pruned = reader.head.sequence
    for row in _rows(conn, chain):
        what = _check_row(reader, row, report)
        if what is not None:
            report.problem = what
            return report
    if base is not None and not report.says(base):
        report.problem = Problem(chain, report.pruned + 1, None, unsaid(report.pruned))
    elif (kept := _kept(conn, trust, Log(cluster, chain), base)) is not None:
        report.problem = Problem(chain, kept.sequence, None, kept.what)
    elif remembered is not None:
        report.problem = _cut(report, *remembered, "this node's own")
    return report


def _kept(conn: Connection, trust: TrustStore, log: Log, base: Base | None) -> Wrong | None:
    """The first entry kept from below the base that is not as it must be."""
    found: KeptSoFar | Wrong = KeptSoFar()
    while isinstance(found, KeptSoFar):
        if found.ended:
            return None
        found = kept_from(conn, trust, log, base, found, PAGE)
    return found


# event_timestamp as a number: a value beyond Python's calendar must be reported, not stop the report.
SELECTED = sql.SQL(", ").join(
    sql.SQL("extract(epoch FROM event_timestamp) * 1000000")
    if name == "event_timestamp"
    else sql.Identifier(name)
    for name in COLUMNS
)
_ROWS = sql.SQL(
    "SELECT {} FROM vsql_sync.vsql_sync_audit WHERE chain = {} ORDER BY sequence, event_id, document"
)


def _rows(conn: Connection, chain: str) -> Iterator[dict[str, Any]]:
    with conn.cursor(name="vsql_sync_verify") as cursor:
        cursor.itersize = PAGE
        cursor.execute(_ROWS.format(SELECTED, sql.Literal(chain)))
        for row in cursor:
            yield dict(zip(COLUMNS, row, strict=True))


def _check_row(reader: ChainReader, row: dict[str, Any], report: ChainReport) -> Problem | None:
    """Check one row against the chain so far.

    1. Its place: nothing is missing before it, nothing stands there twice (deleted, inserted, moved rows).
    2. Its document: parses, is of this chain, signed by its writer, linked to the entry before.
    3. Its columns: each as the document says (altered columns).
    """
    chain, expected, found = reader.chain, reader.head.sequence + 1, row["sequence"]
    event_id = None if row["event_id"] is None else str(row["event_id"])

    def problem(what: str) -> Problem:
        return Problem(chain, found, event_id, what)

    if found is None or found < expected:
        return problem(f"a row too many: expected sequence {expected}, found {found}")
    if found > expected:
        return Problem(chain, expected, None, f"missing: sequence {expected} is not there, {found} follows")
    encoded = bytes(row["document"] or b"")
    before = reader.head
    try:
        stored = parse(encoded)
        base = base_in(stored.entry)
        outcome = reader.accept(encoded, TABLE)
    except (DecodeError, ChainError, SignatureError) as error:
        return problem(error.message)
    if outcome is None:
        return problem(f"its document is an entry of chain {stored.entry.chain}")
    if isinstance(outcome, Void):
        return problem(f"its document does not belong to the chain: {outcome.reason}")
    report.hear(base)
    wanted = columns_of(stored) | {"event_timestamp": stored.entry.event_timestamp}
    wrong = [name for name in COLUMNS if row[name] != wanted[name]]
    if wrong:
        return problem(f"differs from its signed document in {', '.join(wrong)}")
    if hole := hole_before(before, outcome.entry):
        report.holes.append(hole)
    report.count(outcome.entry, outcome.entry_hash)
    return None


def _cut(report: ChainReport, sequence: int, entry_hash: bytes, whose: str) -> Problem | None:
    """Compare a chain's end with a head remembered at the same time or earlier."""
    if sequence > report.sequence:
        return Problem(
            report.chain,
            report.sequence + 1,
            None,
            f"cut at its end: the last entry is {report.sequence}, {whose} memory has {sequence}",
        )
    if sequence == report.sequence and entry_hash != report.entry_hash:
        return Problem(
            report.chain,
            sequence,
            None,
            f"its last entry has hash {report.entry_hash.hex()}, {whose} memory has {entry_hash.hex()}",
        )
    return None


def _nameless(conn: Connection) -> list[Problem]:
    """Rows of no chain at all: NOT NULL must have been dropped to make them."""
    rows = conn.execute(
        "SELECT sequence, event_id FROM vsql_sync.vsql_sync_audit WHERE chain IS NULL LIMIT 1"
    ).fetchall()
    return [Problem("", sequence, str(event_id), "a row without a chain") for sequence, event_id in rows]


def _head_warnings(reports: list[ChainReport], heads: dict[str, tuple[int, bytes]]) -> list[str]:
    """Remembered heads that lag behind the trail: harmless to it, but nothing of ours writes them so."""
    out = []
    for report in reports:
        remembered = heads.get(report.chain)
        if report.problem is None and report.entries and (not remembered or remembered[0] < report.sequence):
            had = f"sequence {remembered[0]}" if remembered else "nothing"
            out.append(
                f"chain {report.chain}: vsql_sync.chain_heads remembers {had}, "
                f"the trail goes to {report.sequence}; the remembered head was altered"
            )
    return out


# The one condition a rule has: what a base lets go (SQL 018), as PostgreSQL 15 to 18 write it.
_LETS_GO = (
    "WHERE (NOT (EXISTS ( SELECT FROM (vsql_sync.audit_bases b JOIN pg_class c ON"
    " ((c.oid = ('vsql_sync.vsql_sync_audit'::regclass)::oid))) WHERE ((b.chain = old.chain) AND"
    " (b.size >= old.sequence) AND (pg_get_userbyid(c.relowner) = CURRENT_USER))))) "
)


def _unprotected(conn: Connection) -> list[str]:
    """Tables of the trail whose append-only rules or TRUNCATE trigger are gone, altered or switched off."""
    rows = conn.execute(
        "SELECT c.relname FROM pg_partition_tree('vsql_sync.vsql_sync_audit') t"
        " JOIN pg_class c ON c.oid = t.relid WHERE 2 <> ("
        "   SELECT count(*) FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_enabled = 'A'"
        "   AND regexp_replace(pg_get_ruledef(r.oid), '\\s+', ' ', 'g') IN ("
        "     format('CREATE RULE no_update AS ON UPDATE TO %%s DO INSTEAD NOTHING;', c.oid::regclass),"
        "     format('CREATE RULE no_delete AS ON DELETE TO %%s %%sDO INSTEAD NOTHING;', c.oid::regclass,"
        "       CASE c.relkind WHEN 'p' THEN %s END)))"
        " OR NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = c.oid"
        "   AND g.tgname = 'no_truncate' AND g.tgenabled = 'A') ORDER BY 1",
        (_LETS_GO,),
    ).fetchall()
    return [
        f"table vsql_sync.{name} is not append-only any more: its rules no_update and no_delete or its "
        "trigger no_truncate were dropped, altered or disabled"
        for (name,) in rows
    ]


def rows_from(conn: Connection, chain: str, sequence: int, limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows of a chain from this sequence on, in order; 0: whatever is first in it."""
    place = sql.SQL("chain = {}").format(sql.Literal(chain))
    if sequence:
        place = sql.SQL("{} AND sequence >= {}").format(place, sql.Literal(sequence))
    query = sql.SQL(
        "SELECT {} FROM vsql_sync.vsql_sync_audit WHERE {} ORDER BY sequence, event_id, document LIMIT {}"
    ).format(SELECTED, place, sql.Literal(limit))
    return [dict(zip(COLUMNS, row, strict=True)) for row in conn.execute(query)]


def unnumbered(conn: Connection, chain: str) -> Problem | None:
    """A row of a chain without a place in it: NOT NULL must have been dropped to make it."""
    row = conn.execute(
        "SELECT event_id FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence IS NULL LIMIT 1",
        (chain,),
    ).fetchone()
    return None if row is None else Problem(chain, None, str(row[0]), "a row without a sequence")


# The same checks, for whoever reads a chain slice by slice (watch.py), or a part of it (verify_range.py).
check_row, cut, nameless, own_heads, unprotected = _check_row, _cut, _nameless, _own_heads, _unprotected
