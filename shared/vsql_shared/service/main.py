"""The entry of both services: `python -m vsql_producers|vsql_consumers [--config FILE] [--chain STREAM]`.

Without --chain it is the service: it supervises one worker process per stream and answers health probes. With
--chain it is the worker of that stream. Errors become one line on standard error and the error's exit code.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vsql_shared.config import advice, check_files, load_settings, require_built
from vsql_shared.errors import TransientError, VsqlSyncError
from vsql_shared.observe import shared_metrics
from vsql_shared.observe.logging import setup
from vsql_shared.observe.process import die_with_parent, harden
from vsql_shared.service.clock_check import require_clock
from vsql_shared.service.nursery import Nursery, begin
from vsql_shared.service.supervisor import Role, Supervisor, first_connection

if TYPE_CHECKING:
    from vsql_shared.config import Settings

_log = logging.getLogger(__name__)

RunWorker = Callable[["Settings", str], int]


def service_main(
    role: Role,
    package: str,
    run_worker: RunWorker,
    argv: list[str],
    *,
    run_member: RunWorker | None = None,
    modules: tuple[str, ...] = (),
) -> int:
    """Run the service or one of its workers; returns the process's exit code.

    `modules` are the workers': the nursery imports them.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=f"vsql-sync {role}")
    parser.add_argument("--config", type=Path, help="vsql-sync.toml; else where syncctl looks for it")
    parser.add_argument("--chain", help="run the worker of one stream (the service starts these itself)")
    if run_member is not None:
        parser.add_argument("--member", action="store_true", help="run a member of the stream --chain names")
    parser.add_argument("--service-pid", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    hardening = harden()
    nursery: Nursery | None = None
    try:
        if not args.chain:
            begun = begin(package, modules, argv)
            if isinstance(begun, list):  # from here on this process is a worker
                return service_main(role, package, run_worker, begun, run_member=run_member)
            nursery = begun
        settings = load_settings(args.config)
        check_files(settings)
        require_built(settings)
        setup(settings.log.level, settings.log.format, service=role, stream=args.chain)
        if not hardening.complete:
            _log.warning("this system does not let us forbid core dumps and debuggers")
        if nursery is None:
            die_with_parent(signal.SIGTERM, args.service_pid)
            run = run_member if run_member is not None and args.member else run_worker
            return run(settings, args.chain)
        for text in advice(settings):
            _log.warning("%s", text)
        return _run_service(settings, role, nursery)
    except VsqlSyncError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code


def _check_keys(settings: Settings) -> None:
    """Say now what would end every worker: a key that cannot be read, a KEK that is not there."""
    from vsql_shared.kms import open_provider, open_signer

    try:
        open_signer(settings)
    except TransientError as error:
        _log.warning("%s", error)
    try:
        open_provider(settings.encryption.kms, strict=settings.is_prod).close()
    except TransientError as error:
        _log.warning("%s", error)


def _run_service(settings: Settings, role: Role, nursery: Nursery) -> int:
    _check_keys(settings)
    first_connection(settings, role)
    require_clock(settings, role)
    shared_metrics.begin()
    # Only now: prometheus_client decides at import whether values are shared between processes.
    from vsql_shared.observe.http import HealthServer
    from vsql_shared.observe.metrics import exposition

    supervisor = Supervisor(settings, role, nursery)
    if not settings.metrics.enabled:
        return supervisor.run()
    address = settings.metrics.producer_addr if role == "producer" else settings.metrics.consumer_addr
    server = HealthServer(address, ready=supervisor.ready, healthy=supervisor.healthy, metrics=exposition)
    host, port = server.start()
    _log.info("service started", extra={"pid": os.getpid(), "health": f"http://{host}:{port}"})
    try:
        return supervisor.run()
    finally:
        server.stop()
