"""Installing schema vsql_sync by its numbered files, on real servers."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from tests.conftest import NewDatabase
from vsql_shared.errors import DatabaseError, RefusedError
from vsql_shared.pg import migrate
from vsql_shared.pg.connect import Connection, connect

TABLES_OF_THE_GUIDE = {
    "nodes",
    "coordinator_state",
    "audit_log",
    "identity_ranges",
    "conflict_log",
    "ddl_queue",
    "schema_fingerprints",
}


def _open(conninfo: str) -> Connection:
    return connect(conninfo, application_name="test")


def _tables(conn: Connection) -> set[str]:
    return {row[0] for row in conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'vsql_sync'")}


@pytest.mark.parametrize("version", [15, 18])
def test_an_empty_database_gets_every_table_of_the_guide(new_database: NewDatabase, version: int) -> None:
    with _open(new_database("schema", version)) as conn:
        numbers = migrate.install(conn)
        assert numbers == [step.version for step in migrate.migrations()]
        assert _tables(conn) >= TABLES_OF_THE_GUIDE
        migrate.require_current(conn)


def test_the_numbers_of_the_files_have_no_gap() -> None:
    numbers = [step.version for step in migrate.migrations()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_installing_again_changes_nothing(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        migrate.install(conn)
        assert migrate.install(conn) == []


def test_a_database_of_an_older_version_is_upgraded_and_keeps_its_rows(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        steps = migrate.migrations()
        migrate.install(conn, steps[:1])
        conn.execute("INSERT INTO vsql_sync.coordinator_state (key, value) VALUES ('kept', '1')")
        with pytest.raises(RefusedError, match="needs version"):
            migrate.require_current(conn)
        assert migrate.install(conn) == [step.version for step in steps[1:]]
        assert conn.execute("SELECT value FROM vsql_sync.coordinator_state").fetchall() == [(1,)]


def test_a_changed_applied_file_is_refused(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        steps = migrate.migrations()
        migrate.install(conn, steps)
        changed = [replace(steps[0], text=steps[0].text + "\n-- one comment more"), *steps[1:]]
        with pytest.raises(RefusedError, match="file 001 of this program is not the one that was applied"):
            migrate.install(conn, changed)


def test_a_database_made_from_other_files_of_equal_numbers_is_named_as_such(
    new_database: NewDatabase,
) -> None:
    with _open(new_database("schema")) as conn:
        migrate.install(conn)
        conn.execute("UPDATE vsql_sync.schema_version SET checksum = 'other' WHERE version = 2")
        with pytest.raises(RefusedError, match="file 002 of this program is not the one") as refused:
            migrate.require_current(conn)
        assert "has version" not in str(refused.value)
        assert "build" in refused.value.hint


def test_a_newer_database_is_refused_by_an_older_program(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        steps = migrate.migrations()
        migrate.install(conn, steps)
        with pytest.raises(RefusedError, match="use the newer program"):
            migrate.install(conn, steps[:-1])


def test_a_file_below_the_newest_applied_one_is_refused(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        first = migrate.migrations()[0]
        third = migrate.Migration(3, "later", "SELECT 1")
        migrate.install(conn, [first, third])
        with pytest.raises(RefusedError, match="002 was never applied"):
            migrate.install(conn, [first, migrate.Migration(2, "between", "SELECT 1"), third])


def test_a_failing_file_leaves_nothing_of_itself_and_can_be_repeated(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        first = migrate.migrations()[0]
        broken = migrate.Migration(2, "broken", "CREATE TABLE vsql_sync.half (x int); SELECT 1/0;")
        with pytest.raises(DatabaseError, match="installing schema"):
            migrate.install(conn, [first, broken])
        assert migrate.applied(conn) == {1: first.checksum}
        assert "half" not in _tables(conn)
        mended = migrate.Migration(2, "broken", "CREATE TABLE vsql_sync.half (x int);")
        assert migrate.install(conn, [first, mended]) == [2]


def test_a_foreign_schema_of_that_name_is_refused_untouched(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        conn.execute("CREATE SCHEMA vsql_sync")
        conn.execute("CREATE TABLE vsql_sync.mine (x int)")
        with pytest.raises(RefusedError, match="not made by vsql-sync"):
            migrate.install(conn)
        assert _tables(conn) == {"mine"}


def test_installers_at_the_same_time_apply_each_file_once(new_database: NewDatabase) -> None:
    conninfo = new_database("schema")
    done: list[list[int]] = []

    def run() -> None:
        with _open(conninfo) as conn:
            done.append(migrate.install(conn))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    installed = sorted(version for versions in done for version in versions)
    assert installed == [step.version for step in migrate.migrations()]


def test_a_user_without_create_is_told_so(new_database: NewDatabase) -> None:
    with _open(new_database("schema")) as conn:
        conn.execute("CREATE ROLE schema_nobody")
        try:
            conn.execute("SET ROLE schema_nobody")
            with pytest.raises(DatabaseError, match="permission denied for database"):
                migrate.install(conn)
        finally:
            conn.execute("RESET ROLE")
            conn.execute("DROP ROLE schema_nobody")
