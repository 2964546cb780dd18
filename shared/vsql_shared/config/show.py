"""The effective configuration as plain values, secrets hidden: what `syncctl config show` prints.

Written from the models, so that a field added there is shown, and hidden when it is a secret, without
a list to keep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel, SecretStr

from vsql_shared.config.kafka import KafkaSettings
from vsql_shared.config.secrets import MASK, ConnectionString
from vsql_shared.config.settings import Settings
from vsql_shared.config.values import format_duration

_PROGRAM = re.compile(r"[A-Za-z0-9_./+-]+")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def masked(settings: Settings) -> dict[str, object]:
    """All settings with defaults, as JSON can hold them; secrets are stars, absent keys are left out."""
    return _section(settings)


def _section(section: BaseModel) -> dict[str, object]:
    fields = {name: getattr(section, name) for name in type(section).model_fields}
    shown = {name: _plain(inner) for name, inner in fields.items() if inner is not None}
    shown |= {
        name: _program(inner)
        for name, inner in fields.items()
        if name.endswith("_command") and isinstance(inner, str)
    }
    if isinstance(section, KafkaSettings):  # free keys: any of them may hold a secret
        shown["client_options"] = dict.fromkeys(section.client_options, MASK)
    return shown


def _program(command: str) -> str:
    """A command that prints a secret: its program; arguments may hold one that opens the other."""
    program, *arguments = command.split() or [""]
    shown = program if _PROGRAM.fullmatch(program) else MASK
    return f"{shown} {MASK}" if arguments else shown


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return _section(value)
    if isinstance(value, ConnectionString):
        return str(value)
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def to_toml(values: Mapping[str, object]) -> str:
    """The masked settings as TOML. Only the kinds of value `masked` yields."""
    lines: list[str] = []
    _write_table(values, "", lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(table: Mapping[str, object], path: str, lines: list[str]) -> None:
    """Plain keys first: after a sub-table's header, keys would belong to that one."""
    for key, value in table.items():
        if not _is_nested(value):
            lines.append(f"{_key(key)} = {_inline(value)}")
    for key, value in table.items():
        name = f"{path}.{_key(key)}" if path else _key(key)
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]"]
            _write_table(value, name, lines)
        elif _is_nested(value) and isinstance(value, list):
            for item in value:
                lines += ["", f"[[{name}]]"]
                _write_table(item, name, lines)


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _inline(key)


def _inline(value: object) -> str:
    """A string, number, truth or list of those. JSON's form is TOML's, but for DEL, which TOML refuses."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
