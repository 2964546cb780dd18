"""What `replication.clock_sync.require_ntp` asks for at a service's start: a host whose clock somebody keeps.

The database's clock is what counts, and its server may be another host: that one cannot be asked who keeps
its clock, but its clock can be held against ours. One that is away is compared later, as always.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from vsql_shared.clocks.host_read import read_host_clock, require_database_near, require_synchronised
from vsql_shared.errors import TransientError
from vsql_shared.pg import clocks
from vsql_shared.pg.connect import connect

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.config.connection import DatabaseRole

_log = logging.getLogger(__name__)


def require_clock(settings: Settings, role: DatabaseRole) -> None:
    """Raise RefusedError or DatabaseError where clocks are not kept as require_ntp wants it."""
    limits = settings.replication.clock_sync
    if not limits.require_ntp:
        return
    found = read_host_clock()
    require_synchronised(limits.max_drift_ms, found)
    _log.info("this host's clock is synchronised", extra={"source": found.source if found else ""})
    try:
        with connect(settings.connection.conninfo(role), application_name=f"vsql-sync {role} clocks") as conn:
            before = time.time_ns() // 1000
            read = clocks.now(conn).time_us
            took = time.time_ns() // 1000 - before
    except TransientError as error:
        _log.warning("the database's clock was not compared: %s", error)
        return
    require_database_near(limits.max_drift_ms, before, read, took)
