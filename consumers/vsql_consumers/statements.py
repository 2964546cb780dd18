"""What is written where, as SQL: a source's descriptor and a target's table joined into one plan. Pure.

Not here: running it (setwise.py, slowpath.py). A plan's statements read rows from a staging table (stage.py)
whose columns are `k`, which set of rows this is; `o<n>`, the old value of column n where one is staged;
`c<n>`, the new one. Where that would be too many, they are fields of columns `o_<group>`, `c_<group>`. Rules:

1. Every identifier is quoted, every value lies in the staging table: texts hold names and numbers of our own.
2. A value goes to a column of another type by way of its text, as native replication does, never through a
   cast that could lose something silently. The text is what the type's output function prints, whether the
   value came binary or as text. Where the target's type may hold less (fitting.py), a value that would not
   come back as it came is an error of its row.
3. Rows are found by the operators and collations of the unique index that identifies them.
4. A column that the target generates is never written. A column the target alone has keeps its value.
5. Columns GENERATED ALWAYS AS IDENTITY cannot be updated: such a row is deleted and inserted anew.
"""

# ruff: noqa: S608 - identifiers are quoted by statements.quoted, values never stand in texts
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vsql_consumers import conversion, fitting, packed
from vsql_consumers.fold import Unchanged
from vsql_consumers.frames import BINARY, TEXT, Layout
from vsql_consumers.target import TargetColumn, TargetTable, TypeName, UniqueIndex
from vsql_shared.changes import Relation, TableName
from vsql_shared.errors import DatabaseError, DecodeError

_TEXT_TYPES = frozenset({25, 1042, 1043})  # text, bpchar, varchar: one binary form
_TEXT_OID = 25
OLD, NEW = "o", "c"


def quoted(name: str) -> str:
    """An identifier in double quotes, whatever it is."""
    return '"' + name.replace('"', '""') + '"'


def table_sql(name: TableName) -> str:
    """A table's full name."""
    return f"{quoted(name.schema)}.{quoted(name.table)}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How one descriptor's rows are written. Column numbers are positions in the descriptor.

    key: columns that find a row, () when nothing does. index: the target's unique index over (some of) them;
    None when the target has none: then a row is found by its key, or by all columns, one at a time. match:
    columns whose old values find a row. written: columns that are written. types: the source's types here.
    """

    relation: Relation
    target: TargetTable
    types: tuple[TypeName | None, ...]
    columns: tuple[TargetColumn, ...]
    key: tuple[int, ...]
    index: UniqueIndex | None
    written: tuple[int, ...]

    @property
    def name(self) -> TableName:
        """The table, on both sides."""
        return self.target.name

    @property
    def identified(self) -> bool:
        """Whether the source can say which row it updated or deleted."""
        return self.relation.replica_identity == "f" or any(c.key for c in self.relation.columns)

    @property
    def folds(self) -> bool:
        """Whether changes may be folded and written as sets."""
        return self.index is not None and not self.target.ordered

    @property
    def match(self) -> tuple[int, ...]:
        """Columns whose old values find a row: what the target generates says nothing the others do not."""
        return self.key or self.written

    @property
    def differing(self) -> list[str]:
        """Columns the source generates that come out differently here, or the other way round.

        A column the target lacks cannot; one it generates by the same definition does not.
        """
        source, target = dict(self.relation.generated), dict(self.target.generated)
        if not source and not target:
            return []
        sent = {column.name for column in self.relation.columns}
        differing = {name for name in sent & target.keys() if name not in source}
        for name, definition in source.items():
            if name in target:
                differing |= {name} if target[name] != definition else set()
            elif name in self.target.columns and name not in sent:
                differing.add(name)
        return sorted(differing)

    @property
    def wide(self) -> bool:
        """Whether staged rows would not fit into a table with a column for each value."""
        return len(self.match) + len(self.columns) > packed.NARROW

    @property
    def always(self) -> tuple[int, ...]:
        """Written columns that are GENERATED ALWAYS AS IDENTITY."""
        return tuple(n for n in self.written if self.columns[n].identity_always)

    @property
    def checked(self) -> tuple[int, ...]:
        """Written columns whose type is a domain."""
        return tuple(n for n in self.written if self.columns[n].domain)

    def direct(self, layout: Layout) -> bool:
        """Whether rows of this layout can be copied straight into the table."""
        unchecked = self.index is not None and not self.index.immediate
        whole = len(self.written) == len(self.columns)
        return (
            bool(self.columns)
            and whole
            and not unchecked
            and all(self._same_bytes(n, layout) for n in self.written)
        )

    def _same_bytes(self, n: int, layout: Layout) -> bool:
        target = self.columns[n].type.oid
        if layout[n : n + 1] == TEXT:
            return target in _TEXT_TYPES and self._holds(n)
        source = self.types[n]
        if source is None or source.finite or not self._holds(n):
            return False
        return source.oid == target or (source.oid in _TEXT_TYPES and target in _TEXT_TYPES)

    def staged_type(self, n: int, layout: Layout) -> TypeName:
        """The type a column is staged as. Raises DatabaseError when the target does not know it."""
        if layout[n : n + 1] == TEXT:
            return TypeName(_TEXT_OID, "text")
        source = self.types[n]
        if source is None:
            column = self.relation.columns[n]
            raise DatabaseError(
                f"column {quoted(column.name)} of {self.name} has type {column.type_name} on the source, "
                "which is not in the target database",
                hint="create the type there, in the same schema",
            )
        return source

    def value(self, n: int, layout: Layout, side: str = NEW, *, seek: bool = False) -> str:
        """A staged value as the target's type, to be assigned; with `seek` to be compared."""
        staged, target = self.staged_type(n, layout), self.columns[n].type
        source = f"(s.{side}_{packed.group(n)}).{side}{n}" if self.wide else f"s.{side}{n}"
        value = conversion.convert(source, staged, target)
        if self._holds(n):
            return value
        return conversion.hold(value, source, staged, self._source(n), self.columns[n], seek=seek)

    def _source(self, n: int) -> TypeName:
        """A column's type on the source; one that is not here can only come as text."""
        return self.types[n] or TypeName(_TEXT_OID, "text")

    def _holds(self, n: int) -> bool:
        """Whether the target's column takes every value of the source's as it is."""
        known, column = self.types[n] is not None, self.columns[n]
        have = self.relation.columns[n].typmod if known else -1
        return fitting.holds(self._source(n).oid, have, column.type.oid, column.modifier)

    # Parts of statements

    @property
    def table(self) -> str:
        """The table with ONLY where it may have children that are not its partitions."""
        return ("" if self.target.partitioned else "ONLY ") + table_sql(self.name)

    def column(self, n: int) -> str:
        """A column's quoted name."""
        return quoted(self.columns[n].name)

    def found_by_key(self, layout: Layout, side: str) -> str:
        """T is the row whose key was staged."""
        tests = []
        for n in self.key:
            value = self.value(n, layout, side, seek=True)
            place = self._in_index(n)
            operator = "OPERATOR(pg_catalog.=)"
            if self.index is not None and place is not None:
                operator = self.index.operators[place]
                if self.index.collations[place]:
                    value = f"({value}) COLLATE {self.index.collations[place]}"
            elif not self.columns[n].comparable:
                tests.append(self._same_text(n, value))
                continue
            elif self.columns[n].collation:
                value = f"({value}) COLLATE {self.columns[n].collation}"
            tests.append(f"{self._stored(n)} {operator} {value}")
        return " AND ".join(tests)

    def _in_index(self, n: int) -> int | None:
        names = self.index.columns if self.index is not None else ()
        name = self.columns[n].name
        return names.index(name) if name in names else None

    def _stored(self, n: int) -> str:
        """T's value as its base type: operators of enums, arrays and rows do not take a domain over one."""
        column = f"t.{self.column(n)}"
        return f"CAST({column} AS {self.columns[n].type.sql})" if self.columns[n].domain else column

    def _same_text(self, n: int, value: str) -> str:
        return f"CAST(t.{self.column(n)} AS text) IS NOT DISTINCT FROM CAST({value} AS text)"

    def found_by_all(self, layout: Layout, side: str, nulls: Collection[int]) -> str:
        """T equals the staged row in every column; those numbered in `nulls` are NULL there.

        IS NOT DISTINCT FROM uses no index, = and IS NULL do.
        """
        tests = []
        for n in self.written:
            column, value = self.columns[n], self.value(n, layout, side, seek=True)
            if not column.comparable:
                tests.append(self._same_text(n, value))
            elif n in nulls:
                tests.append(f"t.{self.column(n)} IS NULL")
            else:
                value = f"({value}) COLLATE {column.collation}" if column.collation else value
                tests.append(f"{self._stored(n)} OPERATOR(pg_catalog.=) {value}")
        return " AND ".join(tests) or "true"

    def _image(self, layout: Layout, side: str) -> str:
        """T equals the staged row byte by byte: 1.0 is not 1.00."""
        return self.image_of(self.written, layout, side)

    def image_of(self, columns: Sequence[int], layout: Layout, side: str) -> str:
        """T equals the staged row byte by byte in some columns."""
        written = [(n, self.columns[n].type.sql) for n in columns]
        rows = [
            ", ".join(f"CAST(t.{self.column(n)} AS {type_})" for n, type_ in written),
            ", ".join(f"CAST({self.value(n, layout, side, seek=True)} AS {type_})" for n, type_ in written),
        ]
        # Without the casts this would be the grammar's comparison of two rows, column by column.
        return f"CAST(ROW({rows[0]}) AS record) OPERATOR(pg_catalog.*=) CAST(ROW({rows[1]}) AS record)"

    def image(self, layout: Layout, side: str) -> str:
        """T is the staged row, byte by byte, in all columns that travel."""
        return self._image(layout, side)

    # Whole statements. `stage` is the staging table's name; `where` further conditions on s.

    def copy(self) -> str:
        """COPY straight into the table. It takes identity columns' values as they come."""
        names = ", ".join(self.column(n) for n in range(len(self.columns)))
        return f"COPY {table_sql(self.name)} ({names}) FROM STDIN (FORMAT binary)"

    def insert(
        self,
        stage: str,
        where: str,
        layout: Layout,
        *,
        absent: bool = False,
        race: bool = False,
        side: str = NEW,
    ) -> str:
        """Insert staged rows; absent: those whose key is not there; race: a key that appears is no error."""
        names = ", ".join(self.column(n) for n in self.written)
        values = ", ".join(self.value(n, layout, side) for n in self.written)
        into = f"({names}) OVERRIDING SYSTEM VALUE" if names else ""
        text = f"INSERT INTO {table_sql(self.name)} {into} SELECT {values} FROM {stage} s WHERE {where}"
        if absent:
            found = self.found_by_key(layout, NEW)
            text += f" AND NOT EXISTS (SELECT FROM {self.table} t WHERE {found})"
        if race and self.index is not None and self.index.immediate:
            text += f" ON CONFLICT ({', '.join(map(quoted, self.index.columns))}) DO NOTHING"
        return text

    def delete(self, stage: str, where: str, found: str) -> str:
        """Delete the rows `found`."""
        return f"DELETE FROM {self.table} t USING {stage} s WHERE {where} AND {found}"

    def update(
        self, stage: str, where: str, found: str, layout: Layout, unchanged: Unchanged, *, keep: Sequence[int]
    ) -> str:
        """Update the rows `found`, but for `keep` (known to be equal) and what was not sent.

        An identity column that is GENERATED ALWAYS and not kept must be equal already, or the row is passed
        over.
        """
        always = [n for n in self.always if n not in keep and n not in unchanged]
        without = {*keep, *unchanged, *always}
        pairs = [f"{self.column(n)} = {self.value(n, layout)}" for n in self.written if n not in without]
        if not pairs:
            # A row that has nothing to set is touched all the same: it is counted, and its triggers fire.
            free = (c for c in self.target.columns.values() if not (c.generated or c.identity_always))
            touched = next(free, None)
            if touched is None:
                return self.replace(stage, where, found, layout, unchanged)
            pairs = [f"{quoted(touched.name)} = t.{quoted(touched.name)}"]
        found += "".join(
            f" AND {self._stored(n)} IS NOT DISTINCT FROM {self.value(n, layout, seek=True)}" for n in always
        )
        return f"UPDATE {self.table} t SET {', '.join(pairs)} FROM {stage} s WHERE {where} AND {found}"

    def replace(self, stage: str, where: str, found: str, layout: Layout, unchanged: Unchanged) -> str:
        """Delete the rows `found` and insert them as staged; what was not staged comes from the old row."""
        staged = [n for n in self.written if n not in unchanged]
        names = {self.columns[n].name for n in staged}
        kept = [c.name for c in self.target.columns.values() if c.name not in names and not c.generated]
        given = [f"{self.value(n, layout)} AS v{n}" for n in staged]
        given += [f"t.{quoted(name)} AS x{i}" for i, name in enumerate(kept)]
        columns = ", ".join([*(self.column(n) for n in staged), *map(quoted, kept)])
        values = ", ".join([*(f"v{n}" for n in staged), *(f"x{i}" for i in range(len(kept)))])
        return (
            f"WITH gone AS ({self.delete(stage, where, found)} RETURNING {', '.join(given)})"
            f" INSERT INTO {table_sql(self.name)} ({columns}) OVERRIDING SYSTEM VALUE"
            f" SELECT {values} FROM gone"
        )

    def same(self, stage: str, where: str, found: str, layout: Layout, columns: Sequence[int]) -> str:
        """For each of some columns, whether the row `found` has the very value that was staged."""
        tests = ", ".join(self._very_same(n, layout) for n in columns)
        return f"SELECT {tests} FROM {self.table} t, {stage} s WHERE {where} AND {found}"

    def _very_same(self, n: int, layout: Layout) -> str:
        """T prints what was staged; a cast to text could hide a difference (char(n) loses its padding)."""
        type_ = self.columns[n].type
        stored = conversion.printed(f"CAST(t.{self.column(n)} AS {type_.sql})", type_)
        staged = conversion.printed(f"CAST({self.value(n, layout)} AS {type_.sql})", type_)
        return f'{stored} COLLATE "C" IS NOT DISTINCT FROM {staged} COLLATE "C"'

    def lock_one(self, stage: str, where: str, layout: Layout, side: str, nulls: Collection[int] = ()) -> str:
        """Find one row equal to the staged one (the key's columns, or all), lock it, and say where it is."""
        if self.key:
            found, order = self.found_by_key(layout, side), ""
        else:
            # All rows of a table without columns are equal.
            order = f" ORDER BY {self._image(layout, side)} DESC" if self.written else ""
            found = self.found_by_all(layout, side, nulls)
        return (
            f"SELECT t.tableoid::bigint, t.ctid::text FROM {self.table} t, {stage} s"
            f" WHERE {where} AND {found}{order} LIMIT 1 FOR UPDATE OF t"
        )


def truncate_sql(plans: Sequence[Plan], named: int, options: int) -> list[str]:
    """The statements that empty these tables, of `named` that the source's TRUNCATE named.

    Never CASCADE: the source named every table it emptied, and what else refers to these here is the
    target's own, or empties with a later change. PostgreSQL truncates no table that others refer to: the rows
    of such a one are deleted (foreign keys are not checked here). So are those of all, when the first copy of
    some table has already seen the TRUNCATE.
    """
    whole = [] if len(plans) < named else list(plans)
    while whole:
        members = frozenset[int]().union(*(plan.target.members for plan in whole))
        free = [plan for plan in whole if plan.target.referrers <= members]
        if len(free) == len(whole):
            break
        whole = free
    restart = options & 2
    statements = []
    for plan in plans:
        if plan not in whole:
            statements.append(f"DELETE FROM {plan.table}")
            statements += [f"ALTER SEQUENCE {name} RESTART" for name in plan.target.sequences if restart]
    if whole:
        tables = ", ".join(plan.table for plan in whole)
        statements.append(f"TRUNCATE TABLE {tables}{' RESTART IDENTITY' if restart else ''}")
    return statements


def make_plan(relation: Relation, target: TargetTable, types: tuple[TypeName | None, ...]) -> Plan:
    """Join a descriptor and its table. Raises DatabaseError for a column the target lacks."""
    names = [column.name for column in relation.columns]
    generated = dict(relation.generated)
    missing = [name for name in names if name not in target.columns and name not in generated]
    if missing:
        raise DatabaseError(
            f"table {target.name} lacks {'column' if len(missing) == 1 else 'columns'} "
            f"{', '.join(map(quoted, missing))} in the target database",
            hint="add what is missing, or publish a column list without it",
        )
    if len(set(names)) != len(names):
        raise DecodeError(f"the descriptor of {relation.name} names a column twice")
    columns = tuple(target.columns.get(name) or _passed_over(name) for name in names)
    key, index = _identity(relation, target)
    written = tuple(n for n, column in enumerate(columns) if not column.generated)
    return Plan(relation, target, types, columns, key, index, written)


def _passed_over(name: str) -> TargetColumn:
    """A column the source generates and the target lacks: read, and neither written nor compared."""
    return TargetColumn(name, TypeName(_TEXT_OID, "text"), True, False, False, "", False)


def _identity(relation: Relation, target: TargetTable) -> tuple[tuple[int, ...], UniqueIndex | None]:
    """The columns that find a row, and the unique index that says they find at most one.

    Identity d and i: the columns the source marked. FULL and none: those of a unique index of the target
    whose columns all come, are written and never NULL, if there is one.
    """
    at = {column.name: n for n, column in enumerate(relation.columns)}
    marked = tuple(n for n, column in enumerate(relation.columns) if column.key)
    if relation.replica_identity in "di" and marked:
        names = {relation.columns[n].name for n in marked}
        return marked, next((index for index in target.uniques if names.issuperset(index.columns)), None)
    # What the target generates may differ from what came, and would find no row, or another one.
    written = at.keys() - {name for name, column in target.columns.items() if column.generated}
    for index in target.uniques:
        if index.never_null and written >= set(index.columns):
            return tuple(at[name] for name in index.columns), index
    return (), None


def binary_layout(relation: Relation) -> Layout:
    """The layout before any text was seen."""
    return BINARY * len(relation.columns)
