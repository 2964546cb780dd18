"""A real target cosigns its source's chain as it goes, after a restart too: the source's own heads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.waiting import until
from vsql_shared.audit.chain import ChainWriter, new_incarnation
from vsql_shared.audit.checkpoint import Checkpoint, Log, open_checkpoint
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED, canonical_json
from vsql_shared.audit.heads import own_head, remembered_checkpoint
from vsql_shared.audit.rows import parse
from vsql_shared.audit.store import insert_entries, load_head
from vsql_shared.crypto.signing import load_public_key, load_signer
from vsql_shared.names import ack_chain
from vsql_shared.pg.connect import connect

_until = partial(until, timeout=60)


@pytest.fixture
def pair(stack: Stack, tmp_path: Path) -> Iterator[TwoNodes]:
    """A running stream whose target cosigns each second."""
    made = TwoNodes(stack, tmp_path, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    made.b.env["VSQL_SYNC__AUDIT__CHECKPOINT_EVERY"] = "1s"
    try:
        made.create(["t(*)"], copy=False)
        made.start()
        yield made
        made.stop()
    finally:
        made.end()


def public(node: Node) -> Path:
    return node.keys / "vsql-sync-signing.pub"


def cosigned(pair: TwoNodes) -> list[Checkpoint]:
    """The notes in B's chain, each verified by B's public key alone."""
    key = load_public_key(public(pair.b))
    rows = pair.b.query(
        "SELECT document FROM vsql_sync.vsql_sync_audit WHERE event_type = 'checkpoint_cosigned'"
        " ORDER BY sequence"
    )
    notes = [json.loads(parse(bytes(document)).entry.detail)["note"] for (document,) in rows]
    return [open_checkpoint(note, [("node-b", key)]).checkpoint for note in notes]


def write_and_wait(pair: TwoNodes, number: int) -> None:
    """A row at A; B has applied it, and cosigned a head that covers it."""
    pair.a.execute(f"INSERT INTO t VALUES ({number}, 'x')")
    pair.wait_in_step()
    head = pair.heads()[0]
    _until(lambda: any(one.size >= head for one in cosigned(pair)))


def test_a_target_cosigns_what_it_has_applied_and_both_sides_agree(pair: TwoNodes) -> None:
    for number in range(3):
        write_and_wait(pair, number)
    pair.b.stop("consumer")
    pair.b.start("consumer")
    write_and_wait(pair, 9)
    notes = cosigned(pair)
    log = Log(pair.cluster, pair.chain)
    assert len(notes) >= 4
    assert [one.size for one in notes] == sorted({one.size for one in notes})
    with connect(pair.a.conninfo, application_name="test") as source:
        for note in notes:
            assert note == own_head(source, log, note.size)
        with connect(pair.b.conninfo, application_name="test") as target:
            mine = remembered_checkpoint(target, log)
        assert mine == own_head(source, log, mine.size)
    report = pair.b.ctl_json("audit", "verify", "--peer-connection", pair.a.conninfo)
    assert (report["ok"], report["problems"]) == (True, [])
    quiet = len(cosigned(pair))
    write_and_wait(pair, 10)
    assert len(cosigned(pair)) > quiet

    alone, both = pair.folder / "b.checkpoint", pair.folder / "both.checkpoint"
    pair.b.ctl("audit", "checkpoint", "--chain", pair.chain, "--output", str(alone))
    pair.a.ctl("audit", "checkpoint", "--add", str(alone), "--output", str(both))
    keys = ("--key", str(public(pair.a)), "--cosigner", f"node-b={public(pair.b)}")
    found = pair.a.ctl_json("audit", "verify-proof", str(both), *keys)
    assert (found["chain"], [one["node"] for one in found["cosigned"]]) == (pair.chain, ["node-b"])


def cosign_another_history(pair: TwoNodes, size: int) -> None:
    """B's chain says that B has cosigned a head of this size, as if its database had been set back since."""
    signer = load_signer(public(pair.b).with_suffix(".key"), "node-b")
    chain = ack_chain(pair.chain, "node-b")
    note = Checkpoint(Log(pair.cluster, pair.chain), size, bytes(32)).sign(signer, 9).encode()
    with connect(pair.b.conninfo, application_name="test") as conn:
        writer = ChainWriter(signer, pair.cluster, chain, load_head(conn, chain), new_incarnation())
        opened = writer.open_epoch(lsn=1, system_identifier="1", timeline=1, source_node_id="node-a")
        writer.commit(opened.entry_hash)
        detail = canonical_json({"note": note})
        said = writer.next(event_type=CHECKPOINT_COSIGNED, batch_lsn_start=1, batch_lsn_end=1, detail=detail)
        insert_entries(conn, [(one.encoded, None) for one in (opened, said)])


def test_a_target_that_was_set_back_does_not_cosign_another_history(pair: TwoNodes) -> None:
    write_and_wait(pair, 0)
    pair.b.stop("consumer")
    size = pair.heads()[0] + 1
    cosign_another_history(pair, size)
    before = len(cosigned(pair))
    pair.b.start("consumer")
    pair.a.execute("INSERT INTO t VALUES (1, 'x')")
    refused = (
        "SELECT detail->'refused'->>'error' FROM vsql_sync.stream_status"
        " WHERE chain = %s AND state = 'refused'"
    )
    _until(lambda: "split view" in str(pair.b.query(refused, pair.chain)))
    assert pair.heads() == (size, size - 1)
    assert pair.b.query("SELECT id FROM t") == [(0,)]
    assert len(cosigned(pair)) == before
