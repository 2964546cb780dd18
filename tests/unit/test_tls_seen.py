"""What a TLS server shows is written down, right or wrong; keys beside certificates are not."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.certificates import Authority, Issued
from vsql_shared import tls, tls_seen


@contextmanager
def serving(issued: Issued | None, *, preface: bool = False, answer: bytes = b"S") -> Iterator[int]:
    """A server of that certificate on a free port, as PostgreSQL begins it where there is a preface."""
    context = None
    if issued is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.certificate, issued.key)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            with raw:
                raw.settimeout(5)
                try:
                    if preface:
                        raw.recv(8)
                        raw.sendall(answer)
                    if context is not None:
                        with context.wrap_socket(raw, server_side=True) as secured:
                            secured.recv(1)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        # Closing alone does not wake the thread that waits in accept.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


@pytest.mark.parametrize("preface", [False, True])
def test_version_cipher_and_certificate_are_those_of_the_handshake(tmp_path: Path, preface: bool) -> None:
    authority = Authority.make("ours")
    issued = authority.issue(tmp_path / "db", "database", ["127.0.0.1"])
    means = tls.Means(authority.write(tmp_path / "ca.crt"))
    with serving(issued, preface=preface) as port:
        found = tls_seen.server("127.0.0.1", port, means, tls.POSTGRES if preface else b"")
    assert (found["tls"], found["version"], found["verifies"], found["fault"]) == (
        True,
        "TLSv1.3",
        True,
        None,
    )
    assert found["cipher_bits"] in (128, 256)
    assert found["certificate"] == tls_seen.file(issued.certificate)[0]
    shown = found["certificate"]
    assert (shown["subject"], shown["issuer"], shown["names"]) == ("CN=database", "CN=ours", ["127.0.0.1"])
    assert (shown["key"], shown["signed_with"]) == ("EC secp256r1", "sha256")


@pytest.mark.parametrize("fault", ["expired", "foreign"])
def test_a_certificate_that_does_not_verify_is_written_down_with_what_is_wrong(
    tmp_path: Path, fault: str
) -> None:
    authority = Authority.make("ours")
    signs = authority if fault == "expired" else Authority.make("theirs")
    issued = signs.issue(tmp_path / "db", "database", ["127.0.0.1"], expired=fault == "expired")
    with serving(issued) as port:
        found = tls_seen.server("127.0.0.1", port, tls.Means(authority.write(tmp_path / "ca.crt")))
    assert found["verifies"] is False
    assert ("expired" if fault == "expired" else "certificate is refused") in found["fault"]
    assert found["certificate"]["subject"] == "CN=database"


def test_a_database_without_tls_is_written_down_as_such() -> None:
    with serving(None, preface=True, answer=b"N") as port:
        found = tls_seen.server("127.0.0.1", port, tls.Means(), tls.POSTGRES)
    assert found == {"host": "127.0.0.1", "port": port, "tls": False}


def test_a_key_beside_a_certificate_is_not_shown(tmp_path: Path) -> None:
    issued = Authority.make("ours").issue(tmp_path / "both", "database", ["db.example"])
    key = [line for line in issued.key.read_text().splitlines() if not line.startswith("-----")]
    shown = str(tls_seen.file(issued.both))
    assert "db.example" in shown
    assert not [line for line in key if line in shown]


def test_what_holds_no_certificate_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    with pytest.raises(ValueError, match="PEM"):
        tls_seen.file(empty)
    with pytest.raises(OSError, match="No such file"):
        tls_seen.file(tmp_path / "none.pem")
