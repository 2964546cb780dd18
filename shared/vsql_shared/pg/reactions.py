"""What becomes of an error of PostgreSQL, by its SQLSTATE: the one table, and how it is read. Pure.

Not here: psycopg, our errors (connect.py and the consumer's faults.py make them) and how long a back-off is
(`[limits]`). docs/operations/apply-errors.md shows the same table to operators; a test compares the two.
Rules:

* A code of five characters is looked up before its class, the first two. What is not listed is MEND; while
  rows are written it is STOP: there only a trigger raises what PostgreSQL does not.
* RETRY: the same may succeed later without anybody's doing.
* MEND: somebody has to change the server, the catalog or a right; tried now and then, so that this is all
  there is to do.
* STOP: one row does not fit this database. Trying it again changes nothing: the stream stands, names the row
  and waits for a decision, or for the table's definition to change.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Reaction(Enum):
    """What an error leads to."""

    RETRY = "retry"
    MEND = "mend"
    STOP = "stop"


class Rule(NamedTuple):
    """A class of two characters, or a code of five, in words."""

    state: str
    reaction: Reaction
    words: str


TABLE = (
    Rule("08", Reaction.RETRY, "the connection was lost"),
    Rule("08P01", Reaction.STOP, "a value of the wrong size for its type (only while rows are written)"),
    Rule("09", Reaction.STOP, "a trigger failed"),
    Rule("0A", Reaction.MEND, "the server, or a table's definition, does not allow this"),
    Rule("21", Reaction.STOP, "more than one row where one is expected"),
    Rule("22", Reaction.STOP, "a value its column does not take: too long, out of range, not of the type"),
    Rule("23", Reaction.STOP, "a constraint: NOT NULL, unique, CHECK, exclusion"),
    Rule("25", Reaction.MEND, "the server is read-only, or a standby"),
    Rule("27", Reaction.STOP, "a trigger changed the row that is being written"),
    Rule("2F", Reaction.STOP, "an SQL function that a trigger or an expression calls failed"),
    Rule("38", Reaction.STOP, "a function that a trigger or an expression calls failed"),
    Rule("39", Reaction.STOP, "a function that a trigger or an expression calls failed"),
    Rule("40", Reaction.RETRY, "deadlock, or a serialization failure"),
    Rule("42", Reaction.MEND, "a table, column, type or privilege is missing"),
    Rule("44", Reaction.STOP, "a view's WITH CHECK OPTION"),
    Rule("53", Reaction.RETRY, "no resources: disk full, out of memory, too many connections"),
    Rule("54", Reaction.STOP, "a row or an index entry is larger than PostgreSQL takes"),
    Rule("55", Reaction.MEND, "an object is not in the state that is needed"),
    Rule("55006", Reaction.RETRY, "an object is in use"),
    Rule("55P03", Reaction.RETRY, "a lock was not available in time"),
    Rule("57", Reaction.MEND, "an operator intervened"),
    Rule("57014", Reaction.RETRY, "the statement was cancelled, or its time was over"),
    Rule("57P01", Reaction.RETRY, "the session was ended by an administrator, or the server stops"),
    Rule("57P02", Reaction.RETRY, "the server recovers from a crash"),
    Rule("57P03", Reaction.RETRY, "the server is starting up"),
    Rule("57P05", Reaction.RETRY, "the session was ended because it was idle"),
    Rule("58", Reaction.MEND, "the operating system reports an error to the server"),
    Rule("HV", Reaction.MEND, "a foreign server"),
    Rule("P0", Reaction.STOP, "RAISE in a trigger"),
    Rule("XX", Reaction.MEND, "an internal error, or corrupted data, of the server"),
)

BAD_VALUE = "08P01"
"""What a receive function says of a value of the wrong size; from elsewhere it is a broken connection."""
_BY_STATE = {rule.state: rule.reaction for rule in TABLE}


def reaction(sqlstate: str, *, writing: bool = False) -> Reaction:
    """What an error leads to; `writing`: it came while rows were written."""
    if sqlstate == BAD_VALUE and not writing:
        return _BY_STATE[sqlstate[:2]]
    found = _BY_STATE.get(sqlstate) or _BY_STATE.get(sqlstate[:2])
    return found or (Reaction.STOP if writing else Reaction.MEND)
