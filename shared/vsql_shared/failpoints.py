"""Failpoints: named places where a test makes a process die or dawdle, to force a schedule. Off by default.

    VSQL_SYNC_ALLOW_FAILPOINTS=1
    VSQL_SYNC_FAILPOINTS="producer.packs-acked=kill:3,producer.confirmed=sleep:200"

`kill[:n]` ends the process (SIGKILL) at the n-th hit; `sleep:ms[:n]` waits at each hit, or at the n-th only.
Rules: places stand where progress becomes durable; without both variables, and outside of dev mode, `hit`
does nothing; `arm` refuses a text it does not understand, so that no test passes by a misspelling.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple

from vsql_shared.errors import ConfigError

_log = logging.getLogger(__name__)
_ALLOW, _POINTS = "VSQL_SYNC_ALLOW_FAILPOINTS", "VSQL_SYNC_FAILPOINTS"


class _Action(NamedTuple):
    kill: bool
    milliseconds: int
    nth: int


_armed: dict[str, _Action] = {}
_hits: dict[str, int] = {}


def arm(*, dev_mode: bool, environment: Mapping[str, str] | None = None) -> None:
    """Read the environment; a process calls it once at its start."""
    values = os.environ if environment is None else environment
    _armed.clear()
    _hits.clear()
    if not dev_mode or values.get(_ALLOW) != "1":
        return
    for part in filter(None, values.get(_POINTS, "").split(",")):
        name, _, what = part.partition("=")
        _armed[name.strip()] = _parse(what.strip(), part)
    if _armed:
        _log.warning("failpoints are armed", extra={"failpoints": sorted(_armed)})


def _parse(what: str, part: str) -> _Action:
    verb, *numbers = what.split(":")
    if all(number.isdigit() for number in numbers):
        values = [int(number) for number in numbers]
        if verb == "kill" and len(values) <= 1:
            return _Action(True, 0, values[0] if values else 1)
        if verb == "sleep" and 1 <= len(values) <= 2:
            return _Action(False, values[0], values[1] if len(values) == 2 else 0)
    raise ConfigError(
        f"{_POINTS}: {part!r} is not understood", hint="write name=kill, name=kill:3 or name=sleep:200"
    )


def hit(name: str) -> None:
    """Pass the place `name`; does nothing unless a test armed it."""
    if not _armed:
        return
    action = _armed.get(name)
    if action is None:
        return
    _hits[name] = _hits.get(name, 0) + 1
    if action.nth and _hits[name] != action.nth:
        return
    _log.warning("failpoint", extra={"failpoint": name, "kill": action.kill})
    if action.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(action.milliseconds / 1000)
