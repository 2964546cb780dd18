"""The operator's connection to a node's database, and the settings when there are any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vsql_ctl.context import Operator
from vsql_shared.errors import ConfigError

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

APPLICATION_NAME = "vsql_sync_ctl"


def open_node(operator: Operator, conninfo: str | None = None) -> Connection:
    """Connect to this node's database: by a connection string, else as the configuration says."""
    from vsql_shared.pg.connect import connect

    text = conninfo if conninfo is not None else operator.settings.connection.conninfo()
    return connect(text, application_name=APPLICATION_NAME)


def settings_or_none(operator: Operator) -> Settings | None:
    """The settings; None only when there is no configuration at all. A wrong one is an error."""
    from vsql_shared.config import find_config

    if operator.config_path is None:
        try:
            find_config(None, env=os.environ, cwd=Path.cwd())
        except ConfigError:
            if not os.environ.get("VSQL_SYNC_CONFIG"):
                return None
            raise
    return operator.settings
