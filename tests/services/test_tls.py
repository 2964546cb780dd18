"""TLS to PostgreSQL as strict as it can be, and what is said where a certificate or version is too weak.

Servers are PostgreSQL 15 and 18 with certificates of a test's authority, and a listener of an old version.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from tests.certificates import Authority, Issued
from tests.nodes import TwoNodes
from tests.stack import PostgresServer, Stack
from tests.stack.postgres import postgres_user
from tests.waiting import until
from vsql_shared import tls
from vsql_shared.config.kafka import KafkaSecurity
from vsql_shared.errors import DatabaseError
from vsql_shared.pg.connect import connect


@dataclass
class Secured:
    """A server with TLS, and the files of its authority."""

    server: PostgresServer
    authority: Authority
    ca: Path
    folder: Path

    def conninfo(self, **changed: str) -> str:
        """The strictest way to it, or another."""
        words = {"sslmode": "verify-full", "sslrootcert": str(self.ca)} | changed
        return " ".join([self.server.conninfo(), *(f"{name}={value}" for name, value in words.items())])

    def use(self, issued: Issued) -> None:
        """Give the server another certificate."""
        for file in (issued.certificate, issued.key):
            if user := postgres_user():
                shutil.chown(file, user)
        self.server.configure(
            {"ssl": "on", "ssl_cert_file": str(issued.certificate), "ssl_key_file": str(issued.key)}
        )
        self.server.restart()

    def good(self) -> Issued:
        """A certificate for the server's address."""
        return self.authority.issue(self.folder / "good", "database", ["127.0.0.1"])


@pytest.fixture(scope="module", params=[15, 18], ids=lambda version: f"pg{version}")
def secured(
    request: pytest.FixtureRequest, stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    """A server of the oldest and of the newest version: it is the client that judges."""
    server = stack.own_postgres(request.param)
    folder = server.data_dir.with_name(server.data_dir.name + "-tls")
    folder.mkdir()
    folder.chmod(0o755)
    authority = Authority.make("the database's authority")
    yield Secured(server, authority, authority.write(tmp_path_factory.mktemp("tls") / "ca.crt"), folder)
    server.remove()


def test_a_database_is_reached_when_its_certificate_and_name_are_right(secured: Secured) -> None:
    secured.use(secured.good())
    with connect(secured.conninfo(), application_name="test") as conn:
        row = conn.execute("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()
    assert row is not None
    assert row[0] in ("TLSv1.2", "TLSv1.3")


def test_a_certificate_of_another_authority_is_refused(secured: Secured, tmp_path: Path) -> None:
    secured.use(secured.good())
    other = Authority.make("another authority").write(tmp_path / "other.crt")
    said = _refused(secured.conninfo(sslrootcert=str(other)))
    assert "certificate is refused" in said
    assert "CA file" in said


def test_a_certificate_for_another_name_is_refused(secured: Secured) -> None:
    secured.use(secured.authority.issue(secured.folder / "named", "database", ["db.example"]))
    assert "does not match host name" in _refused(secured.conninfo())


def test_an_expired_certificate_is_refused_and_said_to_be(secured: Secured) -> None:
    secured.use(secured.authority.issue(secured.folder / "old", "database", ["127.0.0.1"], expired=True))
    said = _refused(secured.conninfo())
    assert "expired" in said
    assert "renew" in said


def test_a_server_without_tls_is_not_taken_for_one_that_has_it(secured: Secured) -> None:
    secured.server.configure({"ssl": "off"})
    secured.server.restart()
    assert "SSL" in _refused(secured.conninfo())


def test_a_server_that_offers_old_versions_only_is_refused(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured.use(secured.good())
    monkeypatch.setenv("PGSSLMINPROTOCOLVERSION", "TLSv1")
    secured.server.configure({"ssl_min_protocol_version": "TLSv1", "ssl_max_protocol_version": "TLSv1.1"})
    secured.server.restart()
    try:
        _refused(secured.conninfo())
    finally:
        secured.server.configure({"ssl_min_protocol_version": "TLSv1.2", "ssl_max_protocol_version": ""})


def _refused(conninfo: str) -> str:
    with pytest.raises(DatabaseError) as refused:
        connect(conninfo, application_name="test")
    return f"{refused.value.message} | {refused.value.hint}"


@pytest.mark.timeout(240)
def test_a_pair_runs_over_verified_connections_and_outlives_an_expired_certificate(
    secured: Secured, stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured.use(secured.good())
    for name, value in (("SSLMODE", "verify-full"), ("SSLROOTCERT", str(secured.ca))):
        monkeypatch.setenv(f"VSQL_SYNC__CONNECTION__{name}", value)
    with connect(secured.server.conninfo(), application_name="test") as conn:
        for name in ("tls_a", "tls_b"):
            conn.execute(f"CREATE DATABASE {name}".encode())
    conninfos = (secured.server.conninfo("tls_a"), secured.server.conninfo("tls_b"))
    limits = "[limits]\nretry_backoff_max_ms = 1000\n"
    pair = TwoNodes(
        stack, tmp_path, "CREATE TABLE t (id int PRIMARY KEY)", conninfos=conninfos, config=limits
    )
    try:
        pair.create(["t(*)"])
        pair.start()
        pair.a.execute("INSERT INTO t SELECT generate_series(1, 10)")
        pair.wait_in_step()
        clear = pair.a.query(
            "SELECT a.application_name FROM pg_stat_activity a JOIN pg_stat_ssl s USING (pid)"
            " WHERE a.application_name LIKE 'vsql%' AND NOT s.ssl"
        )
        assert clear == []
        expired = secured.authority.issue(secured.folder / "late", "database", ["127.0.0.1"], expired=True)
        secured.use(expired)
        for node, role in ((pair.a, "producer"), (pair.b, "consumer")):
            log = node.log_file(role)
            until(lambda log=log: "certificate has expired" in log.read_text())  # type: ignore[misc]  # bound now
        secured.use(secured.good())
        pair.a.execute("INSERT INTO t SELECT generate_series(11, 20)")
        pair.wait_in_step()
        assert pair.differences() == []
    finally:
        pair.end()


# Versions before TLS 1.2


@contextmanager
def _old_server(folder: Path, authority: Authority) -> Iterator[tuple[int, list[str]]]:
    """A listener that speaks nothing newer than TLS 1.1; gives its port and the handshakes it completed."""
    issued = authority.issue(folder / "old-server", "old", ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    completed: list[str] = []
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(raw, server_side=True) as secured:
                        completed.append(str(secured.version()))
                except OSError:
                    raw.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], completed
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_no_client_of_ours_agrees_on_a_version_before_1_2(tmp_path: Path) -> None:
    authority = Authority.make("the old one's authority")
    ca = authority.write(tmp_path / "ca.crt")
    with _old_server(tmp_path, authority) as (port, completed):
        security = KafkaSecurity(protocol="SSL", ca_path=ca)
        kafka = AdminClient(
            {"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0, **security.client_options()}
        )
        kafka.poll(2)
        found = tls.refusal("127.0.0.1", port, tls.Means(ca))
        assert found is not None
        assert found.hint == "the server must offer TLS 1.2 or later"
        assert completed == []
        lax = ssl.create_default_context(cafile=str(ca))
        lax.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            lax.minimum_version = ssl.TLSVersion.TLSv1
        with socket.create_connection(("127.0.0.1", port), 5) as raw:
            lax.wrap_socket(raw, server_hostname="127.0.0.1").close()
            # The control: who allows it gets in. The server notes it after its own end of the handshake.
            until(lambda: completed == ["TLSv1.1"], 20, lambda: str(completed))
