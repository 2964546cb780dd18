"""The two database sessions of a worker, and which keys count on its own chain.

Not here: what is done in them. Rules:

* The control session holds the stream's advisory lock: one worker a stream. The applying session holds the
  stream's replication origin, which only one session can: the fence that also stops a worker whose lock was
  lost. Progress is read in that session.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from vsql_shared import lsn, names
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import RefusedError
from vsql_shared.pg import key_ends
from vsql_shared.pg.connect import Connection, connect, errors

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import Signer

# A worker that was killed leaves its session to the server, which notices within moments.
_LOCK_SECONDS = 10.0


def open_control(settings: Settings, chain: str, stop: threading.Event | None) -> Connection:
    """The control session, locked for this stream; without `stop`, unlocked, for a last word only."""
    conn = connect(
        settings.connection.conninfo("consumer"),
        application_name=f"vsql-sync consumer {chain}",
        holds_lock=True,
    )
    if stop is not None:
        try:
            with errors("taking the stream's lock"):
                _lock(conn, chain, stop)
        except BaseException:
            conn.close()
            raise
    return conn


def _lock(conn: Connection, chain: str, stop: threading.Event) -> None:
    key = names.advisory_key(chain, "in")
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        row = conn.execute("SELECT pg_catalog.pg_try_advisory_lock(%s)", (key,)).fetchone()
        if row is not None and row[0]:
            return
        if time.monotonic() > deadline or stop.wait(0.2):
            raise RefusedError(
                f"stream {chain} already has a worker on this node: {_holder(conn, key)}",
                hint="stop it first; one worker applies a stream",
            )


def _holder(conn: Connection, key: int) -> str:
    """The session that holds the lock, in words."""
    row = conn.execute(
        "SELECT a.pid, a.application_name, coalesce(a.client_addr::text, 'local'), a.backend_start::text"
        " FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)"
        " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1"
        " AND l.classid::bigint = %s AND l.objid::bigint = %s",
        (key >> 32 & 0xFFFFFFFF, key & 0xFFFFFFFF),
    ).fetchone()
    if row is None:
        return "its session has just ended"
    return f"backend {row[0]}, {row[1]!r} from {row[2]} since {row[3]}"


def open_applying(settings: Settings, chain: str, *, of_member: bool = False) -> Connection:
    """The applying session; the applier takes a replication origin in it. A member's number is its lock."""
    return connect(
        settings.connection.conninfo("consumer"),
        application_name=f"vsql-sync apply {chain}",
        holds_lock=of_member,
    )


def own_trust(conn: Connection, node: str, chain: str, signer: Signer | None) -> TrustStore:
    """Whose signatures count on a chain of this node: its key, and those before, each up to its end.

    Raises EnvironmentFault when its key has ended: it signs nothing any more.
    """
    key_ends.require_signing(conn, signer)
    keys = key_ends.own_pins(conn, node, chain)
    if signer is not None and signer.fingerprint not in {key.fingerprint for key in keys}:
        keys.append(PinnedKey(node, signer.public_key, signer.fingerprint, revoked=False))
    return TrustStore(keys, allow_unsigned=signer is None)


class ServerPosition(NamedTuple):
    """Where this server's WAL is flushed to, and whose WAL it is."""

    lsn: int
    system_identifier: str
    timeline: int


def server_position(conn: Connection) -> ServerPosition:
    """Where this server is now."""
    with errors("reading this server's position"):
        row = conn.execute(
            "SELECT pg_catalog.pg_current_wal_flush_lsn()::text, system_identifier::text, timeline_id"
            " FROM pg_catalog.pg_control_system(), pg_catalog.pg_control_checkpoint()"
        ).fetchone()
    assert row is not None  # noqa: S101 - both functions give one row
    return ServerPosition(lsn.parse(row[0]), row[1], row[2])
