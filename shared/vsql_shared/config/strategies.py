"""What a file says about strategies, as choices by table, publication and default.

Not here: who agrees on them (pg/peers.py) and what they do (vsql_consumers/contest.py).
"""

from __future__ import annotations

from vsql_shared.changes import TableName
from vsql_shared.config.settings import Settings
from vsql_shared.deltas import type_of
from vsql_shared.pg.table_spec import parse_table
from vsql_shared.strategies import Strategies


def strategies_of(settings: Settings | None) -> Strategies:
    """What was written down; a default that nobody wrote says nothing. Raises UserError: no table's name."""
    if settings is None:
        return Strategies()
    conflict = settings.conflict
    return Strategies(
        conflict.default_strategy if "default_strategy" in conflict.model_fields_set else None,
        {one.name: one.conflict_strategy for one in settings.publications if one.conflict_strategy},
        {parse_table(one.table): one.strategy for one in conflict.tables},
        _adding(settings),
    )


def _adding(settings: Settings) -> dict[TableName, dict[str, str]]:
    """Columns that add up."""
    found: dict[TableName, dict[str, str]] = {}
    for one in settings.conflict.crdt.columns:
        found.setdefault(parse_table(one.table), {})[one.column] = type_of(one.function) or ""
    return found
