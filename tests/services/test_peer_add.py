"""Adding a peer: what is checked in both databases, what is written, what a failure leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from tests.conftest import NewDatabase
from vsql_shared import names
from vsql_shared.changes import TableName
from vsql_shared.crypto.signing import fingerprint
from vsql_shared.errors import DatabaseError, RefusedError
from vsql_shared.pg import migrate, nodes, peers, publications, roles
from vsql_shared.pg.connect import Connection, connect
from vsql_shared.pg.peers import PeerRequest
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import parse_spec

KEY_A, KEY_B = bytes(range(32)), bytes(range(1, 33))
TABLES = """
CREATE TABLE public.payments (id bigint PRIMARY KEY, amount numeric, pan text);
CREATE TABLE public.merchants (id int PRIMARY KEY, name text);
"""
REQUEST = PeerRequest(2, "node-b")
COPY = "pub.node-a.copy.node-b"


@dataclass
class Pair:
    """Two initialised nodes; the first one publishes both tables as `pub`."""

    a: Connection
    b: Connection

    def streams(self, conn: Connection) -> list[tuple[str, str, str]]:
        """(chain, direction, kind) of a node."""
        return conn.execute("SELECT chain, direction, kind FROM vsql_sync.streams ORDER BY 1, 2").fetchall()

    def untouched(self) -> bool:
        """Whether neither node knows of the other."""
        return all(
            self.streams(conn) == [] and len(nodes.everyone(conn)) == 1
            and conn.execute("SELECT count(*) FROM vsql_sync.signers").fetchall() == [(1,)]
            for conn in (self.a, self.b)
        )  # fmt: skip


def _open(conninfo: str) -> Connection:
    return connect(conninfo, application_name="test")


@pytest.fixture
def pair(new_database: NewDatabase) -> Iterator[Pair]:
    """The two nodes."""
    made = Pair(_open(new_database("a")), _open(new_database("b")))
    for conn, number, name, key in ((made.a, 1, "node-a", KEY_A), (made.b, 2, "node-b", KEY_B)):
        migrate.install(conn)
        nodes.register_local(conn, number, name, "c", key)
        roles.create(conn)
        conn.execute(TABLES)
    specs = (parse_spec("payments(id, amount)"), parse_spec("merchants"))
    publications.create(made.a, PublicationRequest("pub", specs))
    with made.a, made.b:
        yield made


def _add(pair: Pair, request: PeerRequest = REQUEST) -> peers.PeerPlan:
    plan = peers.look(pair.a, pair.b, request)
    peers.add(pair.a, pair.b, plan)
    return plan


def test_looking_shows_both_keys_and_changes_nothing(pair: Pair) -> None:
    plan = peers.look(pair.a, pair.b, REQUEST)
    assert plan.origin.key_fingerprint == fingerprint(KEY_A)
    assert plan.peer.key_fingerprint == fingerprint(KEY_B)
    assert [stream.chain for stream in plan.streams] == ["pub.node-a", COPY]
    assert pair.untouched()


def test_each_node_pins_the_others_key_and_gets_its_rows(pair: Pair) -> None:
    _add(pair)
    assert pair.streams(pair.a) == [("pub.node-a", "out", "live"), (COPY, "out", "copy")]
    assert pair.streams(pair.b) == [("pub.node-a", "in", "live"), (COPY, "in", "copy")]
    for conn in (pair.a, pair.b):
        pinned = conn.execute("SELECT node_name, public_key FROM vsql_sync.signers ORDER BY 1").fetchall()
        assert pinned == [("node-a", KEY_A), ("node-b", KEY_B)]
        known = [(node.number, node.name, node.public_key) for node in nodes.everyone(conn)]
        assert sorted(known) == [(1, "node-a", KEY_A), (2, "node-b", KEY_B)]


def test_both_sides_agree_on_names_and_partitions(pair: Pair) -> None:
    _add(pair)
    out = pair.a.execute(
        "SELECT target, slot_name, audit_partition, ack_partition, desired, state FROM vsql_sync.streams"
        " WHERE kind = 'live'"
    ).fetchall()
    assert out == [("*", names.slot_name("c", "pub", "node-a"), 0, 0, "stopped", "NEW")]
    into = pair.b.execute(
        "SELECT target, origin_name, audit_partition, ack_partition, desired, copy_wanted"
        " FROM vsql_sync.streams WHERE kind = 'live'"
    ).fetchall()
    assert into == [("node-b", names.origin_name("c", "pub", "node-a", "node-b"), 0, 0, "stopped", True)]
    targets = pair.a.execute("SELECT chain, target FROM vsql_sync.stream_targets ORDER BY 1").fetchall()
    assert targets == [("pub.node-a", "node-b"), (COPY, "node-b")]


def test_the_consumers_role_gets_its_tables(pair: Pair) -> None:
    _add(pair)
    for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE"):
        query = "SELECT has_table_privilege('vsql_sync_consumer', 'public.payments', %s)"
        assert pair.b.execute(query, (privilege,)).fetchall() == [(True,)]


def test_empty_tables_are_copied_too_because_rows_may_come_before_the_start(pair: Pair) -> None:
    plan = _add(pair)
    assert [stream.kind for stream in plan.streams] == ["live", "copy"]


def test_a_copy_that_is_declined_is_not_made_and_filled_tables_are_then_allowed(pair: Pair) -> None:
    pair.b.execute("INSERT INTO public.merchants VALUES (1, 'there')")
    with pytest.raises(RefusedError, match=r"public\.merchants: holds rows on the peer.*--no-copy"):
        peers.look(pair.a, pair.b, REQUEST)
    assert pair.untouched()
    _add(pair, replace(REQUEST, copy=False))
    assert pair.streams(pair.b) == [("pub.node-a", "in", "live")]
    assert pair.b.execute("SELECT copy_wanted FROM vsql_sync.streams").fetchall() == [(False,)]


def test_adding_twice_changes_nothing_even_when_the_copy_has_filled_the_tables(pair: Pair) -> None:
    _add(pair)
    before = (pair.streams(pair.a), pair.streams(pair.b))
    pair.a.execute("UPDATE vsql_sync.streams SET state = 'SYNCHRONIZED', desired = 'running'")
    pair.b.execute("INSERT INTO public.merchants VALUES (1, 'copied')")
    _add(pair)
    assert (pair.streams(pair.a), pair.streams(pair.b)) == before
    states = pair.a.execute("SELECT DISTINCT state, desired FROM vsql_sync.streams").fetchall()
    assert states == [("SYNCHRONIZED", "running")]


def test_a_failure_on_the_origin_leaves_the_peer_untouched(pair: Pair) -> None:
    plan = peers.look(pair.a, pair.b, REQUEST)
    pair.a.execute("ALTER TABLE vsql_sync.stream_targets ADD CHECK (target <> 'node-b')")
    with pytest.raises(DatabaseError, match="adding peer node-b"):
        peers.add(pair.a, pair.b, plan)
    assert pair.untouched()


def test_a_crash_between_the_two_commits_is_mended_by_the_same_command(pair: Pair) -> None:
    plan = peers.look(pair.a, pair.b, REQUEST)
    with pair.b.transaction():  # what the peer has committed when the origin never does
        nodes.register_peer(pair.b, replace(plan.origin, is_local=False))
        peers.write_incoming(pair.b, plan.streams)
    pair.b.execute("INSERT INTO public.merchants VALUES (1, 'x')")
    _add(pair)
    assert pair.streams(pair.a) == [("pub.node-a", "out", "live"), (COPY, "out", "copy")]
    assert pair.streams(pair.b) == [("pub.node-a", "in", "live"), (COPY, "in", "copy")]


@pytest.mark.parametrize(
    ("at", "statement", "expected"),
    [
        ("b", "DROP TABLE public.payments", "does not exist on the peer"),
        ("b", "ALTER TABLE public.payments DROP COLUMN amount", "lacks column amount"),
        ("b", "ALTER TABLE public.payments DROP CONSTRAINT payments_pkey", "no unique index on id"),
        (
            "b",
            "ALTER TABLE public.payments ADD COLUMN must int NOT NULL",
            "column must of the peer is NOT NULL",
        ),
        (
            "b",
            "ALTER TABLE public.merchants DROP name, ADD name text GENERATED ALWAYS AS ('x') STORED",
            "is generated on the peer",
        ),
        ("b", "DROP TABLE public.merchants; CREATE VIEW public.merchants AS SELECT 1 AS id", "is no table"),
        ("a", "ALTER TABLE public.payments REPLICA IDENTITY NOTHING", "lost its replica identity"),
        ("a", "DROP TABLE public.merchants", "does not exist any more"),
    ],
)
def test_tables_that_do_not_fit_are_refused_before_anything_is_written(
    pair: Pair, at: str, statement: str, expected: str
) -> None:
    (pair.a if at == "a" else pair.b).execute(statement.encode())
    with pytest.raises(RefusedError, match=expected):
        peers.look(pair.a, pair.b, REQUEST)
    assert pair.untouched()


def test_a_target_may_have_more_columns_and_keep_excluded_ones(pair: Pair) -> None:
    pair.b.execute(
        "ALTER TABLE public.payments ADD COLUMN note text, ADD COLUMN at timestamptz NOT NULL DEFAULT now()"
    )
    pair.b.execute("ALTER TABLE public.payments DROP COLUMN pan")
    assert _add(pair).streams


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (replace(REQUEST, number=3), "is node node-b with number 2, not node-b with number 3"),
        (replace(REQUEST, name="node-c"), "not node-c with number 2"),
        (replace(REQUEST, publications=("nope",)), "there is no publication nope"),
    ],
)
def test_a_peer_other_than_the_one_named_is_refused(pair: Pair, request_: PeerRequest, expected: str) -> None:
    with pytest.raises(RefusedError, match=expected):
        peers.look(pair.a, pair.b, request_)


def test_tables_that_both_write_are_refused_where_they_could_part(pair: Pair) -> None:
    with pytest.raises(RefusedError) as refused:
        peers.look(pair.a, pair.b, replace(REQUEST, mode="bidirectional"))
    assert "public.payments on node-a: leaves out pan" in str(refused.value)
    assert "ALTER TABLE public.merchants REPLICA IDENTITY FULL" in str(refused.value)
    assert pair.untouched()


def test_the_own_database_and_a_foreign_cluster_are_no_peers(pair: Pair, new_database: NewDatabase) -> None:
    with pytest.raises(RefusedError, match="this node is node-a with 1"):
        peers.look(pair.a, pair.a, PeerRequest(1, "node-a"))
    with _open(new_database("other")) as other:
        with pytest.raises(RefusedError, match="is not a node"):
            peers.look(pair.a, other, REQUEST)
        migrate.install(other)
        nodes.register_local(other, 2, "node-b", "elsewhere", KEY_B)
        with pytest.raises(RefusedError, match="is of cluster elsewhere"):
            peers.look(pair.a, other, REQUEST)


def test_a_node_without_a_key_is_accepted_only_where_unsigned_is_allowed(
    pair: Pair, new_database: NewDatabase
) -> None:
    with _open(new_database("nokey")) as other:
        migrate.install(other)
        nodes.register_local(other, 3, "node-c", "c", None)
        other.execute(TABLES)
        request = PeerRequest(3, "node-c")
        with pytest.raises(RefusedError, match="node node-c has no signing key"):
            peers.look(pair.a, other, request)
        peers.add(pair.a, other, peers.look(pair.a, other, replace(request, allow_unsigned=True)))
        assert other.execute("SELECT node_name FROM vsql_sync.signers").fetchall() == [("node-a",)]


def test_a_key_that_changed_after_it_was_pinned_is_refused(pair: Pair) -> None:
    _add(pair)
    forged = bytes(range(2, 34))
    pair.b.execute(
        "UPDATE vsql_sync.nodes SET public_key = %s, key_fingerprint = %s WHERE is_local",
        (forged, fingerprint(forged)),
    )
    with pytest.raises(RefusedError, match="pinned is"):
        peers.look(pair.a, pair.b, REQUEST)


def test_a_revoked_key_and_a_key_of_another_node_are_refused(pair: Pair) -> None:
    pair.a.execute(
        "INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key, revoked_at)"
        " VALUES (%s, 'node-b', %s, now())",
        (fingerprint(KEY_B), KEY_B),
    )
    with pytest.raises(RefusedError, match="was retired or revoked"):
        peers.look(pair.a, pair.b, REQUEST)
    pair.a.execute(
        "UPDATE vsql_sync.signers SET revoked_at = NULL, node_name = 'node-z' WHERE node_name = 'node-b'"
    )
    with pytest.raises(RefusedError, match="pinned for node node-z"):
        peers.look(pair.a, pair.b, REQUEST)


def test_a_fingerprint_that_is_not_the_keys_own_is_refused(pair: Pair) -> None:
    pair.b.execute("UPDATE vsql_sync.nodes SET key_fingerprint = 'SHA256:mine'")
    with pytest.raises(RefusedError, match="does not have the fingerprint beside it"):
        peers.look(pair.a, pair.b, REQUEST)


def test_a_number_or_name_that_is_taken_is_refused(pair: Pair, new_database: NewDatabase) -> None:
    _add(pair)
    with _open(new_database("twin")) as twin:
        migrate.install(twin)
        nodes.register_local(twin, 2, "node-c", "c", bytes(32))
        twin.execute(TABLES)
        with pytest.raises(RefusedError, match="has number 2 here; node-c claims number 2"):
            peers.look(pair.a, twin, PeerRequest(2, "node-c"))


def test_a_table_reaches_a_target_by_one_publication_only(pair: Pair) -> None:
    _add(pair)
    publications.create(pair.a, PublicationRequest("more", (parse_spec("merchants"),)))
    with pytest.raises(RefusedError, match=r"public\.merchants: is in publications pub and more"):
        peers.look(pair.a, pair.b, replace(REQUEST, publications=("more",)))


def test_a_node_without_publications_only_exchanges_keys(pair: Pair) -> None:
    publications.drop(pair.a, "pub")
    plan = _add(pair)
    assert plan.streams == ()
    assert "only the keys" in plan.notes[0]
    assert len(nodes.everyone(pair.b)) == 2


def test_a_second_target_shares_the_live_stream_and_has_its_own_copy(
    pair: Pair, new_database: NewDatabase
) -> None:
    _add(pair)
    with _open(new_database("third")) as third:
        migrate.install(third)
        nodes.register_local(third, 3, "node-c", "c", bytes(range(3, 35)))
        third.execute(TABLES)
        peers.add(pair.a, third, peers.look(pair.a, third, PeerRequest(3, "node-c")))
    assert [row[0] for row in pair.streams(pair.a)] == ["pub.node-a", COPY, "pub.node-a.copy.node-c"]
    targets = pair.a.execute(
        "SELECT target FROM vsql_sync.stream_targets WHERE chain = 'pub.node-a' ORDER BY 1"
    )
    assert targets.fetchall() == [("node-b",), ("node-c",)]


def test_halves_written_without_sight_of_each_other_equal_what_one_command_writes(pair: Pair) -> None:
    here, there = nodes.local(pair.a), nodes.local(pair.b)
    peers.add_target(pair.a, replace(there, is_local=False), REQUEST)
    tables = [TableName("public", "payments"), TableName("public", "merchants")]
    request = PeerRequest(1, "node-a", publications=("pub",))
    peers.add_origin(pair.b, replace(here, is_local=False), request, tables)
    columns = "chain, direction, kind, publication, target, slot_name, origin_name, copy_wanted"
    query = f"SELECT {columns} FROM vsql_sync.streams ORDER BY 1".encode()
    apart = [conn.execute(query).fetchall() for conn in (pair.a, pair.b)]
    for conn in (pair.a, pair.b):
        conn.execute("DELETE FROM vsql_sync.streams; DELETE FROM vsql_sync.stream_targets")
    _add(pair)
    assert [conn.execute(query).fetchall() for conn in (pair.a, pair.b)] == apart


def test_an_origin_added_by_its_key_finds_filled_or_missing_tables(pair: Pair) -> None:
    origin = replace(nodes.local(pair.a), is_local=False)
    request = PeerRequest(1, "node-a", publications=("pub",))
    with pytest.raises(RefusedError, match="there is no table"):
        peers.add_origin(pair.b, origin, request, [TableName("public", "gone")])
    pair.b.execute("INSERT INTO public.merchants VALUES (1, 'x')")
    with pytest.raises(RefusedError, match="holds rows"):
        peers.add_origin(pair.b, origin, request, [TableName("public", "merchants")])
    with pytest.raises(RefusedError, match="is this node"):
        peers.add_target(pair.a, origin, PeerRequest(1, "node-a"))
    assert pair.untouched()


def test_keys_that_ended_are_pinned_as_ended(pair: Pair) -> None:
    """With their time, or up to what was seen; never beyond now."""
    keys = [bytes([number] * 32) for number in (1, 2, 3)]
    prints = [fingerprint(key) for key in keys]
    ends = (
        ("2020-01-01Z", None, "{}"),
        (None, "2021-01-01Z", '{"pub.node-a": 7}'),
        ("2999-01-01Z", None, "{}"),
    )
    for key, print_, end in zip(keys, prints, ends, strict=True):
        pair.a.execute(
            "INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key, retired_at, revoked_at,"
            " trusted_to) VALUES (%s, 'node-a', %s, %s, %s, %s)",
            (print_, key, *end),
        )
    plan = peers.look(pair.a, pair.b, REQUEST)
    assert {key.fingerprint for key in plan.former} == set(prints)
    peers.add(pair.a, pair.b, plan)
    found = pair.b.execute(
        "SELECT fingerprint, retired_at = '2020-01-01Z', retired_at <= now(), revoked_at IS NOT NULL,"
        " trusted_to FROM vsql_sync.signers WHERE fingerprint = ANY (%s) ORDER BY retired_at",
        (prints,),
    ).fetchall()
    assert found == [
        (prints[0], True, True, False, {}),
        (prints[2], False, True, False, {}),
        (prints[1], None, None, True, {"pub.node-a": 7}),
    ]
    assert peers.look(pair.a, pair.b, REQUEST).former == ()


def test_a_key_that_has_ended_is_not_given_to_a_new_peer_as_the_present_one(pair: Pair) -> None:
    pair.a.execute("UPDATE vsql_sync.signers SET revoked_at = now() WHERE node_name = 'node-a'")
    with pytest.raises(RefusedError, match="was retired or revoked there"):
        peers.look(pair.a, pair.b, REQUEST)
    pair.a.execute("UPDATE vsql_sync.signers SET revoked_at = NULL, fingerprint = 'SHA256:x' || fingerprint")
    pair.a.execute(
        "INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key, retired_at)"
        " VALUES ('SHA256:altered', 'node-a', decode(repeat('01', 32), 'hex'), now())"
    )
    plan = peers.look(pair.a, pair.b, REQUEST)
    with pytest.raises(RefusedError, match="does not have the fingerprint beside it"):
        peers.add(pair.a, pair.b, plan)
    assert pair.streams(pair.b) == []
