"""Write a folded step as sets: one statement for each kind of change, however many rows there are.

Not here: savepoints (apply.py) and what follows when a set does not fit (slowpath.py). Rules:

* Deletes first, then updates, then inserts: what one row gives up another may take.
* Each statement must have written exactly the rows it was given; a step of which one did not is undone by the
  caller and replayed change by change.
"""

# ruff: noqa: S608 - put together from what statements.py quotes
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vsql_consumers.fold import Folded, Moved
from vsql_consumers.frames import Fields, Layout, field_chunks
from vsql_consumers.stage import Stage, Stages, copy_in, run
from vsql_consumers.statements import NEW, OLD, Plan

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection


def needs_stage(plan: Plan, step: Folded | Moved) -> bool:
    """Whether a step is more than rows that can be copied straight into the table."""
    if isinstance(step, Moved) or not plan.direct(step.layout):
        return True
    return bool(step.deletes or step.vanished or step.updates)


def write_folded(
    conn: Connection, plan: Plan, stages: Stages, stage: Stage | None, step: Folded, chunk_bytes: int
) -> bool:
    """Write a folded step; false when a statement did not write what it was given. No stage: only inserts."""
    direct = plan.direct(step.layout)
    if stage is not None:
        tasks = _tasks(plan, stages, stage, step, with_inserts=not direct)
        stages.fill(stage)
        if run(conn, [sql for sql, _ in tasks]) != [expected for _, expected in tasks]:
            return False
    if direct and step.inserts:
        copy_in(conn, plan.copy(), field_chunks(step.inserts, len(plan.columns), chunk_bytes))
    return True


def _tasks(
    plan: Plan, stages: Stages, stage: Stage, step: Folded, *, with_inserts: bool
) -> list[tuple[str, int]]:
    """Stage a step's rows; statements and the rows each must write."""
    tasks: list[tuple[str, int]] = []
    found = plan.found_by_key(step.layout, NEW)

    def staged(rows: Sequence[Fields]) -> str:
        number = stages.number()
        for fields in rows:
            stage.add(number, fields)
        return f"s.k = {number}"

    for rows, expected in ((step.deletes, len(step.deletes)), (step.vanished, 0)):
        if rows:
            tasks.append((plan.delete(stage.name, staged(rows), found), expected))
    for unchanged, rows in step.updates.items():
        sql = plan.update(stage.name, staged(rows), found, step.layout, unchanged, keep=plan.key)
        tasks.append((sql, len(rows)))
    if with_inserts and step.inserts:
        unchecked = plan.index is not None and not plan.index.immediate
        sql = plan.insert(stage.name, staged(step.inserts), step.layout, absent=unchecked)
        tasks.append((sql, len(step.inserts)))
    return tasks


class Guard(NamedTuple):
    """Of a table that every node writes: nothing is touched that another node wrote last."""

    ours: str
    """Condition on t: the stream's own node wrote it last, and not later, or this transaction did."""
    tombstones: str
    """Table of them, as SQL."""
    generation: int | None = None
    """Position of the column of generations, where the table has them."""
    buried: str = "false"
    """Condition on t, a tombstone: an INSERT may pass it over."""
    adds: bool = False
    """Columns of it add up: a change is no set of values."""


def write_guarded(
    conn: Connection, plan: Plan, stages: Stages, stage: Stage, step: Folded, guard: Guard
) -> bool:
    """Write a folded step where no other node is met; false where one is, or might be.

    Tombstones are looked at once the keys are ours: before that somebody may be about to leave one.
    """
    if step.vanished:
        return False  # what was inserted and deleted: nobody holds those keys
    found = plan.found_by_key(step.layout, NEW)
    ours = f"{found} AND {guard.ours}"
    tasks: list[tuple[str, int]] = []

    def staged(rows: Sequence[Fields]) -> str:
        number = stages.number()
        for fields in rows:
            stage.add(number, fields)
        return f"s.k = {number}"

    if step.deletes:
        where = staged(step.deletes)
        tasks.append((plan.delete(stage.name, where, ours), len(step.deletes)))
        buried = bury(plan, stage.name, where, step.layout, NEW, guard.tombstones, guard.generation)
        tasks.append((buried, len(step.deletes)))
    for unchanged, rows in step.updates.items():
        sql = plan.update(stage.name, staged(rows), ours, step.layout, unchanged, keep=plan.key)
        tasks.append((sql, len(rows)))
    if step.inserts:
        where = staged(step.inserts)
        tasks.append((plan.insert(stage.name, where, step.layout), len(step.inserts)))
        others = f"{where} AND {found} AND NOT {guard.buried}"
        tasks.append((f"SELECT FROM {guard.tombstones} t, {stage.name} s WHERE {others} LIMIT 1", 0))
    stages.fill(stage)
    return run(conn, [sql for sql, _ in tasks]) == [expected for _, expected in tasks]


def bury(
    plan: Plan,
    stage: str,
    where: str,
    layout: Layout,
    side: str,
    tombstones: str,
    generation: int | None = None,
) -> str:
    """Leave tombstones of the staged rows' keys, with the version of this transaction.

    `generation`: where rows have theirs; a delete is one version more.
    """
    key = ", ".join(plan.column(n) for n in plan.key)
    columns = [plan.column(n) for n in plan.key]
    values = [plan.value(n, layout, side) for n in plan.key]
    given = columns[0]
    if generation is not None:
        given = plan.column(generation)
        columns.append(given)
        values.append(f"{plan.value(generation, layout, side)} + 1")
    return (
        f"INSERT INTO {tombstones} ({', '.join(columns)}) SELECT {', '.join(values)} FROM {stage} s"
        f" WHERE {where} ON CONFLICT ({key}) DO UPDATE SET {given} = excluded.{given}"
    )


def write_moved(conn: Connection, plan: Plan, stages: Stages, stage: Stage, step: Moved) -> bool:
    """Write updates that change the key, found by the old one; false when one was not found."""
    found = plan.found_by_key(step.layout, OLD)
    tasks = []
    for unchanged, moves in step.moves.items():
        number = stages.number()
        for old, new in moves:
            stage.add(number, new, [old[n] for n in plan.key])
        where = f"s.k = {number}"
        if plan.always:
            sql = plan.replace(stage.name, where, found, step.layout, unchanged)
        else:
            sql = plan.update(stage.name, where, found, step.layout, unchanged, keep=())
        tasks.append((sql, len(moves)))
    stages.fill(stage)
    return run(conn, [sql for sql, _ in tasks]) == [expected for _, expected in tasks]


def upsert(conn: Connection, plan: Plan, stages: Stages, stage: Stage, step: Folded) -> int | None:
    """Write inserts, as updates where the key is there already; how many those were, None on a mismatch."""
    number = stages.number()
    for fields in step.inserts:
        stage.add(number, fields)
    stages.fill(stage)
    where, found = f"s.k = {number}", plan.found_by_key(step.layout, NEW)
    updated, inserted = run(
        conn,
        [
            plan.update(stage.name, where, found, step.layout, (), keep=()),
            plan.insert(stage.name, where, step.layout, absent=True),
        ],
    )
    return updated if updated + inserted == len(step.inserts) else None
