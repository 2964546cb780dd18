"""The end of a node's signing key, through the terminal: handed over (retired), or stolen (revoked).

Two nodes with their services; what an operator does is `syncctl`, in the order of docs/operations/keys.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.nodes import TwoNodes
from tests.pairs import Pairs

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"
QUICK = "[limits]\nretry_backoff_max_ms = 1000\ncommand_poll_ms = 300\nstatus_interval_ms = 300\n"


def _until(done: Callable[[], object], what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def _pin_again(pair: TwoNodes) -> None:
    peer = ("--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection", pair.b.conninfo)
    pair.a.ctl("node", "add-peer", *peer, "--yes")


def _in_step(pairs: Pairs) -> TwoNodes:
    pair = pairs(TABLE, config=QUICK)
    pair.create(["t(*)"])
    pair.start()
    pair.a.execute("INSERT INTO t VALUES (1, 'signed by the first key')")
    pair.wait_in_step()
    return pair


def _refusal(pair: TwoNodes) -> str:
    """What node B says of the refused entry, once it does."""
    refused = "SELECT detail->>'last_error' FROM vsql_sync.stream_status WHERE state = 'refused'"
    _until(lambda: pair.b.query(refused), "nothing was refused: " + pair.b.tail("consumer"))
    return str(pair.b.query(refused)[0][0])


def _both_verify(pair: TwoNodes) -> None:
    for node, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        shown = node.ctl("audit", "verify", "--kafka", "--peer-connection", peer.conninfo).stdout
        assert "ok: every entry is signed, linked and unaltered" in shown


def _signers(pair: TwoNodes) -> set[str]:
    rows = pair.b.query("SELECT fingerprint FROM vsql_sync.signers WHERE node_name = 'node-a'")
    return {row[0] for row in rows}


@pytest.mark.timeout(240)
def test_a_key_that_was_handed_over_in_order_is_followed_by_the_new_one(pairs: Pairs) -> None:
    pair = _in_step(pairs)
    old = pair.a.fingerprint()
    pair.a.stop("producer")
    retire = ("key", "retire", "--fingerprint", old, "--reason", "yearly change", "--yes")
    assert f"key {old} of node node-a is retired" in pair.a.ctl(*retire).stdout
    pair.b.ctl(*retire)
    again = pair.b.ctl(*retire, check=False)
    assert again.returncode != 0
    assert "has ended already" in again.stderr
    pair.a.new_key()
    _pin_again(pair)
    assert _signers(pair) == {old, pair.a.fingerprint()}
    pair.a.start("producer")
    pair.a.execute("INSERT INTO t VALUES (2, 'signed by the second key')")
    pair.wait_in_step()
    assert pair.differences() == []
    _both_verify(pair)
    used = "SELECT DISTINCT signer_key FROM vsql_sync.vsql_sync_audit WHERE chain = %s"
    assert {row[0] for row in pair.a.query(used, pair.chain)} == {old, pair.a.fingerprint()}
    pair.stop()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("act", ["retire", "revoke"])
def test_what_a_key_signs_after_its_end_is_refused(pairs: Pairs, act: str) -> None:
    pair = _in_step(pairs)
    old = pair.a.fingerprint()
    shown = pair.b.ctl("key", act, "--fingerprint", old, "--reason", "IR-7", "--yes").stdout
    assert old in shown
    time.sleep(1.5)
    pair.a.execute("INSERT INTO t VALUES (2, 'signed by a key that has ended')")
    said = _refusal(pair)
    assert f"{act}d key {old}" in said or f"after it was {act}d" in said
    assert pair.b.query("SELECT id FROM t") == [(1,)]
    # The target says so in its own chain, signed; once.
    told = (
        "SELECT count(*) FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'batch_refused'"
        " AND signature IS NOT NULL"
    )
    acks = f"{pair.chain}.ack.node-b"
    _until(lambda: pair.b.query(told, acks) == [(1,)], f"{pair.b.query(told, acks)} refusals in the chain")
    # What was known before stays verifiable, on both sides.
    for node in (pair.a, pair.b):
        assert node.ctl("audit", "verify").returncode == 0
    pair.stop()


@pytest.mark.timeout(240)
def test_what_was_signed_before_a_revoked_key_stopped_is_taken_when_its_node_tells_the_last_entry(
    pairs: Pairs,
) -> None:
    pair = _in_step(pairs)
    old = pair.a.fingerprint()
    revoke = ("key", "revoke", "--fingerprint", old, "--reason", "laptop stolen", "--yes")
    pair.b.ctl(*revoke)
    time.sleep(1.5)
    pair.a.execute("INSERT INTO t VALUES (2, 'signed before its node knew')")
    _refusal(pair)
    pair.b.stop("consumer")  # it would hear from the next key where this one ended
    pair.a.stop("producer")
    words = pair.a.ctl(*revoke).stdout.split()
    at = len(words) - 1 - words[::-1].index(pair.chain)
    sequence, entry_hash = words[at + 1], words[at + 2]
    pair.a.new_key()
    _pin_again(pair)
    pair.a.start("producer")
    pair.a.execute("INSERT INTO t VALUES (3, 'signed by the second key')")
    _until(lambda: pair.heads()[0] > int(sequence) + 1, "the producer does not go on")
    trust = ("key", "trust", "--fingerprint", old, "--chain", pair.chain, "--reason", "told", "--yes")
    for told, problem in (
        ((sequence, "00" * 32), "not the one you were told"),
        ((str(int(sequence) + 1_000), entry_hash), "before entry"),
        ((str(int(sequence) + 1), entry_hash), "not the one you were told"),
    ):
        done = pair.b.ctl(*trust, "--sequence", told[0], "--hash", told[1], check=False)
        assert done.returncode != 0
        assert problem in done.stderr
    pair.b.ctl(*trust, "--sequence", sequence, "--hash", entry_hash)
    pair.b.start("consumer")
    pair.wait_in_step()
    assert pair.differences() == []
    _both_verify(pair)
    pair.stop()


@pytest.mark.timeout(240)
def test_a_stream_goes_on_with_a_new_key_after_the_old_one_was_revoked(pairs: Pairs) -> None:
    pair = _in_step(pairs)
    old = pair.a.fingerprint()
    pair.a.stop("producer")
    _until(lambda: len(set(pair.heads())) == 1, "the target has not read what the old key signed")
    shown = pair.b.ctl("key", "revoke", "--fingerprint", old, "--reason", "laptop stolen", "--yes").stdout
    head = pair.heads()[0]
    assert f"{pair.chain} " in shown
    assert str(head) in shown.split()
    pair.a.ctl("key", "revoke", "--fingerprint", old, "--reason", "laptop stolen", "--yes")
    pair.a.new_key()
    _pin_again(pair)
    pair.a.start("producer")
    pair.a.execute("INSERT INTO t VALUES (2, 'signed by the second key')")
    pair.wait_in_step()
    assert pair.differences() == []
    _both_verify(pair)
    pair.stop()
