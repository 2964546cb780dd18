"""Which of two versions of a row stands, and what becomes of a change that meets another node's. Pure.

Not here: where versions are kept and how rows are written. Rules (docs/design/0022-many-writers.md):

1. A version is the commit of the node where somebody wrote the row: its time, its writer, and, for the
   strategies that need it, how many versions it was made from. It never depends on the way it came.
2. Versions of different writers have one total order, given by the strategy; the greatest stands. Those of
   one writer are in the order of its stream, and their times never go back: one that does cannot be compared
   with what others wrote meanwhile, and nothing more is applied.
3. A deleted row keeps its version, as a tombstone: what is older than it stays away.
4. Nothing known of a row counts as older than every version: a change of a row that is not there yet is kept,
   or deletes what will come.
5. keep_local, apply_remote and manual have no order: nodes may end different, and that is said in the docs.
   They are asked only about changes that did not know what is here: whose old row is the one here was made
   of it, whoever wrote that, and is written.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import NamedTuple

from vsql_shared.changes import Op
from vsql_shared.strategies import SYMMETRIC, Strategy


class Writer(NamedTuple):
    """A node as versions name it: the higher priority wins, then the lower number."""

    priority: int
    number: int


class Version(NamedTuple):
    """Of a row, or of its absence. `time` is the commit's, µs since 1970; None where nobody knows it.

    `generation`: 1 for the first, then one more than that of the version the writer had before it.
    """

    time: int | None
    writer: Writer
    generation: int = 1


def rank(version: Version, strategy: Strategy) -> tuple[int, ...]:
    """A key: of two versions of different writers the one with the greater key stands. Raises KeyError.

    A time nobody knows is the oldest: whoever asks has made sure of that.
    """
    time = -(1 << 63) if version.time is None else version.time
    priority, number = version.writer
    return {
        "last_write_wins": (time, priority, -number),
        "first_write_wins": (version.generation, -time, priority, -number),
        "node_priority": (version.generation, priority, time, -number),
    }[strategy]


class Kind(StrEnum):
    """Conflicts, by the names PostgreSQL 18 has for them, and 19 for update_deleted."""

    INSERT_EXISTS = "insert_exists"
    INSERT_DELETED = "insert_deleted"
    UPDATE_ORIGIN_DIFFERS = "update_origin_differs"
    UPDATE_EXISTS = "update_exists"
    UPDATE_MISSING = "update_missing"
    UPDATE_DELETED = "update_deleted"
    DELETE_ORIGIN_DIFFERS = "delete_origin_differs"
    DELETE_MISSING = "delete_missing"
    MULTIPLE_UNIQUE = "multiple_unique_conflicts"


class Act(Enum):
    """What to do with a change."""

    WRITE = "write"
    """Make the row what the change says; or absent, with a tombstone."""
    KEEP = "keep"
    """Leave what is there."""
    ASK = "ask"
    """Leave what is there until a person has decided."""
    STOP = "stop"
    """Nobody can say: its writer's clock went back on this row."""


class Local(NamedTuple):
    """What a node has of a row: the version of the live row, or of its tombstone."""

    live: bool
    version: Version


class Decision(NamedTuple):
    """What becomes of a change; `kind` is None where it met nobody else's."""

    act: Act
    kind: Kind | None


_UNORDERED: dict[Strategy, Act] = {"keep_local": Act.KEEP, "apply_remote": Act.WRITE, "manual": Act.ASK}


def decide(
    op: int,
    version: Version,
    local: Local | None,
    strategy: Strategy,
    *,
    late: bool = False,
    seen: bool = False,
) -> Decision:
    """Decide about an INSERT, UPDATE or DELETE with this version that meets `local` (None: nothing known).

    `late`: it is not in the order of its writer's stream, which may have written the row again since.
    `seen`: the row it changes was, value by value, the one that is here.
    """
    if local is None:
        kind = {Op.UPDATE: Kind.UPDATE_MISSING, Op.DELETE: Kind.DELETE_MISSING}.get(op)
    elif local.version.writer == version.writer:
        return _follow(op, version, local, strategy, late=late)
    else:
        kind = _met(op, local.live)
    if kind is None:
        return Decision(Act.WRITE, None)
    if strategy not in SYMMETRIC:
        return _unordered(kind, version, local, strategy, seen=seen)
    if local is not None and rank(version, strategy) < rank(local.version, strategy):
        return Decision(Act.KEEP, kind)
    # Inserting anew what another node deleted before is no conflict.
    return Decision(Act.WRITE, None if kind == Kind.INSERT_DELETED else kind)


def _unordered(
    kind: Kind, version: Version, local: Local | None, strategy: Strategy, *, seen: bool
) -> Decision:
    """Without an order."""
    if kind == Kind.INSERT_DELETED and local is not None and _younger(version, local.version):
        seen = True  # it inserts anew what another node had deleted
    if seen:
        return Decision(Act.WRITE, None)
    if strategy == "manual" and kind == Kind.DELETE_MISSING:
        return Decision(Act.WRITE, kind)  # it is gone on both: nothing to ask
    return Decision(_UNORDERED[strategy], kind)


def _younger(version: Version, other: Version) -> bool:
    return other.time is None or (version.time is not None and version.time > other.time)


def _follow(op: int, version: Version, local: Local, strategy: Strategy, *, late: bool) -> Decision:
    """A change that meets its own writer's: what that did in order can only be an anomaly, and is written."""
    met = _met(op, local.live) if local.live == (op == Op.INSERT) else None
    before = local.version.time
    if version.time is not None and before is not None and version.time < before:
        if late:
            return Decision(Act.KEEP, met)
        if strategy in SYMMETRIC:
            return Decision(Act.STOP, None)
    return Decision(Act.WRITE, met)


def _met(op: int, live: bool) -> Kind:
    if op == Op.INSERT:
        return Kind.INSERT_EXISTS if live else Kind.INSERT_DELETED
    if op == Op.UPDATE:
        return Kind.UPDATE_ORIGIN_DIFFERS if live else Kind.UPDATE_DELETED
    return Kind.DELETE_ORIGIN_DIFFERS if live else Kind.DELETE_MISSING
