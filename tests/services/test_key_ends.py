"""Where signing keys ended, in the database: fixed for a node's own key, noted for a peer's, and held to.

What a target acknowledged with a key that has ended releases nothing before its next key has said where.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest

from tests.audit_history import CHAIN, CLUSTER, A, B, History, signer
from tests.conftest import NewDatabase
from tests.waiting import until
from vsql_consumers import purging
from vsql_consumers.session import own_trust as own_trust_of_target
from vsql_consumers.state import Stream
from vsql_producers import stream
from vsql_producers.identity import own_trust
from vsql_shared.audit.append import append_entry
from vsql_shared.audit.chain import ChainReader, Void
from vsql_shared.audit.entries import SIGNING_KEY_ENDED, canonical_json
from vsql_shared.audit.key_ends import REVOKED, KeyEnd, sign_handover
from vsql_shared.audit.pruning import limits
from vsql_shared.audit.store import insert_entries
from vsql_shared.crypto.signing import End, Signer, TrustStore
from vsql_shared.errors import DatabaseError, EnvironmentFault, RefusedError, UserError
from vsql_shared.names import ack_chain
from vsql_shared.pg import key_ends, nodes, roles, signers
from vsql_shared.pg.connect import Connection, connect, errors

NEXT, NEXT_B = signer("node-a", "next"), signer("node-b", "next")
ACKS = ack_chain(CHAIN, "node-b")


@pytest.fixture
def place(new_schema: NewDatabase) -> str:
    """A database with our schema."""
    return new_schema("ends")


@pytest.fixture
def conn(place: str) -> Iterator[Connection]:
    """Node A, which knows node B and writes a stream to it."""
    with connect(place, application_name="test") as conn:
        nodes.register_local(conn, 1, "node-a", CLUSTER, A.public_key)
        nodes.pin(conn, "node-b", B.public_key)
        conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin)"
            " VALUES (%s, 'out', 'orders', 'node-a')",
            (CHAIN,),
        )
        conn.execute(
            "INSERT INTO vsql_sync.stream_targets"
            " (chain, target, acked_sequence, acked_lsn, acked_target_lsn)"
            " VALUES (%s, 'node-b', 7, '0/700', '0/900')",
            (CHAIN,),
        )
        yield conn


def written(conn: Connection, batches: int = 3) -> History:
    """The stream's chain, in node A's table."""
    history = History()
    history.open()
    for _ in range(batches):
        history.batch()
    insert_entries(conn, [(one, None) for one in history.documents])
    return history


def end_of(history: History) -> End:
    return End(history.head.sequence, history.head.entry_hash)


def word(chain: str, by: Signer, ended: Signer, end: End, cluster: str = CLUSTER) -> bytes:
    """What the key that follows says of another one."""
    history = History(chain, by, cluster)
    history.open()
    (detail,) = KeyEnd(ended.fingerprint, REVOKED, {chain: end}).as_details()
    return history.add(
        event_type=SIGNING_KEY_ENDED, batch_lsn_start=5, batch_lsn_end=5, detail=canonical_json(detail)
    ).encoded


def ends(conn: Connection, one: Signer) -> dict[str, End]:
    (found,) = [key for key in signers.load(conn) if key.fingerprint == one.fingerprint]
    return dict(found.ends)


def read_by_its_reader(conn: Connection, ended: Signer) -> None:
    """What producers/targets.py notes once it has come to the end of a target's key."""
    conn.execute("UPDATE vsql_sync.stream_targets SET ends_read = ARRAY[%s]", (ended.fingerprint,))


def counted(conn: Connection) -> tuple[int, bool]:
    rows = conn.execute("SELECT acked_sequence, held FROM vsql_sync.counted_targets").fetchall()
    assert len(rows) == 1
    return rows[0][0], rows[0][1]


# A node's own key


def test_the_end_of_an_own_key_is_what_the_table_has_and_nothing_is_added_behind_it(conn: Connection) -> None:
    history = written(conn)
    signers.revoke(conn, A.fingerprint, "laptop stolen")
    assert ends(conn, A) == {CHAIN: end_of(history)}
    history.batch()
    with pytest.raises(DatabaseError, match="was revoked, and entry 5"):
        insert_entries(conn, [(history.documents[-1], None)])
    for of in (own_trust, own_trust_of_target):
        with pytest.raises(EnvironmentFault, match="was revoked on this node"):
            of(conn, "node-a", CHAIN, A)


def test_nothing_is_added_behind_it_in_one_round_trip_either(conn: Connection) -> None:
    history = written(conn)
    before = history.head
    history.batch()
    append_entry(conn, history.documents[-1], before)
    signers.revoke(conn, A.fingerprint, "laptop stolen")
    end = end_of(history)
    before = history.head
    history.batch()
    with pytest.raises(DatabaseError, match="was revoked, and entry 6"):
        append_entry(conn, history.documents[-1], before)
    heads = conn.execute("SELECT sequence, entry_hash FROM vsql_sync.chain_heads WHERE own").fetchall()
    assert [End(*row) for row in heads] == [end]
    assert ends(conn, A) == {CHAIN: end}


@pytest.mark.parametrize("add", ["insert", "append"])
def test_a_revocation_waits_for_entries_that_are_being_added(conn: Connection, place: str, add: str) -> None:
    history = written(conn)
    before = history.head
    history.batch()
    with connect(place, application_name="other") as other:
        with conn.transaction():
            if add == "insert":
                insert_entries(conn, [(history.documents[-1], None)])
            else:
                append_entry(conn, history.documents[-1], before)
            done = threading.Thread(target=signers.revoke, args=(other, A.fingerprint, "stolen"))
            done.start()
            waits = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            until(lambda: conn.execute(waits).fetchone() is not None, 20)
        done.join(20)
    assert ends(conn, A) == {CHAIN: end_of(history)}


def test_an_entry_waits_for_a_revocation_and_is_refused_then(conn: Connection, place: str) -> None:
    history = written(conn)
    before = history.head
    end = end_of(history)
    history.batch()
    failures: list[Exception] = []

    def add(other: Connection) -> None:
        try:
            append_entry(other, history.documents[-1], before)
        except DatabaseError as error:
            failures.append(error)

    with connect(place, application_name="other") as other:
        with conn.transaction():
            signers.revoke(conn, A.fingerprint, "stolen")
            done = threading.Thread(target=add, args=(other,))
            done.start()
            waits = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            until(lambda: conn.execute(waits).fetchone() is not None, 20)
        done.join(20)
    assert [str(one) for one in failures if "was revoked, and entry 5" in str(one)]
    assert ends(conn, A) == {CHAIN: end}


def test_a_producer_at_work_is_not_cut_off_but_by_an_order_to(conn: Connection, place: str) -> None:
    """Its targets have applied what Kafka has, and the table has not yet."""
    history = written(conn)
    with connect(place, application_name="worker") as worker:
        stream.lock(worker, CHAIN)
        with pytest.raises(RefusedError, match=r"stream orders\.node-a is at work"):
            signers.revoke(conn, A.fingerprint, "stolen")
        assert conn.execute(
            "SELECT count(*) FROM vsql_sync.signers WHERE revoked_at IS NOT NULL"
        ).fetchone() == (0,)
        signers.revoke(conn, B.fingerprint, "a peer's key is another matter")
        signers.revoke(conn, A.fingerprint, "stolen", now=True)
    assert ends(conn, A) == {CHAIN: end_of(history)}


def void(conn: Connection, chain: str, document: bytes) -> bool:
    """Whether an entry by an ended own key is passed over where node A reads a chain of its own."""
    reader = ChainReader(CLUSTER, chain, "node-a", own_trust(conn, "node-a", chain, NEXT))
    return isinstance(reader.accept(document, "x"), Void)


def test_a_revoked_key_has_no_place_in_a_chain_it_never_signed(conn: Connection) -> None:
    """A record of the thief's there keeps nobody from opening the chain."""
    written(conn)
    signers.revoke(conn, A.fingerprint, "stolen")
    nodes.register_local(conn, 1, "node-a", CLUSTER, NEXT.public_key)
    for chain in ("invoices.node-a", ack_chain("orders.node-b", "node-a")):
        assert void(conn, chain, History(chain, A).open().encoded)


def test_a_retired_key_does_not_live_again_in_a_stream_that_was_made_later(conn: Connection) -> None:
    signers.retire(conn, A.fingerprint, "yearly")
    nodes.register_local(conn, 1, "node-a", CLUSTER, NEXT.public_key)
    streams = "INSERT INTO vsql_sync.streams (chain, direction, publication, origin) VALUES (%s, %s, 'p', %s)"
    conn.execute(streams, ("p.node-a", "out", "node-a"))
    conn.execute(streams, ("p.node-b", "in", "node-b"))
    for chain in ("p.node-a", ack_chain("p.node-b", "node-a")):
        assert void(conn, chain, History(chain, A).open().encoded)
    assert not void(conn, CHAIN, History(CHAIN, A).open().encoded), "it may be in Kafka alone"


def test_a_third_key_says_the_first_ones_end_in_a_chain_that_was_pruned(conn: Connection) -> None:
    history = written(conn)
    first = end_of(history)
    signers.retire(conn, A.fingerprint, "yearly")
    nodes.register_local(conn, 1, "node-a", CLUSTER, NEXT.public_key)
    (detail,) = key_ends.owed(conn, CLUSTER, "node-a", CHAIN, NEXT)
    history.by = NEXT
    history.open()
    history.add(
        event_type=SIGNING_KEY_ENDED, batch_lsn_start=5, batch_lsn_end=5, detail=canonical_json(detail)
    )
    history.batch()
    insert_entries(conn, [(one, None) for one in history.documents[-3:]])
    # All but the last batch goes; what is no batch is kept apart, as prune_audit does it.
    size = history.head.sequence - 1
    conn.execute("INSERT INTO vsql_sync.audit_bases (chain, size, base) VALUES (%s, %s, '{}')", (CHAIN, size))
    conn.execute(
        "INSERT INTO vsql_sync.audit_kept (chain, sequence, event_type, source_node_id, document)"
        " SELECT chain, sequence, event_type, source_node_id, document FROM vsql_sync.vsql_sync_audit"
        " WHERE sequence <= %s AND event_type = %s",
        (size, SIGNING_KEY_ENDED),
    )
    conn.execute("DELETE FROM vsql_sync.vsql_sync_audit WHERE sequence <= %s", (size,))
    assert conn.execute("SELECT count(*) FROM vsql_sync.vsql_sync_audit").fetchone() == (1,)
    third = signer("node-a", "third")
    signers.retire(conn, NEXT.fingerprint, "yearly, again")
    nodes.register_local(conn, 1, "node-a", CLUSTER, third.public_key)
    (old,) = [key for key in key_ends.own_pins(conn, "node-a", CHAIN) if key.fingerprint == A.fingerprint]
    assert (old.ended, old.ends.get(CHAIN)) == (True, first)
    owed = key_ends.owed(conn, CLUSTER, "node-a", CHAIN, third)
    assert {one["key"]: one["ends"][CHAIN] for one in owed} == {
        A.fingerprint: [first.sequence, first.entry_hash.hex()],
        NEXT.fingerprint: [history.head.sequence, history.head.entry_hash.hex()],
    }


def test_what_a_thief_lays_into_kafka_behind_the_table_is_not_in_the_chain(conn: Connection) -> None:
    history = written(conn)
    true = history.head
    history.batch()  # with the stolen key, and not in the table
    signers.revoke(conn, A.fingerprint, "stolen")
    nodes.register_local(conn, 1, "node-a", CLUSTER, NEXT.public_key)
    reader = ChainReader(CLUSTER, CHAIN, "node-a", own_trust(conn, "node-a", CHAIN, NEXT))
    for document in history.documents:
        reader.accept(document, "x")
    assert reader.head == true


def test_the_next_key_says_each_end_once_and_remembers_that_it_did(conn: Connection) -> None:
    history = written(conn)
    assert key_ends.owed(conn, CLUSTER, "node-a", CHAIN, A) == []
    signers.retire(conn, A.fingerprint, "yearly", sign_handover(A, CLUSTER, NEXT.fingerprint))
    nodes.register_local(conn, 1, "node-a", CLUSTER, NEXT.public_key)
    end = end_of(history)
    (detail,) = key_ends.owed(conn, CLUSTER, "node-a", CHAIN, NEXT)
    assert detail["ends"] == {CHAIN: [end.sequence, end.entry_hash.hex()]}
    assert detail["act"] == "retired"
    assert detail["handover"]
    assert ends(conn, A) == {}, "it counts as if it lived until the next one has said where it ended"
    history.by = NEXT
    history.open()
    history.add(
        event_type=SIGNING_KEY_ENDED, batch_lsn_start=5, batch_lsn_end=5, detail=canonical_json(detail)
    )
    insert_entries(conn, [(one, None) for one in history.documents[-2:]])
    assert key_ends.owed(conn, CLUSTER, "node-a", CHAIN, NEXT) == []
    assert ends(conn, A) == {CHAIN: end}
    # A chain nobody writes any more is named in another one.
    conn.execute("UPDATE vsql_sync.streams SET state = 'FINISHED'")
    (elsewhere,) = key_ends.owed(conn, CLUSTER, "node-a", "other.node-a", NEXT)
    assert set(elsewhere["ends"]) == {CHAIN, "other.node-a"}
    assert elsewhere["ends"]["other.node-a"][0] == 0


def test_a_key_is_handed_over_to_the_one_it_named_and_no_other(conn: Connection) -> None:
    written(conn)
    signers.retire(conn, A.fingerprint, "yearly", sign_handover(A, CLUSTER, NEXT.fingerprint))
    with pytest.raises(RefusedError, match="handed over to another key"):
        nodes.register_local(conn, 1, "node-a", CLUSTER, signer("node-a", "another").public_key)
    nodes.register_local(conn, 1, "node-a", CLUSTER, NEXT.public_key)


def test_an_unknown_key_a_second_end_and_the_only_key(conn: Connection) -> None:
    with pytest.raises(RefusedError, match="no key SHA256:x is pinned here"):
        signers.revoke(conn, "SHA256:x", "why")
    with pytest.raises(UserError, match="needs a reason"):
        signers.revoke(conn, A.fingerprint, " ")
    history = written(conn)
    signers.revoke(conn, A.fingerprint, "the only key")
    for act in (signers.revoke, signers.retire):
        with pytest.raises(RefusedError, match="has ended already"):
            act(conn, A.fingerprint, "again")
    assert ends(conn, A) == {CHAIN: end_of(history)}
    lines = conn.execute(
        "SELECT action FROM vsql_sync.audit_log WHERE action LIKE 'signer.revoke'"
    ).fetchall()
    assert lines == [("signer.revoke",)]


def test_an_end_is_moved_only_while_the_chain_has_not_gone_on(conn: Connection) -> None:
    history = written(conn)
    signers.revoke(conn, A.fingerprint, "stolen")
    history.batch()  # a genuine one, which a peer has and this node's table lacks
    signers.trust_up_to(conn, A.fingerprint, CHAIN, history.head.sequence, history.head.entry_hash, "told")
    assert ends(conn, A) == {CHAIN: end_of(history)}
    for lower in (history.head.sequence, history.head.sequence - 1):
        with pytest.raises(RefusedError, match=r"counts up to entry 5 of chain orders\.node-a already"):
            signers.trust_up_to(conn, A.fingerprint, CHAIN, lower, bytes(32), "another peer told")
    assert ends(conn, A) == {CHAIN: end_of(history)}
    insert_entries(conn, [(history.documents[-1], None)])
    nodes.register_local(conn, 1, "node-a", CLUSTER, NEXT.public_key)
    history.by = NEXT
    history.open()
    insert_entries(conn, [(history.documents[-1], None)])
    with pytest.raises(RefusedError, match="has gone on behind the end"):
        signers.trust_up_to(conn, A.fingerprint, CHAIN, 9, bytes(32), "told again")


# A peer's key


def pinned_next(conn: Connection, act: str = "revoke") -> None:
    getattr(signers, act)(conn, B.fingerprint, "stolen")
    nodes.pin(conn, "node-b", NEXT_B.public_key)


@pytest.mark.parametrize("act", ["revoke", "retire"])
def test_nothing_is_forgotten_for_what_an_ended_key_acknowledged(conn: Connection, act: str) -> None:
    assert counted(conn) == (7, False)
    getattr(signers, act)(conn, B.fingerprint, "stolen")
    assert counted(conn) == (0, True)
    assert (
        limits(conn, CHAIN)["a signing key of target node-b has ended, and its next one has not said where"]
        == 0
    )
    nodes.pin(conn, "node-b", NEXT_B.public_key)
    assert counted(conn) == (0, True)
    keys = signers.load(conn)
    of_another = word("other.node-a.ack.node-b", NEXT_B, B, End(1, bytes(32)))
    assert key_ends.note(conn, keys, CLUSTER, "node-b", of_another)
    assert counted(conn) == (0, True), "that is another chain's"
    assert key_ends.note(conn, keys, CLUSTER, "node-b", word(ACKS, NEXT_B, B, End(3, b"h" * 32)))
    assert counted(conn) == (0, True), "said, and not read yet by who reads the acknowledgements"
    read_by_its_reader(conn, B)
    assert counted(conn) == (7, False)
    # Its next key ends, too: what that one said is worth nothing now.
    signers.revoke(conn, NEXT_B.fingerprint, "stolen as well")
    assert counted(conn) == (0, True)
    assert ends(conn, B) == {}


def test_rows_that_say_more_than_their_document_count_for_nothing(conn: Connection) -> None:
    pinned_next(conn)
    true = word(ACKS, NEXT_B, B, End(3, b"h" * 32))
    forged = {
        "another end": (B.fingerprint, ACKS, 99, b"h" * 32, NEXT_B.fingerprint, true),
        "a thief's word": (
            B.fingerprint,
            ACKS,
            99,
            b"h" * 32,
            B.fingerprint,
            word(ACKS, B, B, End(99, b"h" * 32)),
        ),
        "another chain": (B.fingerprint, "x.node-a.ack.node-b", 3, b"h" * 32, NEXT_B.fingerprint, true),
        "nothing": (B.fingerprint, ACKS, 98, b"h" * 32, NEXT_B.fingerprint, b""),
    }
    for what, row in forged.items():
        conn.execute(
            "INSERT INTO vsql_sync.signed_ends (fingerprint, chain, sequence, entry_hash, said_by, document)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            row,
        )
        assert ends(conn, B) == {}, what
    assert key_ends.note(conn, signers.load(conn), CLUSTER, "node-b", true)
    assert ends(conn, B) == {ACKS: End(3, b"h" * 32)}


def test_what_does_not_count_is_not_noted(conn: Connection) -> None:
    end = End(3, b"h" * 32)
    nothing = {
        "the key lives": word(ACKS, NEXT_B, B, end),
        "by the key itself": word(ACKS, B, B, end),
        "another cluster's": word(ACKS, NEXT_B, B, end, cluster="other"),
        "of a key nobody knows": word(ACKS, NEXT_B, signer("node-b", "unknown"), end),
    }
    for what, document in nothing.items():
        assert not key_ends.note(conn, signers.load(conn), CLUSTER, "node-b", document), what
        if what == "the key lives":
            pinned_next(conn)
    assert conn.execute("SELECT count(*) FROM vsql_sync.signed_ends").fetchone() == (0,)


def test_a_peers_signed_end_cannot_be_moved_by_an_operator(conn: Connection) -> None:
    pinned_next(conn)
    key_ends.note(conn, signers.load(conn), CLUSTER, "node-b", word(ACKS, NEXT_B, B, End(3, b"h" * 32)))
    with pytest.raises(RefusedError, match="has said, signed by its next key"):
        signers.trust_up_to(conn, B.fingerprint, ACKS, 9, bytes(32), "told")


def test_tombstones_wait_for_the_peers_next_key(conn: Connection) -> None:
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, publication, origin, target)"
        " VALUES ('orders.node-b', 'in', 'orders', 'node-b', 'node-a')"
    )
    (number,) = conn.execute("SELECT txid_current()").fetchone() or (0,)
    mark = (
        "INSERT INTO vsql_sync.purge_marks (publication, below, lsn, peer_lsn)"
        " VALUES ('orders', %s::text::xid8, '0/600', %s)"
    )
    conn.execute(mark, (str(number), "0/900"))
    stream = _incoming()
    signers.revoke(conn, B.fingerprint, "stolen")
    assert conn.execute("SELECT count(*) FROM vsql_sync.purge_marks").fetchone() == (0,), "made by a thief?"
    # One that a look at the acknowledgements made a moment before.
    conn.execute(mark, (str(number), "0/900"))
    purging.purge(conn, stream)
    rows = conn.execute("SELECT lsn > '0/600', peer_lsn FROM vsql_sync.purge_marks").fetchall()
    assert rows == [(True, None)], "what the mark took from the stolen key's acknowledgement is gone"
    conn.execute("DELETE FROM vsql_sync.purge_marks")
    conn.execute(mark, (str(number), None))
    nodes.pin(conn, "node-b", NEXT_B.public_key)
    key_ends.note(conn, signers.load(conn), CLUSTER, "node-b", word(ACKS, NEXT_B, B, End(3, b"h" * 32)))
    # Forgetting the acknowledgements takes the mark, too: nobody may have looked meanwhile.
    conn.execute("UPDATE vsql_sync.purge_marks SET peer_lsn = '0/1'")
    with conn.transaction(force_rollback=True):
        conn.execute("SELECT vsql_sync.forget_acknowledgements(%s, 'node-b')", (CHAIN,))
        assert conn.execute("SELECT count(*) FROM vsql_sync.purge_marks").fetchone() == (0,)
    conn.execute("UPDATE vsql_sync.purge_marks SET peer_lsn = NULL")
    read_by_its_reader(conn, B)
    purging.purge(conn, stream)
    assert conn.execute("SELECT peer_lsn::text FROM vsql_sync.purge_marks").fetchall() == [("0/900",)]


def _incoming() -> Stream:
    return Stream("orders.node-b", "live", "orders", "node-b", "node-a", "o", 0, 0, "running", "", False)


def test_a_services_role_notes_ends_and_makes_none(conn: Connection) -> None:
    pinned_next(conn)
    if not roles.exist(conn):
        roles.create(conn)
    roles.grant_schema(conn)
    for role in (roles.PRODUCER, roles.CONSUMER):
        with conn.transaction(force_rollback=True):
            conn.execute(f"SET LOCAL ROLE {role}".encode())
            assert key_ends.note(
                conn, signers.load(conn), CLUSTER, "node-b", word(ACKS, NEXT_B, B, End(3, b"h" * 32))
            )
            conn.execute("SELECT vsql_sync.require_counted(%s, %s, 1)", (NEXT.fingerprint, CHAIN))
    for role, statement in (
        (roles.PRODUCER, "UPDATE vsql_sync.signers SET ended_heads = '{}'"),
        (roles.PRODUCER, "DELETE FROM vsql_sync.signed_ends"),
        (roles.CONSUMER, "UPDATE vsql_sync.signed_ends SET sequence = 99"),
        (roles.CONSUMER, f"SELECT vsql_sync.forget_acknowledgements('{CHAIN}', 'node-b')"),
        (roles.VIEWER, "SELECT vsql_sync.require_counted('x', 'x', 1)"),
        (roles.OPERATOR, "INSERT INTO vsql_sync.signed_ends VALUES ('f', 'c', 1, sha256(''), 's', '')"),
    ):
        with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
            conn.execute(f"BEGIN; SET LOCAL ROLE {role}; {statement}".encode())
        conn.execute("ROLLBACK")
    with conn.transaction():
        conn.execute(f"SET LOCAL ROLE {roles.PRODUCER}".encode())
        conn.execute("SELECT vsql_sync.forget_acknowledgements(%s, 'node-b')", (CHAIN,))
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="no signing key of node node-c has ended"):
        conn.execute("SELECT vsql_sync.forget_acknowledgements(%s, 'node-c')", (CHAIN,))
    assert conn.execute("SELECT acked_sequence, acked_lsn FROM vsql_sync.stream_targets").fetchall() == [
        (0, None)
    ]
    assert TrustStore(signers.load(conn)).proven_from("node-b", ACKS) == 0
