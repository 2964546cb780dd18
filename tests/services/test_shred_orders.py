"""Orders to destroy a KEK version against what producers do at that moment: real database, real Kafka."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, SourceNode
from tests.services.test_data_keys import TABLE, data_keys
from vsql_shared import names
from vsql_shared.audit.dsse import SignedDocument
from vsql_shared.audit.shredding import to_approve
from vsql_shared.crypto.announce import decode_announcement
from vsql_shared.crypto.signing import Signer
from vsql_shared.errors import KeyUnavailableError, RefusedError
from vsql_shared.kms.file import rotate_kek_file
from vsql_shared.pg import commands, coverage, shredding
from vsql_shared.pg.connect import Connection, connect

QUICK = "[limits]\nbatch_linger_ms = 1\nstatus_interval_ms = 100\ncommand_poll_ms = 100\n"
FIRST, SECOND = "test-kek/1", "test-kek/2"


class People:
    """Two operators of a node."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self.alice, self.bob = (Signer(Ed25519PrivateKey.generate(), name) for name in ("alice", "bob"))
        for one in (self.alice, self.bob):
            shredding.enroll(conn, one.node, one.public_key)

    def order(self, kek_id: str) -> int:
        """Alice's order for a version, due at once."""
        return shredding.request(self._conn, self.alice, "file", kek_id, "it is over", timedelta(0)).id

    def scheduled(self, kek_id: str) -> int:
        """The same, approved by Bob."""
        row = shredding.load(self._conn, self.order(kek_id))
        approval = self.bob.sign(to_approve(row.document))
        return shredding.approve(self._conn, row.id, self.bob.fingerprint, approval).id


def kek_file(node: SourceNode) -> Path:
    path = node.settings.encryption.kms.file.path
    assert path is not None
    return path


def announced(node: SourceNode) -> list[tuple[str, str]]:
    """(data key, KEK version) of every announcement in Kafka, in order."""
    said = [
        decode_announcement(SignedDocument.decode(record.value).payload)
        for record in node.records()
        if record.topic == names.keys_topic(node.cluster) and record.value is not None
    ]
    return [(one.dek_id, one.kek_id) for one in said]


def test_a_wrapping_that_was_noted_and_not_announced_is_made_again_and_its_version_kept_until_then(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"], config=QUICK)
    node.execute(f"INSERT INTO vsql_sync.stream_targets (chain, target) VALUES ('{CHAIN}', 'node-b')")
    worker = node.start(failpoints="producer.wrapping-noted=kill")
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO t VALUES (1, 'a')")
    node.wait_confirmed()
    ((used,),) = node.query("SELECT dek_id FROM vsql_sync.deks")
    rotate_kek_file(kek_file(node))
    with connect(node.conninfo, application_name="test") as conn:
        people = People(conn)
        asked = commands.request(conn, "producer", "rotate-kek", {}, "", CHAIN)
        assert worker.wait(60) != 0
        assert announced(node) == [(used, FIRST)]
        # Another version has it, too, by this node's table; nobody else has heard of that.
        found = coverage.of(conn, "file", FIRST)
        assert (found.deks, found.stranded) == ((), (used,))
        with pytest.raises(RefusedError, match="were announced under test-kek/1 last"):
            people.order(FIRST)

        worker = node.start()
        (answer,) = commands.wait(conn, asked, 1, 60)
        assert answer.ok, answer
        assert (used, SECOND) in announced(node)
        assert coverage.of(conn, "file", FIRST).stranded == ()
        assert people.order(FIRST) == 1
    node.stop(worker)


def test_nothing_is_announced_under_a_version_that_was_destroyed_while_it_wrapped(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"])
    with data_keys(node, 1, lambda: 0.0) as keys:
        keys.key_for(1, 10)
        keys.close()
    with connect(node.conninfo, application_name="test") as conn:
        shredding.record_destroyed(conn, People(conn).scheduled(FIRST))
    before = announced(node)
    # This producer still wraps by the version: it has not looked at the KMS since.
    with (
        data_keys(node, 2, lambda: 0.0) as keys,
        pytest.raises(KeyUnavailableError, match="test-kek/1 was destroyed by an order"),
    ):
        keys.key_for(1, 10)
    assert announced(node) == before
    assert node.query("SELECT count(*) FROM vsql_sync.deks") == [(1,)]


def test_a_data_key_that_is_destroyed_while_others_are_wrapped_anew_stays_destroyed(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"])
    path = kek_file(node)
    with connect(node.conninfo, application_name="test") as conn:
        due: list[int] = []

        def destroy() -> None:
            if due:
                shredding.record_destroyed(conn, due.pop())

        with data_keys(node, 1, lambda: 0.0, destroy) as keys:
            kept = keys.key_for(1, 10).dek_id
            rotate_kek_file(path)
            keys.rotate("command")
            doomed = keys.key_for(1, 10).dek_id
            rotate_kek_file(path)
            keys.rotate("command")
            keys.key_for(1, 10)
            due.append(People(conn).scheduled(SECOND))
            done = keys.rotate_kek()  # `kept` comes first; then the order for the other's version is obeyed
            keys.close()
    assert (done.rewrapped, done.left) == ((kept,), (doomed,))
    assert "was destroyed by an order" in done.problem
    assert (doomed, "test-kek/3") not in announced(node)
    assert node.query("SELECT state FROM vsql_sync.deks WHERE dek_id = %s", doomed) == [("destroyed",)]


def test_a_key_that_an_ended_stream_left_behind_keeps_nobody_from_destroying_its_version(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"])
    with data_keys(node, 1, lambda: 0.0) as keys:
        left = keys.key_for(1, 10).dek_id  # its process dies here
    with connect(node.conninfo, application_name="test") as conn:
        people = People(conn)
        with pytest.raises(RefusedError, match="1 data keys under test-kek/1 are in use"):
            people.order(FIRST)
        conn.execute("UPDATE vsql_sync.streams SET state = 'FINISHED' WHERE chain = %s", (CHAIN,))
        shredding.record_destroyed(conn, people.scheduled(FIRST))
        # Its chain says nothing any more; another one that is still written does.
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin, slot_name, desired)"
            " VALUES ('other.node-a', 'out', 'pub', 'node-a', 'other', 'running')"
        )
        assert shredding.told_by(conn, "other.node-a", ((CHAIN, left),)) == {CHAIN: [left]}
        assert shredding.told_by(conn, CHAIN, ((CHAIN, left),)) == {}


def test_nobody_approves_an_order_whose_row_says_something_else_than_was_signed(
    new_source: NewSource,
) -> None:
    node = new_source(TABLE, ["t"])
    with connect(node.conninfo, application_name="test") as conn:
        people = People(conn)
        number = people.order(FIRST)
        conn.execute("UPDATE vsql_sync.shred_orders SET kek_id = 'test-kek/0'")
        row = shredding.load(conn, number)
        approval = people.bob.sign(to_approve(row.document))
        with pytest.raises(RefusedError, match="is about test-kek/1, its row says test-kek/0"):
            shredding.to_be_approved(conn, number)
        with pytest.raises(RefusedError, match="is about test-kek/1"):
            shredding.approve(conn, number, people.bob.fingerprint, approval)
