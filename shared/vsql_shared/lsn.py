"""WAL positions: PostgreSQL's pg_lsn as an int, and back.

A position compares only with positions of the same timeline of the same system.
Text form: two hexadecimal halves with a slash (PostgreSQL manual, "pg_lsn Type").
"""

from __future__ import annotations

import re

from vsql_shared.errors import DecodeError

_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})\Z")


def parse(text: str) -> int:
    """'16/B374D848' → int. Raises DecodeError on anything else."""
    match = _TEXT.match(text)
    if match is None:
        raise DecodeError(f"{text[:40]!r} is not an LSN", hint="an LSN looks like 16/B374D848")
    return int(match.group(1), 16) << 32 | int(match.group(2), 16)


def text(lsn: int) -> str:
    """Int → '16/B374D848'."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
