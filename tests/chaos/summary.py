"""What became of fault runs: one table in docs/faults.md, a row for each commit and length of runs.

Not here: what a run is. Rules: a run is added once, by its seed; the table ends the file, what stands before
it is kept; a file without it is refused rather than overwritten.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.scene import Result

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "faults.md"
HEAD = "| Commit | Seconds | Runs | Failed | Seeds | Seeds that failed | Commits checked | Faults |"
RULE = "|---|---|---|---|---|---|---|---|"
_SOURCES = ("producers", "consumers", "shared", "schemas", "tests")


class SummaryError(Exception):
    """The file is not what this module writes."""


@dataclass
class Row:
    """All runs of one length at one commit."""

    commit: str
    seconds: int
    seeds: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    commits: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        """Add one run."""
        self.seeds.add(result.seed)
        self.failed |= {result.seed} if result.problem else set()
        self.commits += result.commits
        self.faults += result.faults

    def text(self) -> str:
        """The row of the table."""
        cells = (
            self.commit, self.seconds, len(self.seeds), len(self.failed), _ranges(self.seeds),
            _ranges(self.failed) or "none", self.commits, _by_kind(self.faults),
        )  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"

    @classmethod
    def parse(cls, line: str) -> Row:
        """Read what `text` wrote."""
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        try:
            commit, seconds, _, _, seeds, failed, commits, faults = cells
            bad = set() if failed == "none" else _numbers(failed)
            return cls(commit, int(seconds), _numbers(seeds), bad, int(commits), _from_kinds(faults))
        except ValueError as error:
            raise SummaryError(f"not a row of runs: {line}") from error


def present_commit() -> str:
    """The last commit of what is tried; with a "+" where files were changed since."""
    short = _git("log", "-1", "--format=%h", "--abbrev=10", "--", *_SOURCES)
    return short + ("+" if _git("status", "--porcelain", "--", *_SOURCES) else "")


def load(file: Path = FILE) -> list[Row]:
    """Every row of the file."""
    lines = file.read_text().splitlines()
    if HEAD not in lines:
        raise SummaryError(f"{file} has no table that begins with {HEAD!r}")
    return [Row.parse(line) for line in lines[lines.index(HEAD) + 2 :] if line.startswith("|")]


def add(result: Result, commit: str, file: Path = FILE) -> None:
    """Add a run to its row, or in a new row at the table's end."""
    rows = load(file)
    row = next((one for one in rows if (one.commit, one.seconds) == (commit, int(result.seconds))), None)
    if row is None:
        rows.append(row := Row(commit, int(result.seconds)))
    row.add(result)
    kept = file.read_text().split(HEAD)[0]
    file.write_text(kept + "\n".join([HEAD, RULE, *(one.text() for one in rows)]) + "\n")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _ranges(numbers: Iterable[int]) -> str:
    """Write {1, 2, 3, 7} as "1-3, 7"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in found)


def _numbers(text: str) -> set[int]:
    pairs = [part.partition("-") for part in text.split(",")]
    return {n for first, _, last in pairs for n in range(int(first), int(last or first) + 1)}


def _by_kind(faults: Counter[str]) -> str:
    """Write names and counts as "kill: consumer 3, producer 2; crash: kafka 1"."""
    kinds: dict[str, list[str]] = {}
    for name, count in sorted(faults.items()):
        kind, _, part = name.partition(" ")
        kinds.setdefault(kind, []).append(f"{part} {count}")
    return "; ".join(f"{kind}: {', '.join(parts)}" for kind, parts in kinds.items())


def _from_kinds(text: str) -> Counter[str]:
    found = Counter[str]()
    for kind, parts in re.findall(r"([\w-]+): ([^;]+)", text):
        for part in parts.split(", "):
            name, count = part.rsplit(" ", 1)
            found[f"{kind} {name}"] = int(count)
    return found
