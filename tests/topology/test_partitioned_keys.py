"""Several members apply a stream whose columns are left out, whose keys are replaced, and destroyed.

Each has tests of its own (test_partitioned.py, test_scope_stream.py, test_key_life.py); here they meet.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.nodes import TwoNodes
from tests.pairs import Pairs
from tests.topology.test_key_life import QUICK, hsm, new_kek, ordered, sealed, until
from tests.topology.test_partitioned import (
    MEMBERS,
    PARTITIONED,
    decode,
    marked,
    members,
    owners,
    require_order,
)
from vsql_shared.audit.rows import parse
from vsql_shared.kms.file import destroy_version

pytestmark = pytest.mark.topology

CARDS = "CREATE TABLE t (id int PRIMARY KEY, pan text, version int NOT NULL, note text, v text)"
WRITE = (
    "INSERT INTO t VALUES (%s, '4111111111111111', 1, 'a note', 'x')"
    " ON CONFLICT (id) DO UPDATE SET version = t.version + 1"
)


def make(pairs: Pairs, tables: str) -> TwoNodes:
    """Both nodes, made; their services share partitions among members."""
    pair = pairs(tables, config=QUICK)
    for node in (pair.a, pair.b):
        node.env = dict(MEMBERS)
    return pair


@contextmanager
def load(pair: TwoNodes) -> Iterator[None]:
    """Somebody raises rows' versions all the time, a few rows in each transaction."""
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(pair.a.conninfo) as conn:
            number = 0
            while not stop.is_set():
                for _ in range(4):
                    number += 7
                    conn.execute(WRITE, (number % 200,))
                conn.commit()
                stop.wait(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


def acknowledged(pair: TwoNodes) -> list[tuple[dict[str, int], dict[str, Any]]]:
    """(verdicts, detail) of each batch B acknowledged, in order."""
    documents = pair.b.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE event_type = 'batch_applied' ORDER BY sequence"
    )
    entries = [parse(bytes(one)).entry for (one,) in documents]
    return [(dict(entry.verdicts), json.loads(entry.detail)) for entry in entries]


def verify(pair: TwoNodes) -> None:
    for node, peer in ((pair.a, pair.b), (pair.b, pair.a)):
        shown = node.ctl("audit", "verify", "--kafka", "--peer-connection", peer.conninfo).stdout
        assert "ok: every entry is signed, linked and unaltered" in shown


@pytest.mark.timeout(400)
def test_columns_stay_out_and_rows_in_order_while_keks_are_rotated_and_members_killed(pairs: Pairs) -> None:
    pair = make(pairs, CARDS)
    out = ("--pci-column", "t.pan", "--exclude-pci")
    pair.create(["t(*)"], copy=False, publication_args=(*PARTITIONED, *out))
    pair.b.query("SELECT pg_create_logical_replication_slot('seen_' || current_database(), 'test_decoding')")
    pair.start()
    pair.wait_in_step()
    newest = ""
    with load(pair):
        until(lambda: set(owners(pair).values()) == {0, 1}, lambda: pair.b.tail("consumer"))
        newest = new_kek(pair)
        os.kill(members(pair.b)[0], signal.SIGKILL)
        pair.a.ctl("key", "rotate-dek")
        pair.b.stop("consumer")
        newest = new_kek(pair)
        # What B has not read yet holds the column, and is sent without it.
        pair.a.ctl("publication", "remove-column", "pub", "t.note", "--yes")
        time.sleep(0.5)
        newest = new_kek(pair)
        pair.b.start("consumer")
        time.sleep(1)
    for version in range(1, int(newest.rpartition("/")[2])):
        destroy_version(pair.folder / "kek.key", f"test-kek/{version}")
    pair.wait_in_step(120)
    rows = "SELECT id, version, v FROM t ORDER BY id"
    assert pair.b.query(rows) == pair.a.query(rows)
    assert pair.b.query("SELECT count(*) FROM t WHERE pan IS NOT NULL") == [(0,)]
    assert pair.a.query("SELECT count(*) FROM t WHERE pan IS NULL OR note IS NULL") == [(0,)]
    until(lambda: pair.acknowledged_rows() == pair.audited_rows(), lambda: pair.b.tail("consumer"))
    assert require_order(decode(pair.b)) > 100
    by_row, batches = marked(pair)
    assert by_row > batches / 2
    assert pair.a.query(
        "SELECT count(DISTINCT kek_id) FROM vsql_sync.vsql_sync_audit WHERE event_type = 'replication_batch'"
    )[0][0] >= 3  # fmt: skip
    assert pair.b.query("SELECT count(*) FROM vsql_sync.anomalies") == [(0,)]
    assert pair.b.query("SELECT count(*) FROM vsql_sync.part_receipts") == [(0,)]
    report = json.loads(pair.a.ctl("publication", "scope-report", "pub").stdout)
    (table,) = report["tables"]
    seen = {tuple(one["columns"]) for one in table["observed"]}
    assert seen == {("id", "version", "note", "v"), ("id", "version", "v")}
    assert table["observed_pci_columns"] == []
    assert table["unobserved_batches"] == 0
    verify(pair)
    pair.stop()


@pytest.mark.timeout(300)
def test_members_wait_for_a_key_that_is_gone_and_pass_over_what_the_origin_says_was_destroyed(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOFTHSM2_CONF", raising=False)  # given back after the test
    pair = make(pairs, "CREATE TABLE t (id bigint PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY)")
    hsm(pair)
    pair.create(["t(*)", "u(*)"], copy=False, publication_args=PARTITIONED)
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
    people = ordered(pair)
    pair.a.stop("producer")  # nobody is there to say so
    pair.a.ctl("key", "approve", "1", "--operator", "bob", "--key", str(people["bob"]), "--yes")
    done = pair.a.ctl("key", "destroy", "1", "--yes", "--timeout", "0.5", check=False)
    assert done.returncode == 7
    pair.b.start("consumer")
    error = "SELECT detail->>'last_error' FROM vsql_sync.stream_status WHERE state = 'waiting' AND chain = %s"
    until(
        lambda: any("does not hold KEK payments/0001" in row[0] for row in pair.b.query(error, pair.chain)),
        lambda: pair.b.tail("consumer"),
    )
    assert pair.b.query("SELECT count(*) FROM t") == [(10,)]
    assert pair.b.query("SELECT count(*) FROM vsql_sync.table_sync WHERE state = 'DIVERGED'") == [(0,)]

    pair.a.start("producer")
    pair.wait_in_step()
    assert pair.b.query("SELECT v, count(*) FROM t GROUP BY 1 ORDER BY 1") == [("applied", 10), ("kept", 20)]
    assert pair.b.query("SELECT count(*) FROM u") == [(5,)]
    marks = "SELECT table_name, reason FROM vsql_sync.table_sync WHERE state = 'DIVERGED'"
    ((table, reason),) = pair.b.query(marks)
    assert (table, "destroyed with payments/0001" in reason) == ("t", True)
    until(lambda: pair.acknowledged_rows() == pair.audited_rows(), lambda: pair.b.tail("consumer"))
    said = acknowledged(pair)
    (shredded,) = [one for one in said if "shredded" in one[0]]
    assert shredded[0] == {"shredded": 40}
    assert shredded[1]["shredded"]["kek_id"] == "payments/0001"
    assert sum(verdicts.get("applied", 0) for verdicts, _ in said) == 35
    assert pair.b.query("SELECT count(*) FROM vsql_sync.part_receipts") == [(0,)]
    pair.a.execute("INSERT INTO t SELECT g, 'after' FROM generate_series(900, 940) g")
    pair.wait_in_step()
    assert pair.b.query("SELECT count(*) FROM t WHERE v = 'after'") == [(41,)]
    verify(pair)
    pair.stop()
