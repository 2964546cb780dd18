"""Coverage limits of the parts on which secrecy and exactness rest; `make test-coverage` runs it.

    python -m tests.coverage_gate coverage.json

The limit for the whole is coverage's own (`fail_under`). Here each named part, a module or a folder, has one:
a part that no report mentions fails too, so that renaming a file cannot lift its limit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

LIMITS = {
    "shared/vsql_shared/crypto/": 95.0,
    "shared/vsql_shared/audit/": 95.0,
    "shared/vsql_shared/wire/": 95.0,
    "producers/vsql_producers/pgoutput.py": 95.0,
    "consumers/vsql_consumers/collect.py": 95.0,
    "consumers/vsql_consumers/apply.py": 95.0,
}
"""Least percentage of lines by part."""


def shortfalls(files: Mapping[str, tuple[int, int]], limits: Mapping[str, float]) -> list[str]:
    """Return a sentence per part below its limit; files are path → (lines, covered lines)."""
    found = []
    for part, limit in limits.items():
        counts = [count for path, count in files.items() if path == part or path.startswith(part)]
        lines = sum(total for total, _ in counts)
        if not lines:
            found.append(f"{part}: not in the report; correct the path in tests/coverage_gate.py")
            continue
        percent = 100.0 * sum(covered for _, covered in counts) / lines
        if percent < limit:
            found.append(f"{part}: {percent:.1f} % of {lines} lines, at least {limit:.0f} % are asked for")
    return found


def main(arguments: list[str]) -> int:
    """Check a report made by `coverage json` and return the exit code."""
    report = json.loads(Path(arguments[0]).read_text())
    files = {
        path: (entry["summary"]["num_statements"], entry["summary"]["covered_lines"])
        for path, entry in report["files"].items()
    }
    found = shortfalls(files, LIMITS)
    for sentence in found:
        print(f"coverage: {sentence}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
