"""[connection]: how this node reaches its own database."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from vsql_shared.config.secrets import PasswordSource, quote_conninfo
from vsql_shared.config.values import ConfigPath, Duration, Whole

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
DatabaseRole = Literal["producer", "consumer", "operator"]


class ConnectionSettings(PasswordSource):
    """The node's own PostgreSQL. Without a password here, libpq looks at PGPASSWORD and ~/.pgpass."""

    host: Annotated[str, Field(min_length=1)] = "localhost"
    """Host name, address, or the folder of the server's Unix socket."""
    port: Annotated[Whole, Field(ge=1, le=65_535)] = 5432
    """TCP port."""
    database: Annotated[str, Field(min_length=1, max_length=63)]
    """Database that is replicated."""
    user: Annotated[str, Field(min_length=1, max_length=63)] = "vsql_sync"
    """Database user of syncctl, and of both services unless they have their own below."""
    producer_user: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """User of the producer, if another; give its password through the producer's environment."""
    consumer_user: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """User of the consumer, if another; give its password through the consumer's environment."""
    sslmode: SslMode = "prefer"
    """TLS to the database, as libpq's sslmode. Across a network use "verify-full"."""
    sslrootcert: ConfigPath | None = None
    """CA certificates that sign the server's, PEM."""
    sslcert: ConfigPath | None = None
    """Client certificate, PEM."""
    sslkey: ConfigPath | None = None
    """Key of the client certificate, PEM; readable by this user only."""
    connect_timeout: Annotated[Duration, Field(ge=timedelta(seconds=2), le=timedelta(minutes=5))] = timedelta(
        seconds=10
    )
    """How long to wait for the server to answer (whole seconds; libpq's least is 2)."""

    def user_of(self, role: DatabaseRole) -> str:
        """The database user of one service, or of the operator."""
        own = {"producer": self.producer_user, "consumer": self.consumer_user, "operator": None}[role]
        return own or self.user

    def conninfo(self, role: DatabaseRole = "operator", **options: str) -> str:
        """A libpq connection string, password included: pass it on, never print it.

        `options` are further libpq parameters, such as application_name or replication.
        """
        password = self.read_password("connection")
        parts: dict[str, str | None] = {
            "host": self.host,
            "port": str(self.port),
            "dbname": self.database,
            "user": self.user_of(role),
            "password": password.get_secret_value() if password else None,
            "sslmode": self.sslmode,
            "sslrootcert": str(self.sslrootcert) if self.sslrootcert else None,
            "sslcert": str(self.sslcert) if self.sslcert else None,
            "sslkey": str(self.sslkey) if self.sslkey else None,
            "connect_timeout": str(int(self.connect_timeout.total_seconds())),
            **options,
        }
        return " ".join(
            f"{name}={quote_conninfo(value)}" for name, value in parts.items() if value is not None
        )
