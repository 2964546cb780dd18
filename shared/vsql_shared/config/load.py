"""Find the file, read it, let pydantic-settings lay the environment over it, validate it.

Rules:

1. The first of --config, VSQL_SYNC_CONFIG, ./vsql-sync.toml, /etc/vsql-sync/vsql-sync.toml is read; only one.
2. VSQL_SYNC__SECTION__KEY overrides a key; a variable that names no key is an error like a misspelt key.
3. Whatever is wrong, the caller gets one ConfigError that lists all of it (`report.py`), nothing else.
   That is why the file is read here: the library's own TOML source passes over what is no regular file, reads
   without a bound and raises as it pleases.
4. No file needs to exist when the environment gives the keys: containers are often run so.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vsql_shared.config.report import explain, raise_problems, unusable
from vsql_shared.config.settings import Settings
from vsql_shared.config.sources import ENV_PREFIX, Reading, reading
from vsql_shared.config.variables import check_variables
from vsql_shared.errors import ConfigError

CONFIG_VARIABLE = "VSQL_SYNC_CONFIG"
FILE_NAME = "vsql-sync.toml"
SYSTEM_PATH = Path("/etc/vsql-sync") / FILE_NAME
# A configuration of thousands of tables is below this; more is not a configuration.
MAX_FILE_BYTES = 4 * 2**20


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
    tables = _parse_toml(content, name)
    if found := unusable(tables, ()):
        raise_problems(name, found)
    usable, origins, problems = check_variables(env, tables)
    folder = source.parent if source is not None else None
    try:
        with reading(Reading(tables, usable, folder)):
            settings = Settings()
    except ValidationError as error:
        raise_problems(name, [*problems, *explain(error, origins)])
    if problems:
        raise_problems(name, problems)
    return settings.read_from(source)


def _parse_toml(content: bytes | str, name: str) -> dict[str, Any]:
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
