"""What is left of a refused connection: a line of the operators' log, and its hash in the stream's chain.

Not here: finding out why (kafka/refusals.py, pg/connect.py, tls.py). Rules:

* Once for a cause and a start of the service, or when it comes again after the stream has run: not one a try.
* The line is in this node's own database; a database that refuses us itself is in our log and nowhere else.
* Whatever fails here is tried with the next refusal, and never keeps a service from going on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import psycopg

from vsql_shared.errors import BrokerError, EnvironmentFault, VsqlSyncError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)

CAUSES_AT_MOST = 20
"""Of one start: words may hold what changes with every try."""


class RefusedConnections:
    """Those of one stream's worker."""

    def __init__(self, role: str, chain: str, connect: Callable[[], Connection]) -> None:
        self._role, self._chain, self._connect = role, chain, connect
        self._noted: set[tuple[str, str, str]] = set()

    def let_in(self) -> None:
        """The stream runs: a refusal is news again."""
        self._noted.clear()

    def take(self, error: VsqlSyncError) -> None:
        """Note an error that says a server does not let us in; any other is passed over."""
        if not isinstance(error, EnvironmentFault) or not error.refusal:
            return
        place = "kafka" if isinstance(error, BrokerError) else "postgresql"
        cause = (place, error.refusal, error.message)
        if cause in self._noted or len(self._noted) >= CAUSES_AT_MOST:
            return
        try:
            with self._connect() as conn:
                conn.execute(
                    "SELECT vsql_sync.note_refused_connection(%s, %s, %s, %s, %s)",
                    (self._role, self._chain, *cause),
                )
        except (VsqlSyncError, psycopg.Error):
            _log.debug("the refused connection cannot be noted now")
        else:
            self._noted.add(cause)
