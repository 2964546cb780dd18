"""Keys replaced under load, and a KEK version destroyed by two people: nothing else is lost.

Two nodes with their services; what an operator does is `syncctl`, as docs/operations/keys.md says.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.nodes import Node, TwoNodes
from tests.pairs import Pairs
from tests.softhsm import make_token
from vsql_shared.audit.rows import parse
from vsql_shared.kms.file import destroy_version

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id bigint PRIMARY KEY, v text)"
QUICK = "[limits]\nretry_backoff_max_ms = 1000\ncommand_poll_ms = 200\nstatus_interval_ms = 300\n"


def until(done: Callable[[], Any], what: Callable[[], str], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)
    return found


@contextmanager
def load(pair: TwoNodes) -> Iterator[None]:
    """Somebody writes all the time: small transactions, inserts, updates, deletes."""
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(pair.a.conninfo, autocommit=True) as conn:
            number = 0
            while not stop.is_set():
                number += 1
                conn.execute("INSERT INTO t VALUES (%s, %s)", (number, f"row {number}"))
                if number % 5 == 0:
                    conn.execute("UPDATE t SET v = v || '!' WHERE id = %s", (number - 2,))
                if number % 11 == 0:
                    conn.execute("DELETE FROM t WHERE id = %s", (number - 7,))
                stop.wait(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


def new_signer(pair: TwoNodes) -> None:
    """The origin hands over to a new signing key, in the order the page gives."""
    old = pair.a.fingerprint()
    pair.a.stop("producer")
    retire = ("key", "retire", "--fingerprint", old, "--reason", "yearly change", "--yes")
    pair.a.ctl(*retire)
    pair.b.ctl(*retire)
    pair.a.new_key()
    peer = ("--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection", pair.b.conninfo)
    pair.a.ctl("node", "add-peer", *peer, "--yes", "--no-copy")
    pair.a.start("producer")


def new_kek(pair: TwoNodes) -> str:
    """The next version in the file both nodes have, put to use; its name."""
    made = pair.a.ctl("key", "generate", "--kek", str(pair.folder / "kek.key"), "--rotate").stdout
    (answer,) = pair.a.ctl_json("key", "rotate-kek", "--reason", "yearly change")
    assert answer["done"], answer
    assert "stay under" not in answer["message"]
    return next(word for word in made.split() if word.startswith("test-kek/"))


def rotate(pairs: Pairs, rounds: int) -> None:
    """DEK, KEK and signer, each so often, while the target is away: it opens all of it at the end."""
    pair = pairs(TABLE, config=QUICK)
    pair.create(["t(*)"], copy=False)
    pair.start()
    pair.wait_in_step()
    newest = ""
    with load(pair):
        time.sleep(1)
        pair.b.stop("consumer")
        for _ in range(rounds):
            pair.a.ctl("key", "rotate-dek")
            time.sleep(0.2)
            newest = new_kek(pair)
            time.sleep(0.2)
            new_signer(pair)
        time.sleep(0.5)
        (answer,) = pair.a.ctl_json("key", "rotate-kek")  # what the last session sealed
        assert answer["done"], answer
        pair.b.start("consumer")
        time.sleep(1)
    # The versions before are gone for good: every data key that was still needed is wrapped by the newest.
    for version in range(1, int(newest.rpartition("/")[2])):
        destroy_version(pair.folder / "kek.key", f"test-kek/{version}")
    pair.wait_in_step(240)
    assert pair.differences() == []
    for node, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        shown = node.ctl("audit", "verify", "--kafka", "--peer-connection", peer.conninfo).stdout
        assert "ok: every entry is signed, linked and unaltered" in shown
    used = pair.a.query(
        "SELECT count(DISTINCT dek_id), count(DISTINCT kek_id), count(DISTINCT signer_key)"
        " FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'replication_batch'",
        pair.chain,
    )[0]
    assert used[0] > 2 * rounds
    assert used[1] > rounds
    assert used[2] > rounds
    verdicts = pair.b.query(
        "SELECT sum(row_count) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'batch_applied'"
    )
    sent = pair.a.query(
        "SELECT sum(row_count) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'replication_batch'"
    )
    assert verdicts == sent
    pair.stop()


@pytest.mark.timeout(400)
def test_keks_deks_and_signers_are_rotated_under_load_and_nothing_is_lost(pairs: Pairs) -> None:
    rotate(pairs, 3)


@pytest.mark.long
@pytest.mark.timeout(2_400)
def test_keks_deks_and_signers_are_rotated_twenty_times_under_load(pairs: Pairs) -> None:
    rotate(pairs, 20)


def hsm(pair: TwoNodes) -> None:
    """Both nodes' KEK in one token."""
    token = make_token(pair.folder)
    pair.a.kms = pair.b.kms = (
        f'provider = "pkcs11"\nkek_id = "payments"\ncustodian = "key office"\n[encryption.kms.pkcs11]\n'
        f'module = "{token.module}"\ntoken_label = "{token.label}"\nkey_label = "payments"\n'
        f'pin = "{token.pin.get_secret_value()}"'
    )
    for node in (pair.a, pair.b):
        node.write_config(pair.folder / "kek.key")
    pair.a.ctl("key", "generate", "--kek-pkcs11")


def operators(pair: TwoNodes, *names: str) -> dict[str, Path]:
    """Enrolled people; where each keeps the private key."""
    found = {}
    for name in names:
        folder = pair.folder / name
        pair.a.ctl("key", "generate", "--output", str(folder))
        found[name] = folder / "vsql-sync-signing.key"
        public = found[name].with_suffix(".pub")
        pair.a.ctl("key", "enroll", "--operator", name, "--key", str(public))
    return found


def refused(node: Node, *words: str) -> str:
    done = node.ctl(*words, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def states(node: Node) -> dict[str, str]:
    return {one["kek_id"]: one["state"] for one in node.ctl_json("key", "inventory")["keks"]}


@pytest.fixture
def in_token(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    """A pair with its KEK in a token; B has not read 40 rows under version 1 and 25 under version 2."""
    monkeypatch.delenv("SOFTHSM2_CONF", raising=False)  # given back after the test
    pair = pairs(TABLE + "; CREATE TABLE u (id int PRIMARY KEY)", config=QUICK)
    hsm(pair)
    pair.create(["t(*)", "u(*)"], copy=False)
    pair.start()
    pair.a.execute("INSERT INTO t SELECT g, 'applied' FROM generate_series(1, 10) g")
    pair.wait_in_step()
    pair.b.stop("consumer")
    pair.a.execute("INSERT INTO t SELECT g, 'shredded' FROM generate_series(101, 140) g")
    sealed(pair, 50)
    pair.a.ctl("key", "generate", "--kek-pkcs11")
    pair.a.ctl("key", "rotate-dek")
    pair.a.execute("INSERT INTO t SELECT g, 'kept' FROM generate_series(201, 220) g")
    pair.a.execute("INSERT INTO u SELECT g FROM generate_series(1, 5) g")
    sealed(pair, 75)
    return pair


def sealed(pair: TwoNodes, rows: int) -> None:
    """Wait until the origin's chain has so many changes."""
    query = "SELECT sum(row_count) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'replication_batch'"
    until(
        lambda: pair.a.query(query) == [(rows,)], lambda: f"{pair.a.query(query)}: {pair.a.tail('producer')}"
    )


def ordered(pair: TwoNodes, after: str = "0s") -> dict[str, Path]:
    people = operators(pair, "alice", "bob")
    order = ("key", "shred", "--operator", "alice", "--key", str(people["alice"]), "--yes", "--after", after)
    found = pair.a.ctl_json(*order, "--kek", "payments/0001", "--reason", "retention is over")
    assert (found["order"], found["state"], found["deks"]) == (1, "requested", 1)
    assert (found["tuples"] >= 50, found["unapplied_batches"]) == (True, 1)
    return people


@pytest.mark.timeout(300)
def test_what_a_destroyed_kek_version_covered_is_passed_over_by_a_signed_verdict(in_token: TwoNodes) -> None:
    pair = in_token
    people = ordered(pair)
    bob = ("--operator", "bob", "--key", str(people["bob"]), "--yes")
    warned = pair.a.ctl("key", "approve", "1", *bob).stderr
    assert "1 batches are not applied everywhere, and lost to their targets" in warned
    assert states(pair.a) == {"payments/0001": "scheduled for destruction", "payments/0002": "active"}
    gone = pair.a.ctl_json("key", "destroy", "1", "--yes")
    assert [(one["stream"], one["done"]) for one in gone["streams"]] == [(pair.chain, True)]
    listed = pair.a.ctl_json("key", "inventory")
    keks = {one["kek_id"]: (one["state"], one["custodian"]) for one in listed["keks"]}
    assert keks == {"payments/0001": ("destroyed", "key office"), "payments/0002": ("active", "key office")}
    assert {one["state"] for one in listed["deks"] if one["kek_id"] == "payments/0001"} == {"destroyed"}

    pair.b.start("consumer")
    pair.wait_in_step()
    assert pair.b.query("SELECT v, count(*) FROM t GROUP BY 1 ORDER BY 1") == [("applied", 10), ("kept", 20)]
    assert pair.b.query("SELECT count(*) FROM u") == [(5,)]
    marked = "SELECT table_name, state, reason FROM vsql_sync.table_sync WHERE state = 'DIVERGED'"
    (table, _, reason), *more = pair.b.query(marked)
    assert (table, more) == ("t", [])
    assert "destroyed with payments/0001" in reason
    shown = pair.b.ctl("status").stdout
    assert "table public.t is DIVERGED, it lacks changes" in shown
    assert "destroyed with payments/0001" in shown

    documents = pair.b.query("SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain LIKE '%%.ack.%%'")
    said = [verdict for (one,) in documents for verdict in parse(bytes(one)).entry.verdicts]
    assert ("shredded", 40) in said
    assert sum(count for name, count in said if name == "applied") == 35
    for node, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        shown = node.ctl("audit", "verify", "--kafka", "--peer-connection", peer.conninfo).stdout
        assert "ok: every entry is signed, linked and unaltered" in shown
    acked = "SELECT acked_sequence, mismatch FROM vsql_sync.stream_targets WHERE target = 'node-b'"
    last = "SELECT max(sequence) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'replication_batch'"
    newest = pair.a.query(last)[0][0]
    until(lambda: pair.a.query(acked) == [(newest, None)], lambda: f"{pair.a.query(acked)}, not {newest}")

    proof = pair.folder / "proof.json"
    pair.a.ctl("key", "proof", "1", "--out", str(proof))
    trusted = [f"--operator={name}={path.with_suffix('.pub')}" for name, path in people.items()]
    origin = f"--node=node-a={pair.a.keys / 'vsql-sync-signing.pub'}"
    found = pair.b.ctl_json("key", "verify-proof", str(proof), *trusted, origin)
    assert (found["kek"], found["ordered_by"], found["approved_by"]) == ("payments/0001", "alice", "bob")
    assert (found["deks"], found["unapplied_batches"]) == (1, 1)
    assert "of operator alice is not enrolled" in refused(
        pair.b, "key", "verify-proof", str(proof), trusted[1], origin
    )

    pair.a.execute("INSERT INTO t VALUES (900, 'after')")
    pair.wait_in_step()
    assert pair.b.query("SELECT v FROM t WHERE id = 900") == [("after",)]
    pair.stop()


_LEAF_BYTES = "SELECT sum(pg_relation_size(relid))::bigint FROM pg_partition_tree('vsql_sync.batch_leaves')"


@pytest.mark.timeout(300)
def test_fragments_whose_key_was_destroyed_are_written_down_as_they_come_and_not_held_to_the_end(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transaction of 200 fragments: what is held of each, and not written, is held of 20,000, too."""
    monkeypatch.delenv("SOFTHSM2_CONF", raising=False)
    pair = pairs(TABLE, config=QUICK + "batch_max_rows = 20\n")
    hsm(pair)
    pair.create(["t(*)"], copy=False)
    pair.start()
    pair.a.execute("INSERT INTO t SELECT g, 'applied' FROM generate_series(1, 10) g")
    pair.wait_in_step()
    pair.b.stop("consumer")
    pair.a.execute("INSERT INTO t SELECT g, 'shredded' FROM generate_series(1001, 5000) g")
    sealed(pair, 4_010)
    pair.a.ctl("key", "generate", "--kek-pkcs11")
    pair.a.ctl("key", "rotate-dek")
    pair.a.execute("INSERT INTO t VALUES (1, 'kept') ON CONFLICT (id) DO UPDATE SET v = 'kept'")
    sealed(pair, 4_011)
    people = operators(pair, "alice", "bob")
    alice, bob = (("--operator", name, "--key", str(key), "--yes") for name, key in people.items())
    pair.a.ctl(
        "key", "shred", *alice, "--after", "0s", "--kek", "payments/0001", "--reason", "retention is over"
    )
    pair.a.ctl("key", "approve", "1", *bob)
    pair.a.ctl("key", "destroy", "1", "--yes")

    before = pair.b.query(_LEAF_BYTES)[0][0]
    slow = {
        "VSQL_SYNC_ALLOW_FAILPOINTS": "1",
        "VSQL_SYNC_FAILPOINTS": "consumer.before-apply-commit=sleep:4000",
    }
    pair.b.start("consumer", slow)
    until(lambda: pair.b.query(_LEAF_BYTES)[0][0] > before + 100_000, lambda: pair.b.tail("consumer"))
    marked = "SELECT count(*) FROM vsql_sync.table_sync WHERE state = 'DIVERGED'"
    assert pair.b.query(marked) == [(0,)], "written in the transaction that is not committed yet"
    pair.b.stop("consumer")
    pair.b.start("consumer")
    pair.wait_in_step()
    assert pair.b.query(marked) == [(1,)]
    assert pair.b.query("SELECT v, count(*) FROM t GROUP BY 1 ORDER BY 1") == [("applied", 9), ("kept", 1)]
    columns = f"sequence, part, leaves FROM vsql_sync.batch_leaves WHERE chain = '{pair.chain}'"
    kept = f"SELECT {columns} ORDER BY 1, 2"
    assert pair.b.query(kept) == pair.a.query(kept)


def signed_elsewhere(order: Path, key: Path) -> Path:
    """A detached signature as the page has it made, on a machine with openssl and nothing of ours."""
    found = order.with_suffix(f".{key.parent.name}")
    words = ("openssl", "pkeyutl", "-sign", "-rawin", "-inkey", key, "-in", order, "-out", found)
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    return found


@pytest.mark.timeout(300)
def test_a_key_is_not_destroyed_by_one_person_nor_before_its_time_nor_while_it_wraps(
    in_token: TwoNodes,
) -> None:
    pair = in_token
    people = ordered(pair, "1h")
    alice = ("--operator", "alice", "--key", str(people["alice"]), "--yes")
    bob = ("--operator", "bob", "--key", str(people["bob"]), "--yes")
    assert "requested, not scheduled" in refused(pair.a, "key", "destroy", "1", "--yes")
    assert "cannot approve it" in refused(pair.a, "key", "approve", "1", *alice)
    stranger = ("--operator", "bob", "--key", str(pair.a.keys / "vsql-sync-signing.key"), "--yes")
    assert "is not enrolled" in refused(pair.a, "key", "approve", "1", *stranger)
    again = ("key", "shred", *alice, "--kek", "payments/0001", "--reason", "again")
    assert "there is an order for payments/0001 already: 1, requested" in refused(pair.a, *again)
    wraps = ("key", "shred", *alice, "--kek", "payments/0002", "--reason", "too early")
    assert "is the version that wraps" in refused(pair.a, *wraps)
    unheard = ("key", "shred", *alice, "--kek", "payments/0009", "--reason", "a slip of the pen")
    assert "nobody knows a KEK version payments/0009" in refused(pair.a, *unheard)
    shown = pair.a.ctl("key", "approve", "1", "--to-sign", str(pair.folder / "order.bin")).stdout
    assert "payments/0001" in shown
    assert "retention is over" in shown
    by_bob = ("key", "approve", "1", "--operator", "bob", "--yes", "--signature")
    for name, words in (("alice", "does not verify"), ("bob", "")):
        signature = signed_elsewhere(pair.folder / "order.bin", people[name])
        assert words in pair.a.ctl(*by_bob, str(signature), check=not words).stderr
    assert states(pair.a)["payments/0001"] == "scheduled for destruction"
    assert "may be carried out from" in refused(pair.a, "key", "destroy", "1", "--yes")

    # A row that says otherwise is no approval: signatures are looked at again.
    pair.a.execute("UPDATE vsql_sync.shred_orders SET approval = decode(repeat('00', 64), 'hex')")
    assert "does not verify" in refused(pair.a, "key", "destroy", "1", "--yes")
    cancel = ("key", "shred", "--cancel", "1", "--reason", "legal hold")
    assert "--cancel takes --reason and nothing else" in refused(pair.a, *cancel, "--kek", "payments/0002")
    pair.a.ctl(*cancel)

    # What the old version wrapped is wrapped anew: there is nothing left to lose.
    (answer,) = pair.a.ctl_json("key", "rotate-kek")
    assert answer["done"], answer
    assert "payments/0002; 1 wrapped anew; that version was in use already" in answer["message"]
    order = ("key", "shred", *alice, "--after", "0s", "--kek", "payments/0001", "--reason", "rotated")
    assert pair.a.ctl_json(*order)["deks"] == 0
    pair.a.ctl("key", "approve", "2", *bob)
    pair.a.ctl("key", "destroy", "2", "--yes")
    pair.b.start("consumer")
    pair.wait_in_step()
    assert pair.differences() == []
    pair.stop()


@pytest.mark.timeout(300)
def test_a_kek_version_that_is_gone_without_an_order_stops_the_stream_and_skips_nothing(
    in_token: TwoNodes,
) -> None:
    pair = in_token
    people = ordered(pair)
    pair.a.stop("producer")  # nobody is there to say so
    pair.a.ctl("key", "approve", "1", "--operator", "bob", "--key", str(people["bob"]), "--yes")
    done = pair.a.ctl("key", "destroy", "1", "--yes", "--timeout", "0.5", check=False)
    assert done.returncode == 7
    assert "not said so in their chains" in done.stderr
    pair.b.start("consumer")
    error = "SELECT detail->>'last_error' FROM vsql_sync.stream_status WHERE state = 'waiting' AND chain = %s"
    said = until(lambda: pair.b.query(error, pair.chain), lambda: pair.b.tail("consumer"))
    assert "does not hold KEK payments/0001" in said[0][0]
    assert pair.b.query("SELECT count(*) FROM t") == [(10,)]
    pair.a.start("producer")
    pair.wait_in_step()
    assert pair.b.query("SELECT count(*) FROM t") == [(30,)]
    pair.stop()
