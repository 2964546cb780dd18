"""What a person gets wrong: each mistake is one message that says what is wrong and what to do, and no harm.

Three tables of mistakes, on real commands and services: at the terminal, when a service starts, and while a
stream runs (there the message stands in `syncctl status`, and the stream goes on when the mistake is mended).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # not said, as elsewhere

from tests.nodes import PUBLICATION, Node, TwoNodes
from tests.stack import Stack

TABLES = """
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE TABLE u (id int PRIMARY KEY, a int, b int);
CREATE TABLE keyless (a int);
"""
PATIENCE = "[limits]\nretry_backoff_max_ms = 2000\nstatus_interval_ms = 200\n"
NOBODY = "127.0.0.1:1"
PEER = ("--peer-node-id", "2", "--peer-name", "node-b", "--mode", "uni-directional", "--yes")


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """Two nodes with keys, schema and a publication; they do not know each other yet."""
    pair = TwoNodes(stack, tmp_path_factory.mktemp("bad"), TABLES, config=PATIENCE)
    kek = pair.folder / "kek.key"
    for node in (pair.a, pair.b):
        node.write_config(kek)
        node.ctl("key", "generate", "--output", str(node.keys))
    pair.a.ctl("key", "generate", "--kek", str(kek))
    for node in (pair.a, pair.b):
        node.ctl("node", "init")
    pair.a.ctl("publication", "create", PUBLICATION, "--table", "t(*)", "--table", "u(*)")
    with ExitStack() as closing:
        closing.callback(pair.stop)
        for role in ("bad_plain", "bad_norepl"):
            with psycopg.connect(pair.a.conninfo, autocommit=True) as admin:
                admin.execute(f"CREATE ROLE {role} LOGIN".encode())
                closing.callback(_run, pair.a.conninfo, f"DROP OWNED BY {role}; DROP ROLE {role}")
        pair.a.execute("GRANT vsql_sync_producer TO bad_norepl")
        yield pair


def _run(conninfo: str, script: str) -> None:
    with psycopg.connect(conninfo) as conn:
        conn.execute(script.encode())


@contextmanager
def edited(node: Node, old: str, new: str) -> Iterator[None]:
    """The node's configuration with one thing changed."""
    text = node.config.read_text()
    assert old in text
    node.config.write_text(text.replace(old, new))
    try:
        yield
    finally:
        node.config.write_text(text)


def state(pair: TwoNodes) -> list[object]:
    """All that a command could leave half done."""
    found: list[object] = []
    for node in (pair.a, pair.b):
        for table in ("nodes", "streams", "stream_targets", "signers", "audit_log", "vsql_sync_audit"):
            found += node.query(f"SELECT '{table}', count(*) FROM vsql_sync.{table}")
        found += node.query("SELECT pubname FROM pg_publication ORDER BY 1")
        found += node.query("SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")
    return found


def one_error(text: str, words: str) -> None:
    """`text` (standard error) tells of one error, with its remedy, and of nothing that went on inside."""
    lines = [line for line in text.splitlines() if not line.startswith(("{", "warning: "))]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert words in text
    assert "Traceback" not in text
    logged = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [entry for entry in logged if entry["level"] in ("error", "critical")] == []


@dataclass(frozen=True)
class Typed:
    """A command with a mistake: where, the configuration's change, what is typed, what is answered."""

    command: Sequence[str]
    code: int
    words: str
    change: tuple[str, str] = ("[cluster]", "[cluster]")


TYPED = {
    "connection string is none": Typed(
        ["node", "init", "--connection", "nonsense"], 3, "the connection string cannot be read"
    ),
    "nobody at the port": Typed(
        ["node", "init", "--connection", "host=127.0.0.1 port=1 dbname=x"], 7, "check host and port"
    ),
    "no such database": Typed(
        ["status"], 5, "check the database name, or create it", ("database = ", 'database = "nowhere" #')
    ),
    "no such host": Typed(
        ["status"], 7, "check the host name", ('host = "127.0.0.1"', 'host = "nohost.invalid"')
    ),
    "user without privileges": Typed(
        ["status"], 5, "permission denied for schema vsql_sync", ('user = "postgres"', 'user = "bad_plain"')
    ),
    "init without superuser": Typed(
        ["node", "init"], 5, "permission denied for schema", ('user = "postgres"', 'user = "bad_plain"')
    ),
    "signing key is not there": Typed(
        ["node", "init"], 6, "syncctl key generate", ("vsql-sync-signing.key", "nothing.key")
    ),
    "signing key is a public one": Typed(
        ["node", "init"], 6, "holds no private key", ("vsql-sync-signing.key", "vsql-sync-signing.pub")
    ),
    "signing key is a folder": Typed(
        ["config", "check"], 3, "is no file", ("/vsql-sync-signing.key", "")
    ),
    "KEK file is not there": Typed(
        ["config", "check"], 3, "encryption.kms.file.path", ("kek.key", "nokek.key")
    ),
    "no replica identity": Typed(
        ["publication", "create", "p", "--table", "keyless(*)"], 4, "ADD PRIMARY KEY (…)"
    ),
    "no such table": Typed(["publication", "create", "p", "--table", "no(*)"], 4, "there is no such table"),
    "no such column": Typed(["publication", "create", "p", "--table", "t(id,z)"], 4, "there is no column z"),
    "peer out of reach": Typed(
        ["node", "add-peer", *PEER, "--peer-connection", "host=127.0.0.1 port=1"], 7, "check host and port"
    ),
    "a variable that names no key": Typed(["config", "check"], 3, "did you mean", ("[cluster]", "[clustr]")),
    "stream that is not there": Typed(["start", "--stream", "nothing.node-a"], 4, "nothing.node-a"),
}  # fmt: skip


@pytest.mark.parametrize("case", TYPED.values(), ids=TYPED.keys())
def test_a_wrong_command_is_one_error_and_changes_nothing(pair: TwoNodes, case: Typed) -> None:
    before = state(pair)
    with edited(pair.a, *case.change):
        done = pair.a.ctl(*case.command, check=False)
    assert done.returncode == case.code, done.stderr
    one_error(done.stderr, case.words)
    assert state(pair) == before


def test_a_peer_whose_tables_do_not_fit_is_refused_with_every_table_and_nothing_written(
    pair: TwoNodes,
) -> None:
    pair.b.execute("ALTER TABLE t RENAME TO t_elsewhere; ALTER TABLE u DROP COLUMN b")
    before = state(pair)
    done = pair.a.ctl("node", "add-peer", *PEER, "--peer-connection", pair.b.conninfo, check=False)
    pair.b.execute("ALTER TABLE t_elsewhere RENAME TO t; ALTER TABLE u ADD COLUMN b int")
    assert done.returncode == 4
    one_error(done.stderr, "public.t: does not exist on the peer; create it there")
    one_error(done.stderr, "public.u: the peer's table lacks column b; add it there")
    assert state(pair) == before


def test_a_server_without_logical_decoding_is_refused_before_the_schema(stack: Stack, pair: TwoNodes) -> None:
    server = stack.own_postgres(18, {"wal_level": "replica"})
    try:
        done = pair.a.ctl("node", "init", "--connection", server.conninfo(), check=False)
        one_error(done.stderr, "ALTER SYSTEM SET wal_level = 'logical'; then restart the server")
        assert done.returncode == 5
        with psycopg.connect(server.conninfo()) as conn:
            assert conn.execute("SELECT to_regnamespace('vsql_sync')").fetchall() == [(None,)]
    finally:
        server.remove()


def test_a_password_that_is_wrong_is_said_and_not_repeated(stack: Stack, pair: TwoNodes) -> None:
    server = stack.own_postgres(18, auth="scram")
    try:
        wrong = server.conninfo().replace(server.password, "not-the-password")
        done = pair.a.ctl("node", "init", "--connection", wrong, check=False)
        one_error(done.stderr, "check user and password")
        assert "not-the-password" not in done.stderr + done.stdout
        assert done.returncode == 5
    finally:
        server.remove()


@dataclass(frozen=True)
class Started:
    """A service started with a mistake in its configuration, or a file of it."""

    change: tuple[str, str]
    code: int
    words: str
    role: str = "producer"


STARTED = {
    "no such database": Started(("database = ", 'database = "nowhere" #'), 5, "check the database name"),
    "database is no node": Started(("database = ", 'database = "postgres" #'), 4, "syncctl node init"),
    "user is no producer": Started(
        ('user = "postgres"', 'user = "bad_plain"'), 5, "GRANT vsql_sync_producer TO bad_plain"
    ),
    "user is no consumer": Started(
        ('user = "postgres"', 'user = "bad_plain"'), 5, "GRANT vsql_sync_consumer TO bad_plain", "consumer"
    ),
    "user may not replicate": Started(
        ('user = "postgres"', 'user = "bad_norepl"'), 5, "ALTER ROLE bad_norepl REPLICATION"
    ),
    "signing key is not there": Started(("vsql-sync-signing.key", "no.key"), 3, "audit.signing_key_path"),
    "signing key is a public one": Started(
        ("vsql-sync-signing.key", "vsql-sync-signing.pub"), 6, "holds no private key"
    ),
    "signing key is of another kind": Started(("vsql-sync-signing.key", "rsa.key"), 6, "Ed25519"),
    "KEK is not there": Started(("kek.key", "nokek.key"), 3, "encryption.kms.file.path"),
    "KEK is another": Started(('"test-kek"', '"other-kek"'), 6, "set encryption.kms.kek_id"),
    "KEK file is a signing key": Started(
        ("kek.key", "node-a-keys/vsql-sync-signing.key"), 6, "syncctl key generate --kek FILE"
    ),
    "mode prod without what it needs": Started(('mode = "dev"', 'mode = "prod"'), 3, "server.tls.cert_path"),
}  # fmt: skip


@pytest.mark.parametrize("case", STARTED.values(), ids=STARTED.keys())
def test_a_service_that_cannot_work_says_one_thing_and_ends(pair: TwoNodes, case: Started) -> None:
    _rsa_key(pair.a.keys / "rsa.key")
    before = state(pair)
    with edited(pair.a, *case.change):
        done = run_service(pair.a, case.role)
    assert done.returncode == case.code, done.stderr
    one_error(done.stderr, case.words)
    assert "worker started" not in done.stderr
    assert state(pair) == before


def run_service(node: Node, role: str) -> subprocess.CompletedProcess[str]:
    """Run a service that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", f"vsql_{role}s", "--config", str(node.config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _rsa_key(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


@pytest.fixture
def running(pair: TwoNodes) -> Iterator[TwoNodes]:
    """The pair with streams; each test starts the services it needs, and they are stopped after it."""
    pair.a.ctl("node", "add-peer", *PEER, "--peer-connection", pair.b.conninfo)
    for node in (pair.a, pair.b):
        node.ctl("start")
        for role in ("producer", "consumer"):
            node.log_file(role).unlink(missing_ok=True)
    yield pair
    pair.stop()


def says(node: Node, words: str, timeout: float = 40) -> None:
    """Wait until `syncctl status` says `words` as a stream's error."""
    deadline = time.monotonic() + timeout
    shown = ""
    while time.monotonic() < deadline:
        shown = node.ctl("status").stdout
        if words in shown:
            return
        time.sleep(0.5)
    pytest.fail(f"{words!r} is not said:\n{shown}\n{node.tail('producer')}\n{node.tail('consumer')}")


def told_once(node: Node, role: str, words: str) -> None:
    """The service lives, and its log has the error once for a stream, with no trace of the inside."""
    assert node.services[role].poll() is None
    text = node.log_file(role).read_text()
    assert "Traceback" not in text
    logged = [json.loads(line) for line in text.splitlines()]
    assert [entry for entry in logged if entry["level"] == "critical"] == []
    errors = [(entry["stream"], entry["msg"]) for entry in logged if entry["level"] == "error"]
    assert errors
    assert all(words in message for _, message in errors)
    assert len({stream for stream, _ in errors}) == len(errors), errors
    assert len(logged) < 30, "the log is flooded"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("role", ["producer", "consumer"])
def test_no_kafka_is_said_and_waited_for(running: TwoNodes, role: str) -> None:
    node = running.a if role == "producer" else running.b
    with edited(node, node.kafka, NOBODY):
        node.start(role)
        says(node, f"no Kafka broker answers at {NOBODY}")
        told_once(node, role, "check kafka.bootstrap_servers")
        assert node.stop(role) == 0
    running.start()
    running.wait_in_step()


@pytest.mark.timeout(180)
def test_a_topic_of_another_shape_is_said_with_all_that_differs(stack: Stack, tmp_path: Path) -> None:
    pair = TwoNodes(stack, tmp_path, TABLES, config=PATIENCE)
    pair.create(["t(*)"])
    admin, topic = AdminClient({"bootstrap.servers": pair.a.kafka}), f"{pair.cluster}.audit"
    admin.create_topics([NewTopic(topic, num_partitions=3, replication_factor=1)])[topic].result(30)
    try:
        pair.start()
        for node, role in ((pair.a, "producer"), (pair.b, "consumer")):
            says(node, "cleanup.policy = delete, expected compact; 3 partitions, expected 1")
            told_once(node, role, f"topic {topic} is not of the shape it needs")
        assert pair.heads() == (0, 0)
        admin.delete_topics([topic])[topic].result(30)
        pair.a.execute("INSERT INTO t VALUES (1, 'after')")
        pair.wait_in_step(60)
        assert pair.differences() == []
    finally:
        pair.stop()


MENDED = {
    "column is missing": (
        "ALTER TABLE u DROP COLUMN b", 'table public.u lacks column "b"', "ALTER TABLE u ADD COLUMN b int"
    ),
    "table is missing": (
        "ALTER TABLE u RENAME TO away", "table public.u is not in the target", "ALTER TABLE away RENAME TO u"
    ),
}  # fmt: skip


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("spoil", "words", "mend"), MENDED.values(), ids=MENDED.keys())
def test_a_target_that_stops_fitting_is_said_and_waited_for(
    running: TwoNodes, spoil: str, words: str, mend: str
) -> None:
    running.start()
    running.wait_in_step()
    running.b.execute(spoil)
    running.a.execute("INSERT INTO t VALUES (7, 'same transaction'); INSERT INTO u VALUES (7, 7, 7)")
    try:
        says(running.b, words)
        told_once(running.b, "consumer", words)
        assert running.b.query("SELECT count(*) FROM t WHERE id = 7") == [(0,)], "nothing of it is applied"
    finally:
        running.b.execute(mend)
    running.wait_in_step(60)
    assert running.differences() == []
    running.a.execute("DELETE FROM t; DELETE FROM u")
    running.wait_in_step(60)


@pytest.mark.timeout(180)
def test_a_privilege_that_the_consumer_lacks_is_said_with_the_table(running: TwoNodes) -> None:
    _run(
        running.b.conninfo,
        "GRANT vsql_sync_consumer TO bad_plain; REVOKE INSERT ON t FROM vsql_sync_consumer",
    )
    running.a.start("producer")
    with edited(running.b, 'user = "postgres"', 'user = "bad_plain"'):
        running.b.start("consumer")
        running.a.execute("INSERT INTO t VALUES (8, 'x')")
        says(running.b, "permission denied for table t")
        told_once(running.b, "consumer", "grant the consumer's role the privilege")
        _run(running.b.conninfo, "GRANT INSERT ON t TO vsql_sync_consumer")
        running.wait_in_step(60)
        assert running.differences() == []
        _run(running.b.conninfo, "REVOKE vsql_sync_consumer FROM bad_plain")


@pytest.mark.timeout(180)
def test_a_second_service_and_a_second_daemon_are_refused_and_the_first_goes_on(running: TwoNodes) -> None:
    running.start()
    running.wait_in_step()
    for node, role in ((running.a, "producer"), (running.b, "consumer")):
        second = run_service(node, role)
        assert second.returncode == 4
        one_error(second.stderr, f"another {role} of node {node.name} is already running")
    running.a.stop("producer")
    running.b.stop("consumer")
    running.a.ctl("daemon", "start")
    try:
        refused = running.a.ctl("daemon", "start", check=False)
        assert refused.returncode == 4
        one_error(refused.stderr, "a daemon of this node runs already")
        foreground = running.a.ctl("run", "producer", check=False)
        assert foreground.returncode == 4
        one_error(foreground.stderr, "another producer of node node-a is already running")
        running.b.start("consumer")
        running.a.execute("INSERT INTO t VALUES (9, 'by the daemon')")
        running.wait_in_step()
    finally:
        running.a.ctl("daemon", "stop")
