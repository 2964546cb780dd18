"""What the programs that set a host's clock say of it: their output becomes a value. Pure.

Not here: running them (host_read.py). Rules:

* Synchronised is only what says so: no line, no daemon, an unknown word mean that it is not.
* Output is somebody else's: whatever it is, it becomes a HostClock or a DecodeError, nothing else.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vsql_shared.errors import DecodeError

MOST_TEXT = 64 << 10
"""Characters of output that are looked at."""
_MOST_SECONDS = 10**9
_LOCAL_REFERENCE = "7F7F0101"  # chrony's own clock, served as if it were a source
_ERROR, _UNSYNCHRONISED = 5, 0x40  # TIME_ERROR, STA_UNSYNC of adjtimex(2)


class HostClock(NamedTuple):
    """Who says it, and what."""

    source: str
    synchronised: bool
    error_us: int | None
    """By how much it may be wrong at most, where that is said."""
    why: str
    """Why it counts as not synchronised; empty where it is."""


def parse_chrony(text: str) -> HostClock:
    """`chronyc tracking`. Raises DecodeError for anything else."""
    said = _pairs(text, ":")
    if "Leap status" not in said or "Reference ID" not in said:
        raise DecodeError("not the output of `chronyc tracking`")
    why = ""
    stratum = said.get("Stratum", "")
    if said["Leap status"] not in ("Normal", "Insert second", "Delete second"):
        why = f"leap status {said['Leap status'][:40]!r}"
    elif said["Reference ID"].split(" ")[0] in ("00000000", _LOCAL_REFERENCE, ""):
        why = "it follows no other clock"
    elif not re.fullmatch(r"[1-9]|1[0-5]", stratum):
        why = f"stratum {stratum[:10]!r}"
    delay, dispersion = _seconds(said.get("Root delay")), _seconds(said.get("Root dispersion"))
    off = _seconds(said.get("System time"))
    error = None
    if delay is not None and dispersion is not None and off is not None:
        error = round((delay / 2 + dispersion + off) * 1e6)
    return HostClock("chrony", not why, error, why)


def parse_timedatectl(text: str) -> HostClock:
    """`timedatectl show`. Raises DecodeError for anything else."""
    said = _pairs(text, "=")
    if "NTPSynchronized" not in said:
        raise DecodeError("not the output of `timedatectl show`")
    yes = said["NTPSynchronized"] == "yes"
    return HostClock("timedatectl", yes, None, "" if yes else "NTPSynchronized is not yes")


def parse_timesync(text: str) -> HostClock:
    """`timedatectl show-timesync --all`: systemd-timesyncd. Raises DecodeError for anything else."""
    said = _pairs(text, "=")
    if "ServerName" not in said and "FallbackNTPServers" not in said:
        raise DecodeError("not the output of `timedatectl show-timesync`")
    message = dict(re.findall(r"(\w+)=([^,}]*?)\s*[,}]", said.get("NTPMessage", "")))
    why = ""
    if not message:
        why = "no server has answered"
    elif message.get("Leap") not in ("0", "1", "2") or message.get("Ignored") != "no":
        why = "its server is not synchronised, or was not believed"
    elif not re.fullmatch(r"[1-9]|1[0-5]", message.get("Stratum", "")):
        why = "stratum of its server"
    return HostClock("systemd-timesyncd", not why, None, why)


def of_kernel(returned: int, status: int, max_error_us: int) -> HostClock:
    """adjtimex(2): what any program that disciplines the clock has told the kernel."""
    synchronised = 0 <= returned != _ERROR and not status & _UNSYNCHRONISED
    why = "" if synchronised else "nothing that sets it has told the kernel that it is synchronised"
    return HostClock("kernel", synchronised, max_error_us if synchronised else None, why)


def best(found: list[HostClock]) -> HostClock | None:
    """Chrony's word where it runs; else the first that says it is synchronised, else the first."""
    if found and found[0].source == "chrony":
        return found[0]
    return next((one for one in found if one.synchronised), found[0] if found else None)


def _pairs(text: str, sign: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text[:MOST_TEXT].splitlines():
        name, there, value = line.partition(sign)
        if there:
            found.setdefault(name.strip(), value.strip())
    return found


def _seconds(text: str | None) -> float | None:
    """The number at the beginning of "0.000012 seconds slow of NTP time", without its sign."""
    match = re.match(r"[+-]?(\d{1,12}(?:\.\d{1,12})?) seconds\b", text or "")
    value = float(match[1]) if match else None
    return value if value is not None and value <= _MOST_SECONDS else None
