"""The supervisor of a service: reads which streams are wanted, keeps one worker process for each.

It replicates nothing itself. Rules:

* One service of a role per node: a session advisory lock on the node's database. A second one is refused at
  its start, or stands by where it is configured to: it tries for the lock every second, and whoever has lost
  it stops its workers. The streams' own locks and PostgreSQL's slots and origins keep both apart meanwhile.
* One that does not stand by, and lost the lock with its session, keeps its workers and waits for it: the
  server may hold the old session as long as it has not noticed its end.
* The database going away stops no worker (they retry by themselves); the lock is taken again when it is back.
* SIGTERM or SIGINT stops all workers gracefully, then itself.
* Where no worker can be started any more (0024), it ends at once, also while it has none or stands by: who
  starts it again must not find that out when the workers are needed.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Literal

from vsql_shared import names
from vsql_shared.clocks.keeper import ClockKeeper
from vsql_shared.errors import DatabaseError, RefusedError, TransientError, VsqlSyncError
from vsql_shared.pg import synchronous, write_primary
from vsql_shared.pg.connect import Connection, connect, errors
from vsql_shared.service.auditor import Auditor
from vsql_shared.service.stopping import set_on_signals
from vsql_shared.service.workers import Workers, member_name

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.service.nursery import Nursery

_log = logging.getLogger(__name__)

Role = Literal["producer", "consumer"]
_DIRECTION: dict[Role, str] = {"producer": "out", "consumer": "in"}
_POLL_SECONDS = 0.5
_STANDBY_SECONDS = 1.0
_AUDIT_STOP_SECONDS = 6.0
_CLOCKS_STOP_SECONDS = 2.0
_SILENT_SECONDS = 60.0
_UNSIGNED_WARNING_SECONDS = 60.0
_WORKING_STATES = frozenset({"running", "paused", "copying"})


class AlreadyRunningError(RefusedError):
    """Another service of the same role runs for this node."""


class Supervisor:
    """Runs until it is told to stop; see the module's rules."""

    def __init__(self, settings: Settings, role: Role, nursery: Nursery) -> None:
        self._settings, self._role = settings, role
        config = str(settings.source) if settings.source else None
        self._workers = Workers(
            nursery,
            config,
            settings.limits.retry_backoff_ms / 1000,
            settings.limits.retry_backoff_max_ms / 1000,
            settings.server.stop_timeout.total_seconds(),
        )
        self._stop = threading.Event()
        self._connection: Connection | None = None
        self._watching: Connection | None = None
        self._last_seen = 0.0
        self._not_ready = ["the service is starting"]

    def healthy(self) -> str | None:
        """None while the loop turns (for /healthz)."""
        silent = time.monotonic() - self._last_seen
        return None if silent < _SILENT_SECONDS else f"the supervisor has not moved for {silent:.0f} s"

    def ready(self) -> str | None:
        """None when every wanted stream does its work (for /readyz)."""
        return "; ".join(self._not_ready) or None

    def run(self) -> int:
        """The loop, until a signal; returns the exit code."""
        set_on_signals(self._stop)
        warned = float("-inf")
        auditor = Auditor(self._settings, self._role)
        auditor.start()
        clocks = ClockKeeper(self._settings, self._role)
        clocks.start()
        try:
            while not self._stop.is_set():
                self._last_seen = time.monotonic()
                if not self._settings.audit.signs and self._last_seen - warned > (_UNSIGNED_WARNING_SECONDS):
                    warned = self._last_seen
                    _log.warning("dev mode without a signing key: audit entries are NOT signed")
                self._workers.look()
                self._turn()
                self._stop.wait(_POLL_SECONDS)
        finally:
            _log.info("stopping: workers finish their batch")
            clocks.stop(0.0)
            graceful = self._workers.stop()
            auditor.stop(_AUDIT_STOP_SECONDS)
            clocks.stop(_CLOCKS_STOP_SECONDS)
            for connection in (self._connection, self._watching):
                if connection is not None:
                    connection.close()
        return 0 if graceful else 1

    def _turn(self) -> None:
        try:
            if self._connection is None:
                self._connection = self._connect()
            wanted, troubles = self._read(self._connection)
            wanted += self._read_members(self._connection)
        except VsqlSyncError as error:
            if isinstance(error, AlreadyRunningError) and self._settings.server.standby:
                self._stand_by(error)
                return
            # Also what only an operator can mend: the service stays, says so, and goes on when it is mended.
            # And a lock that our own last session holds, as long as the server has not noticed its end.
            if self._not_ready != [str(error)]:
                _log.error("%s", error)
            self._not_ready = [str(error)]
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._stop.wait(min(self._settings.limits.retry_backoff_ms / 1000 * 5, 5.0))
            return
        self._workers.sync(wanted)
        running = self._workers.running()
        troubles += [f"{chain}: its worker is not running" for chain in wanted if not running.get(chain)]
        self._not_ready = troubles

    def _stand_by(self, why: AlreadyRunningError) -> None:
        """Run no worker until the lock is free, but members."""
        said = [f"standing by: {why.message}"]
        if self._not_ready != said:
            _log.info("%s", said[0])
        self._not_ready = said
        self._workers.sync(self._members_beside_another())
        self._stop.wait(_STANDBY_SECONDS)

    def _members_beside_another(self) -> list[str]:
        """The members this service adds to the streams of the one that is at work."""
        if self._role != "consumer" or not self._settings.apply.members:
            return []
        try:
            if self._watching is None:
                self._watching = connect(
                    self._settings.connection.conninfo(self._role),
                    application_name=f"vsql-sync {self._role} standby",
                )
            return self._read_members(self._watching)
        except VsqlSyncError as error:
            _log.warning("%s", error)
            if self._watching is not None:
                self._watching.close()
                self._watching = None
            return []

    def _read_members(self, connection: Connection) -> list[str]:
        """A name for each member this service is to run."""
        if self._role != "consumer":
            return []
        with errors("reading vsql_sync.streams"):
            rows = connection.execute(
                "SELECT chain FROM vsql_sync.streams WHERE direction = 'in' AND kind = 'live'"
                " AND apply_mode = 'partitioned' AND desired <> 'stopped' ORDER BY chain"
            ).fetchall()
        members = range(1, self._settings.apply.members + 1)
        return [member_name(chain, number) for (chain,) in rows for number in members]

    def _connect(self) -> Connection:
        connection = connect(
            self._settings.connection.conninfo(self._role),
            application_name=f"vsql-sync {self._role} supervisor",
            holds_lock=True,
        )
        try:
            _lock_service(connection, self._settings, self._role)
        except VsqlSyncError:
            connection.close()
            raise
        return connection

    def _read(self, connection: Connection) -> tuple[list[str], list[str]]:
        """(wanted chains, what keeps the service from being ready)."""
        direction = _DIRECTION[self._role]
        with errors("reading vsql_sync.streams"):
            rows = connection.execute(
                "SELECT s.chain, s.state, st.state, extract(epoch FROM now() - st.updated_at)"
                " FROM vsql_sync.streams s LEFT JOIN vsql_sync.stream_status st USING (chain, direction)"
                " WHERE s.direction = %s AND s.desired <> 'stopped' AND s.state <> 'FINISHED'"
                " ORDER BY s.chain",
                (direction,),
            ).fetchall()
        stale = 3 * self._settings.limits.status_interval_ms / 1000 + 5
        troubles = [
            f"{chain}: {said or 'has not said anything yet'}"
            for chain, _, said, age in rows
            if said not in _WORKING_STATES or age is None or age > stale
        ]
        return [row[0] for row in rows], troubles


def _lock_service(connection: Connection, settings: Settings, role: Role) -> None:
    """Take the lock of the node's one service of a role, for this session."""
    node = settings.cluster.node_name
    with errors("taking the lock of the service"):
        row = connection.execute(
            "SELECT pg_try_advisory_lock(%s)", (names.advisory_key(f"service {node}", role),)
        ).fetchone()
    if row is None or not row[0]:
        raise AlreadyRunningError(
            f"another {role} of node {node} is already running",
            hint="stop it first (`syncctl daemon stop`, or the other container), or let this one stand by:"
            " server.standby = true",
        )


def first_connection(settings: Settings, role: Role) -> None:
    """Fail at once, with one message, for what retrying cannot mend: wrong password, no schema, a second one.

    Where the database is away, the supervisor finds the same later.
    """
    try:
        connection = connect(
            settings.connection.conninfo(role), application_name=f"vsql-sync {role} supervisor"
        )
    except TransientError as error:
        _log.warning("%s", error)
        return
    with connection, errors("looking for schema vsql_sync"):
        row = connection.execute("SELECT to_regnamespace('vsql_sync')").fetchone()
        if row is None or row[0] is None:
            raise RefusedError(
                "this database is not a node yet: schema vsql_sync is missing",
                hint="run `syncctl node init` first",
            )
        _require_privileges(connection, role)
        write_primary.require_as_configured(connection, settings)
        if role == "producer":
            synchronous.require_as_configured(connection, settings)
        try:
            _lock_service(connection, settings, role)
        except AlreadyRunningError:
            if not settings.server.standby:
                raise
        # Now, and not when this session has ended at the server: the supervisor takes it on its own session.
        connection.execute("SELECT pg_advisory_unlock_all()")


# What only the role of the service, its members and owners may.
_TELLING_TABLE: dict[Role, str] = {"producer": "deks", "consumer": "apply_progress"}


def _require_privileges(connection: Connection, role: Role) -> None:
    row = connection.execute(
        "SELECT current_user, has_schema_privilege('vsql_sync', 'USAGE') AND EXISTS (SELECT FROM pg_class"
        " WHERE relnamespace = to_regnamespace('vsql_sync') AND relname = %s"
        " AND has_table_privilege(oid, 'INSERT')), rolsuper OR rolreplication"
        " FROM pg_roles WHERE rolname = current_user",
        (_TELLING_TABLE[role],),
    ).fetchone()
    user, allowed, replicates = row or ("", False, False)
    if not allowed:
        raise DatabaseError(
            f"user {user} has not the privileges of a {role}", hint=f"GRANT vsql_sync_{role} TO {user}"
        )
    if role == "producer" and not replicates:
        raise DatabaseError(
            f"user {user} may not replicate; members of vsql_sync_producer do not inherit that",
            hint=f"ALTER ROLE {user} REPLICATION",
        )
