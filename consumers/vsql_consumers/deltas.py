"""What becomes of a change of a table with columns that add up. Pure.

Not here: how they add up (adding.py), and which of two versions stands (contest.py). Rules (rule 22;
docs/design/0028-columns-that-add-up.md):

1. An UPDATE of a row that is here adds its difference, whatever becomes of the rest. The rest is a
   register with a version, as in every other table.
2. A DELETE stands over everything. Keys are never used again, so nothing can come that it must not delete.
3. An INSERT of a key that was deleted falls; one of a key that is here waits for a person, whoever is
   younger: two rows that began apart have no sum.
4. An UPDATE of a key nobody here knows waits for its INSERT, or for its tombstone: to make a row of it would
   add up with what the INSERT brings. It waits at its place in its stream. That ends: what it waits for was
   committed before it was, so no two streams wait for each other. Where no third node could bring the row the
   stream stops, and an operator says how it goes on.
"""

from __future__ import annotations

from vsql_consumers.contest import Act, Decision, Kind, Local, Version, decide
from vsql_shared.changes import Op
from vsql_shared.strategies import Strategy


def judge(
    op: int,
    version: Version,
    local: Local | None,
    strategy: Strategy,
    *,
    late: bool = False,
    seen: bool = False,
) -> Decision | None:
    """Decide about a change; None: it has to wait. Of an UPDATE that meets a row this is what the rest does.

    `late`, `seen`: as for contest.decide.
    """
    if op == Op.DELETE:
        if local is not None and local.version.writer == version.writer:
            return Decision(Act.WRITE, None)
        live = local is not None and local.live
        return Decision(Act.WRITE, Kind.DELETE_ORIGIN_DIFFERS if live else Kind.DELETE_MISSING)
    if op == Op.INSERT:
        if local is None:
            return Decision(Act.WRITE, None)
        return (
            Decision(Act.ASK, Kind.INSERT_EXISTS) if local.live else Decision(Act.KEEP, Kind.INSERT_DELETED)
        )
    if local is None:
        return None
    if not local.live:
        return Decision(Act.KEEP, Kind.UPDATE_DELETED)
    return decide(op, version, local, strategy, late=late, seen=seen)
