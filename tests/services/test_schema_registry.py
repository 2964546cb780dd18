"""The schema of packs in a real schema registry (Apicurio): what is asked and refused, and who reads it."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, groupby
from pathlib import Path
from typing import Any

import fastavro
import pytest

from tests.busy_service import busy_service
from tests.certificates import Authority
from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs
from tests.raw_server import drip, speaking
from tests.registry_server import Registry, gate, registry_server
from tests.services.conftest import NewSource
from tests.services.producer_node import SourceNode, make_shorter
from tests.stack.ports import release_port, reserve_port
from tests.streams import Record, read_topics
from tests.waiting import until
from vsql_shared import names
from vsql_shared.audit.dsse import SignedDocument
from vsql_shared.config.schema_registry import SchemaRegistrySettings
from vsql_shared.errors import RegistryError, TransientError
from vsql_shared.kafka.schema_registry import SchemaRegistry, pack_schema
from vsql_shared.wire.framing import FRAME_SIZE, frame

_numbers = count()
PASSWORD = "marker-of-a-password"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def subject() -> str:
    """A subject of this test's own."""
    return f"test-{next(_numbers)}.Pack"


def asked(url: str, subject: str, **section: Any) -> bytes:
    settings = SchemaRegistrySettings.model_validate({"url": url, "subject": subject, **section})
    return frame(SchemaRegistry(settings).id_of(pack_schema()))


def id_in(message: bytes) -> int:
    assert message[0] == 0
    return int.from_bytes(message[1:FRAME_SIZE], "big")


def changed(**more: Any) -> dict[str, Any]:
    """The schema of packs with something else about it."""
    found: dict[str, Any] = json.loads(pack_schema()) | more
    return found


# The subject


def test_the_schema_is_registered_once_and_its_subject_takes_only_what_is_compatible(
    registry: Registry, subject: str
) -> None:
    first = asked(registry.url, subject)
    assert json.loads(registry.schema(id_in(first))) == json.loads(pack_schema())
    assert asked(registry.url, subject) == asked(registry.url, subject, auto_register=False) == first
    assert registry.versions(subject) == [1]
    assert registry.level(subject) == "BACKWARD"
    fields = [*changed()["fields"], {"name": "more", "type": "int"}]
    text = json.dumps(changed(fields=fields))
    refused = registry.ask("POST", f"/subjects/{subject}/versions", {"schema": text})
    assert refused["error_code"] == 409


def test_producers_that_register_at_once_get_one_id(registry: Registry, subject: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda _: asked(registry.url, subject), range(6)))
    assert len(found) == 1
    assert registry.versions(subject) == [1]


def test_a_schema_somebody_registered_in_another_form_is_found(registry: Registry, subject: str) -> None:
    made = registry.register(subject, json.dumps(changed(), indent=3))
    assert id_in(asked(registry.url, subject, auto_register=False)) == made


def test_without_auto_register_a_missing_schema_is_refused_by_name_and_nothing_is_written(
    registry: Registry, subject: str
) -> None:
    with pytest.raises(RegistryError, match=f"subject {subject} does not have the schema of packs"):
        asked(registry.url, subject, auto_register=False)
    assert registry.versions(subject) == []


def test_reading_is_all_the_right_a_producer_needs_where_the_schema_is_there(
    registry: Registry, subject: str
) -> None:
    def only_look_ups(method: str, path: str) -> bool:
        return method == "POST" and path == f"/subjects/{subject}"

    with gate(registry, allows=only_look_ups) as door:
        with pytest.raises(RegistryError, match=r"registering subject .* 403 \(40301: User is denied"):
            asked(door.url, subject)
        made = registry.register(subject, pack_schema())
        door.calls.clear()
        assert id_in(asked(door.url, subject)) == made
        level = f"GET /config/{subject}?defaultToGlobal=true"
        assert door.calls == [f"POST /subjects/{subject}", level]
        door.calls.clear()
        assert id_in(asked(door.url, subject, auto_register=False)) == made
        assert door.calls == [f"POST /subjects/{subject}"]


def test_a_level_we_may_not_change_is_a_warning(
    registry: Registry, subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    with gate(registry, allows=lambda method, _: method != "PUT") as door, caplog.at_level(logging.WARNING):
        assert asked(door.url, subject)
    assert f"subject {subject} has compatibility NONE, and we may not change that (403" in caplog.text


def test_a_subject_that_was_left_without_a_level_is_warned_of_at_the_next_start(
    registry: Registry, subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A producer ended between registering and setting the level."""
    registry.register(subject, pack_schema())
    with caplog.at_level(logging.WARNING):
        assert asked(registry.url, subject, auto_register=False)
        assert not caplog.records
        assert asked(registry.url, subject)
    assert f"subject {subject} has compatibility NONE; set it to BACKWARD" in caplog.text


def test_a_level_that_may_not_be_read_is_a_warning_where_the_subject_is_ours(
    registry: Registry, subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        gate(registry, allows=lambda method, _: method == "POST") as door,
        caplog.at_level(logging.WARNING),
    ):
        assert asked(door.url, subject)
    assert f"subject {subject} has compatibility unknown (403" in caplog.text


def test_a_former_version_of_the_schema_is_followed_by_ours(registry: Registry, subject: str) -> None:
    former = changed(fields=[*changed()["fields"], {"name": "dropped", "type": "int"}])
    registry.register(subject, former, "BACKWARD")
    assert json.loads(registry.schema(id_in(asked(registry.url, subject)))) == changed()
    assert registry.versions(subject) == [1, 2]


FOREIGN: dict[str, tuple[object, str, str]] = {
    "another kind of schema": ("string", "BACKWARD", "is not compatible with what subject"),
    "a record without our fields": (
        {"type": "record", "name": "Pack", "namespace": "vsql_sync.v1", "fields": []},
        "FULL_TRANSITIVE",
        "is not compatible with what subject",
    ),
    "a subject that takes anything": ("string", "NONE", "has other schemas and compatibility NONE"),
    "a subject that looks forward": ("string", "FORWARD", "has other schemas and compatibility FORWARD"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_subject_with_schemas_ours_cannot_follow_is_refused_and_left_as_it_is(
    registry: Registry, subject: str, name: str
) -> None:
    schema, level, wanted = FOREIGN[name]
    registry.register(subject, json.dumps(schema), level)
    with pytest.raises(RegistryError, match=wanted) as refused:
        asked(registry.url, subject)
    assert subject in str(refused.value)
    assert "kafka.schema_registry.subject" in refused.value.hint
    assert (registry.versions(subject), registry.level(subject)) == ([1], level)


# The way to it


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


CREDENTIALS: dict[str, tuple[str, dict[str, str], bool]] = {
    "user and password": (basic("prod", PASSWORD), {"username": "prod", "password": PASSWORD}, True),
    "a password with ü and :": (basic("p", "ü:x"), {"username": "p", "password": "ü:x"}, True),
    "a token": ("Bearer abc.DEF-1==", {"token": "abc.DEF-1=="}, True),
    "another password": (basic("prod", "right"), {"username": "prod", "password": PASSWORD}, False),
    "another token": ("Bearer right", {"token": PASSWORD}, False),
    "none": (basic("prod", "right"), {}, False),
}


@pytest.mark.parametrize("name", CREDENTIALS)
def test_credentials_are_shown_to_the_registry_and_to_nobody_else(
    registry: Registry, subject: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, section, good = CREDENTIALS[name]
    with gate(registry, authorization=wanted) as door, caplog.at_level(logging.DEBUG):
        if good:
            assert id_in(asked(door.url, subject, **section)) > 0
        else:
            with pytest.raises(RegistryError, match=r"it answers 401 \(40101: User cannot access") as refused:
                asked(door.url, subject, **section)
            assert "check the credentials" in refused.value.hint
            assert PASSWORD not in str(refused.value)
            assert registry.versions(subject) == []
    assert PASSWORD not in caplog.text


def test_a_password_is_read_when_the_registry_is_asked(
    registry: Registry, subject: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    section = {"username": "prod", "password_file": str(file)}
    with gate(registry, authorization=basic("prod", "new")) as door:
        file.write_text("old\n")
        with pytest.raises(RegistryError, match="401"):
            asked(door.url, subject, **section)
        file.write_text("new\n")
        assert asked(door.url, subject, **section)


def test_tls_is_verified_and_a_client_certificate_shown(
    registry: Registry, subject: str, tmp_path: Path
) -> None:
    ca = Authority.make("ours")
    served = ca.issue(tmp_path / "registry", "registry", names=["127.0.0.1"])
    client = ca.issue(tmp_path / "client", "producer")
    ca_path = ca.write(tmp_path / "ca.crt")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca_path)
    context.load_cert_chain(served.certificate, served.key)
    context.verify_mode = ssl.CERT_REQUIRED
    with gate(registry, tls=context) as door:
        with pytest.raises(RegistryError, match="certificate is not to be trusted"):
            asked(door.url, subject)
        with pytest.raises(TransientError, match="no connection"):
            asked(door.url, subject, ca_path=str(ca_path))
        with pytest.raises(RegistryError, match="no certificate and its key"):
            asked(
                door.url, subject, ca_path=str(ca_path), cert_path=str(client.key), key_path=str(client.key)
            )
        assert asked(
            door.url,
            subject,
            ca_path=str(ca_path),
            cert_path=str(client.certificate),
            key_path=str(client.key),
        )


def test_a_busy_registry_is_asked_again_and_then_waited_for(registry: Registry, subject: str) -> None:
    with busy_service(registry.root, 503) as service:
        url = service.address + "/apis/ccompat/v7"
        service.start_refusing(2)
        assert asked(url, subject)
        service.start_refusing(100)
        with pytest.raises(TransientError, match=r"it answers 503 \(3 attempts\)"):
            asked(url, subject)
        assert service.calls == 3


def test_an_address_where_no_registry_is_says_so(registry: Registry, subject: str) -> None:
    with pytest.raises(RegistryError, match="it answers 404") as refused:
        asked(registry.root, subject)
    assert "REST API" in refused.value.hint
    port = reserve_port()
    with pytest.raises(TransientError, match="ConnectionRefusedError"):
        asked(f"http://127.0.0.1:{port}", subject)
    release_port(port)


# Who writes, and who reads

TABLES = "CREATE TABLE t (id bigint PRIMARY KEY, note text); CREATE TABLE u (id bigint PRIMARY KEY)"


def section(url: str, subject: str, more: str = "") -> str:
    return (
        f'[kafka.schema_registry]\nurl = "{url}"\nsubject = "{subject}"\n{more}\n'
        "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 100\nretry_backoff_max_ms = 500\n"
    )


def data_records(records: list[Record], cluster: str) -> list[Record]:
    apart = (names.audit_topic(cluster), names.keys_topic(cluster))
    return [record for record in records if record.topic not in apart and record.value is not None]


def test_a_stranger_decodes_a_real_record_with_the_schema_of_its_id(
    registry: Registry, subject: str, new_source: NewSource
) -> None:
    node = new_source(TABLES, ["t", "u"], config=section(registry.url, subject))
    worker = _running(node)
    node.execute("INSERT INTO t SELECT g, 'note ' || g FROM generate_series(1, 200) g")
    node.execute("INSERT INTO u VALUES (1)")
    node.wait_confirmed()
    node.stop(worker)
    records = node.records()
    packs = data_records(records, node.cluster)
    found = [_decoded(registry, record.value or b"") for record in packs]
    assert sum(len(pack["tuples"]) for pack in found) == 203  # a descriptor of each table
    assert {(pack["format"], pack["cluster"], pack["chain"]) for pack in found} == {
        (1, node.cluster, node.chain)
    }
    assert {pack["table_name"] for pack in found} == {"t", "u"}
    assert len({(record.value or b"")[:FRAME_SIZE] for record in packs}) == 1
    # What is signed lies as it was signed.
    apart = [r.value for r in records if r not in packs]
    assert apart
    assert all(value and SignedDocument.decode(value).encode() == value for value in apart)
    assert len(node.read().rows("t")) == 200


def _running(node: SourceNode) -> subprocess.Popen[bytes]:
    """A worker that has its slot."""
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    return worker


def _refused(node: SourceNode) -> bool:
    """Whether a waiting worker has said an error, and not only that it is asking."""
    state, detail = node.state()
    return state == "waiting" and detail["last_error_at"] is not None


def _decoded(registry: Registry, message: bytes) -> dict[str, Any]:
    """As a tool does that knows nothing but the wire format and the registry."""
    schema = fastavro.parse_schema(json.loads(registry.schema(id_in(message))))
    stream = io.BytesIO(message[FRAME_SIZE:])
    found = fastavro.schemaless_reader(stream, schema, None)
    assert stream.tell() == len(message) - FRAME_SIZE
    assert isinstance(found, dict)
    return found


def test_a_registry_is_waited_for_at_start_and_not_missed_later(
    registry: Registry, subject: str, new_source: NewSource
) -> None:
    port = reserve_port()
    node = new_source(TABLES, ["t", "u"], config=section(f"http://127.0.0.1:{port}/apis/ccompat/v7", subject))
    worker = node.start()
    node.wait(lambda: node.state()[0] == "waiting")
    assert "schema registry" in node.state()[1]["last_error"]
    release_port(port)
    with gate(registry, port=port) as door:
        node.wait(lambda: node.state()[0] == "running")
        node.execute("INSERT INTO t VALUES (1, 'x')")
        node.wait_confirmed()
        assert sum(call.startswith("POST") for call in door.calls) == 2  # looked up, registered
    node.cut_off()
    node.execute("INSERT INTO t VALUES (2, 'x')")
    node.wait_confirmed()
    node.stop(worker)
    read = node.read()
    assert [values[0] for _, values in read.rows("t")] == [(n).to_bytes(8, "big") for n in (1, 2)]
    assert len({entry.epoch for entry in read.manifests}) == 2
    assert {id_in(r.value or b"") for r in data_records(node.records(), node.cluster)} == {
        id_in(asked(registry.url, subject))
    }


def test_a_registry_that_answers_byte_by_byte_is_said_in_the_status_and_a_stop_is_seen(
    subject: str, new_source: NewSource
) -> None:
    with speaking(lambda conn: drip(conn, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")) as url:
        node = new_source(TABLES, ["t", "u"], config=section(url, subject))
        worker = node.start()
        node.wait(lambda: node.state()[0] == "waiting")
        assert f"asking schema registry {url}" in node.state()[1]["last_error"]
        began = time.monotonic()
        node.stop(worker)
        # One call's time at most, and not three.
        assert time.monotonic() - began < 10
        assert node.state()[0] == "stopped"
    assert node.topics() == []


def test_a_restart_does_not_need_the_registry(
    registry: Registry, subject: str, new_source: NewSource
) -> None:
    port = reserve_port()
    url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
    release_port(port)
    node = new_source(TABLES, ["t", "u"], config=section(url, subject))
    with gate(registry, port=port):
        worker = _running(node)
        node.execute("INSERT INTO t VALUES (1, 'x')")
        node.wait_confirmed()
        node.stop(worker)
    worker = node.start(log="second")
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (2, 'y')")
    node.wait_confirmed()
    node.stop(worker)
    packs = data_records(node.records(), node.cluster)
    assert {id_in(record.value or b"") for record in packs} == {id_in(asked(registry.url, subject))}
    assert "which it gave before" in node.log("second")


def test_a_registry_that_refuses_is_said_in_the_status_without_the_password_and_nothing_is_sent(
    registry: Registry, subject: str, new_source: NewSource
) -> None:
    with gate(registry, authorization=basic("prod", "right")) as door:
        node = new_source(
            TABLES,
            ["t", "u"],
            config=section(door.url, subject, f'username = "prod"\npassword = "{PASSWORD}"'),
        )
        worker = node.start()
        node.wait(lambda: _refused(node))
        said = str(node.state())
        assert "it answers 401" in said
        assert subject in said
        assert node.topics() == []
        door.authorization = basic("prod", PASSWORD)
        node.wait(lambda: node.state()[0] == "running")
        node.execute("INSERT INTO t VALUES (1, 'x')")
        node.wait_confirmed()
        node.stop(worker)
    assert PASSWORD not in said + node.log() + (node.folder / "worker.log").read_text()
    assert len(node.read().rows("t")) == 1


def _say_registry(node: Node, text: str) -> None:
    """Change the node's configuration file, as an operator does between two starts."""
    kept = node.config.read_text().partition("[kafka.schema_registry]")[0]
    node.config.write_text(kept + text)


def test_what_is_switched_off_and_on_before_a_backlog_is_applied_all_the_same(
    registry: Registry, subject: str, pairs: Pairs
) -> None:
    framed = section(registry.url, subject)
    pair = pairs(TABLES, config=framed, target_config="")
    pair.a.execute("INSERT INTO t SELECT g, 'copied' FROM generate_series(1, 100) g")
    pair.create(["t(*)", "u(*)"])
    pair.a.start("producer")
    # The topics of a first copy go when it is applied.
    copied = until(lambda: _forms(pair, ".copy."), 60, lambda: pair.a.tail("producer"))
    assert set(copied) == {True}
    pair.b.start("consumer")
    pair.wait_in_step()
    pair.b.stop("consumer")
    for number, text in enumerate((None, "", framed), 1):
        if text is not None:
            _say_registry(pair.a, text)
            pair.a.start("producer")
        first = number * 1000
        pair.a.execute(
            f"INSERT INTO t SELECT g, 'x' FROM generate_series({first}, {first + 299}) g;"
            f"UPDATE t SET note = 'y' WHERE id = {first}; INSERT INTO u VALUES ({number})"
        )
        _wait_sent(pair.a)
        pair.a.stop("producer")
    sent = _forms(pair, names.data_topic(pair.cluster, pair.chain, "public", "t"))
    assert [form for form, _ in groupby(sent)] == [True, False, True]
    pair.start()
    pair.wait_in_step()
    assert pair.differences() == []
    assert pair.b.query("SELECT count(*), sum(id) FROM u") == [(3, 6)]
    assert pair.b.query("SELECT count(*) FROM t WHERE note = 'copied'") == [(100,)]
    assert pair.acknowledged_rows() == pair.audited_rows()
    assert pair.b.ctl("audit", "verify").returncode == 0
    pair.stop()


def _forms(pair: TwoNodes, part: str) -> list[bool]:
    """Of the records of topics with this in their name: whether they have a frame."""
    records = data_records(read_topics(pair.a.kafka, pair.cluster), pair.cluster)
    return [(one.value or b"")[:1] == b"\0" for one in records if part in one.topic]


def _wait_sent(node: Node) -> None:
    wanted = node.query("SELECT pg_current_wal_insert_lsn()")[0][0]
    until(
        lambda: node.query(
            "SELECT 1 FROM pg_replication_slots WHERE confirmed_flush_lsn >= %s::pg_lsn", wanted
        ),
        60,
        lambda: node.tail("producer"),
    )


def test_records_with_frames_are_read_back_where_kafka_lost_the_end_of_the_chain(
    registry: Registry, subject: str, new_source: NewSource
) -> None:
    node = new_source(TABLES, ["t", "u"], config=section(registry.url, subject))
    worker = _running(node)
    for number in range(4):
        node.execute(f"INSERT INTO t SELECT g, 'x' FROM generate_series({number}00, {number}99) g")
        node.wait_confirmed()
    node.stop(worker)
    topic = names.audit_topic(node.cluster)
    make_shorter(node, topic, [record for record in node.records() if record.topic == topic][:2])
    worker = node.start(log="second")
    node.execute("INSERT INTO t VALUES (400, 'after')")
    node.wait_confirmed()
    assert "published again" in node.log("second")
    node.stop(worker)
    keys = [int.from_bytes(values[0] or b"", "big") for _, values in node.read().rows("t")]
    assert keys == [*range(401)]


def test_the_operator_registers_what_a_producer_may_not(
    registry: Registry, subject: str, new_source: NewSource, tmp_path: Path
) -> None:
    writes, reads = basic("admin", PASSWORD), basic("producer", "may read")
    for name, text in (("reader", "may read"), ("admin", PASSWORD)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    own = f'auto_register = false\nusername = "producer"\npassword_file = "{tmp_path / "reader"}"'
    with gate(registry, authorization=writes) as admins, gate(registry, authorization=reads) as readers:
        node = new_source(TABLES, ["t"], config=section(readers.url, subject, own))
        worker = node.start()
        node.wait(lambda: _refused(node))
        said = node.state()[1]["last_error"]
        assert f"subject {subject} does not have the schema of packs" in said
        assert "syncctl kafka schema" in said
        done = subprocess.run(
            [sys.executable, "-m", "vsql_ctl", "--config", str(node.config), "kafka", "schema",
             "--register", "--output", "json"],
            capture_output=True, text=True, timeout=60, check=True,
            env={
                **os.environ,
                "VSQL_SYNC__KAFKA__SCHEMA_REGISTRY__URL": admins.url,
                "VSQL_SYNC__KAFKA__SCHEMA_REGISTRY__USERNAME": "admin",
                "VSQL_SYNC__KAFKA__SCHEMA_REGISTRY__PASSWORD_FILE": str(tmp_path / "admin"),
            },
        )  # fmt: skip
        told = json.loads(done.stdout)
        assert (told["subject"], told["schema"]) == (subject, changed())
        node.wait(lambda: node.state()[0] == "running")
        node.execute("INSERT INTO t VALUES (1, 'x')")
        node.wait_confirmed()
        node.stop(worker)
        assert all("versions" not in call for call in readers.calls)
    packs = data_records(node.records(), node.cluster)
    assert {id_in(record.value or b"") for record in packs} == {told["id"]}
