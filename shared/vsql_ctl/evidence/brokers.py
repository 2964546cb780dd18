"""The brokers, asked once whether they answer: each subject that needs them is tried, none waits anew.

Rules: what kept the first subject from them is the reason of all that follow. One client serves all: each new
one would connect, and prove who it is, once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vsql_shared.errors import VsqlSyncError

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

    from vsql_shared.config import Settings


class Brokers:
    """The way to the brokers while one bundle is made."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AdminClient | None = None
        self._away: VsqlSyncError | None = None

    def client(self) -> AdminClient:
        """The client of brokers that answer. Raises what they answered at first, or that none did."""
        from vsql_shared.kafka.clients import make_admin
        from vsql_shared.kafka.topics import require_broker

        if self._away is not None:
            raise self._away
        if self._client is None:
            client = make_admin(self._settings)
            try:
                require_broker(client, self._settings)
            except VsqlSyncError as error:
                self._away = error
                raise
            self._client = client
        return self._client
