"""What follows from a refusal, and from an operator's decision to go on without a batch.

Not here: the refusing (collect.py, verify.py, unseal.py) and the decisions themselves (`syncctl` writes them,
state.py reads them). Rules:

* A refusal names one record and the entry that was next in the chain; it holds no row value.
* A row PostgreSQL does not take (vsql_shared/pg/reactions.py) is no attack, and nothing is signed about it:
  the stream is `blocked` instead of `refused`.
* A batch that is skipped leaves a signed entry of this node and marks its tables DIVERGED: they lack changes
  until they are verified or copied again. So do the tables of a transaction that is skipped or parked; it is
  named in the acknowledgement of its batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vsql_consumers import state
from vsql_consumers.collected import Decided
from vsql_consumers.members import PartReceipt, skipped
from vsql_consumers.state import Receipt
from vsql_consumers.target import read_rules, read_versions
from vsql_consumers.window import in_words
from vsql_shared import lsn
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.changes import RowPlace, TableName, Transaction
from vsql_shared.errors import DecodeError, RowError, VerificationError
from vsql_shared.pg.connect import Connection, errors

_WATCH_SECONDS = 1.0
NAMED_MOST = 200
"""Transactions an acknowledgement names, of some hundred bytes each: an entry's detail is bounded."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was refused, for status, log and the signed entry."""

    record: str
    error: str
    sequence: int
    sqlstate: str | None = None
    """Of a row that does not fit; None: what arrived is not what was signed."""
    place: RowPlace | None = None

    @property
    def state(self) -> str:
        """What the stream says it is."""
        return "refused" if self.sqlstate is None else "blocked"

    @classmethod
    def of_row(cls, error: RowError, chain: str, next_sequence: int) -> Refusal:
        """A row that PostgreSQL does not take."""
        place = error.place
        sequence = place.sequence if place is not None else next_sequence
        record = in_words(place) if place is not None else f"{chain} from sequence {sequence} on"
        return cls(record, str(error), sequence, error.sqlstate, place)

    @classmethod
    def of(cls, error: VerificationError, next_sequence: int) -> Refusal:
        """The refusal an error means; the entry is the next one, where the error does not name another."""
        text = error.message + (f"; {error.hint}" if error.hint else "")
        return cls(error.record, text, error.sequence or next_sequence)

    def as_detail(self) -> dict[str, object]:
        """For the `refused` or `blocked` key of the stream's status."""
        detail: dict[str, object] = {"record": self.record, "error": self.error, "sequence": self.sequence}
        if self.sqlstate is None:
            return detail
        return detail | {"sqlstate": self.sqlstate} | _row_detail(self.place)


def _row_detail(place: RowPlace | None) -> dict[str, object]:
    """Which row; every key is there, null where that is not known."""
    if place is None:
        return dict.fromkeys(("table", "batch", "change", "transaction"))
    one = place.transaction
    return {
        "table": None if place.table is None else str(place.table),
        "batch": place.batch,
        "change": place.change,
        "transaction": one and {"xid": one.xid, "lsn": lsn.text(one.commit_lsn), "time": one.commit_time},
    }


def watch(conn: Connection, place: RowPlace | None) -> Callable[[], bool]:
    """Whether the table that refused a row has another definition since; asked at most once a second.

    Of its types and partitions: since this call.
    """
    if place is None or (table := place.table) is None:
        return lambda: False
    due = time.monotonic() + _WATCH_SECONDS
    with errors("looking at a table's definition"):
        rules = read_rules(conn, table)
        if place.version and read_versions(conn, [table]).get(table) != place.version:
            return lambda: True

    def altered() -> bool:
        nonlocal due
        if time.monotonic() < due:
            return False
        due = time.monotonic() + _WATCH_SECONDS
        with errors("looking at a table's definition"):
            return read_rules(conn, table) != rules

    return altered


def receipt_of_skipped(entry: AuditEntry, encoded: bytes, found: Sequence[PartReceipt] = ()) -> Receipt:
    """The receipt of a batch that was passed over: no root of all was computed, so it is the empty tree's.

    `found`: what members had applied of it before.
    """
    verdicts, detail = skipped(entry, found)
    return Receipt(entry.sequence, entry.epoch, entry.batch, encoded, EMPTY_ROOT, verdicts, detail)


def is_skipped(receipt: Receipt) -> bool:
    """Whether a receipt is that of a skipped batch; a real batch is never empty."""
    return receipt.merkle_root == EMPTY_ROOT


def passed_over(transaction: Transaction, decided: Decided, changes: int) -> dict[str, Any]:
    """What an acknowledgement says of a transaction that is not applied."""
    return {
        "xid": transaction.xid,
        "lsn": lsn.text(transaction.commit_lsn),
        "decision": decided.id,
        "verdict": decided.verdict,
        "changes": changes,
    }


def as_detail(said: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Detail of an acknowledgement: transactions by name, as many as an entry holds, and the sum of others.

    Each of those stands in the operators' log all the same, whose lines the chain holds.
    """
    if not said:
        return {}
    changes, transactions = Counter[str](), Counter[str]()
    for one in said[NAMED_MOST:]:
        changes[one["verdict"]] += one["changes"]
        transactions[one["verdict"]] += 1
    others = [{"verdict": v, "changes": n, "transactions": transactions[v]} for v, n in changes.items()]
    return {"passed_over": [*said[:NAMED_MOST], *others]}


def mark_diverged(conn: Connection, live_chain: str, tables: Iterable[TableName], reason: str) -> None:
    """Mark tables that lack changes; inside the transaction that passes these over."""
    for name in tables:
        state.mark_table(conn, live_chain, name, "DIVERGED", reason=reason)


def mark_all_diverged(conn: Connection, live_chain: str, reason: str) -> None:
    """The same where it is not known which tables were changed."""
    conn.execute(
        "UPDATE vsql_sync.table_sync SET state = 'DIVERGED', reason = %s WHERE chain = %s",
        (reason, live_chain),
    )


def parse_table(text: str) -> TableName:
    """`schema.table`, quoted where needed (changes.quote_ident), back to names. Raises DecodeError."""
    parts: list[str] = []
    rest = text
    while True:
        part, rest = _identifier(rest, text)
        parts.append(part)
        if not rest:
            break
        if rest[0] != ".":
            raise DecodeError(f"{text[:130]!r} is not schema.table")
        rest = rest[1:]
    if len(parts) != 2:
        raise DecodeError(f"{text[:130]!r} is not schema.table")
    return TableName(parts[0], parts[1])


def _identifier(rest: str, whole: str) -> tuple[str, str]:
    """One identifier and what follows it."""
    if not rest.startswith('"'):
        name, dot, more = rest.partition(".")
        if not name:
            raise DecodeError(f"{whole[:130]!r} is not schema.table")
        return name, dot + more
    out: list[str] = []
    at = 1
    while True:
        end = rest.find('"', at)
        if end < 0:
            raise DecodeError(f"{whole[:130]!r} has a quote without end")
        out.append(rest[at:end])
        if rest[end + 1 : end + 2] != '"':
            return "".join(out), rest[end + 1 :]
        out.append('"')
        at = end + 2
