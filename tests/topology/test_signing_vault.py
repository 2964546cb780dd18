"""Two nodes whose signing keys are in Vault: a server sealed in the middle, a rotated key, the next key."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.vault_server import VaultServer, vault_server

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text)"
_RIGHTS = (("keys", "read"), ("sign", "update"))
QUICK = "[limits]\nretry_backoff_max_ms = 1000\ncommand_poll_ms = 300\nstatus_interval_ms = 300\n"


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[VaultServer]:
    """A server of this test's own: it is sealed in between."""
    with vault_server(tmp_path) as server:
        yield server


def _signing(label: str) -> str:
    return f'signing_key_label = "transit/{label}"\nsigning_key_provider = "vault"'


@pytest.fixture
def pair(vault: VaultServer, stack: Stack, tmp_path: Path) -> Iterator[TwoNodes]:
    pair = TwoNodes(stack, tmp_path, TABLE, config=QUICK)
    vault.new_key("payments")
    for node in (pair.a, pair.b):
        vault.new_key(f"{node.name}-1", "ed25519")
        vault.new_key(f"{node.name}-2", "ed25519")
        kek = (("transit/keys/payments", "read"), ("transit/encrypt/payments", "update"))
        opens = ("transit/decrypt/payments", "update")
        rules = [(f"transit/{verb}/{node.name}-{n}", can) for verb, can in _RIGHTS for n in (1, 2)]
        token = vault.token_with(node.name, *kek, opens, *rules)
        node.signing = _signing(f"{node.name}-1")
        node.kms = (
            'provider = "vault"\nkek_id = "transit/payments"\nattempts = 2\nretry_pause = "10ms"\n'
            f'[encryption.kms.vault]\naddress = "{vault.address}"\ntoken = "{token}"'
        )
    try:
        yield pair
    finally:
        pair.end()


def _until(done: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def _says_sealed(node: Node, role: str) -> bool:
    return "Vault is sealed" in node.tail(role)


def _both_verify(pair: TwoNodes) -> None:
    for node, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        shown = node.ctl("audit", "verify", "--kafka", "--peer-connection", peer.conninfo).stdout
        assert "ok: every entry is signed, linked and unaltered" in shown


def _signers(pair: TwoNodes) -> set[str]:
    used = "SELECT DISTINCT signer_key FROM vsql_sync.vsql_sync_audit WHERE chain = %s"
    return {row[0] for row in pair.a.query(used, pair.chain)}


@pytest.mark.timeout(240)
def test_streams_wait_while_vault_is_sealed_and_no_row_is_lost_or_applied_twice(
    pair: TwoNodes, vault: VaultServer
) -> None:
    pair.create(["t(*)"])
    pair.start()
    pair.a.execute("INSERT INTO t SELECT n, 'before' FROM generate_series(1, 100) n")
    pair.wait_in_step()
    vault.ask("POST", "transit/keys/node-a-1/rotate", {})  # signs on as version 1
    vault.seal()
    head = pair.heads()[0]
    pair.a.execute("INSERT INTO t SELECT n, 'sealed' FROM generate_series(101, 200) n")
    says = "SELECT detail->>'last_error' FROM vsql_sync.stream_status WHERE state = 'waiting'"
    _until(lambda: "sealed" in str(pair.a.query(says)), pair.a.tail("producer"))
    assert pair.heads()[0] == head  # nothing unsigned leaves
    assert pair.b.query("SELECT count(*) FROM t") == [(100,)]
    vault.unseal()
    pair.wait_in_step()
    assert pair.differences() == []
    assert pair.b.query("SELECT count(*) FROM t") == [(200,)]
    assert _signers(pair) == {pair.a.fingerprint()}
    _both_verify(pair)
    pair.stop()


@pytest.mark.timeout(240)
def test_a_service_that_starts_while_vault_is_sealed_waits_and_the_next_key_follows_the_first(
    pair: TwoNodes, vault: VaultServer
) -> None:
    pair.create(["t(*)"])
    pair.start()
    pair.a.execute("INSERT INTO t VALUES (1, 'signed by the first key')")
    pair.wait_in_step()
    old = pair.a.fingerprint()
    pair.stop()
    retire = ("key", "retire", "--fingerprint", old, "--reason", "yearly change", "--yes")
    for node in (pair.a, pair.b):
        node.ctl(*retire)
    config = pair.a.config
    config.write_text(config.read_text().replace(_signing("node-a-1"), _signing("node-a-2")))
    pair.a.ctl("node", "init")
    new = pair.a.fingerprint()
    assert new != old
    peer = ("--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection", pair.b.conninfo)
    pair.a.ctl("node", "add-peer", *peer, "--yes")
    vault.seal()
    pair.start()
    for node, role in ((pair.a, "producer"), (pair.b, "consumer")):
        _until(partial(_says_sealed, node, role), f"{role}: {node.tail(role)}")
        assert node.services[role].poll() is None
    pair.a.execute("INSERT INTO t VALUES (2, 'signed by the second key')")
    vault.unseal()
    pair.wait_in_step()
    assert pair.differences() == []
    assert _signers(pair) == {old, new}
    _both_verify(pair)
    pair.stop()
