"""The look at a server's settings: by values for every finding, and on servers that are set up wrongly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.stack import Postgres, Stack
from vsql_shared.errors import DatabaseError
from vsql_shared.pg import checks
from vsql_shared.pg.connect import connect

GOOD = checks.ServerState(
    version=18,
    settings={
        "wal_level": "logical",
        "track_commit_timestamp": "on",
        "max_slot_wal_keep_size": "65536",
        "fsync": "on",
        "max_replication_slots": "10",
        "max_wal_senders": "10",
        "max_active_replication_origins": "10",
    },
    encoding="UTF8",
    in_recovery=False,
    slots_used=0,
    senders_used=0,
    origins_used=0,
)


def _with(**settings: str) -> checks.ServerState:
    return replace(GOOD, settings=GOOD.settings | settings)


def test_a_good_server_has_no_findings() -> None:
    assert list(checks.judge(GOOD)) == []


@pytest.mark.parametrize(
    ("state", "name", "severity"),
    [
        (_with(wal_level="replica"), "wal_level", "error"),
        (_with(track_commit_timestamp="off"), "track_commit_timestamp", "error"),
        (_with(max_slot_wal_keep_size="-1"), "max_slot_wal_keep_size", "warning"),
        (_with(fsync="off"), "fsync", "warning"),
        (replace(GOOD, encoding="SQL_ASCII"), "server_encoding", "error"),
        (replace(GOOD, encoding="WIN1252"), "server_encoding", "error"),
        (replace(GOOD, version=14), "server version", "error"),
        (replace(GOOD, version=19), "server version", "error"),
        (replace(GOOD, in_recovery=True), "pg_is_in_recovery()", "error"),
        (replace(GOOD, slots_used=9), "max_replication_slots", "warning"),
        (replace(GOOD, slots_used=10), "max_replication_slots", "error"),
        (replace(GOOD, senders_used=10), "max_wal_senders", "error"),
        (replace(GOOD, origins_used=10), "max_active_replication_origins", "error"),
        (replace(GOOD, version=17, origins_used=10), "max_replication_slots", "error"),
    ],
)
def test_each_wrong_setting_is_one_finding_with_its_fix(
    state: checks.ServerState, name: str, severity: str
) -> None:
    found = list(checks.judge(state))
    assert [(one.name, one.severity) for one in found] == [(name, severity)]
    assert found[0].fix


def test_every_supported_version_can_be_read(pg: Postgres) -> None:
    with connect(pg.conninfo, application_name="test") as conn:
        errors = [one for one in checks.inspect(conn) if one.severity == "error"]
        assert errors == []


def test_a_server_without_logical_decoding_is_refused_with_all_that_is_wrong(stack: Stack) -> None:
    server = stack.own_postgres(18, {"wal_level": "replica", "track_commit_timestamp": "off"})
    try:
        with connect(server.conninfo(), application_name="test") as conn:
            conn.execute("CREATE DATABASE bytes ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'")
        anything = connect(server.conninfo("bytes"), application_name="test")
        with anything, pytest.raises(DatabaseError) as caught:
            checks.require(anything)
        for word in ("wal_level", "track_commit_timestamp", "server_encoding", "ALTER SYSTEM"):
            assert word in str(caught.value)
    finally:
        server.remove()
