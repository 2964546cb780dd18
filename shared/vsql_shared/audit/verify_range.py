"""Verifying a part of a chain: the entries FIRST to LAST of this database's trail, without those before.

Not here: the whole trail (verify.py), what both sides keep of a range of batches (leaf_diff.py). Rules:

* The entry before the range is where reading begins. It is not believed: the first entry of the range is
  signed and names its hash, so that one which was altered shows there.
* What is verified is what `verify_table` verifies of these rows: place, signature, link, columns. Nothing is
  said of entries before and behind, nor of the chain's end.
* A range that is not in the table is refused, unless the node remembers the chain that far: then it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from psycopg import sql

from vsql_shared.audit.bases import base_of
from vsql_shared.audit.chain import ChainHead, ChainReader, writer_of
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.rows import COLUMNS
from vsql_shared.audit.store import load_head
from vsql_shared.audit.verify import PAGE, SELECTED, ChainReport, Problem, Report, check_row, own_heads
from vsql_shared.errors import ChainError, DecodeError, RefusedError, SignatureError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

_ROWS = sql.SQL(
    "SELECT {} FROM vsql_sync.vsql_sync_audit WHERE chain = {} AND sequence BETWEEN {} AND {}"
    " ORDER BY sequence, event_id, document"
)


def verify_range(
    conn: Connection, trust: TrustStore, cluster: str, chain: str, entries: tuple[int, int]
) -> Report:
    """Verify the entries FIRST to LAST of a chain. `conn` as for `verify_table`.

    Raises RefusedError where there are no such entries and never were, as far as this node remembers.
    """
    report = ChainReport(chain)
    with errors("reading the audit trail"), conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        _require(conn, chain, entries)
        try:
            _verify(conn, trust, cluster, report, entries)
        except (ChainError, SignatureError, DecodeError) as error:
            report.problem = Problem(chain, None, None, error.message)
    problems = (report.problem,) if report.problem else ()
    return Report((report,), problems)


def _require(conn: Connection, chain: str, entries: tuple[int, int]) -> None:
    """Refuse a range beyond the chain's end, as the table and this node's memory have it."""
    row = conn.execute(
        "SELECT coalesce(max(sequence), 0) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", (chain,)
    ).fetchone()
    last = max(int(row[0]) if row else 0, own_heads(conn).get(chain, (0, b""))[0])
    if entries[1] > last:
        raise RefusedError(
            f"chain {chain} has entries up to {last}, asked for {entries[0]}..{entries[1]}",
            hint="`syncctl audit list` shows what there is",
        )


def _verify(
    conn: Connection, trust: TrustStore, cluster: str, report: ChainReport, entries: tuple[int, int]
) -> None:
    chain, (first, last) = report.chain, entries
    before = _before(conn, Log(cluster, chain), first)
    if before.sequence != first - 1:
        gone = Problem(
            chain,
            first - 1,
            None,
            f"missing: sequence {first - 1}, before the range, is not there, or has another document",
        )
        report.problem = gone
        return
    reader = ChainReader(cluster, chain, writer_of(chain), trust, before)
    for row in _rows(conn, chain, first, last):
        report.problem = check_row(reader, row, report)
        if report.problem is not None:
            return
    if reader.head.sequence < last:
        at = reader.head.sequence + 1
        report.problem = Problem(chain, at, None, f"missing: sequence {at} is not there, asked up to {last}")


def _before(conn: Connection, log: Log, first: int) -> ChainHead:
    """The chain's state before the range. Raises RefusedError where that was pruned."""
    base = base_of(conn, log)
    if base is None or first > base.head.sequence + 1:
        return load_head(conn, log.chain, first - 1)
    if first == base.head.sequence + 1:
        return base.head
    raise RefusedError(
        f"chain {log.chain} begins behind entry {base.head.sequence} here, it was pruned",
        hint="`syncctl audit archive --verify` reads what is in the archive",
    )


def _rows(conn: Connection, chain: str, first: int, last: int) -> Iterator[dict[str, Any]]:
    with conn.cursor(name="vsql_sync_verify_range") as cursor:
        cursor.itersize = PAGE
        cursor.execute(_ROWS.format(SELECTED, sql.Literal(chain), sql.Literal(first), sql.Literal(last)))
        for row in cursor:
            yield dict(zip(COLUMNS, row, strict=True))
