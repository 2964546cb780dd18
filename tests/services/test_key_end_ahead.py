"""A target looks ahead for the end of its origin's key: what the ended key signed must not come first."""

from __future__ import annotations

import pytest
from confluent_kafka import Producer

from tests.audit_history import History, signer
from tests.services.conftest import NewSource
from vsql_consumers import key_ends, state
from vsql_consumers.state import Position, Stream
from vsql_shared import names
from vsql_shared.audit.chain import Accepted, ChainReader, Void
from vsql_shared.audit.entries import SIGNING_KEY_ENDED, canonical_json
from vsql_shared.audit.key_ends import RETIRED, KeyEnd
from vsql_shared.crypto.signing import End
from vsql_shared.pg import nodes, signers
from vsql_shared.pg.connect import connect

CHAIN = "orders.node-x"
OLD, NEXT = signer("node-x"), signer("node-x", "next")


@pytest.mark.parametrize("applied", [False, True])
def test_what_a_retired_key_signed_behind_its_end_is_void_wherever_the_target_stands(
    new_source: NewSource, applied: bool
) -> None:
    """A thief lays an entry, dated back, between the target's place and the next key's opening."""
    node = new_source("CREATE TABLE t (id int PRIMARY KEY)", ["t"])  # its database and Kafka: a target's
    history = History(CHAIN, OLD, node.cluster)
    history.open()
    history.batch()
    head = history.head
    thief = History(CHAIN, OLD, node.cluster, head)
    thief.open(88)
    following = History(CHAIN, NEXT, node.cluster, head)
    following.open(77)
    (detail,) = KeyEnd(OLD.fingerprint, RETIRED, {CHAIN: End(head.sequence, head.entry_hash)}).as_details()
    following.add(
        event_type=SIGNING_KEY_ENDED, batch_lsn_start=5, batch_lsn_end=5, detail=canonical_json(detail)
    )
    node.make_topic("audit")
    documents = [*history.documents, *thief.documents, *following.documents]
    producer = Producer({"bootstrap.servers": node.kafka, "enable.idempotence": True})
    for one in documents:
        producer.produce(names.audit_topic(node.cluster), one, partition=0)
    assert producer.flush(20) == 0
    stream = Stream(CHAIN, "live", "orders", "node-x", "node-a", "o", 0, 0, "running", "", False)
    with connect(node.conninfo, application_name="test") as conn:
        nodes.pin(conn, "node-x", OLD.public_key)
        begin = len(history.documents) if applied else 0
        if applied:
            state.save_position(conn, CHAIN, Position(head, begin))
        signers.retire(conn, OLD.fingerprint, "yearly")
        nodes.pin(conn, "node-x", NEXT.public_key)
        keys = key_ends.look_at_start(node.settings, conn, stream)
        trust = key_ends.trust_of(node.settings, conn, stream, keys)
        at = state.load_position(conn, CHAIN).head
    reader = ChainReader(node.cluster, CHAIN, "node-x", trust, at)
    found = [type(reader.accept(one, "x")) for one in documents[begin:]]
    assert found == [*[Accepted] * (len(history.documents) - begin), Void, Accepted, Accepted]
