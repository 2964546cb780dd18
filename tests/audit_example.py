"""Runs the program of docs/operations/audit.md that verifies an export. Not a test itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from vsql_shared.crypto.signing import Signer

ROOT = Path(__file__).parents[1]


def worked_example() -> str:
    text = (ROOT / "docs" / "operations" / "audit.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert isinstance(program, str)
    return program


def run_example(file: Path, *trusted: Signer) -> subprocess.CompletedProcess[str]:
    program = file.with_name("verify.py")
    program.write_text(worked_example())
    keys = [f"{one.node}={one.fingerprint}" for one in trusted]
    return subprocess.run(
        [sys.executable, str(program), str(file), *keys], capture_output=True, text=True, check=False
    )
