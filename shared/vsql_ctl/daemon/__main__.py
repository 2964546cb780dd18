"""The daemon as a background process: `syncctl daemon start` runs this. Standard error is its log file."""

from __future__ import annotations

import sys

from vsql_ctl.cli import exit_with
from vsql_ctl.daemon.launch import plan_of, run_here
from vsql_shared.config import load_settings


def main() -> int:
    """Load the configuration that was found by whoever started us, and be the daemon."""
    return run_here(plan_of(load_settings(sys.argv[1] if len(sys.argv) > 1 else None), to_files=True))


exit_with(main)
