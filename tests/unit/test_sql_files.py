"""Rules the schema's SQL files keep wherever PostgreSQL runs."""

from __future__ import annotations

import re

import pytest

from tests.stack.state import REPOSITORY

FILES = sorted((REPOSITORY / "schemas" / "vsql_schemas" / "sql").glob("*.sql"))


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_no_schema_file_calls_what_fips_mode_refuses(name: str) -> None:
    """PostgreSQL raises an error in md5() there: an index over it loses the very row that is noted."""
    text = next(path for path in FILES if path.name == name).read_text()
    code = re.sub(r"--[^\n]*", "", text)
    assert re.findall(r"\bmd5\s*\(", code, re.IGNORECASE) == []


def test_there_are_schema_files() -> None:
    assert FILES
