"""What a server may answer that says it is a schema registry: a typed refusal, in time, and nothing else."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.raw_server import drip, speaking
from vsql_shared.config.schema_registry import SchemaRegistrySettings
from vsql_shared.errors import RegistryError, TransientError
from vsql_shared.kafka.schema_registry import SchemaRegistry, pack_schema


def asked(url: str, wait: Callable[[float], None] = time.sleep, **section: Any) -> int:
    settings = SchemaRegistrySettings.model_validate({"url": url, "timeout": "1s", **section})
    return SchemaRegistry(settings, wait).id_of(pack_schema())


def answer(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


ANSWERS: dict[str, bytes] = {
    "a redirect": answer("302 Found", b"", "Location: file:///etc/passwd"),
    "a redirect that keeps the method": answer(
        "307 Temporary Redirect", b"", "Location: http://127.0.0.1:1/"
    ),
    "nothing": answer("204 No Content", b""),
    "an id that is text": answer("200 OK", b'{"id": "1"}'),
    "an id that is true": answer("200 OK", b'{"id": true}'),
    "an id of nothing": answer("200 OK", b'{"id": null}'),
    "a negative id": answer("200 OK", b'{"id": -1}'),
    "an id of zero": answer("200 OK", b'{"id": 0}'),
    "an id beyond four bytes": answer("200 OK", b'{"id": 4294967296}'),
    "an id with a fraction": answer("200 OK", b'{"id": 1.5}'),
    "no object": answer("200 OK", b"[1]"),
    "no JSON": answer("200 OK", b"\xff\xfe"),
    "JSON without end": answer("200 OK", b"[" * 200_000),
    "more than a mebibyte": answer("200 OK", b'{"id": 1, "more": "' + b"x" * (2 << 20) + b'"}'),
    "control characters": answer(
        "403 Forbidden", b'{"error_code": 1, "message": "\\u001b[31m\\nx\\u202e"}', "X: y"
    ),
    "words without end": answer("401 Unauthorized", b'{"message": "' + b"y" * 100_000 + b'"}'),
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    "less than it said": b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"id": 1',
    "no HTTP": b"\x00\x01\x02 SSH-2.0\r\n\r\n",
    "a line without end": b"HTTP/1.1 200 " + b"x" * 100_000,
    "a conflict where nothing was registered": answer("409 Conflict", b'{"message": "no"}'),
    "a mode that takes nothing": answer("422 Unprocessable Entity", b'{"error_code": 42205}'),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_whatever_a_registry_answers_is_a_typed_refusal_in_words_that_can_be_shown(case: str) -> None:
    with (
        speaking(lambda conn: conn.sendall(ANSWERS[case])) as url,
        pytest.raises((RegistryError, TransientError)) as refused,
    ):
        asked(url, username="u", password="marker-of-a-password")
    said = f"{refused.value} {refused.value.hint}"
    assert said.isprintable()
    assert len(said) < 1_200
    assert "marker-of-a-password" not in said
    if case.startswith("a conflict"):
        assert "not compatible" not in said


DRIPS = {
    "in its body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", False),
    "in its headers": (b"HTTP/1.1 200 OK\r\nX: ", False),
    "over TLS": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", True),
}


@pytest.mark.parametrize("case", DRIPS)
def test_a_server_that_answers_byte_by_byte_is_given_up_in_time(case: str, tmp_path: Path) -> None:
    first, over_tls = DRIPS[case]
    more: dict[str, Any] = {}
    tls = None
    if over_tls:
        ca = Authority.make("ours")
        issued = ca.issue(tmp_path / "registry", "registry", names=["127.0.0.1"])
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(issued.certificate, issued.key)
        more = {"ca_path": ca.write(tmp_path / "ca.crt")}
    began = time.monotonic()
    with speaking(lambda conn: drip(conn, first), tls) as url, pytest.raises(TransientError) as waited:
        asked(url, **more)
    # Three calls of a second, two pauses.
    assert 3 <= time.monotonic() - began < 12
    assert "TimeoutError" in str(waited.value)


class Halted(Exception):
    """What waits was told to stop."""


def test_whoever_waits_for_a_slow_server_says_so_before_each_question_and_can_be_stopped() -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if seconds:
            raise Halted

    with (
        speaking(lambda conn: drip(conn, DRIPS["in its body"][0])) as url,
        pytest.raises(Halted),
    ):
        asked(url, wait)
    assert waited[0] == 0
    assert len(waited) == 2, "it went on after it was told to stop"
