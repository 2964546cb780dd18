"""A fault on the way to a real service: it answers some calls itself, "busy", and hands on the rest."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from typing_extensions import override


class BusyService:
    """How many calls came, and how many of the next ones are refused with `status` and `body`."""

    def __init__(self, upstream: str, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.upstream, self.status, self.body, self.headers = urlsplit(upstream).netloc, status, body, headers
        self.refuse = 0
        self.calls = 0
        self.address = ""
        self.lock = threading.Lock()

    def next_is_refused(self) -> bool:
        """Count a call."""
        with self.lock:
            self.calls += 1
            self.refuse -= 1
            return self.refuse >= 0

    def start_refusing(self, calls: int) -> None:
        """Refuse the next `calls`, and count from here."""
        with self.lock:
            self.refuse, self.calls = calls, 0


@contextmanager
def busy_service(
    upstream: str, status: int, body: bytes = b"{}", headers: dict[str, str] | None = None
) -> Iterator[BusyService]:
    """Stand between a client and `upstream` while the block runs."""
    service = BusyService(upstream, status, body, headers or {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(service))
    service.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(service: BusyService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if service.next_is_refused():
                self._answer(service.status, service.headers, service.body)
                return
            upstream = http.client.HTTPConnection(service.upstream, timeout=30)
            try:
                upstream.request(self.command, self.path, sent or None, dict(self.headers.items()))
                answer = upstream.getresponse()
                kind = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
                self._answer(answer.status, kind, answer.read())
            finally:
                upstream.close()

        do_GET = do_POST = do_PUT = _handle  # noqa: N815  # http.server's names

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        @override
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the terminal is the test run's."""

    return Handler
