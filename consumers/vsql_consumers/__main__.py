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


def _main(argv: list[str]) -> int:
    if any(word == "--tail" or word.startswith("--tail=") for word in argv):
        from vsql_consumers.tail import main

        return main(argv)
    return service_main("consumer", "vsql_consumers", _run_worker, argv, run_member=_run_member)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
