"""The attacks docs/threat-model.md lists are those that are tested, word by word."""

from __future__ import annotations

import ast
import re

from tests.stack.state import REPOSITORY
from tests.topology.attacks import REFUSED
from tests.topology.test_tampering import WITHOUT_EFFECT

TEXT = (REPOSITORY / "docs" / "threat-model.md").read_text()
SECTION = TEXT.partition("## Every right on Kafka")[2].partition("\n## ")[0]


def _rows(header: str) -> list[list[str]]:
    """The cells of a table by the beginning of its header."""
    lines = SECTION.partition(f"| {header}")[2].splitlines()[2:]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_alteration_that_is_refused_is_listed_and_every_one_listed_is_tried() -> None:
    assert [row[0] for row in _rows("what is done to records")] == list(REFUSED)


def test_everything_without_effect_is_listed_and_tried() -> None:
    assert [row[0] for row in _rows("what is done to the topics")] == list(WITHOUT_EFFECT)


def test_every_test_the_document_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECTION)
    assert len(named) >= 15
    assert len(_rows("attack")) == len(named) - 2, "each row of the last table names its test"
    for path, name in named:
        tree = ast.parse((REPOSITORY / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            f"{path}::{name}"
        )


def test_at_least_fifteen_attacks_are_listed_each_with_what_it_meets() -> None:
    rows = [
        row
        for header in ("what is done to records", "what is done to the topics", "attack")
        for row in _rows(header)
    ]
    assert len(rows) >= 15
    assert all(cell for row in rows for cell in row)
