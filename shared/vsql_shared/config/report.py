"""What is wrong with a configuration, in words: one line per problem, with key, value and fix.

Rules: a value is shown only where it cannot be a secret; a line never breaks, whatever was written in
the file; an unknown key comes with the known one that looks like it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vsql_shared.config.fields import Location, field_at, is_secret_field, may_show, section_at
from vsql_shared.config.secrets import MASK, mask_conninfo
from vsql_shared.errors import ConfigError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN_MAX = 80
# Deeper than any key of ours; the parser and we recurse, the interpreter's own limit is far above.
MAX_DEPTH = 12
# A file of garbage would scroll the first, useful lines away.
_LISTED_MAX = 50


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what and how to mend it; `variable` when the environment set it."""

    at: Location
    text: str
    variable: str | None = None
    value: str | None = None


def unusable(value: object, at: Location) -> list[Problem]:
    """NUL cannot stand in a path, a connection string or a name; refuse it before anything stumbles on it."""
    if len(at) > MAX_DEPTH:
        return [Problem(at, "tables nested too deep")]
    if isinstance(value, dict):
        return [problem for key in value for problem in unusable(value[key], (*at, key))]
    if isinstance(value, list):
        return [problem for index, item in enumerate(value) for problem in unusable(item, (*at, index))]
    if isinstance(value, str) and "\0" in value:
        return [Problem(at, "holds a NUL character; remove it")]
    return []


def raise_problems(name: str, problems: list[Problem]) -> NoReturn:
    """Raise the one ConfigError that lists them all."""
    lines = list(dict.fromkeys(_line(problem) for problem in problems))
    if len(lines) == 1:
        raise ConfigError(f"{name}: {lines[0]}")
    listed = lines[:_LISTED_MAX]
    if len(lines) > _LISTED_MAX:
        listed.append(f"… and {len(lines) - _LISTED_MAX} more")
    raise ConfigError("\n  ".join([f"{name}: {len(lines)} errors", *listed]))


def _line(problem: Problem) -> str:
    shown = f" = {problem.value}" if problem.value is not None else ""
    via = f" (set by {printable(problem.variable)})" if problem.variable else ""
    key = show_location(problem.at)
    return f"{key}{shown}{via}: {problem.text}" if key else problem.text


def show_location(at: Location) -> str:
    """The dotted key, as a person would write it: publications[1].tables[0].name."""
    shown = ""
    for part in at:
        if isinstance(part, int):
            shown += f"[{part}]"
        else:
            key = part if _BARE_KEY.fullmatch(part) else json.dumps(part, ensure_ascii=False)
            shown += f".{printable(key)}" if shown else printable(key)
    return shown


def printable(text: str) -> str:
    """The text on one line and of bounded length, whatever characters it holds."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_SHOWN_MAX])
    return safe + ("…" if len(text) > _SHOWN_MAX else "")


def explain(error: ValidationError, origins: Mapping[Location, str]) -> list[Problem]:
    """Put pydantic's findings in our words."""
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "across":
            problems += [Problem(key, why) for key, why in detail["ctx"]["problems"]]
            continue
        at = _known_part(detail["loc"])
        variable = next((origins[at[:end]] for end in range(len(at), 0, -1) if at[:end] in origins), None)
        problems.append(Problem(at, _text(detail, at), variable, _shown_value(detail, at)))
    return problems


def _known_part(loc: Location) -> Location:
    """The location without pydantic's own marks (union members), which no file contains."""
    return (
        loc[:-1] if len(loc) > 1 and field_at(loc) is None and field_at(loc[:-1]) and _is_plain(loc) else loc
    )


def _is_plain(loc: Location) -> bool:
    return section_at(loc[:-1]) is None


def _shown_value(detail: ErrorDetails, at: Location) -> str | None:
    field = field_at(at)
    if detail["type"] in ("missing", "extra_forbidden") or field is None:
        return None
    if is_secret_field(field):
        return MASK
    if not may_show(at) or isinstance(detail["input"], dict | list):
        return None
    value = detail["input"]
    if isinstance(value, str):  # somebody may have put a password into an address
        if at[-1] in _ADDRESSES:
            value = _without_credentials(value)
        elif "://" in value:
            value = mask_conninfo(value)
    return printable(json.dumps(value, ensure_ascii=False, default=str))


_ADDRESSES = frozenset({"url", "address", "endpoint"})


def _without_credentials(value: str) -> str:
    """A refused address, which may be misspelt anywhere: nothing before an "@", nor after a "?" or "#"."""
    before, at, after = value.rpartition("@")
    shown = re.split(r"[?#]", after, maxsplit=1)
    if at and re.search(r"[?#]", before):
        return MASK  # the "@" may stand in a query
    return (f"{MASK}@" if at else "") + shown[0] + (f"?{MASK}" if len(shown) > 1 else "")


def _text(detail: ErrorDetails, at: Location) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return f"missing; add {_example(at)}"
    if kind == "extra_forbidden":
        return unknown_key(at)
    if kind in ("literal_error", "enum"):
        return "must be " + str(context["expected"]).replace("'", '"')
    plain = _PLAIN.get(kind)
    if plain is not None:
        return plain.format_map(context)
    return detail["msg"]


_WHOLE = "must be a whole number"
_TEXT = "must be text in quotes"
_TRUTH = "must be true or false"
_PLAIN = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "finite_number": _WHOLE,
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_type": _TEXT,
    "string_unicode": "must be valid Unicode text",
    "path_type": _TEXT + ", a path",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must have the form {pattern}",
    "bool_type": _TRUTH,
    "bool_parsing": _TRUTH,
    "list_type": "must be a list in brackets",
    "too_short": "must have at least {min_length} entry",
    "dict_type": "must be a table of keys",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
}


def _example(at: Location) -> str:
    """How to write a missing key, section first."""
    section = show_location(at[:-1])
    where = f" under [{section}]" if section and not isinstance(at[-2], int) else ""
    if section_at(at) is not None:
        return f"the section [{show_location(at)}]"
    return f"{show_location(at[-1:])} = …{where}"


def unknown_key(at: Location) -> str:
    """What to say of an unknown key: the one that was meant, or all that there are."""
    section = section_at(at[:-1])
    known = sorted(section.model_fields) if section is not None else []
    close = difflib.get_close_matches(str(at[-1]).lower(), known, n=1, cutoff=0.6)
    if close:
        return f'unknown key; did you mean "{close[0]}"?'
    return f"unknown key; known here: {', '.join(known)}" if known else "unknown key; remove it"
