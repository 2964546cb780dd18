"""Checks that the documentation is true; `make docs-check` runs it.

* A fenced block whose first line is `$ syncctl … --help` holds exactly what the command prints.
* A relative link points at a file that is there.

It changes nothing: it says which block or link of which file is wrong, and the fix is made by hand.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HELP = re.compile(r"\$ (syncctl(?: [a-z-]+)* --help)\n(.*)", re.DOTALL)
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
