"""What follows from a refusal, and from an operator's decision to go on without a batch.

Not here: the refusing (collect.py, verify.py, unseal.py) and the decisions themselves (`syncctl` writes them,
state.py reads them). Rules:

* A refusal names one record and the entry that was next in the chain; it holds no row value.
* A batch that is skipped leaves a signed entry of this node and marks its tables DIVERGED: they lack changes
  until they are verified or copied again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vsql_consumers import state
from vsql_consumers.state import Receipt
from vsql_shared.audit.entries import AuditEntry
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.changes import TableName
from vsql_shared.errors import DecodeError, VerificationError
from vsql_shared.pg.connect import Connection


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was refused, for status, log and the signed entry."""

    record: str
    error: str
    sequence: int

    @classmethod
    def of(cls, error: VerificationError, next_sequence: int) -> Refusal:
        """The refusal an error means; the entry is the next one, where the error does not name another."""
        text = error.message + (f"; {error.hint}" if error.hint else "")
        return cls(error.record, text, error.sequence or next_sequence)

    def as_detail(self) -> dict[str, object]:
        """For the `refused` key of the stream's status."""
        return {"record": self.record, "error": self.error, "sequence": self.sequence}


def receipt_of_skipped(entry: AuditEntry, encoded: bytes) -> Receipt:
    """The receipt of a batch that was passed over: nothing was computed, so its root is the empty tree's."""
    return Receipt(
        entry.sequence, entry.epoch, entry.batch, encoded, EMPTY_ROOT, {"skipped": entry.row_count}
    )


def is_skipped(receipt: Receipt) -> bool:
    """Whether a receipt is that of a skipped batch; a real batch is never empty."""
    return receipt.merkle_root == EMPTY_ROOT


def mark_diverged(conn: Connection, live_chain: str, tables: Iterable[str], reason: str) -> None:
    """Mark the tables a skipped batch would have changed; inside the transaction that passes it over."""
    for text in tables:
        state.mark_table(conn, live_chain, parse_table(text), "DIVERGED", reason=reason)


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
