"""Rules of this repository that no linter knows: real servers, no doubles; each exception with a reason.

Read from the syntax trees and comments of all Python below the source roots; nothing is imported or run.
"""

from __future__ import annotations

import ast
import functools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack.state import REPOSITORY

SOURCE_ROOTS = ("producers", "consumers", "schemas", "shared", "tests", "bench")
DOUBLES = re.compile(r"(Fake|Mock|Stub|Dummy|Spy)(?![a-z])")
DOUBLES_MODULES = ("unittest.mock", "mock", "pytest_mock")
PATCHING = {"setattr", "delattr", "setitem", "delitem"}
SKIPS = {"skip", "skipif", "xfail", "importorskip"}
# What silences a tool, and what has to follow it in the same comment.
SILENCERS = re.compile(
    r"#\s*(?:noqa(?::\s*[A-Z]+[0-9]+(?:,\s*[A-Z]+[0-9]+)*)?"
    r"|type:\s*ignore(?:\[[a-z, -]+\])?|pragma:\s*no cover)"
)
REASON = re.compile(r"[\s#(`-]*\w+\W+\w+")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")

FILES = sorted(
    path
    for root in SOURCE_ROOTS
    for path in (REPOSITORY / root).rglob("*.py")
    if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(REPOSITORY).parts)
)


@functools.cache
def _tree(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _comments(path: Path) -> list[tuple[int, str]]:
    with tokenize.open(path) as stream:
        tokens = tokenize.generate_tokens(stream.readline)
        return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def _at(path: Path, line: int) -> str:
    return f"{path.relative_to(REPOSITORY)}:{line}"


def _name(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute, empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _doubles(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that import, define or install a stand-in for something real."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in _imported(node) if name.startswith(DOUBLES_MODULES))
        if isinstance(node, ast.ClassDef) and DOUBLES.match(node.name):
            yield node.lineno, f"class {node.name}"
        if isinstance(node, ast.arg) and node.arg == "mocker":
            yield node.lineno, "mocker"
        if isinstance(node, ast.Call):
            owner, _, method = _name(node.func).rpartition(".")
            if method in PATCHING and owner.rpartition(".")[2] == "monkeypatch":
                yield node.lineno, f"{owner}.{method}"


def _unexplained_skips(tree: ast.AST) -> Iterator[int]:
    """Lines of skips and expected failures without a text that says why."""
    explained: set[ast.expr] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func).rpartition(".")[2] in SKIPS:
            texts = [*node.args, *(word.value for word in node.keywords if word.arg in ("reason", "msg"))]
            if any(isinstance(text, ast.JoinedStr | ast.Constant) for text in texts):
                explained.add(node.func)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in SKIPS or node in explained:
            continue
        if _name(node).startswith("pytest."):
            yield node.lineno


def _unexplained(comment: str) -> bool:
    """Whether the comment silences a tool and does not say why."""
    ends = [match.end() for match in SILENCERS.finditer(comment)]
    return bool(ends) and not REASON.match(comment[ends[-1] :])


def test_the_files_are_found() -> None:
    found = {path.relative_to(REPOSITORY).parts[0] for path in FILES}
    assert found == set(SOURCE_ROOTS)


def test_nothing_real_is_replaced_by_a_double() -> None:
    found = [f"{_at(path, line)}: {what}" for path in FILES for line, what in _doubles(_tree(path))]
    assert found == []


def test_every_skip_says_why() -> None:
    found = [_at(path, line) for path in FILES for line in _unexplained_skips(_tree(path))]
    assert found == []


def test_every_silenced_finding_says_why() -> None:
    found = [_at(path, line) for path in FILES for line, comment in _comments(path) if _unexplained(comment)]
    assert found == []


def test_nothing_is_left_for_later() -> None:
    found = [_at(path, line) for path in FILES for line, text in _comments(path) if UNFINISHED.search(text)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import unittest.mock",
        "from unittest import mock",
        "from unittest.mock import patch",
        "class FakeBroker: ...",
        "class Mock: ...",
        "def test(mocker): ...",
        "monkeypatch.setattr(thing, 'name', 1)",
        "self.monkeypatch.setitem(thing, 'name', 1)",
    ],
)
def test_a_double_would_be_found(source: str) -> None:
    assert list(_doubles(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    ["class Stubborn: ...", "monkeypatch.setenv('A', 'b')", "import tests.stack", "setattr(a, 'b', 1)"],
)
def test_what_is_no_double_is_let_be(source: str) -> None:
    assert not list(_doubles(ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("@pytest.mark.skip\ndef f(): ...", True),
        ("@pytest.mark.xfail()\ndef f(): ...", True),
        ("pytest.skip()", True),
        ("@pytest.mark.skipif(sys.platform != 'linux')\ndef f(): ...", True),
        ("@pytest.mark.skipif(sys.platform != 'linux', reason='prctl is Linux only')\ndef f(): ...", False),
        ("pytest.skip('no token here')", False),
        ("wal.skip()", False),
    ],
)
def test_a_skip_without_a_reason_would_be_found(source: str, found: bool) -> None:
    assert bool(list(_unexplained_skips(ast.parse(source)))) is found


@pytest.mark.parametrize(
    ("comment", "found"),
    [
        ("# noqa", True),
        ("# noqa: S101", True),
        ("# noqa: S101,B008 -", True),
        ("# type: ignore[arg-type]", True),
        ("# pragma: no cover", True),
        ("# type: ignore[arg-type]  # noqa: S101", True),
        ("# noqa: S101 - the row is there", False),
        ("# noqa: S101  (as above said)", False),
        ("# type: ignore[arg-type]  # a table of cases", False),
        ("# an ordinary comment", False),
    ],
)
def test_a_silenced_finding_without_a_reason_would_be_found(comment: str, found: bool) -> None:
    assert _unexplained(comment) is found
