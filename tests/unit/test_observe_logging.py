"""Logs: one line per event, and nothing that may be a key or a row in any of them."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from vsql_shared.errors import DatabaseError
from vsql_shared.observe.logging import HIDDEN, safe, setup

SECRET = "hunter2-marker"
LOG = logging.getLogger("vsql_shared.test")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    hooks = sys.excepthook, threading.excepthook
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    logging.raiseExceptions = raising
    sys.excepthook, threading.excepthook = hooks


def _lines(form: Literal["json", "text"] = "json") -> io.StringIO:
    output = io.StringIO()
    setup("debug", form, service="producer", stream="orders", output=output)
    return output


def test_an_event_is_one_json_object_with_its_fields() -> None:
    output = _lines()
    LOG.info("batch %d\nsealed", 7, extra={"rows": 5000})
    (line,) = output.getvalue().splitlines()
    found = json.loads(line)
    assert (found["level"], found["msg"], found["rows"]) == ("info", "batch 7\nsealed", 5000)
    assert (found["service"], found["stream"], found["logger"]) == ("producer", "orders", "vsql_shared.test")
    assert found["ts"].endswith("+00:00")


def test_text_is_one_line_without_control_characters() -> None:
    output = _lines("text")
    LOG.warning("two\nlines \x1b[31mred", extra={"table": "a\nb"})
    (line,) = output.getvalue().splitlines()
    assert "\x1b" not in line
    assert "orders: two\\nlines" in line
    assert "table=a\\nb" in line


SECRET_VALUES = {
    "secret": SecretStr(SECRET),
    "bytes": SECRET.encode(),
    "bytearray": bytearray(SECRET.encode()),
    "memoryview": memoryview(SECRET.encode()),
    "nested": {"a": [SecretStr(SECRET), {"b": SECRET.encode()}]},
    "foreign error": ValueError(SECRET),
    "object": type("Row", (), {"__repr__": lambda _self: SECRET})(),
    "deep": [[[[[[[[SECRET.encode()]]]]]]]],
}


@pytest.mark.parametrize("value", SECRET_VALUES.values(), ids=SECRET_VALUES.keys())
@pytest.mark.parametrize("form", ["json", "text"])
def test_no_secret_is_written_as_argument_or_field_or_message(
    form: Literal["json", "text"], value: object
) -> None:
    output = _lines(form)
    LOG.error("value %s", value, extra={"field": value})
    LOG.error(value)
    LOG.error("value %(x)s", {"x": value})
    assert SECRET not in output.getvalue()
    assert len(output.getvalue().splitlines()) == 3


def test_a_foreign_exception_is_logged_by_type_and_place_only() -> None:
    output = _lines()

    def apply() -> None:
        raise RuntimeError(f"Key (pan)=({SECRET}) already exists")

    try:
        apply()
    except RuntimeError:
        LOG.exception("apply failed")
    found = json.loads(output.getvalue())
    assert SECRET not in output.getvalue()
    assert found["error"] == "RuntimeError"
    assert "test_observe_logging.py" in found["trace"][0]


def test_our_own_error_is_logged_in_full() -> None:
    output = _lines()
    LOG.error("stopped", extra={"cause": DatabaseError("no privilege on t", hint="grant it")})
    assert json.loads(output.getvalue())["cause"] == "DatabaseError: no privilege on t; grant it"


def test_an_uncaught_exception_leaves_no_value_behind() -> None:
    output = _lines()
    thread = threading.Thread(target=lambda: int(SECRET))
    thread.start()
    thread.join()
    error = ValueError(SECRET)
    sys.excepthook(ValueError, error, None)
    assert len(output.getvalue().splitlines()) == 2
    assert SECRET not in output.getvalue()


def test_libraries_speak_from_warning_on() -> None:
    output = _lines()
    logging.getLogger("some.library").info("connecting")
    logging.getLogger("some.library").warning("slow")
    assert [json.loads(line)["msg"] for line in output.getvalue().splitlines()] == ["slow"]


def test_a_field_cannot_replace_what_every_line_has() -> None:
    output = _lines()
    LOG.info("hello", extra={"level": "none", "ts": "never"})
    found = json.loads(output.getvalue())
    assert (found["level"], found["field_level"], found["field_ts"]) == ("info", "none", "never")


def test_setting_up_twice_writes_each_event_once() -> None:
    _lines()
    output = _lines()
    LOG.info("once")
    assert len(output.getvalue().splitlines()) == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(min_size=4),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_whatever_is_logged_bytes_become_hidden(value: object) -> None:
    def hides(before: object, after: object) -> bool:
        if isinstance(before, bytes):
            return after == HIDDEN
        if isinstance(before, list) and isinstance(after, list):
            return len(before) == len(after) and all(map(hides, before, after))
        return not isinstance(after, bytes)

    assert hides(value, safe(value))
