"""Connections to PostgreSQL, and psycopg's errors in our words.

Every connection of vsql-sync comes from here. Rules:

* A session is the same whatever the role's or database's defaults are: UTC, ISO, UTF-8, READ COMMITTED, only
  pg_catalog in the search path (all names are written with their schema).
* `row_security = off`: a policy that would hide rows is an error, never a silently shorter answer.
* Where a session goes and how it is protected is what the connection string says: the environment
  (PGHOSTADDR, a service file, a Kerberos ticket) leads it to no other address, nor past a certificate check.
* No message carries a password, or a server's text that may hold a row's value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
from psycopg import conninfo as libpq
from psycopg import sql

from vsql_shared import tls
from vsql_shared.errors import ConfigError, DatabaseError, TransientError, VsqlSyncError
from vsql_shared.pg.encodings import UTF8, fit_parameters
from vsql_shared.pg.reactions import Reaction, reaction

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

# Seconds after which a peer that is silent is taken for dead; libpq's own defaults are two hours.
_KEEPALIVE = {"keepalives_idle": "15", "keepalives_interval": "5", "keepalives_count": "4"}
# Keepalive says nothing while sent bytes wait to be acknowledged: the system tries for a quarter of an hour.
# Milliseconds, at the client and at the server. Not where rows flow: who reads none would count as gone, too.
_UNACKNOWLEDGED = {"tcp_user_timeout": "30000"}
_UNACKNOWLEDGED_AT_SERVER = " SET tcp_user_timeout = 8000;"
_CONNECT_TIMEOUT = "10"
# Said here too, so that no environment lowers it.
_LEAST_TLS = {"ssl_min_protocol_version": "TLSv1.2"}
_SESSION = (
    "SET search_path = pg_catalog; SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD';"
    " SET IntervalStyle = 'postgres'; SET extra_float_digits = 3; SET bytea_output = 'hex';"
    " SET standard_conforming_strings = on; SET row_security = off; SET lc_monetary = 'C';"
    " SET xmloption = 'content'; SET array_nulls = on; SET quote_all_identifiers = off;"
    " SET transform_null_equals = off;"
    # The server's side: a host that vanished gives its locks back in seconds, for one that stands by.
    " SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 1; SET tcp_keepalives_count = 3;"
    " SET default_transaction_isolation = 'read committed'; SET client_min_messages = warning;"
)

# libpq's words for what only waiting mends. Servers may translate theirs; unrecognised ones are permanent.
_PASSING = re.compile(
    r"connection refused|timeout expired|timed out|no route to host|network is unreachable|connection reset"
    r"|server closed the connection|could not receive data|starting up|shutting down|recovery mode"
    r"|not yet accepting connections|too many (clients|connections)|remaining connection slots|resolve host"
    r"|no such file or directory|connection is lost",
    re.IGNORECASE,
)
_ADVICE = (
    (r"password authentication failed", "check user and password"),
    (r"no password supplied", "give a password: PGPASSWORD, ~/.pgpass, or password_file in [connection]"),
    (r"no pg_hba.conf entry", "allow this host, user and database in the server's pg_hba.conf"),
    (r"database .* does not exist", "check the database name, or create it"),
    (r"role .* does not exist", "check the user, or create it"),
    (r"not permitted to log in", "ALTER ROLE … LOGIN, or take another user"),
    (r"permission denied for database", "GRANT CONNECT ON DATABASE … TO the user"),
    (r"conversion between \S+ and \S+ is not supported", "make the database anew with ENCODING 'UTF8'"),
    (r"SSL|certificate", "check sslmode, sslrootcert and the server's certificate"),
    (r"resolve host", "check the host name"),
    (r"connection refused|no such file", "check host and port, and that the server runs"),
    (r"must be superuser or replication role|replication role", "ALTER ROLE … REPLICATION"),
)
# What of these means that we are not let in.
_REFUSALS = (
    (
        r"authentication failed|no password supplied|no pg_hba.conf entry|not permitted to log in",
        "authentication",
    ),
    (r"permission denied|replication role", "authorization"),
    (r"SSL|TLS|certificate", "tls"),
)
# Data and constraint errors: the primary message quotes values.
_TELLING_CLASSES = ("22", "23")


def connect(
    conninfo: str,
    *,
    application_name: str,
    statement_timeout_ms: int = 0,
    lock_timeout_ms: int = 0,
    autocommit: bool = True,
    holds_lock: bool = False,
    **options: str,
) -> Connection:
    """Open a session with the settings above; `options` are further libpq parameters (`replication`, …).

    `holds_lock`: others wait for what it holds; its end is noticed in seconds, whatever was under way.
    Raises ConfigError for a connection string that cannot be read, TransientError where waiting may help and
    DatabaseError where it will not.
    """
    given = parse_conninfo(conninfo)
    ours = {**_KEEPALIVE, **(_UNACKNOWLEDGED if holds_lock else {}), **_LEAST_TLS}
    parameters = {**ours, "connect_timeout": _CONNECT_TIMEOUT, **own_way(given), **given}
    parameters |= {**options, "application_name": application_name, "client_encoding": "UTF8"}
    try:
        # autocommit first: the SETs must not open a transaction of their own.
        conn = psycopg.connect("", autocommit=True, **parameters)  # type: ignore[arg-type]  # kwargs are str only
    except psycopg.Error as error:
        raise _connect_error(error, parameters) from None
    timeouts = sql.SQL("SET statement_timeout = {}; SET lock_timeout = {}").format(
        sql.Literal(statement_timeout_ms), sql.Literal(lock_timeout_ms)
    )
    try:
        conn.execute(
            sql.SQL(_SESSION + (_UNACKNOWLEDGED_AT_SERVER if holds_lock else "")) + timeouts, prepare=False
        )
        conn.autocommit = autocommit
        fit_parameters(conn, conn.info.parameter_status("server_encoding") or UTF8)
    except psycopg.Error as error:
        conn.close()
        raise translate(error, f"opening a session {_where(parameters)}") from None
    return conn


def own_way(given: dict[str, str]) -> dict[str, str]:
    """What the environment may not add: libpq takes it for what is not said here."""
    # With an empty address libpq resolves the host; the check of "is this machine" was made on that name.
    way = {"hostaddr": ""} if given.get("host") else {}
    if given.get("sslmode", "").startswith("verify"):
        way["gssencmode"] = "disable"  # libpq prefers Kerberos to TLS, and checks no certificate then
    return way


def parse_conninfo(conninfo: str) -> dict[str, str]:
    """The parts of a connection string. The error never repeats the string: it may hold a password."""
    try:
        parts = libpq.conninfo_to_dict(conninfo)
    except psycopg.Error:
        raise ConfigError(
            "the connection string cannot be read",
            hint='write it as "host=db1 port=5432 dbname=shop user=vsql_sync" or as postgresql://user@db1/shop',
        ) from None
    return {name: str(value) for name, value in parts.items() if value is not None}


def describe(conninfo: str) -> str:
    """A connection string's database, address and user, for messages."""
    return _where(parse_conninfo(conninfo))


@contextmanager
def errors(doing: str) -> Iterator[None]:
    """Turn psycopg's errors inside into ours. `doing` completes "while …"."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error, doing) from error


def translate(error: psycopg.Error, doing: str) -> VsqlSyncError:
    """Our error for psycopg's: TransientError where trying again later can help, else DatabaseError."""
    state = error.sqlstate
    if state is None:
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return TransientError(f"lost the database while {doing}", hint="it is tried again")
        return DatabaseError(f"{type(error).__name__} while {doing}")
    text = _server_text(error, state)
    if reaction(state) is Reaction.RETRY:
        return TransientError(f"{text} while {doing}", hint="it is tried again")
    return DatabaseError(f"{text} while {doing}", hint=_hint(error, state))


def is_passing(error: psycopg.Error) -> bool:
    """Whether the same statement may succeed later, on a new connection if need be."""
    return isinstance(translate(error, ""), TransientError)


def _server_text(error: psycopg.Error, state: str) -> str:
    diag = error.diag
    if state[:2] in _TELLING_CLASSES or diag.message_primary is None:
        place = [
            f"{kind} {name}"
            for kind, name in (
                ("table", diag.table_name and f"{diag.schema_name}.{diag.table_name}"),
                ("column", diag.column_name),
                ("constraint", diag.constraint_name),
            )
            if name
        ]
        return f"{type(error).__name__} (SQLSTATE {state})" + (f" on {', '.join(place)}" if place else "")
    return f"{diag.message_primary} (SQLSTATE {state})"


def _hint(error: psycopg.Error, state: str) -> str:
    if state == "42501":
        return "grant the privilege, or connect as a user who has it"
    if state == "25006":
        return "this server is a standby or read-only; connect to the primary"
    return error.diag.message_hint or ""


def _connect_error(error: psycopg.Error, parameters: dict[str, str]) -> VsqlSyncError:
    reason = _connect_reason(str(error), parameters)
    refused = _tls_reason(parameters) if "verify failed" in reason or "alert" in reason else None
    if refused is not None:
        return DatabaseError(
            f"cannot connect {_where(parameters)}: no TLS: {refused.text}",
            hint=f"{refused.hint} (sslrootcert, sslcert)",
        ).refusing("tls")
    advice = next((say for pattern, say in _ADVICE if re.search(pattern, reason, re.IGNORECASE)), "")
    message = f"cannot connect {_where(parameters)}: {reason}"
    if _PASSING.search(reason):
        return TransientError(message, hint=advice)
    cause = next((cause for pattern, cause in _REFUSALS if re.search(pattern, reason, re.IGNORECASE)), "")
    return DatabaseError(message, hint=advice or "check the connection string").refusing(cause)


def _connect_reason(text: str, parameters: dict[str, str]) -> str:
    """The last attempt's reason, without what may be a piece of a password in a misread string."""
    line = next((part for part in reversed(text.splitlines()) if "failed: " in part), text.splitlines()[0])
    reason = line.rpartition("failed: ")[2].removeprefix("FATAL:").strip()
    if reason.startswith("connection is bad") or "invalid integer value" in reason:
        return "an option of the connection string has a value libpq does not accept"
    if "resolve host" in reason:
        return "failed to resolve host"
    secret = parameters.get("password")
    return reason.replace(secret, "********") if secret else reason


def _tls_reason(parameters: dict[str, str]) -> tls.Reason | None:
    """What is wrong with a certificate, where that can be told; libpq says only that it does not verify."""

    def file(name: str) -> Path | None:
        return Path(parameters[name]) if parameters.get(name) else None

    host, port = parameters.get("host", ""), parameters.get("port", "5432")
    if not host or "," in host or host.startswith("/") or not port.isdigit():
        return None
    means = tls.Means(file("sslrootcert"), file("sslcert"), file("sslkey"))
    return tls.refusal(host, int(port), means, tls.POSTGRES)


def _where(parameters: dict[str, str]) -> str:
    """'to database shop at db1:5432 as user vsql_sync', of parts that look like what they should be."""

    def shown(name: str, default: str, looks: str = r"[\w.,:/ -]{1,200}") -> str:
        value = parameters.get(name, default)
        return value if re.fullmatch(looks, value) else "(not shown)"

    port = shown("port", "5432", "[0-9,]{1,60}")
    place = f"at {shown('host', shown('hostaddr', 'the local socket'))}:{port}"
    user = f" as user {shown('user', '')}" if "user" in parameters else ""
    return f"to database {shown('dbname', '(default)')} {place}{user}"
