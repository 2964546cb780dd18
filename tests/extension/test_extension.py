"""CREATE EXTENSION vsql_sync gives what the numbered files give, and is upgraded and dumped as it must be."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import NewDatabase
from tests.extension.catalog import describe
from tests.stack import Stack
from tests.stack.fetch import client_tools
from tests.stack.postgres import sharedir
from vsql_shared.errors import RefusedError
from vsql_shared.pg import extension, migrate, nodes
from vsql_shared.pg.connect import Connection, connect

pytestmark = pytest.mark.extension


def _open(conninfo: str) -> Connection:
    return connect(conninfo, application_name="test")


def _install_files(stack: Stack, version: int) -> None:
    if stack.postgres(version).source not in ("process", "running"):
        pytest.skip("the server's share folder is not on this machine")
    folder = sharedir(version) / "extension"
    extension.write(folder)
    extension.write(
        folder, migrate.migrations()[:1]
    )  # vsql_sync--1.sql, as a node of an older program has it
    extension.write(folder)  # the control file names the newest again


@pytest.mark.parametrize("version", [15, 16, 17, 18])
def test_the_extension_and_the_files_give_the_same_catalog(
    stack: Stack, new_database: NewDatabase, version: int
) -> None:
    _install_files(stack, version)
    with (
        _open(new_database("files", version)) as by_files,
        _open(new_database("ext", version)) as by_extension,
    ):
        migrate.install(by_files)
        by_extension.execute("CREATE EXTENSION vsql_sync")
        assert describe(by_extension) == describe(by_files)


def test_every_object_belongs_to_the_extension_and_goes_with_it(
    stack: Stack, new_database: NewDatabase
) -> None:
    _install_files(stack, 18)
    with _open(new_database("ext")) as conn:
        conn.execute("CREATE EXTENSION vsql_sync")
        conn.execute("DROP EXTENSION vsql_sync")
        assert conn.execute("SELECT to_regnamespace('vsql_sync')").fetchall() == [(None,)]


def test_node_init_finds_the_extension_and_runs_no_script_twice(
    stack: Stack, new_database: NewDatabase
) -> None:
    _install_files(stack, 18)
    with _open(new_database("ext")) as conn:
        conn.execute("CREATE EXTENSION vsql_sync")
        assert migrate.install(conn) == []
        migrate.require_current(conn)
        assert nodes.register_local(conn, 1, "node-a", "c", None)


def test_an_older_extension_is_updated_and_equals_a_new_one(stack: Stack, new_database: NewDatabase) -> None:
    _install_files(stack, 18)
    with _open(new_database("old")) as old, _open(new_database("new")) as new:
        old.execute("CREATE EXTENSION vsql_sync VERSION '1'")
        new.execute("CREATE EXTENSION vsql_sync")
        assert migrate.install(old) == [step.version for step in migrate.migrations()[1:]]
        assert describe(old) == describe(new)


def test_an_extension_whose_server_lacks_the_script_says_what_to_copy(
    stack: Stack, new_database: NewDatabase
) -> None:
    _install_files(stack, 18)
    with _open(new_database("ext")) as conn:
        conn.execute("CREATE EXTENSION vsql_sync")
        later = [*migrate.migrations(), migrate.Migration(900, "later", "SELECT 1")]
        with pytest.raises(RefusedError, match="copy the new extension files"):
            migrate.install(conn, later)


_ENTRY = """
INSERT INTO vsql_sync.vsql_sync_audit (event_type, source_node_id, target_node_id, batch_lsn_start,
    batch_lsn_end, tables_affected, row_count, contains_pci, merkle_root, signer_node_id, signature, chain,
    epoch, incarnation, sequence, batch, signer_key, document)
VALUES ('replication_batch', 'node-g', '*', '0/1', '0/2', '{}', 0, false, '', 'node-g', '', 'c', 1,
    gen_random_uuid(), 1, 1, '', 'the document')
"""


def test_state_survives_dump_and_restore(stack: Stack, new_database: NewDatabase) -> None:
    _install_files(stack, 18)
    source, target = new_database("dump"), new_database("restore")
    with _open(source) as conn:
        conn.execute("CREATE EXTENSION vsql_sync")
        nodes.register_local(conn, 7, "node-g", "c", bytes(range(32)))
        conn.execute(_ENTRY)
        partition = conn.execute("SELECT tableoid::regclass::text FROM vsql_sync.vsql_sync_audit").fetchall()
        assert partition != [("vsql_sync.vsql_sync_audit_default",)]
    tools = client_tools()
    dump = subprocess.run([tools / "pg_dump", source], capture_output=True, check=True)
    restore = [str(tools / "psql"), "-q", "-d", target]
    done = subprocess.run(restore, input=dump.stdout, capture_output=True, check=False)
    complaints = [line for line in done.stderr.decode().splitlines() if "ERROR" in line]
    # pg_dump does not know that attaching a partition to the extension's table makes its indexes.
    assert all("vsql_sync_audit_p" in line for line in complaints), complaints
    with _open(target) as conn:
        assert nodes.local(conn).number == 7
        assert conn.execute("SELECT count(*) FROM vsql_sync.signers").fetchall() == [(1,)]
        found = conn.execute(
            "SELECT tableoid::regclass::text, document FROM vsql_sync.vsql_sync_audit"
        ).fetchall()
        assert found == [(*partition[0], b"the document")]
        migrate.require_current(conn)
