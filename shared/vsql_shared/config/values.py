"""The kinds of value a configuration key can hold, and how each is read.

Not a settings model: only the types the models are made of. Rules:

* A value is read in one way only, and what is refused says what to write instead.
* No refusal repeats the value: the loader shows it, masked where the key holds a secret.
* Sizes are bytes, durations carry a unit ("7d"), addresses are host:port.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from vsql_shared.config.sources import folder_of_paths

_DURATION_UNITS_MS = {
    "ms": 1,
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 604_800_000,
}
_SIZE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
# A century: longer is a typing error, and timedelta stays far from its own limit.
_LONGEST_MS = 100 * 366 * 86_400_000
# PostgreSQL's NAMEDATALEN - 1; a longer name would be cut by the server without an error.
IDENTIFIER_MAX_BYTES = 63

CLUSTER_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
NODE_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


def refusal(text: str) -> PydanticCustomError:
    """An error whose text the loader shows as it stands; braces in it are not a template."""
    return PydanticCustomError("refused", "{text}", {"text": text})


def parse_duration(value: object) -> timedelta:
    """Read "250ms", "30s", "5m", "24h", "7d" or "2w"."""
    if isinstance(value, timedelta):
        return value
    found = re.fullmatch(r"([0-9]{1,12})\s*(ms|s|m|h|d|w)", value) if isinstance(value, str) else None
    if found is None:
        raise refusal('write a duration with its unit, such as "30s", "5m", "24h" or "7d"')
    milliseconds = int(found[1]) * _DURATION_UNITS_MS[found[2]]
    if milliseconds > _LONGEST_MS:
        raise refusal("a duration is at most 100 years")
    return timedelta(milliseconds=milliseconds)


def format_duration(value: timedelta) -> str:
    """Write a duration as `parse_duration` reads it, in the largest unit that is exact (weeks as days)."""
    milliseconds = value // timedelta(milliseconds=1)
    for unit in ("d", "h", "m"):
        if milliseconds and milliseconds % _DURATION_UNITS_MS[unit] == 0:
            return f"{milliseconds // _DURATION_UNITS_MS[unit]}{unit}"
    return f"{milliseconds}ms" if milliseconds % 1_000 else f"{milliseconds // 1_000}s"


def parse_size(value: object) -> int:
    """Read a number of bytes, or text with a unit: "4MiB", "10GB"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = re.fullmatch(r"([0-9]{1,15})\s*([A-Za-z]{0,3})", value) if isinstance(value, str) else None
    if found is None or found[2] not in _SIZE_UNITS:
        raise refusal('write a size in bytes or with a unit, such as 65536, "256KiB", "4MiB" or "10GB"')
    return int(found[1]) * _SIZE_UNITS[found[2]]


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[::1]:port"; port 0 asks the system for a free one."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/@]+):([0-9]{1,5})", address)
    if found is None or int(found[2]) > 65_535:
        raise refusal('write an address as host:port, such as "127.0.0.1:9464"')
    return found[1].strip("[]"), int(found[2])


def _address(value: str) -> str:
    split_address(value)
    return value


def _bootstrap(value: object) -> object:
    """Accept a list or comma-separated text, as people know both from Kafka clients."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise refusal('write broker addresses as "host:port,host:port" or a list of those')
    hosts = [part.strip() for part in parts]
    for host in hosts:
        if split_address(host)[1] == 0:
            raise refusal("a broker's port is 1 to 65535")
    return ",".join(hosts)


def _not_bool(value: object) -> object:
    """Refuse true, which pydantic reads as 1: in a configuration that is always a mistake."""
    if isinstance(value, bool):
        raise refusal("must be a whole number")
    return value


def _path(value: Path) -> Path:
    """A relative path is meant from the folder of the file that names it, not from where a service runs."""
    folder = folder_of_paths()
    try:
        expanded = value.expanduser()
    except RuntimeError:
        raise refusal("the home directory behind ~ is not known; write the whole path") from None
    return folder / expanded if folder is not None else expanded


def _identifier(value: str) -> str:
    if not value or len(value.encode("utf-8", "replace")) > IDENTIFIER_MAX_BYTES:
        raise refusal("a PostgreSQL name has 1 to 63 bytes")
    return value


def _table(value: str) -> str:
    """`table`, `schema.table`, or the pattern `*`; quoting rules are those of SQL."""
    if not value.strip() or len(value) > 2 * IDENTIFIER_MAX_BYTES + 5:
        raise refusal('write a table as "table" or "schema.table"')
    return value


def _cluster_name(value: str) -> str:
    if CLUSTER_NAME.fullmatch(value) is None:
        raise refusal("1 to 63 of a-z 0-9 . _ -, beginning with a letter or a digit")
    return value


def _node_name(value: str) -> str:
    if NODE_NAME.fullmatch(value) is None:
        raise refusal("1 to 31 of a-z 0-9 -, beginning with a letter")
    return value


Whole = Annotated[int, BeforeValidator(_not_bool)]
Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Address = Annotated[str, AfterValidator(_address)]
Bootstrap = Annotated[str, BeforeValidator(_bootstrap)]
ConfigPath = Annotated[Path, AfterValidator(_path)]
Identifier = Annotated[str, AfterValidator(_identifier)]
TableName = Annotated[str, AfterValidator(_table)]
ClusterName = Annotated[str, AfterValidator(_cluster_name)]
NodeName = Annotated[str, AfterValidator(_node_name)]


def is_local(place: str) -> bool:
    """Whether a host, with a port or without, is this machine: loopback, localhost, or a socket's folder."""
    host = place.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    if host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
