"""How results look: aligned tables, JSON, human units, progress.

Rules: no control character reaches a pipe, nor a terminal from data (a name may hold an escape
sequence); JSON goes to standard output alone, progress and questions to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from datetime import time as clock_time
from enum import Enum
from pathlib import PurePath
from typing import Self, TextIO
from uuid import UUID

import click

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_COUNT_UNITS = ("", "k", "M", "G", "T")
_BAR_WIDTH = 30
# In a pipe, a line now and then; at a terminal, as often as an eye follows.
_LINE_SECONDS = 5.0
_REDRAW_SECONDS = 0.1


def printable(value: object) -> str:
    """A cell's text on one line, without control characters."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    text = str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width(text: str) -> int:
    """Columns the text takes at a terminal: wide letters two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def render_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under their headers, columns aligned; columns of numbers to the right."""
    values = [list(row) for row in rows]
    cells = [[printable(value) for value in row] for row in values]
    widths = [
        max([width(header), *(width(row[column]) for row in cells)]) for column, header in enumerate(headers)
    ]
    right = [
        bool(values) and all(_is_number(row[column]) for row in values) for column in range(len(headers))
    ]
    lines = [_line(headers, widths, right), *(_line(row, widths, right) for row in cells)]
    return "\n".join(lines)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (
        " " * (wide - width(cell)) + cell if to_right else cell + " " * (wide - width(cell))
        for cell, wide, to_right in zip(cells, widths, right, strict=True)
    )
    return "  ".join(padded).rstrip()


def render_pairs(pairs: Mapping[str, object]) -> str:
    """One name and value per line, values aligned."""
    wide = max((width(name) for name in pairs), default=0)
    return "\n".join(
        f"{name}{' ' * (wide - width(name))}  {printable(value)}" for name, value in pairs.items()
    )


def to_json(value: object) -> str:
    """JSON with times in ISO 8601, durations in seconds, bytes in hex; what is unknown is refused."""
    return json.dumps(value, default=_jsonable, ensure_ascii=False, indent=2)


def _jsonable(value: object) -> object:
    if isinstance(value, datetime | date | clock_time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, UUID | PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    raise TypeError(f"{type(value).__qualname__} has no form in JSON")


def emit(output: str, data: object, table: Callable[[], str]) -> None:
    """Print the result in the form that was asked for; the table is made only when it is shown."""
    click.echo(to_json(data) if output == "json" else table())


def human_bytes(size: float) -> str:
    """1536 → "1.5 KiB"."""
    return _scaled(size, 1024, _BYTE_UNITS)


def human_count(count: float) -> str:
    """12345 → "12.3 k"."""
    return _scaled(count, 1000, _COUNT_UNITS).rstrip()


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    scaled = float(value)
    for unit in units[:-1]:
        # 999.95 would be shown as 1000.0 of the smaller unit
        if abs(scaled) < base - 0.05:
            return f"{scaled:.0f} {unit}" if unit == units[0] else f"{scaled:.1f} {unit}"
        scaled /= base
    return f"{scaled:.1f} {units[-1]}"


def human_seconds(seconds: float) -> str:
    """0.012 → "12 ms", 75 → "1m 15s", 100000 → "1d 3h"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for size, unit, below, name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // below}{name}"
    return f"{whole}s"


class Progress:
    """How far a long act has come: one redrawn line at a terminal, a line now and then in a pipe.

    Use as a context manager; `update` may be called as often as one likes.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = printable(label)
        self._total = total
        self._stream = stream or sys.stderr
        self._clock = clock
        self._live = self._stream.isatty()
        self._began = clock()
        self._shown_at: float | None = None
        self._shown = ""
        self._done = 0
        self._note = ""

    def __enter__(self) -> Self:
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self._live:
            self._stream.write("\n")
            self._stream.flush()

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total, with a word on what is happening; shown when it is time to."""
        self._done, self._note = done, note
        pause = _REDRAW_SECONDS if self._live else _LINE_SECONDS
        if self._shown_at is None or self._clock() - self._shown_at >= pause:
            self._show()

    def _show(self) -> None:
        text = self._text()
        if text == self._shown and not self._live:
            return
        if self._live:
            # Return to the line's start and overwrite what was longer.
            self._stream.write("\r" + text + " " * max(0, width(self._shown) - width(text)))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
        self._shown, self._shown_at = text, self._clock()

    def _text(self) -> str:
        parts = [self._label]
        if self._total:
            part = min(1.0, self._done / self._total)
            if self._live:
                filled = int(part * _BAR_WIDTH)
                parts.append("[" + "#" * filled + "." * (_BAR_WIDTH - filled) + "]")
            parts.append(f"{part:4.0%} {self._done}/{self._total}")
        elif self._done:
            parts.append(human_count(self._done))
        elapsed = self._clock() - self._began
        if self._done and elapsed > 0.5:
            parts.append(f"{human_count(self._done / elapsed)}/s")
        if self._note:
            parts.append(printable(self._note))
        return " ".join(parts)
