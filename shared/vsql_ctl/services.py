"""The two services of a node as programs: their packages and how they are called. Imports neither."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from vsql_shared.errors import EnvironmentFault

SERVICES = {"producer": "vsql_producers", "consumer": "vsql_consumers"}


def service_command(service: str, source: Path | None) -> list[str]:
    """The command line of a service; without a file it takes its configuration from the environment."""
    package = SERVICES[service]
    if importlib.util.find_spec(package) is None:
        raise EnvironmentFault(f"the package {package} is not installed", hint="install vsql-sync as a whole")
    # -P: a folder named like a module of ours in the working directory must not be run in its place.
    command = [sys.executable, "-P", "-m", package]
    return [*command, "--config", str(source.absolute())] if source is not None else command
