"""What a TLS server shows is written down, right or wrong; keys beside certificates are not."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.certificates import Authority, Issued
from vsql_ctl.evidence import connections
from vsql_shared import tls, tls_seen
from vsql_shared.errors import VsqlSyncError


@contextmanager
def serving(
    issued: Issued | None,
    *,
    preface: bool = False,
    answer: bytes = b"S",
    clients: Path | None = None,
    shown: list[bytes | None] | None = None,
) -> Iterator[int]:
    """A server of that certificate on a free port, as PostgreSQL begins it where there is a preface.

    `clients`: it asks for certificates of this authority; `shown` gets what clients show.
    """
    context = None
    if issued is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.certificate, issued.key)
        if clients is not None:
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_OPTIONAL
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
                            if shown is not None:
                                shown.append(secured.getpeercert(binary_form=True))
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


@pytest.mark.parametrize("raw", [b"", b"no certificate", bytes([0x30, 0x80]) + bytes(40)])
def test_a_malformed_certificate_is_told_and_ends_nothing(raw: bytes) -> None:
    found = tls_seen.parsed(raw)
    assert set(found) == {"not_read", "sha256"}
    assert str(found["not_read"]).startswith("malformed: ")


def test_no_flipped_byte_of_a_certificate_ends_the_inventory(tmp_path: Path) -> None:
    issued = Authority.make("ours").issue(tmp_path / "x", "broker", ["127.0.0.1"])
    whole = x509.load_pem_x509_certificate(issued.certificate.read_bytes()).public_bytes(Encoding.DER)
    for at in range(len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 0x5A
        assert "sha256" in tls_seen.parsed(bytes(raw)), at


@pytest.mark.parametrize(
    ("host", "port"), [("x" * 64 + ".example", 9092), ("127.0.0.1", 70_000), ("a..b", 1)]
)
def test_a_place_a_hostile_broker_names_is_a_typed_error(host: str, port: int) -> None:
    with pytest.raises(VsqlSyncError):
        connections.seen(host, port, tls.Means())


@pytest.mark.parametrize("verifies", [True, False])
def test_our_certificate_is_shown_only_to_a_server_that_verifies(tmp_path: Path, verifies: bool) -> None:
    ours, theirs = Authority.make("ours"), Authority.make("theirs")
    issued = (ours if verifies else theirs).issue(tmp_path / "x", "broker", ["127.0.0.1"])
    own = ours.issue(tmp_path / "own", "us", [])
    means = tls.Means(ours.write(tmp_path / "ca.crt"), own.certificate, own.key)
    shown: list[bytes | None] = []
    with serving(issued, clients=means.ca, shown=shown) as port:
        found = tls_seen.server("127.0.0.1", port, means)
    assert (found["verifies"], found["certificate"]["subject"]) == (verifies, "CN=broker")
    assert any(shown) is verifies
