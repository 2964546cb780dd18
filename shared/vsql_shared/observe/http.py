"""Health, readiness and metrics over HTTP: the one thing vsql-sync serves without authentication.

Not an API. Rules:

* GET /healthz, /readyz and /metrics; anything else is 404. Nothing is read from the caller but the path.
* Bounded: so many requests at a time, so many seconds each; one more is closed at once.
* What is said holds no secret and no row; requests are not logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from typing_extensions import override

from vsql_shared.config.values import split_address
from vsql_shared.errors import EnvironmentFault

Check = Callable[[], str | None]
"""None when all is well; otherwise why not, in a few words."""

_REQUEST_SECONDS = 5.0
_REQUESTS_AT_ONCE = 16
_STOP_SECONDS = 2.0

log = logging.getLogger(__name__)


def always_well() -> str | None:
    """A process that answers is alive."""
    return None


class HealthServer:
    """The endpoints of one service, served by threads of their own; a context manager."""

    def __init__(
        self,
        address: str,
        *,
        ready: Check,
        metrics: Callable[[], bytes],
        healthy: Check = always_well,
        request_seconds: float = _REQUEST_SECONDS,
    ) -> None:
        """`request_seconds`: how long one caller may hold one of the few places."""
        self._address, self._request_seconds = address, request_seconds
        self._pages = _Pages(ready, healthy, metrics)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> tuple[str, int]:
        """Listen; returns the address, with the port the system chose when 0 was asked for."""
        host, port = split_address(self._address)
        try:
            self._server = _Server(host, port, self._pages, self._request_seconds)
        except OSError as error:
            raise EnvironmentFault(
                f"cannot listen on {self._address}: {error.strerror or 'address not known'}",
                hint="another process has it, or the address is not this machine's; see [metrics]",
            ) from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="health", daemon=True
        )
        self._thread.start()
        return host, int(self._server.server_address[1])

    def stop(self) -> None:
        """Stop listening; requests under way are left to their threads."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(_STOP_SECONDS)
            self._server = self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Pages:
    """What the three paths answer: status, content type, body."""

    def __init__(self, ready: Check, healthy: Check, metrics: Callable[[], bytes]) -> None:
        self._checks = {"/healthz": healthy, "/readyz": ready}
        self._metrics = metrics

    def answer(self, path: str) -> tuple[int, str, bytes]:
        if path in self._checks:
            reason = self._checks[path]()
            body = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
            return (200 if reason is None else 503), "application/json", json.dumps(body).encode() + b"\n"
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", self._metrics()
        return 404, "text/plain; charset=utf-8", b"not found; try /healthz, /readyz or /metrics\n"


class _Server(ThreadingHTTPServer):
    """A threaded server with a bound on its threads."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, host: str, port: int, pages: _Pages, seconds: float) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages, self._seconds = pages, seconds
        self._room = threading.BoundedSemaphore(_REQUESTS_AT_ONCE)
        super().__init__((host, port), _Handler)

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a thread, or close at once when all are taken."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    @override
    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Give the place back, however the request ended; it ends in time.

        The handler's own timeout is one of silence: a byte now and then would hold the place for ever.
        """
        limit = threading.Timer(self._seconds, _cut_off, (request,))
        limit.daemon = True
        limit.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            limit.cancel()
            self._room.release()

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet: a caller that hangs up is no event, and a traceback may quote values."""


def _cut_off(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it ended this moment
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One request of one caller."""

    timeout = _REQUEST_SECONDS
    server_version = "vsql-sync"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        """Answer from the pages; a page that fails is 500 without detail."""
        try:
            status, kind, body = self.server.pages.answer(self.path.partition("?")[0])
        except Exception as error:  # noqa: BLE001 - a failing check must answer, and its text may hold values
            log.warning("health page failed", extra={"path": self.path[:64], "cause": error})
            status, kind, body = 500, "text/plain; charset=utf-8", b"failed; see the service's log\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - http.server finds methods by these names

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """No access log: probes come every few seconds."""
