"""Where settings come from and which source counts: pydantic-settings' sources, environment over file.

Not the search for the file (`load.py`), not the check of variables (`variables.py`). Rules:

* A source says where it reads only once, at construction: `reading` sets file, environment and folder for the
  settings constructed inside it, so that tests and services load alike, and two loads never mix.
* The environment is handed over checked; pydantic-settings nests it, decodes JSON and merges it.
* Without `reading`, settings come from the values given alone: nothing is picked up by accident.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX = "VSQL_SYNC__"
DELIMITER = "__"
# Asked to debug, the library logs what each source holds, passwords too: never.
logging.getLogger("pydantic_settings").setLevel(logging.INFO)


@dataclass(frozen=True)
class Reading:
    """What one load reads: the file's tables, the variables, the folder relative paths are meant from."""

    tables: dict[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


_current: ContextVar[Reading] = ContextVar("vsql_sync_reading")


@contextmanager
def reading(what: Reading) -> Iterator[None]:
    """Settings constructed inside are read from `what`."""
    token = _current.set(what)
    try:
        yield
    finally:
        _current.reset(token)


def folder_of_paths() -> Path | None:
    """The folder relative paths are meant from, while a file is being read."""
    return _current.get(Reading()).folder


class _EnvironmentSource(EnvSettingsSource):
    """The library's source over a given environment instead of the process's."""

    def __init__(self, settings_cls: type[BaseSettings], env: Mapping[str, str]) -> None:
        super().__init__(settings_cls, case_sensitive=False)
        self.env_vars = {name.lower(): value for name, value in env.items() if name.startswith(ENV_PREFIX)}


class LayeredSettings(BaseSettings):
    """Settings from values given, then the environment, then the file; the first that has a key counts."""

    # As in every section (`section.py`), and how variables are named.
    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
        env_prefix=ENV_PREFIX.lower(),
        env_nested_delimiter=DELIMITER,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  the process's own: `reading` gives the one that counts
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  no .env files: one file configures
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  secrets name their files themselves
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Say which sources there are, the one that counts most first."""
        what = _current.get(Reading())
        return (
            init_settings,
            _EnvironmentSource(settings_cls, what.env),
            InitSettingsSource(settings_cls, init_kwargs=what.tables),
        )
