"""`syncctl audit` on two real nodes and a real topic: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # no stubs say so

from tests.audit_example import run_example
from tests.audit_history import ACKS, CHAIN, CLUSTER, A, B, History, acknowledged, ordinary
from tests.conftest import NewDatabase
from tests.services.test_audit_trail import TABLE, as_attacker, store
from tests.stack import Kafka
from vsql_ctl.cli import main
from vsql_shared.audit.rows import timestamp
from vsql_shared.audit.store import remember_head
from vsql_shared.names import audit_topic
from vsql_shared.pg import nodes, roles
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.migrate import install

ROOT = Path(__file__).parents[2]


class Pair:
    """Node A with a stream, node B that applied it, and syncctl on either."""

    def __init__(
        self, folder: Path, a: str, b: str, capsys: pytest.CaptureFixture[str], cluster: str = CLUSTER
    ) -> None:
        self.infos = {"node-a": a, "node-b": b}
        self.conns: dict[str, Connection] = {}
        self._folder, self._capsys = folder, capsys
        self.cluster = cluster
        self.bootstrap = "127.0.0.1:1"
        self.user = ""
        for number, (name, info) in enumerate(self.infos.items(), 1):
            conn = connect(info, application_name="test")
            install(conn)
            own, peer = (A, B) if name == "node-a" else (B, A)
            nodes.register_local(conn, number, name, cluster, own.public_key)
            nodes.pin(conn, peer.node, peer.public_key)
            self.conns[name] = conn

    def close(self) -> None:
        for conn in self.conns.values():
            conn.close()

    def config(self, node: str) -> Path:
        values = self.conns[node].info
        path = self._folder / f"{node}.toml"
        path.write_text(
            f'[cluster]\nname = "{self.cluster}"\nnode_id = {1 + (node == "node-b")}\nnode_name = "{node}"\n'
            f'[connection]\nhost = "{values.host}"\nport = {values.port}\ndatabase = "{values.dbname}"\n'
            f'user = "{self.user or values.user}"\n[server]\nmode = "dev"\n'
            f'[kafka]\nbootstrap_servers = ["{self.bootstrap}"]\n'
        )
        return path

    def syncctl(self, node: str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["--config", str(self.config(node)), *arguments])
        shown = self._capsys.readouterr()
        return int(done.value.code or 0), shown.out, shown.err

    def verify(self, node: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        code, out, _ = self.syncctl(node, "audit", "verify", "--output", "json", *arguments)
        found: dict[str, Any] = json.loads(out)
        return code, found


@pytest.fixture
def pair(tmp_path: Path, new_schema: NewDatabase, capsys: pytest.CaptureFixture[str]) -> Iterator[Pair]:
    made = Pair(tmp_path, new_schema("node_a"), new_schema("node_b"), capsys)
    yield made
    made.close()


@pytest.fixture
def replicated(pair: Pair) -> Pair:
    """B applied all of A's ordinary history, and remembers its head."""
    source = ordinary()
    store(pair.conns["node-a"], source)
    store(pair.conns["node-b"], acknowledged(source))
    remember_head(pair.conns["node-b"], CHAIN, source.head, None)
    receipts(pair.conns["node-b"], source)
    return pair


def receipts(conn: Connection, source: History) -> None:
    """What the applying transactions leave, for the last two manifests."""
    for made in source.entries[-2:]:
        conn.execute(
            "INSERT INTO vsql_sync.receipts"
            " (chain, sequence, epoch, batch, manifest, merkle_root, verdicts, acked)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                CHAIN,
                made.entry.sequence,
                made.entry.epoch,
                made.entry.batch,
                made.encoded,
                made.entry.merkle_root,
                json.dumps({"applied": made.entry.row_count}),
                True,
            ),
        )


def test_verify_of_a_true_trail_ends_with_zero(replicated: Pair) -> None:
    code, out, err = replicated.syncctl("node-a", "audit", "verify")
    assert code == 0, err
    assert "ok: every entry is signed" in out
    code, found = replicated.verify("node-b")
    assert (code, found["ok"], found["warnings"]) == (0, True, [])
    assert [(one["chain"], one["tuples"]) for one in found["chains"]] == [(ACKS, 15)]


@pytest.mark.parametrize("node", ["node-a", "node-b"])
def test_verify_with_the_peer_compares_both_sides_roots(replicated: Pair, node: str) -> None:
    peer = replicated.infos["node-b" if node == "node-a" else "node-a"]
    code, found = replicated.verify(node, "--peer-connection", peer)
    assert code == 0, found
    assert found["comparisons"] == [
        {
            "chain": CHAIN,
            "target": "node-b",
            "compared": 6,
            "under_way": 0,
            "problem": None,
            "passed_over": 0,
            "replayed": 0,
        }
    ]
    code, out, _ = replicated.syncctl(node, "audit", "verify", "--peer-connection", peer)
    assert (code, "equal in 6 batches compared" in out) == (0, True)


def test_verify_of_a_bad_trail_ends_with_nine_and_names_the_first_bad_entry(replicated: Pair) -> None:
    as_attacker(replicated.conns["node-a"], f"UPDATE {TABLE} SET row_count = 7 WHERE sequence IN (3, 5)")
    code, out, err = replicated.syncctl("node-a", "audit", "verify")
    assert code == 9
    assert "entry 3" in err
    assert "row_count" in out
    code, found = replicated.verify("node-a")
    assert [(one["chain"], one["sequence"]) for one in found["problems"]] == [(CHAIN, 3)]
    assert code == 9


def ranged(pair: Pair, wanted: str, *more: str) -> tuple[int, list[tuple[int, str]], dict[str, Any]]:
    """Exit code, problems and the chain's row of `audit verify --range` on node A."""
    code, found = pair.verify("node-a", "--chain", CHAIN, "--range", wanted, *more)
    (row,) = found["chains"]
    assert found["range"] == [int(one) for one in (wanted.split("..") * 2)[:2]]
    return code, [(one["sequence"], one["what"]) for one in found["problems"]], row


@pytest.mark.parametrize("wanted", ["1..11", "1..1", "2..2", "4..9", "7..11", "8", "11"])
def test_a_range_of_a_true_trail_verifies_wherever_it_begins_and_ends(replicated: Pair, wanted: str) -> None:
    first, last = (int(one) for one in (wanted.split("..") * 2)[:2])
    code, problems, row = ranged(replicated, wanted)
    assert (code, problems) == (0, [])
    assert (row["entries"], row["last_sequence"]) == (last - first + 1, last)
    _, out, _ = replicated.syncctl("node-a", "audit", "verify", "--chain", CHAIN, "--range", wanted)
    assert f"ok: entries {first} to {last} are signed, linked and unaltered" in out
    assert "every entry" not in out
    assert "nothing is said of entries before and behind these" in out


SWAPPED = f"UPDATE {TABLE} a SET document = b.document FROM {TABLE} b WHERE a.sequence + b.sequence = 11"
RANGE_DAMAGE: dict[str, tuple[str, int, str]] = {
    "a column of its first": (f"UPDATE {TABLE} SET row_count = 7 WHERE sequence = 4", 4, "row_count"),
    "a column of its last": (f"UPDATE {TABLE} SET row_count = 7 WHERE sequence = 9", 9, "row_count"),
    "one of it is gone": (f"DELETE FROM {TABLE} WHERE sequence = 6", 6, "missing"),
    "its last is gone": (f"DELETE FROM {TABLE} WHERE sequence = 9", 9, "missing"),
    "its last and all behind are gone": (f"DELETE FROM {TABLE} WHERE sequence > 8", 9, "missing"),
    "its first is gone": (f"DELETE FROM {TABLE} WHERE sequence = 4", 4, "missing"),
    "the one before it is gone": (f"DELETE FROM {TABLE} WHERE sequence = 3", 3, "missing"),
    "the one before it is another": (
        f"UPDATE {TABLE} a SET document = b.document FROM {TABLE} b WHERE a.sequence = 3 AND b.sequence = 2",
        3,
        "another document",
    ),
    "two exchange their documents": (f"{SWAPPED} AND a.sequence IN (5, 6)", 5, ""),
}


@pytest.mark.parametrize("damage", RANGE_DAMAGE)
def test_what_is_done_to_a_range_is_named_in_it(replicated: Pair, damage: str) -> None:
    statement, at, word = RANGE_DAMAGE[damage]
    as_attacker(replicated.conns["node-a"], statement)
    code, problems, _ = ranged(replicated, "4..9")
    assert code == 9
    assert [one for one, _ in problems] == [at], problems
    assert word in problems[0][1]


def test_a_range_says_nothing_of_what_lies_outside_of_it(replicated: Pair) -> None:
    as_attacker(replicated.conns["node-a"], f"UPDATE {TABLE} SET row_count = 7 WHERE sequence IN (2, 10)")
    assert ranged(replicated, "4..9")[:2] == (0, [])
    assert ranged(replicated, "9..11")[1][0][0] == 10


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--chain", CHAIN, "--range", "4..12"), 4, "has entries up to 11, asked for 4..12"),
        (("--chain", "none.here", "--range", "1..2"), 4, "has no chain"),
        (("--range", "1..2"), 2, "--range goes with --chain"),
        (("--chain", CHAIN, "--range", "1..2", "--kafka"), 2, "--range goes with --chain"),
        (("--chain", CHAIN, "--range", "9..4"), 2, "a range with its first one"),
        (("--chain", CHAIN, "--range", "0..4"), 2, "entries begin with 1"),
        (("--chain", CHAIN, "--range", "four"), 2, "is no entry"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(
    replicated: Pair, words: tuple[str, ...], code: int, said: str
) -> None:
    done, _, err = replicated.syncctl("node-a", "audit", "verify", *words)
    assert (done, said in err) == (code, True), err


def test_trail_cut_together_with_its_memory_is_found_by_the_peer(replicated: Pair) -> None:
    conn = replicated.conns["node-a"]
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence > 8")
    conn.execute(
        f"UPDATE vsql_sync.chain_heads SET sequence = 8, entry_hash ="
        f" (SELECT sha256(document) FROM {TABLE} WHERE sequence = 8)"
    )
    assert replicated.verify("node-a")[0] == 0
    code, found = replicated.verify("node-a", "--peer-connection", replicated.infos["node-b"])
    assert code == 9
    assert any("the chain was cut" in one["what"] for one in found["problems"])
    code, found = replicated.verify("node-b", "--peer-connection", replicated.infos["node-a"])
    assert code == 9


def test_an_entry_the_target_had_first_is_waited_for(replicated: Pair) -> None:
    """A producer puts an entry into Kafka before its table, and a target is quick."""
    source = ordinary()
    late = History(head=source.head)
    late.open()
    remember_head(replicated.conns["node-b"], CHAIN, late.head, None)
    for node, peer in (("node-a", "node-b"), ("node-b", "node-a")):
        code, found = replicated.verify(node, "--peer-connection", replicated.infos[peer])
        assert (code, [one["sequence"] for one in found["problems"]]) == (9, [late.head.sequence])
    with connect(replicated.infos["node-a"], application_name="test") as conn:
        storing = Timer(0.7, store, (conn, late))
        storing.start()
        try:
            code, found = replicated.verify("node-b", "--peer-connection", replicated.infos["node-a"])
        finally:
            storing.join()
    assert (code, found["problems"]) == (0, [])


def test_history_rewritten_with_the_true_key_is_found_by_the_peer(pair: Pair) -> None:
    told, other = ordinary(), History()
    other.open()
    for _ in range(11):
        other.note()
    store(pair.conns["node-a"], other)
    remember_head(pair.conns["node-b"], CHAIN, told.head, None)
    assert pair.verify("node-a")[0] == 0
    code, found = pair.verify("node-a", "--peer-connection", pair.infos["node-b"])
    assert code == 9
    assert "history was rewritten" in found["problems"][0]["what"]


def test_target_that_computed_another_root_is_named(pair: Pair) -> None:
    source, acks = ordinary(), History(ACKS, B)
    acks.open()
    acks.acknowledge(source.entries[1])
    acks.acknowledge(source.entries[2], merkle_root=b"x" * 32)
    store(pair.conns["node-a"], source)
    store(pair.conns["node-b"], acks)
    code, found = pair.verify("node-a", "--peer-connection", pair.infos["node-b"])
    assert code == 9
    assert (found["problems"][0]["chain"], found["problems"][0]["sequence"]) == (ACKS, 3)
    _, out, _ = pair.syncctl("node-a", "audit", "verify", "--peer-connection", pair.infos["node-b"])
    assert "differ in 1 batches compared" in out


def test_bad_trail_of_the_peer_is_named_and_not_compared(replicated: Pair) -> None:
    as_attacker(replicated.conns["node-b"], f"UPDATE {TABLE} SET document = 'x' WHERE sequence = 2")
    code, found = replicated.verify("node-a", "--peer-connection", replicated.infos["node-b"])
    assert (code, found["comparisons"]) == (9, [])
    assert found["problems"][0]["chain"] == ACKS


# What somebody changes in the receipts: (statement, words)
RECEIPTS = {
    "root": ("UPDATE vsql_sync.receipts SET merkle_root = sha256('x')", "the receipt has root"),
    "verdicts": ("UPDATE vsql_sync.receipts SET verdicts = '{\"lost\": 3}'", "different verdicts"),
    "never acknowledged": (
        "UPDATE vsql_sync.receipts SET sequence = 999 WHERE sequence = 11",
        "there is no acknowledgement",
    ),
    "open, other root": (
        "UPDATE vsql_sync.receipts SET acked = false, merkle_root = sha256('x')",
        "the source signed",
    ),
    "open, other manifest": (
        "UPDATE vsql_sync.receipts SET acked = false, manifest = set_byte(manifest, 300, 0)",
        "does not verify",
    ),
}


@pytest.mark.parametrize("case", RECEIPTS)
def test_receipt_that_does_not_match_is_named(replicated: Pair, case: str) -> None:
    statement, words = RECEIPTS[case]
    replicated.conns["node-b"].execute(statement)
    code, found = replicated.verify("node-b")
    assert code == 9
    assert words in found["problems"][0]["what"]


def test_open_receipt_that_matches_its_manifest_is_no_finding(replicated: Pair) -> None:
    replicated.conns["node-b"].execute("UPDATE vsql_sync.receipts SET acked = false")
    assert replicated.verify("node-b")[0] == 0


def test_verify_of_one_chain_looks_at_no_other(replicated: Pair) -> None:
    conn = replicated.conns["node-a"]
    other = History("bills.node-a")
    other.open()
    store(conn, other)
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE chain = 'bills.node-a'")
    code, found = replicated.verify(
        "node-a", "--chain", CHAIN, "--peer-connection", replicated.infos["node-b"]
    )
    assert (code, found["comparisons"][0]["compared"]) == (0, 6)
    assert replicated.verify("node-a", "--chain", "bills.node-a")[0] == 9
    code, found = replicated.verify(
        "node-b", "--chain", ACKS, "--peer-connection", replicated.infos["node-a"]
    )
    assert (code, found["comparisons"][0]["compared"]) == (0, 6)


def test_chain_that_is_not_here_is_refused(replicated: Pair) -> None:
    code, _, err = replicated.syncctl("node-a", "audit", "verify", "--chain", "bills.node-a")
    assert (code, "has no chain 'bills.node-a'" in err) == (4, True)


def test_node_is_not_its_own_peer(replicated: Pair) -> None:
    own = replicated.infos["node-a"]
    code, _, err = replicated.syncctl("node-a", "audit", "verify", "--peer-connection", own)
    assert (code, "leads to node node-a" in err) == (2, True)


@pytest.fixture
def published(
    tmp_path: Path,
    new_schema: NewDatabase,
    capsys: pytest.CaptureFixture[str],
    kafka: Kafka,
    cluster_name: str,
) -> Iterator[Pair]:
    """Nodes of a cluster of this test's own, so that the audit topic is this test's own."""
    made = Pair(tmp_path, new_schema("node_a"), new_schema("node_b"), capsys, cluster_name)
    made.bootstrap = kafka.bootstrap_servers
    yield made
    made.close()


def publish(pair: Pair, cluster: str, *documents: bytes) -> None:
    servers: dict[str, str | int | float | bool] = {"bootstrap.servers": pair.bootstrap}
    admin = AdminClient(servers)  # held until the answer is there
    admin.create_topics([NewTopic(audit_topic(cluster), 1)])[audit_topic(cluster)].result(30)
    failed: list[object] = []
    producer = Producer(dict(servers))
    for encoded in documents:
        producer.produce(
            audit_topic(cluster),
            encoded,
            on_delivery=lambda error, _: failed.append(error) if error else None,
        )
    assert (producer.flush(30), failed) == (0, [])


def own_history(cluster: str) -> History:
    history = History(cluster=cluster)
    history.open()
    for _ in range(4):
        history.batch()
    return history


def test_verify_with_kafka_finds_a_cut_the_database_alone_does_not_show(
    published: Pair, cluster_name: str
) -> None:
    history = own_history(cluster_name)
    publish(published, cluster_name, *history.documents)
    conn = published.conns["node-a"]
    store(conn, history)
    code, found = published.verify("node-a", "--kafka")
    assert code == 0, found
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence > 3")
    conn.execute(
        f"UPDATE vsql_sync.chain_heads SET sequence = 3, entry_hash ="
        f" (SELECT sha256(document) FROM {TABLE} WHERE sequence = 3)"
    )
    assert published.verify("node-a")[0] == 0
    code, found = published.verify("node-a", "--kafka")
    assert (code, found["problems"][0]["sequence"]) == (9, 4)


def test_kafka_without_the_topic_is_one_clear_error(published: Pair, cluster_name: str) -> None:
    store(published.conns["node-a"], own_history(cluster_name))
    code, _, err = published.syncctl("node-a", "audit", "verify", "--kafka")
    assert code == 5
    assert audit_topic(cluster_name) in err


def test_list_shows_the_newest_entries_that_match(replicated: Pair) -> None:
    code, out, _ = replicated.syncctl("node-a", "audit", "list", "--contains-pci", "true", "--limit", "3")
    assert code == 0
    assert len(out.splitlines()) == 4
    assert "public.orders" in out

    def listed(*arguments: str) -> list[int]:
        _, out, _ = replicated.syncctl("node-a", "audit", "list", "--output", "json", *arguments)
        return [row["sequence"] for row in json.loads(out)]

    assert listed() == list(range(1, 12))
    assert listed("--event-type", "epoch_opened") == [1, 7]
    assert listed("--contains-pci", "false") == [1, 7, 8]
    assert listed("--chain", "none.here") == []
    _, out, _ = replicated.syncctl("node-a", "audit", "list", "--output", "json")
    second = json.loads(out)[4]["event_timestamp"]
    assert listed("--since", second) == [5, 6, 7, 8, 9, 10, 11]
    assert listed("--until", second) == [1, 2, 3, 4]
    assert listed("--since", "2100-01-01") == []
    code, out, _ = replicated.syncctl("node-a", "audit", "list", "--since", "2100-01-01")
    assert (code, out) == (0, "no entries\n")


def test_time_that_is_none_is_refused(replicated: Pair) -> None:
    code, _, err = replicated.syncctl("node-a", "audit", "list", "--since", "yesterday")
    assert (code, "is no time" in err) == (2, True)


def test_export_is_verified_by_the_documented_program_alone(replicated: Pair, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    code, _, err = replicated.syncctl("node-a", "audit", "export", "--output", str(target))
    assert (code, "exported 11 entries" in err) == (0, True)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    done = run_example(target, A)
    assert (done.returncode, done.stdout) == (0, f"{CHAIN}: verified up to 11\n"), done.stderr
    assert run_example(target, B).returncode != 0
    logged = replicated.conns["node-a"].execute(
        "SELECT target_id FROM vsql_sync.audit_log WHERE action = 'audit.export'"
    )
    assert logged.fetchall() == [(str(target),)]


# What somebody changes in an exported file.
FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "entry for people": lambda export: export["entries"][3]["entry"].update(row_count=99),
    "document": lambda export: export["entries"][3].update(document=export["entries"][2]["document"]),
    "dropped entry": lambda export: export["entries"].pop(3),
    "dropped end": lambda export: export["entries"].pop(),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_altered_export_does_not_verify(replicated: Pair, tmp_path: Path, case: str) -> None:
    target = tmp_path / "report.json"
    replicated.syncctl("node-a", "audit", "export", "--output", str(target))
    export = json.loads(target.read_text())
    FORGERIES[case](export)
    target.write_text(json.dumps(export))
    assert run_example(target, A).returncode != 0


def test_jsonl_export_holds_the_same(replicated: Pair, tmp_path: Path) -> None:
    target, lines = tmp_path / "report.json", tmp_path / "report.jsonl"
    replicated.syncctl("node-a", "audit", "export", "--output", str(target))
    replicated.syncctl("node-a", "audit", "export", "--format", "jsonl", "--output", str(lines))
    whole = json.loads(target.read_text())
    parts = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [next(iter(one)) for one in parts] == ["header", *["entry"] * 11, "end"]
    assert [one["entry"] for one in parts[1:-1]] == whole["entries"]
    assert parts[-1]["end"] == whole["end"]
    since = timestamp(whole["entries"][5]["entry"]["event_timestamp"]).isoformat()
    replicated.syncctl("node-a", "audit", "export", "--output", str(target), "--since", since)
    assert [one["sequence"] for one in json.loads(target.read_text())["entries"]] == [6, 7, 8, 9, 10, 11]


def test_export_hides_no_broken_document_and_leaves_no_half_file(replicated: Pair, tmp_path: Path) -> None:
    as_attacker(replicated.conns["node-a"], f"UPDATE {TABLE} SET document = 'x' WHERE sequence = 2")
    folder = tmp_path / "out"
    folder.mkdir()
    replicated.syncctl("node-a", "audit", "export", "--output", str(folder / "report.json"))
    entries = json.loads((folder / "report.json").read_text())["entries"]
    assert (entries[1]["entry"], "not a signed document" in entries[1]["error"]) == (None, True)
    replicated.conns["node-a"].execute("ALTER TABLE vsql_sync.signers RENAME TO gone")
    before = (folder / "report.json").read_bytes()
    code, _, _ = replicated.syncctl("node-a", "audit", "export", "--output", str(folder / "report.json"))
    assert code == 5
    assert [(one.name, one.read_bytes()) for one in folder.iterdir()] == [("report.json", before)]


def test_viewer_verifies_and_only_an_operator_exports(
    replicated: Pair, tmp_path: Path, cluster_name: str
) -> None:
    conn = replicated.conns["node-a"]
    roles.create(conn)
    users = {role: f"{role}_{cluster_name}" for role in (roles.VIEWER, roles.OPERATOR)}
    for role, user in users.items():
        conn.execute(f'CREATE ROLE "{user}" LOGIN IN ROLE {role}')
    try:
        target = str(tmp_path / "report.json")
        replicated.user = users[roles.VIEWER]
        assert replicated.verify("node-a")[0] == 0
        assert replicated.syncctl("node-a", "audit", "list")[0] == 0
        code, _, err = replicated.syncctl("node-a", "audit", "export", "--output", target)
        assert (code, "permission denied" in err) == (5, True)
        replicated.user = users[roles.OPERATOR]
        assert replicated.syncctl("node-a", "audit", "export", "--output", target)[0] == 0
    finally:
        for user in users.values():
            conn.execute(f'DROP ROLE "{user}"')


def test_export_to_nowhere_is_one_clear_error(replicated: Pair, tmp_path: Path) -> None:
    target = tmp_path / "none" / "report.json"
    code, _, err = replicated.syncctl("node-a", "audit", "export", "--output", str(target))
    assert (code, "cannot write to" in err) == (2, True)
