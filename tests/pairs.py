"""The `pairs` fixture: nodes for one test, whose services never outlive it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack


class Pairs:
    """Call it for a new pair of nodes; `TwoNodes` says what it takes."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self.made: list[TwoNodes] = []

    def __call__(self, schema_sql: str, **options: Any) -> TwoNodes:
        folder = self._folder / f"pair{len(self.made)}"
        folder.mkdir()
        self.made.append(TwoNodes(self._stack, folder, schema_sql, **options))
        return self.made[-1]


@pytest.fixture
def pairs(stack: Stack, tmp_path: Path) -> Iterator[Pairs]:
    """Make pairs of nodes; their services end with the test, however that ends."""
    factory = Pairs(stack, tmp_path)
    yield factory
    for pair in factory.made:
        pair.end()
