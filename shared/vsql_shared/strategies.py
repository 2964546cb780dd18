"""Which strategy settles conflicts of which table. Pure.

Not here: what a strategy does (vsql_consumers/contest.py). Rules:

* A table's own choice comes first, then its publication's, then the default.
* It is chosen once, when the table becomes one that every node writes, and is the same on all of them: nodes
  that judged one conflict by two rules would end different. The databases say which it is
  (vsql_sync.multi_writer_tables); what a file says must be that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from vsql_shared.changes import TableName

Strategy: TypeAlias = Literal[
    "last_write_wins", "first_write_wins", "node_priority", "keep_local", "apply_remote", "manual"
]
STRATEGIES: tuple[Strategy, ...] = (
    "last_write_wins",
    "first_write_wins",
    "node_priority",
    "keep_local",
    "apply_remote",
    "manual",
)
SYMMETRIC: frozenset[Strategy] = frozenset({"last_write_wins", "first_write_wins", "node_priority"})
"""Strategies with a total order: all nodes end equal."""
GENERATIONS: frozenset[Strategy] = frozenset({"first_write_wins", "node_priority"})
"""Those whose order needs generations, or the first write would stand for ever."""
GENERATION = "vsql_generation"
"""Column of a row's generation."""


@dataclass(frozen=True, slots=True)
class Strategies:
    """What was chosen; None: nothing was."""

    default: Strategy | None = None
    publications: Mapping[str, Strategy] = field(default_factory=dict)
    tables: Mapping[TableName, Strategy] = field(default_factory=dict)
    adding: Mapping[TableName, Mapping[str, str]] = field(default_factory=dict)
    """Table → columns that add up, each with the type its function is for ("" for any)."""

    def chosen(self, publication: str, table: TableName) -> Strategy | None:
        """What somebody chose for a table."""
        return self.tables.get(table) or self.publications.get(publication) or self.default

    def of(self, publication: str, table: TableName) -> Strategy:
        """A table's strategy."""
        return self.chosen(publication, table) or "last_write_wins"
