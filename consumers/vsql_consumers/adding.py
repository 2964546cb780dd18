"""Write changes of tables with columns that add up: local := local + (new - old), whoever stands.

Not here: what is decided (deltas.py). Rules (docs/design/0028-columns-that-add-up.md):

1. A difference is added once for each change that is applied: row by row, never folded, in the transaction
   that also says how far the stream is. What is rolled back, to a savepoint too, has added nothing.
2. A change whose rest falls writes its difference only. That restamps the row: its version is kept in
   vsql_sync.row_versions, until a change stands over it.
3. Integers and money are added as numeric, so that only a result that does not fit is an error. It stops the
   stream at its transaction; nothing of that is lost, and an operator's retry adds it.
4. What is here is taken as it came where it is, bit by bit, what the change was made of: sums of floats are
   rounded, and those of numerics spelled, only where two nodes really added.
5. Conflicts are logged where the rest of two rows differs; what only adds up has none.
6. A key that was changed all the same (triggers can be passed by) stops the stream: as a delete and an insert
   it would lose what others add.
"""

# ruff: noqa: S608 - put together from quoted names and statements.py
from __future__ import annotations

from typing import TYPE_CHECKING

from vsql_consumers import versions
from vsql_consumers.contest import Act, Decision, Local, Version
from vsql_consumers.contested import Contest, ContestedWriter, Found
from vsql_consumers.deltas import judge
from vsql_consumers.fold import Unchanged
from vsql_consumers.frames import Layout
from vsql_consumers.slowpath import Change
from vsql_consumers.stage import Stage, run
from vsql_consumers.statements import NEW, OLD, Plan
from vsql_shared.changes import Op
from vsql_shared.errors import DatabaseError, RowError, TransientError, VsqlSyncError
from vsql_shared.strategies import SYMMETRIC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vsql_shared.pg.connect import Connection

# Types by OID: those added as numeric, and those that can be no number.
_EXACT = {21: "smallint", 23: "integer", 20: "bigint", 790: "money"}
_FLOAT4, _FLOAT8, _NUMERIC = 700, 701, 1700
_PLUS, _MINUS = "OPERATOR(pg_catalog.+)", "OPERATOR(pg_catalog.-)"


def summed(here: str, new: str, old: str, oid: int) -> str:
    """`here` + (`new` - `old`) of one type, as SQL. Raises KeyError: no type that adds up."""
    if oid in _EXACT:
        here, new, old = (f"CAST({value} AS numeric)" for value in (here, new, old))
        return f"CAST({here} {_PLUS} ({new} {_MINUS} {old}) AS {_EXACT[oid]})"
    type_ = {_FLOAT4: "float4", _FLOAT8: "float8", _NUMERIC: "numeric"}[oid]
    # 32768 is no smallint: an error of its row, as overflow is.
    wrong = f"CAST(CAST(CAST(s.k * 0 + 32768 AS int2) AS text) AS {type_})"
    given = f"'NaN' IN ({new}, {old}) OR 'Infinity' IN ({new}, {old}) OR '-Infinity' IN ({new}, {old})"
    rows = [f"CAST(ROW(CAST({value} AS {type_})) AS record)" for value in (here, old)]
    same, one = f"{rows[0]} OPERATOR(pg_catalog.*=) {rows[1]}", new
    if oid == _FLOAT4:
        here, new, old = (f"CAST({value} AS float8)" for value in (here, new, old))
    total = f"CAST(({here} {_MINUS} {old}) {_PLUS} {new} AS {type_})"
    return f"CASE WHEN {given} THEN {wrong} WHEN {same} THEN {one} ELSE {total} END"


class AddingWriter(ContestedWriter):
    """Writes staged changes of one such table, one by one."""

    def __init__(self, conn: Connection, plan: Plan, layout: Layout, stage: Stage, contest: Contest) -> None:
        super().__init__(conn, plan, layout, stage, contest)
        at = {plan.relation.columns[n].name: n for n in plan.written}
        missing = [name for name in self._rules.adding if name not in at]
        if missing:
            raise DatabaseError(
                f"column {', '.join(missing)} of {plan.name} is to add up, and its changes do not bring it",
                hint=f"it was dropped, renamed or generated on node {contest.origin}: give it back",
            )
        self._adds = tuple(at[name] for name in self._rules.adding)
        apart = {*plan.key, *self._adds, self._generation}
        self._rest = tuple(n for n in plan.written if n not in apart)

    def write(self, number: int, change: Change) -> str | None:
        """Write one change. Returns "", or None when it could not be decided."""
        if change.op == Op.UPDATE and not self._keeps_key(change.old, change.new or []):
            raise RowError(
                f"a row of {self._plan.name}, which has columns that add up, was given another key on node"
                f" {self._contest.origin}",
                hint="its triggers were passed by there; park or skip the transaction with `syncctl stream`,"
                " and bring the row here by hand",
            )
        if change.op == Op.UPDATE and change.old is None:
            raise DatabaseError(
                f"a change of {self._plan.name}, which has columns that add up, has no old values",
                hint=f"ALTER TABLE {self._plan.name} REPLICA IDENTITY FULL on node {self._contest.origin}",
            )
        return super().write(number, change)

    def _against_row(self, number: int, change: Change, side: str) -> bool | None:
        """The row is there, and locked."""
        if change.op != Op.UPDATE:
            return super()._against_row(number, change, side)
        found = self._version(number, change.op, side, live=True)
        if found is None:
            return None
        alike = self._is_rest(number, NEW)
        decision = self._decide(change, found, seen=self._saw(number, change, side))
        if not alike:
            self._log(number, side, decision, found, change)
        if decision.act is Act.WRITE:
            if found.kept:
                self._forget_version(number)
            written = self._update(number, self._old_key, (), self._plan.key) == 1
            if written and found.local.version.writer != self._contest.remote:
                self._reset(number, self._old_key)
            return written or None
        if not self._add(number):
            return None
        self._keep_version(number, found)
        return alike

    def _rule(self, change: Change, version: Version, local: Local | None, *, seen: bool) -> Decision:
        late, strategy = self._contest.late, self._rules.strategy
        decision = judge(change.op, version, local, strategy, late=late, seen=seen)
        if decision is None:
            raise self._missing()
        return decision

    def _missing(self) -> VsqlSyncError:
        """Another node's stream may bring the row: that is waited for. Else nothing of itself does."""
        what = f"a change of {self._plan.name} by node {self._contest.origin} adds to a row that is not here"
        if self._contest.third_nodes:
            return TransientError(f"{what} yet, and waits for it", hint="another node's stream brings it")
        return RowError(
            what,
            hint="where its INSERT was parked: `syncctl stream replay` that; one that was lost is brought by"
            " hand, with the values it had before this change and not with those it has at the peer now, then"
            " `stream retry`",
        )

    def _saw(self, number: int, change: Change, side: str) -> bool:
        """Whether it was made of the row that is here, but for what adds up; asked where no order is."""
        if self._rules.strategy in SYMMETRIC or change.op != Op.UPDATE:
            return False
        return self._is_rest(number, side)

    def _is_rest(self, number: int, side: str) -> bool:
        """Whether the row that is here is the staged one, byte by byte, but for key, sums and generation."""
        if not self._rest:
            return True
        text = self._text(
            ("rest", side),
            lambda: (
                f"SELECT 1 FROM {self._stage.name} s, {self._plan.table} t WHERE {self.SET}"
                f" AND {self._old_key} AND {self._plan.image_of(self._rest, self._layout, side)}"
            ),
        )
        return self._conn.execute(self._numbered(text, number), prepare=False).fetchone() is not None

    def _update(self, number: int, found: str, unchanged: Unchanged, keep: tuple[int, ...]) -> int:
        """All of it: the rest as it came, and what adds up."""
        unchanged = (*unchanged, *self._same(number, found, (*unchanged, *self._adds)))
        rest = [n for n in self._plan.written if n not in {*keep, *unchanged, *self._adds}]
        return self._set(number, found, ("sum", unchanged, keep), rest)

    def _add(self, number: int) -> bool:
        """What adds up, and nothing else."""
        return self._set(number, self._old_key, ("sum",), ()) == 1

    def _set(self, number: int, found: str, kind: tuple[object, ...], rest: Sequence[int]) -> int:
        plan, layout = self._plan, self._layout
        return self._run(
            number,
            "",
            (*kind, found),
            lambda: (
                f"UPDATE {plan.table} t SET "
                + ", ".join(
                    [
                        *(f"{plan.column(n)} = {plan.value(n, layout)}" for n in rest),
                        *(f"{plan.column(n)} = {self._sum(n)}" for n in self._adds),
                    ]
                )
                + f" FROM {self._stage.name} s WHERE {self.SET} AND {found}"
            ),
        )

    def _sum(self, n: int) -> str:
        plan, layout = self._plan, self._layout
        column = plan.columns[n]
        try:
            return summed(
                f"t.{plan.column(n)}", plan.value(n, layout, NEW), plan.value(n, layout, OLD), column.type.oid
            )
        except KeyError:
            raise DatabaseError(
                f"column {plan.column(n)} of {plan.name} is to add up, and is {column.type.sql}",
                hint="give it back the type it had when the peer was added",
            ) from None

    def _keep_version(self, number: int, found: Found) -> None:
        """Our write stamped the row; its version is the one it had."""
        version = versions.Kept(found.time, found.node, found.local.version.generation)
        text = versions.keep(self._plan.name, self._rules.key, f"FROM {self._row}", version)
        run(self._conn, [self._numbered(text, number).decode()])

    def _forget_version(self, number: int) -> None:
        """What stands over it is written by this transaction, too: the row's xmin may stay as it is."""
        text = versions.forget(self._plan.name, self._rules.key, self._row)
        run(self._conn, [self._numbered(text, number).decode()])

    @property
    def _row(self) -> str:
        """The staged change's row, as SQL behind FROM."""
        return f"{self._stage.name} s, {self._plan.table} t WHERE {self.SET} AND {self._old_key}"
