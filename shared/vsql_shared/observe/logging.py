"""Structured logs: one line per event, as JSON for programs or text for people.

    log = logging.getLogger(__name__)
    log.info("batch published", extra={"batch": 17, "rows": 5000})

Not a place for decisions: what is logged where is the caller's. Rules:

1. One event is one line, whatever its text holds.
2. Keys and rows are bytes or SecretStr here; neither is ever written, whoever logs it: such a value
   becomes "<hidden>", in arguments, in fields, and nested.
3. The text of an exception that is not ours is never written: PostgreSQL's contain row values. Its type,
   SQLSTATE and the places it passed are.
4. Other libraries speak from WARNING on, through the same filter.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import PurePath
from types import TracebackType
from typing import Literal, TextIO
from uuid import UUID

from pydantic import BaseModel, SecretBytes, SecretStr
from typing_extensions import override

from vsql_shared.errors import VsqlSyncError

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["json", "text"]

HIDDEN = "<hidden>"
_OURS = ("vsql_shared", "vsql_producers", "vsql_consumers", "vsql_ctl", "vsql_schemas")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Enough for an event; a value that is longer is cut, so that a line stays a line.
_TEXT_MAX = 4_096
_DEPTH_MAX = 6
_FRAMES_MAX = 12


def safe(value: object, depth: int = 0) -> object:
    """The value as it may be logged: plain and bounded, without secrets, bytes or foreign errors' texts."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= _TEXT_MAX else value[:_TEXT_MAX] + "…"
    if isinstance(value, BaseException):
        return describe(value)
    if isinstance(value, Enum):
        return safe(value.value, depth + 1)
    if isinstance(value, UUID | PurePath | datetime):
        return str(value)
    return _safe_inside(value, depth) if depth < _DEPTH_MAX else HIDDEN


def _safe_inside(value: object, depth: int) -> object:
    """Containers item by item. What is not known to be harmless is hidden, not trusted to hide itself."""
    if isinstance(value, SecretStr | SecretBytes | bytes | bytearray | memoryview | BaseModel):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(safe(key, depth + 1)): safe(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [safe(item, depth + 1) for item in value]
    kind = type(value)
    if kind.__module__.partition(".")[0] in _OURS and "__str__" in vars(kind):
        return safe(str(value), depth + 1)  # our own types that say how they are written, such as an LSN
    return f"<{kind.__qualname__}>"


def describe(error: BaseException) -> str:
    """An exception in words that hold no row and no secret: our own in full, another's type and code."""
    kind = type(error).__qualname__
    if isinstance(error, VsqlSyncError):
        return f"{kind}: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"{kind}: {error.strerror}"
    sqlstate = getattr(error, "sqlstate", None)
    return f"{kind} (SQLSTATE {sqlstate})" if isinstance(sqlstate, str) else kind


def _places(trace: TracebackType | None) -> list[str]:
    """Where an exception passed, without source lines, which may quote values."""
    frames = traceback.extract_tb(trace)[-_FRAMES_MAX:]
    return [f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]


class SecretFilter(logging.Filter):
    """Makes every record harmless before any formatter sees it; stands on the handler, so none gets by."""

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        """Replace arguments, fields and exceptions by their harmless forms. Drops nothing."""
        if isinstance(record.args, Mapping):
            record.args = {key: safe(value) for key, value in record.args.items()}
        elif record.args:
            record.args = tuple(safe(value) for value in record.args)
        if not isinstance(record.msg, str):
            record.msg = str(safe(record.msg))
        for name in vars(record).keys() - _STANDARD:
            setattr(record, name, safe(getattr(record, name)))
        if record.exc_info and record.exc_info[1] is not None:
            record.error = describe(record.exc_info[1])
            record.trace = _places(record.exc_info[2])
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def _message(record: logging.LogRecord) -> str:
    """The text; a template that does not fit its arguments is a defect, but no reason to lose the line."""
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):
        return str(record.msg)


class _LineFormatter(logging.Formatter):
    """What both forms share: the service and stream, and the fields of an event."""

    def __init__(self, service: str, stream: str) -> None:
        super().__init__()
        self._service = service
        self._stream = stream

    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        fields = {"service": self._service, "stream": self._stream}
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        return {name: value for name, value in fields.items() if value not in ("", None)}


class JsonFormatter(_LineFormatter):
    """{"ts": …, "level": …, "logger": …, "msg": …, "service": …, "stream": …, fields}."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object on one line."""
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": _message(record),
        }
        fields = self._fields(record)
        # A field never replaces what every line has.
        line |= {(f"field_{name}" if name in line else name): value for name, value in fields.items()}
        return json.dumps(line, default=lambda value: f"<{type(value).__qualname__}>", ensure_ascii=True)


class TextFormatter(_LineFormatter):
    """2026-02-17 06:00:00.000 INFO    stream: message  key=value."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        """One line; control characters are written as escapes."""
        fields = self._fields(record)
        who = str(fields.pop("stream", "") or fields.pop("service", "") or record.name)
        fields.pop("service", None)
        stamp = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%S")
        rest = "".join(f"  {name}={value}" for name, value in fields.items())
        line = f"{stamp}.{int(record.msecs):03d} {record.levelname:<7} {who}: {_message(record)}{rest}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def setup(
    level: Level, form: Format, *, service: str, stream: str = "", output: TextIO | None = None
) -> None:
    """Send this process's logs to `output` (standard error), in one form. May be called again."""
    handler = logging.StreamHandler(output or sys.stderr)
    handler.addFilter(SecretFilter())
    handler.setFormatter((JsonFormatter if form == "json" else TextFormatter)(service, stream))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)
    # logging's own complaint about a broken handler quotes the arguments of the call.
    logging.raiseExceptions = False
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log the last words of a process through the same filter: a plain traceback would quote values."""
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("vsql_shared.observe").critical("uncaught exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None:
        _log_uncaught(found.exc_type, found.exc_value, found.exc_traceback)
