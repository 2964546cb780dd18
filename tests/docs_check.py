"""Checks that the documentation is true; `make docs-check` runs it.

* A fenced block whose first line is `$ syncctl … --help` holds exactly what the command prints.
* A relative link points at a file that is there.
* A file of the repository that stands in code is there, and so are the test and the case of it that are named
  behind it: `tests/unit/test_x.py::test_y[a case]`.

It changes nothing: it says which block or link of which file is wrong, and the fix is made by hand.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HELP = re.compile(r"\$ (syncctl(?: [a-z-]+)* --help)\n(.*)", re.DOTALL)
_ROOTS = "tests|shared|producers|consumers|schemas|bench|docs|compose"
_NAMED = re.compile(rf"`((?:{_ROOTS})/[\w./-]*)(?:::(\w+)(?:\[([^]`]+)\])?)?`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def help_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield command and printed text of each help block of a Markdown text."""
    for fence in _FENCE.finditer(text):
        if match := _HELP.fullmatch(fence.group(1)):
            yield match.group(1), match.group(2)


def relative_links(text: str) -> list[str]:
    """Return the link targets of a Markdown text that are paths; code is no place for links."""
    targets = _LINK.findall(_FENCE.sub("", text))
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


def named_files(text: str) -> list[tuple[str, str, str]]:
    """Return (file or folder, test, case) of each name in code; what is not named is ''."""
    return _NAMED.findall(_FENCE.sub("", text))


def untrue_name(file: str, test: str, case: str) -> str | None:
    """What of a name does not exist; None when all of it does."""
    path = ROOT / file
    if not path.exists():
        return f"{file}, which is not there"
    if test and not re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE):
        return f"{file}::{test}, and there is no such test"
    if case and json.dumps(case, ensure_ascii=False) not in _cases(path):
        return f"{file}::{test}[{case}], and there is no such case"
    return None


def _cases(path: Path) -> str:
    """The texts a case may stand in: the test's file, and the table of attacks beside it."""
    beside = path.parent / "attacks.py"
    return path.read_text() + (beside.read_text() if beside.exists() else "")


def check(path: Path) -> Iterator[str]:
    """Yield a sentence for everything in a Markdown file that is not true."""
    text = path.read_text()
    for command, shown in help_blocks(text):
        printed = _run(command)
        if printed.rstrip() != shown.rstrip():
            yield f"{path.relative_to(ROOT)}: `{command}` prints something else:\n{printed}"
    for target in relative_links(text):
        if not (path.parent / target).exists():
            yield f"{path.relative_to(ROOT)}: link to {target}, which is not there"
    for name in named_files(text):
        if (what := untrue_name(*name)) is not None:
            yield f"{path.relative_to(ROOT)}: names {what}"


def _run(command: str) -> str:
    words = shlex.split(command)
    program = [sys.executable, "-m", "vsql_ctl", *words[1:]]
    # Click wraps at the terminal's width; documentation is written for 80 columns.
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env={"COLUMNS": "80", "PATH": "/usr/bin:/bin"}
    )
    return done.stdout


def main() -> int:
    """Check README.md and docs/ and return the exit code."""
    files = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
    found = [sentence for path in files for sentence in check(path)]
    for sentence in found:
        print(f"docs: {sentence}", file=sys.stderr)
    print(f"docs: {len(files)} files, {len(found)} untrue")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
