"""Two nodes measure each other's clocks over a real Kafka; what somebody else puts there changes nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from tests.stack import Stack
from tests.waiting import until
from vsql_consumers.skew import FutureCommits, SkewGuard
from vsql_shared import names
from vsql_shared.audit.dsse import SignedDocument, sign_document
from vsql_shared.clocks import exchange
from vsql_shared.clocks.exchange import Answer, Measure, Question
from vsql_shared.clocks.keeper import ClockKeeper, Turns
from vsql_shared.config import Settings, load_settings
from vsql_shared.crypto.signing import Signer, generate_signing_key, load_signer
from vsql_shared.errors import TransientError
from vsql_shared.pg import clocks, nodes, roles
from vsql_shared.pg.clocks import NodeClock
from vsql_shared.pg.connect import Connection, connect

NAMES = ("node-a", "node-b")


@dataclasses.dataclass
class Side:
    """One node: its settings, its database, its key."""

    name: str
    settings: Settings
    conninfo: str
    conn: Connection
    signer: Signer

    def clock_of(self, name: str) -> NodeClock | None:
        """What it knows of a node's clock."""
        return next((one for one in clocks.read(self.conn) if one.node == name), None)


@pytest.fixture(scope="module")
def sides(
    stack: Stack, schema_of: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Side, Side]]:
    """Two nodes that know each other, with signing keys; no streams, and no services."""
    folder, cluster = tmp_path_factory.mktemp("clocks"), stack.new_cluster_name()
    with ExitStack() as closing:
        made = []
        for number, name in enumerate(NAMES, 1):
            conninfo = stack.new_database(18, f"clocks{number}", schema_of(18))
            closing.callback(stack.drop_database, conninfo)
            key, _ = generate_signing_key(_folder(folder / name))
            conn = closing.enter_context(connect(conninfo, application_name="test"))
            settings = _settings(
                folder, cluster, number, name, conninfo, stack.kafka().bootstrap_servers, key
            )
            made.append(Side(name, settings, conninfo, conn, load_signer(key, name)))
        for side, other in (made, made[::-1]):
            number = NAMES.index(side.name) + 1
            nodes.register_local(side.conn, number, side.name, cluster, side.signer.public_key)
            roles.create(side.conn)
            side.conn.execute(
                "INSERT INTO vsql_sync.nodes (node_id, node_name, number, cluster, host, public_key,"
                " key_fingerprint) VALUES (%s, %s, %s, %s, 'x', %s, %s)",
                (
                    other.name,
                    other.name,
                    3 - number,
                    cluster,
                    other.signer.public_key,
                    other.signer.fingerprint,
                ),
            )
            nodes.pin(side.conn, other.name, other.signer.public_key)
        yield made[0], made[1]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _settings(
    folder: Path, cluster: str, number: int, name: str, conninfo: str, kafka: str, key: Path
) -> Settings:
    parts = dict(word.split("=", 1) for word in conninfo.split())
    file = folder / f"{name}.toml"
    file.write_text(
        f"""[cluster]
name = "{cluster}"
node_id = {number}
node_name = "{name}"
[connection]
host = "{parts["host"]}"
port = {parts["port"]}
database = "{parts["dbname"]}"
user = "{parts["user"]}"
[server]
mode = "dev"
[kafka]
bootstrap_servers = "{kafka}"
[audit]
signing_key_path = "{key}"
[encryption.kms]
provider = "file"
kek_id = "k"
[encryption.kms.file]
path = "{folder / "kek"}"
[replication.clock_sync]
measure_every = "1s"
"""
    )
    return load_settings(file)


class Lens:
    """What is on the topic, and a hand that puts something there."""

    def __init__(self, settings: Settings) -> None:
        self.topic = names.clocks_topic(settings.cluster.name)
        brokers = settings.kafka.bootstrap_servers
        self._producer = Producer({"bootstrap.servers": brokers})
        self._consumer = Consumer(
            {"bootstrap.servers": brokers, "group.id": "lens", "enable.auto.commit": False}
        )

    def put(self, value: bytes, key: bytes = b"") -> None:
        self._producer.produce(self.topic, value, key, partition=0)
        self._producer.flush(20)

    def end(self) -> int:
        return int(self._consumer.get_watermark_offsets(TopicPartition(self.topic, 0), timeout=20)[1])

    def read(self, begin: int = 0) -> list[SignedDocument]:
        end = self.end()
        self._consumer.assign([TopicPartition(self.topic, 0, begin)])
        found: list[SignedDocument] = []
        while len(found) < end - begin:
            for message in self._consumer.consume(100, timeout=1):
                assert message.error() is None
                found.append(SignedDocument.decode(message.value() or b""))
        return found

    def close(self) -> None:
        self._consumer.close()


@pytest.fixture
def keepers(sides: tuple[Side, Side]) -> Iterator[tuple[Side, Side]]:
    """Both nodes with the thread that measures, in both services of each."""
    for side in sides:
        side.conn.execute("DELETE FROM vsql_sync.clocks; DELETE FROM vsql_sync.future_commits")
    running = [ClockKeeper(side.settings, role) for side in sides for role in ("producer", "consumer")]
    for one in running:
        one.start()
    yield sides
    for one in running:
        one.stop(10)


def _measured(side: Side, other: str) -> bool:
    found = side.clock_of(other)
    return found is not None and found.offset_us is not None


def test_each_node_measures_the_other_and_its_own_host(keepers: tuple[Side, Side]) -> None:
    a, b = keepers
    until(lambda: _measured(a, "node-b") and _measured(b, "node-a"), 60)
    for side, other in ((a, "node-b"), (b, "node-a")):
        found = side.clock_of(other)
        assert found is not None
        assert found.offset_us is not None
        assert found.uncertainty_us is not None
        assert abs(found.offset_us) <= found.uncertainty_us, "both databases are on one server"
        assert (found.state, found.local, found.unanswered <= 1) == ("ok", False, True)
        own = side.clock_of(side.name)
        assert own is not None
        assert own.local
        assert own.offset_us is not None


def test_however_many_services_a_pair_exchanges_one_question_an_interval(keepers: tuple[Side, Side]) -> None:
    """And the topic has one key for each pair, direction and kind."""
    a, _ = keepers
    until(lambda: _measured(a, "node-b"), 60)
    lens = Lens(a.settings)
    begin, since = lens.end(), time.monotonic()
    time.sleep(5)
    found = lens.read(begin)
    seconds = time.monotonic() - since
    lens.close()
    asked = [Question.decode(one.payload).asker for one in found if one.payload_type == exchange.QUESTION]
    answered = [Answer.decode(one.payload).answerer for one in found if one.payload_type == exchange.ANSWER]
    for name in NAMES:
        assert 1 <= asked.count(name) <= seconds + 1
        assert answered.count(name) <= seconds + 1


@pytest.fixture
def alone(sides: tuple[Side, Side]) -> Iterator[tuple[Side, Side, Turns, Lens]]:
    """The turns of B, by hand, and nobody else."""
    a, b = sides
    with ExitStack() as closing:
        turns = until(lambda: _open(b, closing), 60)
        assert turns is not None
        turns.look(("node-a",))
        lens = Lens(b.settings)
        closing.callback(lens.close)
        yield a, b, turns, lens


def _open(side: Side, closing: ExitStack) -> Turns | None:
    try:
        return Turns(side.settings, side.conn, side.signer, closing)
    except KafkaException:  # a topic that was made this moment
        return None


def _answers(lens: Lens, begin: int, nonce: bytes) -> list[Answer]:
    found = [one for one in lens.read(begin) if one.payload_type == exchange.ANSWER]
    return [one for one in (Answer.decode(document.payload) for document in found) if one.nonce == nonce]


def _turn(turns: Turns, times: int = 4) -> None:
    for _ in range(times):
        turns.turn()
    turns.flush()


def test_a_recorded_question_is_answered_once(alone: tuple[Side, Side, Turns, Lens]) -> None:
    a, b, turns, lens = alone
    nonce = b"recorded".ljust(16)
    question = Question(b.settings.cluster.name, "node-a", "node-b", nonce)
    document = sign_document(a.signer, exchange.QUESTION, question.encode())
    begin = lens.end()
    lens.put(document)
    _turn(turns)
    time.sleep(1.1)
    lens.put(document)
    _turn(turns)
    assert len(_answers(lens, begin, nonce)) == 1


def test_what_anybody_else_puts_there_is_neither_answered_nor_believed(
    alone: tuple[Side, Side, Turns, Lens],
) -> None:
    a, b, turns, lens = alone
    cluster = b.settings.cluster.name
    _turn(turns, 1)
    asked = [one for one in lens.read() if one.payload_type == exchange.QUESTION]
    mine = [one for one in (Question.decode(document.payload) for document in asked) if one.asker == "node-b"]
    lie = Answer(cluster, "node-b", "node-a", mine[-1].nonce, 10**15, 10**15)
    forged = sign_document(a.signer, exchange.ANSWER, dataclasses.replace(lie, cluster="other").encode())
    nonce = b"of a stranger".ljust(16)
    question = Question(cluster, "node-a", "node-b", nonce)
    b.conn.execute("DELETE FROM vsql_sync.clocks")
    begin = lens.end()
    for value in (
        b"", b"garbage", b"x" * 100_000, forged,
        sign_document(None, exchange.ANSWER, lie.encode()),
        sign_document(b.signer, exchange.ANSWER, lie.encode()),
        sign_document(a.signer, exchange.QUESTION, lie.encode()),
        sign_document(None, exchange.QUESTION, question.encode()),
        sign_document(b.signer, exchange.QUESTION, question.encode()),
    ):  # fmt: skip
        lens.put(value)
    _turn(turns)
    assert _answers(lens, begin + 3, nonce) == []
    assert not _measured(b, "node-a")


def test_an_answer_that_is_kept_back_and_delivered_later_counts_for_nothing(
    alone: tuple[Side, Side, Turns, Lens],
) -> None:
    """Whoever holds Kafka has the true answer to an earlier question, and the peer's signature on it."""
    a, b, turns, lens = alone
    begin = lens.end()
    _turn(turns, 1)
    time.sleep(1.1)
    _turn(turns, 1)
    asked = [one for one in lens.read(begin) if one.payload_type == exchange.QUESTION]
    first = Question.decode(asked[0].payload)
    assert len(asked) >= 2
    late = Answer(
        first.cluster,
        first.asker,
        first.answerer,
        first.nonce,
        time.time_ns() // 1000,
        time.time_ns() // 1000,
    )
    b.conn.execute("DELETE FROM vsql_sync.clocks")
    lens.put(sign_document(a.signer, exchange.ANSWER, late.encode()))
    _turn(turns, 2)
    assert not _measured(b, "node-a")


def test_a_peer_that_is_gone_keeps_its_last_measure_with_its_age_and_no_alarm(
    sides: tuple[Side, Side],
) -> None:
    _, b = sides
    clocks.measured(b.conn, "node-a", Measure(5_000_000, 1_000), "error", 0.2)
    assert clocks.fresh(b.conn, "node-a") == Measure(5_000_000, 1_000)
    assert (b.clock_of("node-a") or pytest.fail("nothing")).state == "error"
    time.sleep(0.3)
    assert clocks.fresh(b.conn, "node-a") is None
    found = b.clock_of("node-a")
    assert found is not None
    assert (found.state, found.offset_us) == ("unknown", 5_000_000)
    assert found.age_seconds is not None
    assert found.age_seconds >= 0.3


def test_a_measure_from_before_this_clock_was_set_back_says_nothing(sides: tuple[Side, Side]) -> None:
    _, b = sides
    clocks.measured(b.conn, "node-a", Measure(5_000_000, 1_000), "error", 60)
    b.conn.execute(
        "UPDATE vsql_sync.clocks SET measured_at = measured_at + interval '1 hour',"
        " fresh_until = fresh_until + interval '1 hour'"
    )
    assert clocks.fresh(b.conn, "node-a") is None
    assert (b.clock_of("node-a") or pytest.fail("nothing")).state == "unknown"
    clocks.measured(b.conn, "node-a", Measure(5_000_000, 1_000), "error", 60)
    assert clocks.fresh(b.conn, "node-a") == Measure(5_000_000, 1_000)


@pytest.mark.parametrize(
    ("found", "waits"),
    [
        (Measure(101_000, 500), True), (Measure(-101_000, 500), True), (Measure(100_000, 0), False),
        (Measure(500_000, 450_000), False), (None, False),
    ],
)  # fmt: skip
def test_pci_data_waits_only_where_the_clocks_are_too_far_apart_for_sure(
    sides: tuple[Side, Side], found: Measure | None, waits: bool
) -> None:
    _, b = sides
    b.conn.execute("DELETE FROM vsql_sync.clocks")
    if found is not None:
        clocks.measured(b.conn, "node-a", found, "warning", 60)
    guard = SkewGuard(b.conn, "node-a", 100)
    if not waits:
        guard.require_near()
        return
    with pytest.raises(TransientError, match=r"(?s)PCI data waits .* node-a.*max_clock_skew_ms = 100"):
        guard.require_near()


def test_commits_from_the_future_are_counted_and_the_farthest_is_kept(sides: tuple[Side, Side]) -> None:
    _, b = sides
    b.conn.execute("DELETE FROM vsql_sync.future_commits; DELETE FROM vsql_sync.clocks")
    future = FutureCommits(b.conn, "node-a")
    for ahead in (5_000, 70_000, 20_000):
        future.came(ahead)
    future.write()
    future.came(30_000)
    future.write()  # not twice within a second
    found = b.clock_of("node-a")
    assert found is not None
    assert (found.future_waits, found.future_most_us, found.offset_us) == (3, 70_000, None)
    future.write(now=True)
    found = b.clock_of("node-a")
    assert found is not None
    assert (found.future_waits, found.future_most_us) == (4, 70_000)


@pytest.mark.parametrize("role", [roles.PRODUCER, roles.CONSUMER])
def test_a_service_s_role_may_write_what_it_measured(sides: tuple[Side, Side], role: str) -> None:
    a, _ = sides
    a.conn.execute("DELETE FROM vsql_sync.clocks")
    with a.conn.transaction():
        a.conn.execute(f"SET LOCAL ROLE {role}".encode())
        clocks.asked(a.conn, "node-b", 1)
        clocks.measured(a.conn, "node-b", Measure(1, 1), "ok", 60)
        clocks.host(a.conn, None)
        assert clocks.read(a.conn)
