"""Scope as a boundary on the wire: whatever is done at the source, what is left out is in no record.

Every record of the data topics is opened, those without a manifest too.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.services.conftest import NewSource
from tests.services.producer_node import CHAIN, NODE, PUBLICATION, SourceNode, _keys
from tests.streams import read_topics
from tests.syncctl import syncctl
from vsql_shared import lsn
from vsql_shared.crypto.seal import open_tuples
from vsql_shared.crypto.signing import PinnedKey, TrustStore, fingerprint
from vsql_shared.names import data_topic
from vsql_shared.wire.pack import decode_header, decode_tuples, header_digest

pytestmark = pytest.mark.timeout(180)

TABLE = """
CREATE TABLE cards (id int PRIMARY KEY, holder text, note text, pan text);
INSERT INTO cards VALUES (0, 'before', 'n', 'MARKER');
"""
MARKER = "MARKER"
CONFIG = "[limits]\nretry_backoff_max_ms = 500\nstatus_interval_ms = 300\n"


def _source(new_source: NewSource, *, excludes: bool = True, version: int = 18) -> SourceNode:
    marks = [("cards", "pan")] if excludes else []
    return new_source(
        TABLE, ["cards"], config=CONFIG, pci_columns=marks, exclude_pci=excludes, version=version
    )


def _begun(node: SourceNode) -> None:
    """Have the stream's slot made: what is written from here on is a backlog."""
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.stop(worker)


def _says(node: SourceNode, *words: str) -> None:
    """Wait until the stream's status says all of these."""

    def said() -> bool:
        text = str(node.state()[1].get("last_error", ""))
        return all(word in text for word in words)

    node.wait(said, what=f"the stream does not say {words}: {node.state()}")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return syncctl(*words, timeout=60)


def _ctl(node: SourceNode, *words: str) -> str:
    done = _run("--config", str(node.config), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _sent(node: SourceNode, chain: str = CHAIN) -> bytes:
    """The plaintext of every record of the table's topic, whoever may read it."""
    records = read_topics(node.kafka, node.cluster)
    trust = TrustStore([PinnedKey(NODE, node.public_key, fingerprint(node.public_key), revoked=False)])
    keys = _keys(node, records, chain, trust)
    topic = data_topic(node.cluster, chain, "public", "cards")
    out = []
    for record in records:
        if record.topic == topic and record.value is not None:
            header, body = decode_header(record.value)
            tuples = decode_tuples(record.value, body, header_digest(record.value[:body]))
            out += open_tuples(keys[header.dek_id], tuples)
    return b"\n".join(out)


def _columns(node: SourceNode) -> set[tuple[str, ...]]:
    return {tuple(c.name for c in change.relation.columns) for change in node.read().changes}


@pytest.mark.parametrize("version", [15, 18], ids=["pg15", "pg18"])
def test_a_scope_narrowed_with_a_backlog_pending_holds_for_the_backlog(
    new_source: NewSource, version: int
) -> None:
    """PostgreSQL decodes the backlog under the old list: the column is taken out of its rows."""
    node = _source(new_source, excludes=False, version=version)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO cards VALUES (1, 'a', 'n', 'sent before')")
    node.wait_confirmed()
    node.stop(worker)
    node.execute(f"INSERT INTO cards VALUES (2, 'b', NULL, '{MARKER}'), (3, NULL, 'n3', NULL)")
    node.execute(f"UPDATE cards SET pan = '{MARKER}', id = 20 WHERE id = 2; DELETE FROM cards WHERE id = 3")
    _ctl(node, "publication", "remove-column", PUBLICATION, "cards.pan", "--yes")
    node.execute(f"INSERT INTO cards VALUES (4, 'c', 'n4', '{MARKER}')")
    worker = node.start()
    node.wait_confirmed()
    node.stop(worker)
    assert MARKER.encode() not in _sent(node)
    rows = node.read().rows("cards")
    width = [len(values) for _, values in rows]
    assert ([op for op, _ in rows], width) == (["I", "I", "I", "U", "D", "I"], [4, 3, 3, 3, 3, 3])
    assert _columns(node) == {("id", "holder", "note", "pan"), ("id", "holder", "note")}
    (report,) = _report(node)["tables"]
    assert [one["columns"] for one in report["observed"]] == [
        ["id", "holder", "note", "pan"], ["id", "holder", "note"],
    ]  # fmt: skip
    assert report["observed_pci_columns"] == ["pan"]
    assert report["subscriber_can_contain_pci"] is True


def test_a_scope_narrowed_under_a_running_stream_holds_from_its_next_epoch(new_source: NewSource) -> None:
    node = _source(new_source, excludes=False)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    epoch = node.state()[1]["epoch"]
    done = _run(
        "--config", str(node.config), "publication", "remove-column", PUBLICATION, "cards.pan", "--yes"
    )
    assert f"no more, from its epoch {epoch + 1} on" in done.stderr
    node.execute(f"INSERT INTO cards VALUES (4, 'c', 'n4', '{MARKER}')")
    node.wait_confirmed()
    node.stop(worker)
    assert MARKER.encode() not in _sent(node)
    scopes = _report(node)["streams"][0]["scopes"]
    assert [one["epoch"] for one in scopes] == [epoch, epoch + 1]
    assert len({one["sha256"] for one in scopes}) == 2


def test_a_row_right_behind_a_decision_does_not_stop_the_stream_that_has_not_looked_yet(
    new_source: NewSource,
) -> None:
    """A running stream looks every 5 s; the rows of a column that was let in come at once."""
    node = _source(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("ALTER TABLE cards ADD town text")
    _ctl(node, "publication", "add-column", PUBLICATION, "cards.town", "--yes")
    node.execute("INSERT INTO cards (id, town) VALUES (5, 'let in')")
    node.wait_confirmed()
    node.stop(worker)
    assert b"let in" in _sent(node)
    assert "which the publication leaves out" not in node.log()
    assert "may carry was changed" in node.log()


def test_a_column_that_is_marked_while_it_travels_stops_the_stream_with_the_way_on(
    new_source: NewSource,
) -> None:
    node = _source(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    _ctl(node, "publication", "pci", "mark", "cards.note", "--yes")
    node.execute(f"INSERT INTO cards VALUES (6, 'h', '{MARKER}', NULL)")
    _says(node, "column note was marked as PCI data, which the publication excludes", "remove-column")
    _ctl(node, "publication", "remove-column", PUBLICATION, "cards.note", "--yes")
    node.wait_confirmed()
    node.stop(worker)
    assert MARKER.encode() not in _sent(node)
    assert [values for _, values in node.read().rows("cards")] == [(b"\0\0\0\6", b"h")]


def _copied(node: SourceNode, chain: str) -> bool:
    query = "SELECT FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_finished'"
    return bool(node.query(query, chain))


def test_a_scope_narrowed_during_a_first_copy_holds_for_the_tables_it_has_not_read(
    new_source: NewSource,
) -> None:
    """The copy's snapshot, and its list of columns, may be hours old when a table's turn comes."""
    node = _source(new_source, excludes=False)
    chain = node.add_copy()
    desired = "UPDATE vsql_sync.streams SET desired = '{}' WHERE kind = 'copy'"
    node.execute(desired.format("paused"))
    live, copy = node.start(), node.start(chain, log="copy")
    started = "SELECT FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND event_type = 'copy_started'"
    node.wait(lambda: bool(node.query(started, chain)), what=node.log("copy"))
    _ctl(node, "publication", "remove-column", PUBLICATION, "cards.pan", "--yes")
    node.execute(desired.format("running"))
    node.wait(lambda: _copied(node, chain), what=node.log("copy"))
    node.stop(copy)
    node.stop(live)
    sent = _sent(node, chain)
    assert b"before" in sent
    assert MARKER.encode() not in sent
    (table,) = _report(node)["tables"]
    assert [(one["stream"], one["columns"]) for one in table["observed"]] == [
        (chain, ["id", "holder", "note"])
    ]


def test_authentication_data_known_by_its_type_stops_a_first_copy_that_reads_it_as_text(
    new_source: NewSource,
) -> None:
    node = _source(new_source, excludes=False)
    node.execute("CREATE DOMAIN cvv AS text; ALTER TABLE cards ADD v cvv[], DROP pan")
    node.execute(f"INSERT INTO cards VALUES (1, 'a', 'n', '{{{MARKER}}}')")
    chain = node.add_copy()
    live, copy = node.start(), node.start(chain, log="copy")
    node.wait(lambda: "column v would leave" in node.log("copy") or _copied(node, chain))
    _ctl(node, "publication", "remove-column", PUBLICATION, "cards.v", "--yes")
    node.wait(lambda: _copied(node, chain), what=node.log("copy"))
    node.stop(copy)
    node.stop(live)
    assert MARKER.encode() not in _sent(node, chain)


def test_what_a_stream_carried_as_pci_data_is_reported_when_its_mark_went_with_it(
    new_source: NewSource,
) -> None:
    node = _source(new_source, excludes=False)
    _ctl(node, "publication", "pci", "mark", "cards.note", "--yes")
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("ALTER TABLE cards RENAME note TO info; ALTER TABLE cards DROP pan")
    node.execute("INSERT INTO cards VALUES (1, 'a', 'n')")
    node.wait_confirmed()
    node.stop(worker)
    for act in ("ALTER TABLE cards DROP info", "DROP TABLE cards"):
        node.execute(act)
        report = _report(node)
        (table,) = report["tables"]
        assert table["observed_pci_columns"] == ["info"], act
        assert table["subscriber_can_contain_pci"] is True
        assert report["conclusion"].startswith("Columns known as PCI data are published, or were seen")


def test_a_new_column_stays_out_and_one_with_authentication_data_stops_any_stream(
    new_source: NewSource,
) -> None:
    node = _source(new_source, excludes=False)
    _begun(node)
    node.execute(f"ALTER TABLE cards ADD cvv text DEFAULT '{MARKER}'")
    node.execute(f"INSERT INTO cards VALUES (1, 'a', 'n', NULL, '{MARKER}')")
    worker = node.start()
    _says(node, "column cvv would leave", "sensitive authentication data never does", "remove-column")
    _ctl(node, "publication", "remove-column", PUBLICATION, "cards.cvv", "--yes")
    node.wait_confirmed()
    node.stop(worker)
    assert MARKER.encode() not in _sent(node)
    assert _columns(node) == {("id", "holder", "note", "pan")}


def test_a_publication_widened_by_hand_stops_the_stream_until_the_column_is_taken_out(
    new_source: NewSource,
) -> None:
    node = _source(new_source)
    _begun(node)
    node.execute(f"ALTER PUBLICATION {PUBLICATION} SET TABLE cards")
    node.execute(f"INSERT INTO cards VALUES (1, 'a', 'n', '{MARKER}')")
    worker = node.start()
    _says(node, "has all columns")
    node.execute(f"ALTER PUBLICATION {PUBLICATION} SET TABLE cards (id, holder, note)")
    _says(node, "sends column pan", "which the publication leaves out", "remove-column")
    assert _sent(node) == b""
    _ctl(node, "publication", "remove-column", PUBLICATION, "cards.pan", "--yes")
    node.wait_confirmed()
    node.stop(worker)
    assert [values for _, values in node.read().rows("cards")] == [(b"\0\0\0\1", b"a", b"n")]
    assert MARKER.encode() not in _sent(node)


def test_an_identity_changed_to_full_stops_the_stream_until_it_is_set_back(new_source: NewSource) -> None:
    node = _source(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute(
        f"ALTER TABLE cards REPLICA IDENTITY FULL;INSERT INTO cards VALUES (1, 'a', 'n', '{MARKER}')"
    )
    _says(node, "REPLICA IDENTITY FULL", "public.cards", "set it back")
    node.execute("ALTER TABLE cards REPLICA IDENTITY DEFAULT")
    node.execute(f"UPDATE cards SET note = 'm', pan = '{MARKER}2' WHERE id = 1")
    node.wait_confirmed()
    node.stop(worker)
    assert len(node.read().rows("cards")) == 2
    assert MARKER.encode() not in _sent(node)


def _report(node: SourceNode) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_ctl(node, "publication", "scope-report", PUBLICATION))
    return found


def test_a_report_says_what_was_seen_and_verifies_without_a_database(
    new_source: NewSource, tmp_path: Path
) -> None:
    node = _source(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute(f"INSERT INTO cards VALUES (1, 'a', 'n', '{MARKER}')")
    node.wait_confirmed()
    node.stop(worker)
    file = tmp_path / "scope.json"
    _ctl(node, "publication", "scope-report", PUBLICATION, "--out", str(file))
    report = json.loads(file.read_text())
    (table,) = report["tables"]
    assert (table["table"], table["total_columns"], table["replicated_columns"]) == ("public.cards", 4, 3)
    assert table["excluded_pci_columns"] == ["pan"]
    assert table["subscriber_can_contain_pci"] is False
    (seen,) = table["observed"]
    (manifest,) = node.read().manifests
    assert seen["columns"] == ["id", "holder", "note"]
    assert lsn.parse(seen["lsn_to"]) == manifest.batch_lsn_end
    assert report["streams"][0]["rows"] == 1
    assert report["conclusion"].startswith("No column known as PCI data is published, and none was seen")
    key = str(node.folder / "vsql-sync-signing.pub")
    done = _run("publication", "scope-report", "--verify", str(file), "--key", key)
    assert done.returncode == 0, done.stderr
    assert "verifies" in done.stdout
    file.write_text(file.read_text().replace('"pan"', '"pin"', 1))
    done = _run("publication", "scope-report", "--verify", str(file), "--key", key)
    assert done.returncode == 9
    assert "it was altered" in done.stderr


@pytest.mark.parametrize("table", ["scopes", "scope_seen"])
@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_what_was_written_down_and_is_changed_or_deleted_is_found(
    new_source: NewSource, table: str, how: str
) -> None:
    node = _source(new_source)
    worker = node.start()
    node.wait(lambda: node.state()[0] == "running")
    node.execute("INSERT INTO cards VALUES (1, 'a', 'n', 'p')")
    node.wait_confirmed()
    node.stop(worker)
    column = "scope" if table == "scopes" else "seen"
    node.execute(f"UPDATE vsql_sync.{table} SET {column} = '{{}}'; DELETE FROM vsql_sync.{table}")
    _report(node)  # the rules of append-only tables turn that into nothing
    act = f"UPDATE vsql_sync.{table} SET {column} = replace({column}, 'holder', 'pan')"
    act = act if how == "changed" else f"DELETE FROM vsql_sync.{table}"
    node.execute(
        f"ALTER TABLE vsql_sync.{table} DISABLE RULE no_update;"
        f"ALTER TABLE vsql_sync.{table} DISABLE RULE no_delete; {act}"
    )
    done = _run("--config", str(node.config), "publication", "scope-report", PUBLICATION)
    assert done.returncode == 9
    assert f"vsql_sync.{table} does not have that text" in done.stderr
