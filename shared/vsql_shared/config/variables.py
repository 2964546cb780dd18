"""Which environment variables are usable, and what is wrong with the others, in our words.

pydantic-settings passes over variables that name no key, and tells of unreadable JSON without the variable;
here each is named. Not the reading itself (`sources.py`): nothing here changes a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import get_origin

from vsql_shared.config.fields import Location, field_at, model_at, section_at, takes_json, unwrap
from vsql_shared.config.report import Problem, unknown_key, unusable
from vsql_shared.config.sources import DELIMITER, ENV_PREFIX

_NO_SECTION = "is no section in the file; a variable sets a key in it"


def check_variables(
    env: Mapping[str, str], tables: Mapping[str, object]
) -> tuple[dict[str, str], dict[Location, str], list[Problem]]:
    """(the variables that may be read, which of them sets which key, what is wrong with the others)."""
    usable: dict[str, str] = {}
    origins: dict[Location, str] = {}
    problems: list[Problem] = []
    for variable in sorted(name for name in env if name.startswith(ENV_PREFIX)):
        at: Location = tuple(variable.removeprefix(ENV_PREFIX).lower().split(DELIMITER))
        found = _problems(at, env[variable], tables)
        problems += [replace(problem, variable=variable) for problem in found]
        if not found:
            usable[variable] = env[variable]
            origins[at] = variable
    return usable, origins, problems


def _problems(at: Location, value: str, tables: Mapping[str, object]) -> list[Problem]:
    for end in range(1, len(at)):
        above = at[:end]
        if field_at(above) is None:
            return [Problem(above, unknown_key(above))]
        if not _holds_keys(above) or not _is_table(tables, above):
            return [Problem(above, _NO_SECTION)]
    if field_at(at) is None and section_at(at[:-1]) is not None:
        return [Problem(at, unknown_key(at))]
    if model_at(at) is not None:
        return [Problem(at, "names a section; name a key in it")]
    if not takes_json(at):
        return unusable(value, at)
    decoded = _json_or_none(value)
    if decoded is None:
        return [Problem(at, "must be a JSON list or object")]
    # JSON has an escape for NUL, and nests as deep as it likes.
    return unusable(decoded, at)


def _holds_keys(at: Location) -> bool:
    """Whether a key may stand below `at`: a section, or a table of free keys."""
    field = field_at(at)
    free = field is not None and any(get_origin(kind) is dict for kind in unwrap(field.annotation))
    return free or model_at(at) is not None


def _is_table(tables: Mapping[str, object], at: Location) -> bool:
    """Whether the file has a table at `at`, or nothing."""
    found: object = tables
    for part in at:
        if not isinstance(found, Mapping):
            return False
        if part not in found:
            return True
        found = found[part]
    return isinstance(found, Mapping)


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
