"""The health server: three paths, bounded, quiet, and a clear word when the address is taken."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import suppress

import pytest

from vsql_shared.errors import EnvironmentFault
from vsql_shared.observe.http import HealthServer


def _get(address: tuple[str, int], path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _serve(ready: str | None = None) -> HealthServer:
    return HealthServer("127.0.0.1:0", ready=lambda: ready, metrics=lambda: b"a_metric 1\n")


def test_health_readiness_and_metrics_answer() -> None:
    server = _serve()
    address = server.start()
    try:
        assert _get(address, "/healthz") == (200, b'{"status": "ok"}\n')
        assert _get(address, "/readyz") == (200, b'{"status": "ok"}\n')
        assert _get(address, "/metrics?x=1") == (200, b"a_metric 1\n")
        assert _get(address, "/metrics", "HEAD") == (200, b"")
    finally:
        server.stop()


def test_not_ready_says_why_and_stays_healthy() -> None:
    server = _serve("waiting for Kafka")
    address = server.start()
    try:
        status, body = _get(address, "/readyz")
        assert (status, json.loads(body)["reason"]) == (503, "waiting for Kafka")
        assert _get(address, "/healthz")[0] == 200
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/../etc/passwd", 404), ("GET", "/healthz/", 404), ("POST", "/healthz", 501)],
)
def test_anything_else_is_refused(method: str, path: str, status: int) -> None:
    server = _serve()
    address = server.start()
    try:
        assert _get(address, path, method)[0] == status
    finally:
        server.stop()


def test_a_failing_check_answers_without_its_text() -> None:
    def broken() -> str | None:
        raise ValueError("hunter2-marker")

    server = HealthServer("127.0.0.1:0", ready=broken, metrics=lambda: b"")
    address = server.start()
    try:
        status, body = _get(address, "/readyz")
        assert status == 500
        assert b"hunter2" not in body
    finally:
        server.stop()


def test_an_address_in_use_is_named() -> None:
    server = _serve()
    _, port = server.start()
    try:
        with pytest.raises(EnvironmentFault, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            HealthServer(f"127.0.0.1:{port}", ready=lambda: None, metrics=lambda: b"").start()
    finally:
        server.stop()


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(EnvironmentFault, match=r"cannot listen on no-such-host\.invalid:9464"):
        HealthServer("no-such-host.invalid:9464", ready=lambda: None, metrics=lambda: b"").start()


def test_a_flood_of_connections_is_bounded_and_the_server_recovers() -> None:
    server = _serve()
    address = server.start()
    idle = [socket.create_connection(address, timeout=5) for _ in range(16)]
    try:
        time.sleep(0.5)
        one_more = socket.create_connection(address, timeout=5)
        one_more.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        try:
            answer = one_more.recv(100)
        except ConnectionResetError:
            answer = b""
        assert answer == b"", "the seventeenth is closed at once"
        one_more.close()
        for connection in idle:
            connection.close()
        deadline = time.monotonic() + 5
        status = 0
        while status != 200 and time.monotonic() < deadline:
            try:
                status, _ = _get(address, "/healthz")
            except (http.client.HTTPException, OSError):
                time.sleep(0.05)
        assert status == 200
    finally:
        server.stop()


def test_callers_that_send_a_byte_now_and_then_do_not_keep_the_places() -> None:
    """The timeout of a silent caller never strikes these; a probe that gets no answer restarts a service."""
    server = HealthServer("127.0.0.1:0", ready=lambda: None, metrics=lambda: b"", request_seconds=4.0)
    address = server.start()
    slow = [socket.create_connection(address, timeout=5) for _ in range(16)]
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.1):
            for connection in slow:
                with suppress(OSError):
                    connection.send(b"G")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        time.sleep(0.3)
        with pytest.raises((http.client.HTTPException, OSError)):
            _get(address, "/healthz")
        time.sleep(4.5)
        assert _get(address, "/healthz")[0] == 200
    finally:
        over.set()
        dripping.join()
        for connection in slow:
            connection.close()
        server.stop()
