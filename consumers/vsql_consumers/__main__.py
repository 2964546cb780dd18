"""`python -m vsql_consumers`: the consumer service, or with --chain the worker of one stream."""

from __future__ import annotations

import sys

from vsql_shared.config import Settings
from vsql_shared.service.main import service_main


def _run_worker(settings: Settings, chain: str) -> int:
    # Imported late: metrics decide at import whether they are shared between processes.
    from vsql_consumers.worker import run_worker

    return run_worker(settings, chain)


if __name__ == "__main__":
    sys.exit(service_main("consumer", "vsql_consumers", _run_worker))
