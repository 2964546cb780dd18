"""`python -m vsql_producers [--config FILE] [--chain STREAM]`: the producer, or one stream's worker."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vsql_shared.service.main import service_main

if TYPE_CHECKING:
    from vsql_shared.config import Settings


def _run_worker(settings: Settings, chain: str) -> int:
    # Imported late: the supervisor decides where metrics live before their module is loaded.
    from vsql_producers.worker import run_worker

    return run_worker(settings, chain)


def main(argv: list[str]) -> int:
    """Run the producer, or a worker; returns the exit code."""
    return service_main("producer", "vsql_producers", _run_worker, argv, modules=("vsql_producers.worker",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
