"""Tables, JSON, human units and progress, at a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from vsql_ctl.output import (
    Progress,
    human_bytes,
    human_count,
    human_seconds,
    render_pairs,
    render_table,
    to_json,
    width,
)


def test_columns_are_aligned_and_numbers_stand_to_the_right() -> None:
    table = render_table(("stream", "rows", "pci"), [("a", 5, True), ("long-name", 12345, None)])
    assert table.splitlines() == [
        "stream      rows  pci",
        "a              5  yes",
        "long-name  12345  -",
    ]


def test_wide_and_combining_letters_keep_the_columns() -> None:
    table = render_table(("name", "x"), [("表", "1"), ("e\u0301", "1"), ("ab", "1")])
    assert {width(line) for line in table.splitlines()} == {7}


def test_a_table_without_rows_is_its_headers() -> None:
    assert render_table(("a", "b"), []) == "a  b"
    assert render_pairs({}) == ""


@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_no_control_character_gets_from_data_to_the_terminal(rows: list[tuple[str, str]]) -> None:
    table = render_table(("a", "b"), rows)
    assert len(table.split("\n")) == len(rows) + 1
    assert table.replace("\n", "").isprintable()


def test_pairs_are_aligned() -> None:
    assert render_pairs({"a": 1, "long": None}) == "a     1\nlong  -"


@dataclass
class Point:
    """Some result."""

    at: datetime
    size: bytes


def test_json_has_one_form_for_each_kind_of_value() -> None:
    found = json.loads(
        to_json(
            {
                "point": Point(datetime(2026, 2, 17, tzinfo=UTC), b"\x01\xff"),
                "path": PurePosixPath("/a"),
                "id": UUID(int=0),
                "for": timedelta(seconds=1.5),
            }
        )
    )
    assert found == {
        "point": {"at": "2026-02-17T00:00:00+00:00", "size": "01ff"},
        "path": "/a",
        "id": "00000000-0000-0000-0000-000000000000",
        "for": 1.5,
    }


def test_a_secret_has_no_form_in_json() -> None:
    with pytest.raises(TypeError, match="SecretStr has no form in JSON"):
        to_json({"x": SecretStr("hunter2")})


UNITS = [
    (human_bytes(0), "0 B"),
    (human_bytes(1023), "1023 B"),
    (human_bytes(1536), "1.5 KiB"),
    (human_bytes(1024**2 - 1), "1.0 MiB"),
    (human_bytes(5 * 1024**5), "5.0 PiB"),
    (human_bytes(9000 * 1024**5), "9000.0 PiB"),
    (human_count(999), "999"),
    (human_count(12_345), "12.3 k"),
    (human_count(999_999), "1.0 M"),
    (human_seconds(0.012), "12 ms"),
    (human_seconds(2.5), "2.5 s"),
    (human_seconds(75), "1m 15s"),
    (human_seconds(3_700), "1h 1m"),
    (human_seconds(100_000), "1d 3h"),
]


@pytest.mark.parametrize(("shown", "expected"), UNITS, ids=[expected for _, expected in UNITS])
def test_units_are_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def test_progress_in_a_pipe_is_a_line_now_and_then() -> None:
    now = [0.0]
    stream = io.StringIO()
    with Progress("copying", 100, stream=stream, clock=lambda: now[0]) as progress:
        for done in range(101):
            now[0] += 0.1
            progress.update(done, "orders\x1b[31m")
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) <= 5
    assert lines[0] == "copying   0% 0/100"
    assert lines[-1].startswith("copying 100% 100/100 10/s")
    assert stream.getvalue().replace("\n", "").isprintable()


def test_progress_at_a_terminal_redraws_one_line() -> None:
    now = [0.0]
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        with Progress("copying", 10, stream=terminal, clock=lambda: now[0]) as progress:
            for done in range(11):
                now[0] += 1
                progress.update(done, "a long note" if done < 5 else "")
        shown = b""
        while not shown.endswith(b"\n"):  # a terminal hands over what has come so far
            shown += os.read(ours, 65_536)
    os.close(ours)
    assert shown.endswith(b"\r\n")
    assert shown.count(b"\n") == 1
    assert shown.count(b"\r") == 13 + 1
    assert b"[##############################] 100% 10/10" in shown


def test_progress_without_a_total_counts() -> None:
    now = [0.0]
    stream = io.StringIO()
    with Progress("copying", stream=stream, clock=lambda: now[0]) as progress:
        now[0] += 10
        progress.update(50_000)
    assert stream.getvalue().splitlines() == ["copying", "copying 50.0 k 5.0 k/s"]
