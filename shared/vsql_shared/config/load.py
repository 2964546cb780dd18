"""Find the file, read it, lay the environment over it, validate it.

Rules:

1. The first of --config, VSQL_SYNC_CONFIG, ./vsql-sync.toml, /etc/vsql-sync/vsql-sync.toml is read; only one.
2. VSQL_SYNC__SECTION__KEY overrides a key; a variable that names no key is an error like a misspelt key.
3. Whatever is wrong, the caller gets one ConfigError that lists all of it (`report.py`), nothing else.
4. No file needs to exist when the environment gives the keys: containers are often run so.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from vsql_shared.config.fields import Location, model_at, takes_json
from vsql_shared.config.report import Problem, explain, raise_problems
from vsql_shared.config.settings import Settings
from vsql_shared.errors import ConfigError

CONFIG_VARIABLE = "VSQL_SYNC_CONFIG"
ENV_PREFIX = "VSQL_SYNC__"
FILE_NAME = "vsql-sync.toml"
SYSTEM_PATH = Path("/etc/vsql-sync") / FILE_NAME
# A configuration of thousands of tables is below this; more is not a configuration.
MAX_FILE_BYTES = 4 * 2**20
# Deeper than any key of ours; the parser and we recurse, the interpreter's own limit is far above.
MAX_DEPTH = 12


def load_settings(path: Path | str | None = None) -> Settings:
    """The settings of this process: from `path`, or from where they are looked for."""
    return load_from(path, env=os.environ, cwd=Path.cwd())


def load_from(path: Path | str | None, *, env: Mapping[str, str], cwd: Path) -> Settings:
    """As `load_settings`, with the environment and the working directory given."""
    source = find_config(path, env=env, cwd=cwd)
    if source is None:
        return parse_settings("", source=None, env=env)
    return parse_settings(_read(source), source=source, env=env)


def find_config(path: Path | str | None, *, env: Mapping[str, str], cwd: Path) -> Path | None:
    """The one file that counts; None when only the environment configures. One that is named must exist."""
    for said_by, named in (("--config", path), (CONFIG_VARIABLE, env.get(CONFIG_VARIABLE))):
        if named:
            chosen = cwd / named
            if not os.path.lexists(chosen):
                raise ConfigError(f"{said_by}: no file at {chosen}", hint="give the path of vsql-sync.toml")
            return chosen
    places = (cwd / FILE_NAME, SYSTEM_PATH)
    for place in places:
        if place.is_file():
            return place
    if any(name.startswith(ENV_PREFIX) for name in env):
        return None
    raise ConfigError(
        f"no configuration found at {places[0]} or {places[1]}",
        hint=f"write one as in vsql-sync.toml.example, or name it by --config or {CONFIG_VARIABLE}",
    )


def _read(source: Path) -> bytes:
    try:
        with source.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise ConfigError(
            f"{source}: cannot be read: {reason}", hint="give a file that this user may read"
        ) from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{source}: more than {MAX_FILE_BYTES} bytes", hint="this is no vsql-sync configuration"
        )
    return content


def parse_settings(content: bytes | str, *, source: Path | None, env: Mapping[str, str]) -> Settings:
    """Settings from the text of a file and an environment."""
    name = str(source) if source is not None else "environment"
    data = _parse_toml(content, name)
    problems = list(_unusable(data, ()))
    if problems:
        raise_problems(name, problems)
    origins, problems = _overlay(data, env)
    base = source.parent if source is not None else None
    try:
        settings = Settings.model_validate(data, context={"base": base})
    except ValidationError as error:
        raise_problems(name, [*problems, *explain(error, origins)])
    if problems:
        raise_problems(name, problems)
    return settings.read_from(source)


def _parse_toml(content: bytes | str, name: str) -> dict[str, object]:
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8", hint="save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML: {error}", hint="mend the line that is named") from None
    except (ValueError, RecursionError):
        # tomllib lets through what int() and the interpreter's stack refuse.
        raise ConfigError(
            f"{name}: not TOML: a number too long or tables nested too deep",
            hint="vsql-sync.toml.example shows the form",
        ) from None


def _unusable(value: object, at: Location) -> list[Problem]:
    """NUL cannot stand in a path, a connection string or a name; refuse it before anything stumbles on it."""
    if len(at) > MAX_DEPTH:
        return [Problem(at, "tables nested too deep")]
    if isinstance(value, dict):
        return [problem for key in value for problem in _unusable(value[key], (*at, key))]
    if isinstance(value, list):
        return [problem for index, item in enumerate(value) for problem in _unusable(item, (*at, index))]
    if isinstance(value, str) and "\0" in value:
        return [Problem(at, "holds a NUL character; remove it")]
    return []


def _overlay(data: dict[str, object], env: Mapping[str, str]) -> tuple[dict[Location, str], list[Problem]]:
    """Put VSQL_SYNC__SECTION__KEY variables into `data`; returns which variable set which key."""
    origins: dict[Location, str] = {}
    problems: list[Problem] = []
    for variable in sorted(name for name in env if name.startswith(ENV_PREFIX)):
        at: Location = tuple(variable.removeprefix(ENV_PREFIX).lower().split("__"))
        value: object = env[variable]
        if model_at(at) is not None:
            problems.append(Problem(at, "names a section; name a key in it", variable))
            continue
        if takes_json(at):
            value = _json_or_none(env[variable])
            if value is None:
                problems.append(Problem(at, "must be a JSON list or object", variable))
                continue
        # JSON has an escape for NUL, and nests as deep as it likes.
        if unusable := _unusable(value, at):
            problems += [replace(problem, variable=variable) for problem in unusable]
            continue
        if _set(data, at, value):
            origins[at] = variable
        else:
            problems.append(
                Problem(at[:-1], "is no section in the file; a variable sets a key in it", variable)
            )
    return origins, problems


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _set(data: dict[str, object], at: Location, value: object) -> bool:
    """Set one key, making the tables on the way; False where something else than a table stands there."""
    table = data
    for part in at[:-1]:
        inner = table.setdefault(str(part), {})
        if not isinstance(inner, dict):
            return False
        table = inner
    table[str(at[-1])] = value
    return True
