"""A real schema registry on this machine: Apicurio Registry with its Confluent-compatible API, in memory.

And a gate before it, as operators place one: TLS, client certificates, credentials, and which calls they
allow. Apicurio itself knows OpenID Connect only, and no server of that is at hand.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from typing_extensions import override

from tests.moto_server import answers
from tests.stack.fetch import registry_home
from tests.stack.java import find_java
from tests.stack.ports import release_port, reserve_port
from tests.stack.processes import kill_tree, spawn, tail
from tests.waiting import until

# Some seconds on an idle machine, twenty on a busy one.
_START_SECONDS = 120.0
_JVM_FLAGS = ("-Xms64m", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto")
_PATH = "/apis/ccompat/v7"


class Registry:
    """A running registry, and its administrator's hands."""

    def __init__(self, root: str) -> None:
        self.root = root
        """Where its pages are; no Confluent API is there."""
        self.url = root + _PATH

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Any call of the API; its answer, of a refusal too."""
        request = urllib.request.Request(  # noqa: S310  # an address on this machine
            f"{self.url}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  # this machine too
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return json.load(error)

    def register(self, subject: str, schema: object, level: str = "") -> int:
        """Give a subject a schema, text or JSON, and what it requires of the next one."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        made = self.ask("POST", f"/subjects/{quote(subject)}/versions", {"schema": text})
        if level:
            self.ask("PUT", f"/config/{quote(subject)}", {"compatibility": level})
        return int(made["id"])

    def schema(self, schema_id: int) -> str:
        """What an id stands for."""
        return str(self.ask("GET", f"/schemas/ids/{schema_id}")["schema"])

    def versions(self, subject: str) -> list[int]:
        """Of a subject; none where there is no such subject."""
        found = self.ask("GET", f"/subjects/{quote(subject)}/versions")
        return found if isinstance(found, list) else []

    def level(self, subject: str) -> str:
        """What a subject requires of the next schema."""
        return str(self.ask("GET", f"/config/{quote(subject)}?defaultToGlobal=true")["compatibilityLevel"])


@contextmanager
def registry_server(folder: Path) -> Iterator[Registry]:
    """A registry without anything in it; it ends with the block."""
    port, log = reserve_port(), folder / "registry.log"
    jar = next(registry_home().glob("*-runner.jar"))
    options = [f"-Dquarkus.http.port={port}", "-Dquarkus.http.host=127.0.0.1", "-Dquarkus.log.level=WARN"]
    process = spawn([str(find_java()), *_JVM_FLAGS, *options, "-jar", str(jar)], log=log)
    try:
        until(lambda: answers(port, f"{_PATH}/subjects"), _START_SECONDS, lambda: tail(log))
        yield Registry(f"http://127.0.0.1:{port}")
    finally:
        kill_tree(process)
        release_port(port)


class Gate:
    """What stands before a registry. `calls` are those that came, whatever became of them."""

    def __init__(
        self, upstream: Registry, authorization: str, allows: Callable[[str, str], bool] | None
    ) -> None:
        self.upstream, self.authorization, self.allows = upstream, authorization, allows
        self.calls: list[str] = []
        self.url = ""


@contextmanager
def gate(
    upstream: Registry,
    *,
    authorization: str = "",
    allows: Callable[[str, str], bool] | None = None,
    tls: ssl.SSLContext | None = None,
    port: int = 0,
) -> Iterator[Gate]:
    """Hand on to the registry what has this header and is allowed (method, path), and refuse the rest."""
    made = Gate(upstream, authorization, allows)
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(made))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    made.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}{_PATH}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(door: Gate) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            door.calls.append(f"{self.command} {self.path.removeprefix(_PATH)}")
            if door.authorization and self.headers.get("Authorization") != door.authorization:
                self._answer(401, b'{"error_code": 40101, "message": "User cannot access the resource."}')
            elif door.allows and not door.allows(self.command, self.path.removeprefix(_PATH)):
                self._answer(403, b'{"error_code": 40301, "message": "User is denied this operation."}')
            else:
                self._hand_on(sent)

        do_GET = do_POST = do_PUT = _handle  # noqa: N815  # http.server's names

        def _hand_on(self, sent: bytes) -> None:
            upstream = http.client.HTTPConnection(urlsplit(door.upstream.root).netloc, timeout=30)
            try:
                upstream.request(self.command, self.path, sent or None, {"Content-Type": "application/json"})
                answer = upstream.getresponse()
                self._answer(answer.status, answer.read())
            finally:
                upstream.close()

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        @override
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the terminal is the test run's."""

    return Handler
