"""How connections are protected: TLS as servers show it, sessions as PostgreSQL sees them, certificates.

Rules: a server that has no TLS is written down as such; what the services themselves negotiated is known to
PostgreSQL for its own sessions (pg_stat_ssl), librdkafka does not tell. Paths and certificates, never keys.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vsql_shared import tls, tls_seen
from vsql_shared.errors import EnvironmentFault, TransientError, VsqlSyncError

if TYPE_CHECKING:
    from vsql_ctl.evidence.brokers import Brokers
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

_SESSIONS = """
SELECT a.application_name, a.usename, a.client_addr::text, s.ssl, s.version, s.cipher, s.bits, s.client_dn,
       s.client_serial::text, s.issuer_dn, a.pid = pg_catalog.pg_backend_pid()
FROM pg_catalog.pg_stat_activity a LEFT JOIN pg_catalog.pg_stat_ssl s USING (pid)
WHERE a.datname = pg_catalog.current_database() AND a.application_name ~ '^vsql[-_]sync' ORDER BY 1, 2, 3
"""
_SESSION_COLUMNS = (
    "application", "user", "client_address", "tls", "version", "cipher", "bits", "client_subject",
    "client_serial", "client_issuer", "this_program",
)  # fmt: skip


def sessions(conn: Connection) -> list[dict[str, Any]]:
    """Sessions of ours on this node's database, and the TLS of each; other users' may be hidden from us."""
    from vsql_shared.pg.connect import errors

    with errors("reading the sessions"):
        rows = conn.execute(_SESSIONS).fetchall()
    return [dict(zip(_SESSION_COLUMNS, row, strict=True)) for row in rows]


def sees_all(conn: Connection) -> bool:
    """Whether this user is shown the sessions of others: where not, they are simply not there."""
    from vsql_shared.pg.connect import errors

    with errors("reading the rights on sessions"):
        row = conn.execute("SELECT pg_catalog.pg_has_role('pg_read_all_stats', 'USAGE')").fetchone()
    return row is not None and bool(row[0])


def postgres(settings: Settings) -> dict[str, Any]:
    """What the database's server shows."""
    c = settings.connection
    asked = {"sslmode": c.sslmode}
    if c.host.startswith("/"):
        return asked | {"host": c.host, "port": c.port, "tls": False, "unix_socket": True}
    return asked | seen(c.host, c.port, tls.Means(c.sslrootcert, c.sslcert, c.sslkey), tls.POSTGRES)


def brokers(settings: Settings, kafka: Brokers) -> list[dict[str, Any]]:
    """What each broker shows, those of the configuration and those they name."""
    security = settings.kafka.security
    places = sorted({*_configured(settings), *_named(kafka)})
    asked = {"protocol": security.protocol, "mechanism": security.mechanism if security.uses_sasl else None}
    if not security.uses_tls:
        about = {"tls": False, "seen": "nobody was asked: it is this node's configuration that has no TLS"}
        return [asked | about | {"host": host, "port": port} for host, port in places]
    means = tls.Means(security.ca_path, security.cert_path, security.key_path)
    found = []
    for host, port in places:
        try:
            found.append(asked | seen(host, port, means))
        except VsqlSyncError as error:  # what one of them shows must not lose what the others do
            found.append(asked | {"host": host, "port": port, "not_seen": error.message})
    return found


def _configured(settings: Settings) -> list[tuple[str, int]]:
    servers = settings.kafka.bootstrap_servers.split(",")
    split = [one.strip().rpartition(":") for one in servers]
    return [(host.strip("[]"), int(port)) for host, _, port in split if port.isdigit()]


def _named(kafka: Brokers) -> list[tuple[str, int]]:
    from confluent_kafka import KafkaException

    from vsql_shared.kafka.clients import from_exception

    client = kafka.client()
    try:
        found = client.list_topics(timeout=tls.TIMEOUT_SECONDS).brokers.values()
    except KafkaException as error:
        raise from_exception(error, "list the brokers") from error
    return [(str(one.host), int(one.port)) for one in found]


def seen(host: str, port: int, means: tls.Means, preface: bytes = b"") -> dict[str, Any]:
    """What a server shows, whatever it and its name are. Raises our errors only."""
    try:
        return tls_seen.server(host, port, means, preface)
    except ssl.SSLError as error:
        reason = (error.reason or "no reason").lower().replace("_", " ")
        raise EnvironmentFault(f"the TLS handshake with {host}:{port} fails: {reason}") from error
    except OSError as error:
        raise TransientError(f"{host}:{port} does not answer: {error.strerror or 'timeout'}") from error
    except (ValueError, OverflowError) as error:  # brokers name places nobody can connect to
        raise EnvironmentFault(f"{host[:100]!r}, port {port}, is no place to connect to") from error


def configured(settings: Settings) -> list[dict[str, Any]]:
    """The certificates this node's configuration names: its own, and authorities it believes."""
    security, c = settings.kafka.security, settings.connection
    named: dict[str, Path | None] = {
        "server.tls.cert_path": settings.server.tls.cert_path,
        "connection.sslcert": c.sslcert,
        "connection.sslrootcert": c.sslrootcert,
        "kafka.security.cert_path": security.cert_path,
        "kafka.security.ca_path": security.ca_path,
        "encryption.kms.vault.ca_path": settings.encryption.kms.vault.ca_path,
    }
    return [_in_file(key, path) for key, path in named.items() if path is not None]


def _in_file(key: str, path: Path) -> dict[str, Any]:
    shown: dict[str, Any] = {"key": key, "path": str(path)}
    try:
        return shown | {"certificates": tls_seen.file(path)}
    except OSError as error:
        return shown | {"not_read": error.strerror or "cannot be read"}
    except ValueError:
        return shown | {"not_read": "holds no certificate in PEM form"}
