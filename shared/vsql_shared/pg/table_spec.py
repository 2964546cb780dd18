"""What an operator writes for a table: `payments(id, amount)`, `sales."Order Items"(*)`, `merchants`, `*`.

Pure. Names follow SQL: unquoted ones are folded to lower case, quoted ones are taken as they are; a table
without a schema is in `public`. No columns, or `(*)`, means all of the table's. A row filter follows as in
CREATE PUBLICATION: `orders(id, region) WHERE (region = 'US')`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vsql_shared.changes import TableName
from vsql_shared.errors import UserError

_MAX_BYTES = 63  # NAMEDATALEN - 1
_WHERE = "where"
_TOKEN = re.compile(r'\s*(?:(?P<plain>[^\W\d][\w$]*)|"(?P<quoted>(?:[^"]|"")+)"|(?P<mark>[.(),*]))\s*')


@dataclass(frozen=True, slots=True)
class TableSpec:
    """A table to publish. `name` None is every table; `columns` None is every column."""

    name: TableName | None
    columns: tuple[str, ...] | None = None
    exclude_pci: bool = False
    where: str | None = None
    """Row filter, as it was written."""


def parse_table(text: str) -> TableName:
    """`payments` or `sales."Order Items"`."""
    reader = _Reader(text, "a table")
    name = reader.table()
    reader.end()
    return name


def parse_spec(text: str, *, exclude_pci: bool = False) -> TableSpec:
    """A table with or without its columns and its row filter, or `*`."""
    reader = _Reader(text, "a table with its columns", filtered=True)
    if reader.take("*"):
        reader.end()
        if reader.where is not None:
            raise UserError('"*" has no row filter', hint="name the table: filters are of one table each")
        return TableSpec(None, None, exclude_pci)
    name, columns = reader.table(), None
    if reader.take("("):
        columns = None if reader.take("*") else tuple(reader.names())
        reader.need(")")
    reader.end()
    if columns is not None and len(set(columns)) != len(columns):
        raise UserError(f"{text!r} names a column twice", hint="name each column once")
    return TableSpec(name, columns, exclude_pci, reader.where)


def parse_column(text: str) -> tuple[TableName, str]:
    """`payments.pan` or `sales.payments.pan`: a table and one of its columns."""
    reader = _Reader(text, "a column")
    names = [reader.name()]
    while reader.take("."):
        names.append(reader.name())
    reader.end()
    if len(names) == 2:
        return TableName("public", names[0]), names[1]
    if len(names) == 3:
        return TableName(names[0], names[1]), names[2]
    raise UserError(
        f"{text!r} is not a column of a table", hint='write "table.column" or "schema.table.column"'
    )


class _Reader:
    """Takes one token after the other."""

    def __init__(self, text: str, what: str, *, filtered: bool = False) -> None:
        """`filtered`: the unquoted word WHERE, which is reserved in SQL, begins a row filter."""
        self._text, self._what = text, what
        self._tokens: list[tuple[str, str]] = []
        self.where: str | None = None
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._error()
            kind = str(match.lastgroup)
            value = match[kind]
            if filtered and kind == "plain" and value.lower() == _WHERE:
                self.where = text[match.end() :].strip()
                if not self.where:
                    raise self._error()
                return
            if kind != "mark":
                value = value.replace('""', '"') if kind == "quoted" else _fold(value)
                self._check_length(value)
            self._tokens.append((kind, value))
            at = match.end()

    def table(self) -> TableName:
        """A name, or schema.name."""
        first = self.name()
        return TableName(first, self.name()) if self.take(".") else TableName("public", first)

    def names(self) -> list[str]:
        """Names with commas between them."""
        found = [self.name()]
        while self.take(","):
            found.append(self.name())
        return found

    def name(self) -> str:
        """The next token, which is a name."""
        if not self._tokens or self._tokens[0][0] == "mark":
            raise self._error()
        return self._tokens.pop(0)[1]

    def take(self, mark: str) -> bool:
        """Whether the next token is this mark; then it is taken."""
        if self._tokens[:1] != [("mark", mark)]:
            return False
        self._tokens.pop(0)
        return True

    def need(self, mark: str) -> None:
        """The next token is this mark."""
        if not self.take(mark):
            raise self._error()

    def end(self) -> None:
        """Nothing is left."""
        if self._tokens:
            raise self._error()

    def _check_length(self, name: str) -> None:
        if len(name.encode()) > _MAX_BYTES or "\0" in name:
            raise UserError(
                f"{name[:20]!r}… is longer than {_MAX_BYTES} bytes", hint="PostgreSQL has no such name"
            )

    def _error(self) -> UserError:
        return UserError(
            f"{self._text!r} does not name {self._what}",
            hint='write it as in SQL: payments, sales.payments, payments(id, amount), "Order Items"(*), or *;'
            " a row filter comes last: orders WHERE (region = 'US')",
        )


def _fold(name: str) -> str:
    """As PostgreSQL folds in a UTF-8 database: ASCII letters only."""
    return "".join(c.lower() if c.isascii() else c for c in name)
