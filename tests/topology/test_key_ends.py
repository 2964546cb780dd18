"""A stolen signing key, from end to end: what its node signs of its end is what every reader counts by.

Two nodes with their services; what an operator does is `syncctl`, in the order of docs/operations/keys.md.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest
from confluent_kafka import Producer

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from vsql_shared import names
from vsql_shared.audit.chain import ChainWriter, Prepared, new_incarnation
from vsql_shared.audit.entries import OPERATOR_ACTION
from vsql_shared.audit.store import recall_head
from vsql_shared.crypto.signing import load_signer
from vsql_shared.pg.connect import connect

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"
QUICK = "[limits]\nretry_backoff_max_ms = 1000\ncommand_poll_ms = 300\nstatus_interval_ms = 300\n"
REVOKE = ("key", "revoke", "--reason", "laptop stolen", "--yes", "--output", "json", "--fingerprint")


def _until(done: Callable[[], object], what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def _reached(pair: TwoNodes, point: str) -> bool:
    return f'"failpoint": "{point}"' in pair.a.tail("producer", 200)


def _next_key(pair: TwoNodes) -> None:
    pair.a.new_key()
    peer = ("--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection", pair.b.conninfo)
    pair.a.ctl("node", "add-peer", *peer, "--yes", "--no-copy")


def _steal(pair: TwoNodes) -> list[Prepared]:
    """What a thief makes of A's key behind the last entry: one more of its epoch, and an epoch of his own."""
    thief = load_signer(pair.a.keys / "vsql-sync-signing.key", "node-a", strict=False)
    with connect(pair.a.conninfo, application_name="thief") as conn:
        known = recall_head(conn, pair.chain)
    assert known is not None
    head = known[0]
    same = ChainWriter(thief, pair.cluster, pair.chain, head, head.incarnation)
    own = ChainWriter(thief, pair.cluster, pair.chain, head, new_incarnation())
    more = same.next(event_type=OPERATOR_ACTION, batch_lsn_start=head.lsn_end, batch_lsn_end=head.lsn_end)
    return [more, own.open_epoch(lsn=head.lsn_end, system_identifier=head.system_identifier, timeline=1)]


def _lay(pair: TwoNodes, entries: list[Prepared]) -> None:
    producer = Producer({"bootstrap.servers": pair.a.kafka})
    for one in entries:
        entry = one.entry
        key = names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)
        producer.produce(names.audit_topic(pair.cluster), one.encoded, key=key, partition=0)
    assert producer.flush(20) == 0


def _ends(pair: TwoNodes) -> list[tuple[int, str]]:
    """Where node B has it from A that keys ended in the stream's chain."""
    query = "SELECT sequence, encode(entry_hash, 'hex') FROM vsql_sync.signed_ends WHERE chain = %s"
    return pair.b.query(query, pair.chain)


def _both_verify(pair: TwoNodes) -> None:
    for node, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        shown = node.ctl("audit", "verify", "--kafka", "--peer-connection", peer.conninfo).stdout
        assert "ok: every entry is signed, linked and unaltered" in shown


@pytest.mark.timeout(300)
def test_a_thiefs_entry_before_the_end_counts_for_nobody_wherever_the_rotation_is_cut_off(
    pairs: Pairs,
) -> None:
    """The target begins from the beginning, and the source is killed at each step of its first start."""
    pair = pairs(TABLE, config=QUICK)
    pair.create(["t(*)"], copy=False)
    pair.a.start("producer")
    pair.a.execute("INSERT INTO t VALUES (1, 'signed by the first key')")
    _until(lambda: pair.heads()[0] >= 2, "nothing was sent")
    pair.a.stop("producer")
    head, old = pair.heads()[0], pair.a.fingerprint()
    _lay(pair, _steal(pair))
    shown = json.loads(pair.a.ctl(*REVOKE, old).stdout)
    assert [(one["chain"], one["sequence"]) for one in shown["own"]] == [(pair.chain, head)]
    pair.a.start("producer")
    _until(lambda: "was revoked on this node" in pair.a.tail("producer"), "it signs on")
    pair.a.stop("producer")
    assert pair.heads()[0] == head
    pair.b.ctl(*REVOKE, old)
    _next_key(pair)
    for point in ("producer.opening", "producer.epoch-opened", "producer.key-end"):
        env = {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": f"{point}=kill"}
        pair.a.start("producer", env)
        _until(partial(_reached, pair, point), f"{point} is not reached")
        pair.a.stop("producer")
    pair.start()
    pair.a.execute("INSERT INTO t VALUES (2, 'signed by the second key')")
    pair.wait_in_step()
    assert pair.b.query("SELECT id FROM t ORDER BY 1") == [(1,), (2,)]
    assert _ends(pair) == [(head, shown["own"][0]["hash"])]
    _both_verify(pair)
    # Once more, behind the end: the stream passes over it and goes on.
    before = pair.heads()[0]
    pair.a.keys, new = pair.folder / "node-a-keys", pair.a.keys
    _lay(pair, _steal(pair))
    pair.a.keys = new
    pair.a.execute("INSERT INTO t VALUES (3, 'and the third row')")
    pair.wait_in_step()
    assert pair.heads()[0] > before
    assert pair.differences() == []
    pair.stop()


@pytest.mark.timeout(240)
def test_what_a_peer_had_refused_counts_once_the_next_key_has_signed_that_it_does(pairs: Pairs) -> None:
    """Nobody reads a hash to anybody: the signed end says it."""
    pair = pairs(TABLE, config=QUICK)
    pair.create(["t(*)"])
    pair.start()
    pair.a.execute("INSERT INTO t VALUES (1, 'signed by the first key')")
    pair.wait_in_step()
    old = pair.a.fingerprint()
    pair.b.ctl(*REVOKE, old)
    time.sleep(1.5)
    pair.a.execute("INSERT INTO t VALUES (2, 'signed before its node knew')")
    refused = "SELECT 1 FROM vsql_sync.stream_status WHERE state = 'refused'"
    _until(lambda: pair.b.query(refused), "nothing was refused: " + pair.b.tail("consumer"))
    pair.a.stop("producer")
    pair.a.ctl(*REVOKE, old)
    _next_key(pair)
    pair.a.start("producer")
    pair.a.execute("INSERT INTO t VALUES (3, 'signed by the second key')")
    said = "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE event_type = 'signing_key_ended' AND chain = %s"
    _until(lambda: pair.a.query(said, pair.chain), "the end is not said: " + pair.a.tail("producer"))
    pair.b.ctl("stream", "retry", "--chain", pair.chain, "--reason", "its next key is pinned")
    pair.wait_in_step()
    assert pair.differences() == []
    _both_verify(pair)
    pair.stop()


@contextmanager
def _rows(pair: TwoNodes) -> Iterator[None]:
    """Rows go into A's table, one transaction each, until the block ends."""
    over = threading.Event()

    def write() -> None:
        with psycopg.connect(pair.a.conninfo, autocommit=True) as connection:
            number = 1000
            while not over.wait(0.002):
                number += 1
                connection.execute("INSERT INTO t VALUES (%s, 'a row')", (number,))

    writing = threading.Thread(target=write)
    writing.start()
    try:
        yield
    finally:
        over.set()
        writing.join(20)


@pytest.mark.timeout(300)
def test_a_producer_at_work_has_its_key_revoked_and_no_target_is_left_behind(pairs: Pairs) -> None:
    """Its targets apply what Kafka has before the table has it: the end must not lie before that."""
    pair = pairs(TABLE, config=QUICK)
    pair.create(["t(*)"])
    pair.start()
    with _rows(pair):
        _until(lambda: pair.heads()[1] > 5, "nothing is applied")
        old = pair.a.fingerprint()
        refused = pair.a.ctl(*REVOKE, old, check=False)
        assert refused.returncode != 0
        assert f"stream {pair.chain} is at work" in refused.stderr
        pair.a.stop("producer")
        pair.a.ctl(*REVOKE, old)
        _until(lambda: len(set(pair.heads())) == 1, "the target is beyond its source, or never gets there")
        pair.b.ctl(*REVOKE, old)
        _next_key(pair)
        pair.a.start("producer")
        _until(lambda: _ends(pair), "the end is not said: " + pair.a.tail("producer"))
    pair.wait_in_step()
    assert pair.differences() == []
    assert set(pair.a.query("SELECT mismatch FROM vsql_sync.stream_targets")) == {(None,)}
    _both_verify(pair)
    pair.stop()


@pytest.mark.timeout(300)
def test_a_target_at_work_has_its_key_revoked_and_counts_again_with_the_next_one(pairs: Pairs) -> None:
    """Each small transaction is acknowledged by itself; none of that goes behind the end."""
    pair = pairs(TABLE, config=QUICK + "batch_linger_ms = 1\n")
    pair.create(["t(*)"])
    pair.start()
    with _rows(pair):
        _until(lambda: pair.heads()[1] > 5, "nothing is applied")
        old = pair.b.fingerprint()
        pair.b.ctl(*REVOKE, old)
        _until(lambda: "was revoked on this node" in pair.b.tail("consumer"), "it signs on")
        pair.a.ctl(*REVOKE, old)
        pair.b.stop("consumer")
        pair.b.new_key()
        peer = ("--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection", pair.b.conninfo)
        pair.a.ctl("node", "add-peer", *peer, "--yes", "--no-copy")
        assert set(pair.a.query("SELECT held FROM vsql_sync.counted_targets")) == {(True,)}
        pair.b.start("consumer")
        counts = "SELECT 1 FROM vsql_sync.counted_targets WHERE chain = %s AND NOT held AND mismatch IS NULL"
        _until(
            lambda: pair.a.query(counts, pair.chain), "it does not count again: " + pair.a.tail("producer")
        )
    pair.wait_in_step()
    acked = (
        "SELECT 1 FROM vsql_sync.counted_targets WHERE chain = %s AND acked_sequence >= %s"
        " AND mismatch IS NULL"
    )
    last = "SELECT max(sequence) FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND batch > 0"
    ((batch,),) = pair.a.query(last, pair.chain)
    _until(lambda: pair.a.query(acked, pair.chain, batch), "the last batch is not acknowledged")
    assert pair.differences() == []
    _both_verify(pair)
    pair.stop()
