"""`python -m vsql_consumers`: the consumer service; with --chain a stream's worker, with --tail a reader."""

from __future__ import annotations

import sys

from vsql_shared.config import Settings
from vsql_shared.service.main import service_main


def _run_worker(settings: Settings, chain: str) -> int:
    # Imported late: metrics decide at import whether they are shared between processes.
    from vsql_consumers.worker import run_worker

    return run_worker(settings, chain)


def _run_member(settings: Settings, chain: str) -> int:
    from vsql_consumers.member import run_member

    return run_member(settings, chain)


def main(argv: list[str]) -> int:
    """Run the consumer, a worker, a member or a reader; returns the exit code."""
    if any(word == "--tail" or word.startswith("--tail=") for word in argv):
        from vsql_consumers.tail import main as tail

        return tail(argv)
    return service_main(
        "consumer",
        "vsql_consumers",
        _run_worker,
        argv,
        run_member=_run_member,
        modules=("vsql_consumers.worker", "vsql_consumers.member"),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
