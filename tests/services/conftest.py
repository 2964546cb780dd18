"""Fixtures of the tests of one component against real servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.services.producer_node import SourceNode
from tests.stack import Stack


class NewSource(Protocol):
    """What the `new_source` fixture gives: call it for a source node with a live stream."""

    def __call__(
        self,
        schema_sql: str,
        tables: Sequence[str],
        *,
        version: int = 18,
        config: str = "",
        kafka: str | None = None,
        conninfo: str | None = None,
        pci_columns: Sequence[tuple[str, str]] = (),
        exclude_pci: bool = False,
    ) -> SourceNode: ...


@pytest.fixture
def new_source(stack: Stack, tmp_path: Path) -> Iterator[NewSource]:
    """Make source nodes; their workers are ended and their databases dropped after the test."""
    made: list[SourceNode] = []

    def make(
        schema_sql: str,
        tables: Sequence[str],
        *,
        version: int = 18,
        config: str = "",
        kafka: str | None = None,
        conninfo: str | None = None,
        pci_columns: Sequence[tuple[str, str]] = (),
        exclude_pci: bool = False,
    ) -> SourceNode:
        # The first node lies in tmp_path itself; a further one would overwrite its keys.
        folder = tmp_path / f"node-{len(made)}" if made else tmp_path
        folder.mkdir(exist_ok=True)
        node = SourceNode(
            stack,
            folder,
            schema_sql,
            tables,
            version=version,
            config=config,
            kafka=kafka,
            conninfo=conninfo,
            pci_columns=pci_columns,
            exclude_pci=exclude_pci,
        )
        made.append(node)
        return node

    yield make
    for node in made:
        node.kill_workers()
        node.drop(stack)
