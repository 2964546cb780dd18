"""The list of files the stack downloads: reading `artifacts.lock`.

Pure: text in, values out. It downloads nothing (`fetch` does) and holds no server names.

Rules: every file has a pinned SHA-256; a line that does not parse is an error that names the line; a
group's fingerprint changes when any of its lines does, so an unpacked folder never outlives its list.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOCK_FILE = Path(__file__).with_name("artifacts.lock")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COORDINATES = {
    "maven": re.compile(r"[\w.-]+:[\w.-]+:[\w.-]+(:[\w.-]+@[\w.-]+)?"),
    "pypi": re.compile(r"[\w.-]+==[\w.]+"),
}


class LockFileError(Exception):
    """The lock file has a line that cannot be used. Correct that line."""


@dataclass(frozen=True)
class Artifact:
    """One file to download: what it belongs to, what it is, and what its bytes must hash to."""

    group: str
    machine: str | None
    """The processor it is for, as `platform.machine()` names it; None when it runs anywhere."""
    sha256: str
    source: str
    """`maven` or `pypi`."""
    coordinate: str

    @property
    def version(self) -> str:
        """The version the coordinate names."""
        return re.split(r"==|:", self.coordinate)[1 if self.source == "pypi" else 2]

    @property
    def maven_path(self) -> str:
        """The file's place below a Maven repository's root."""
        group, artifact, version, *rest = self.coordinate.split(":")
        classifier, _, extension = rest[0].partition("@") if rest else ("", "", "jar")
        name = "-".join(filter(None, (artifact, version, classifier)))
        return f"{group.replace('.', '/')}/{artifact}/{version}/{name}.{extension}"


def parse_lock(text: str) -> Iterator[Artifact]:
    """Yield the artifacts of a lock file's text."""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        yield _parse_line(line, number)


def _parse_line(line: str, number: int) -> Artifact:
    fields = line.split()
    if len(fields) != 4:
        raise LockFileError(f"line {number}: {len(fields)} fields, expected GROUP SHA-256 SOURCE COORDINATE")
    name, sha256, source, coordinate = fields
    if not _SHA256.fullmatch(sha256):
        raise LockFileError(f"line {number}: {sha256!r} is not a SHA-256 in lower-case hex")
    if source not in _COORDINATES:
        raise LockFileError(f"line {number}: source {source!r} is none of {', '.join(_COORDINATES)}")
    if not _COORDINATES[source].fullmatch(coordinate):
        raise LockFileError(f"line {number}: {coordinate!r} is not a {source} coordinate with a version")
    group, _, machine = name.partition("/")
    return Artifact(group, machine or None, sha256, source, coordinate)


def group_artifacts(artifacts: list[Artifact], group: str, machine: str) -> list[Artifact]:
    """Return the artifacts of a group that fit a machine; a group without any is an error."""
    found = [a for a in artifacts if a.group == group and a.machine in (None, machine)]
    if not found:
        raise LockFileError(
            f"nothing listed for {group} on {machine}; give a running server by its address instead "
            "(VSQL_SYNC_TEST_KAFKA, VSQL_SYNC_TEST_PG18)"
        )
    return found


def fingerprint(artifacts: list[Artifact]) -> str:
    """Return a short name for exactly these files."""
    digest = hashlib.sha256("\n".join(sorted(a.sha256 for a in artifacts)).encode())
    return digest.hexdigest()[:12]
