"""`syncctl audit export` with proofs, from a time on, and as a table: what it holds, what does not verify."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.audit_example import run_example
from tests.audit_history import CHAIN, CLUSTER, A, B, acknowledged, ordinary, signer, trust
from tests.conftest import NewDatabase
from tests.services.test_audit_proofs import Logs
from tests.services.test_audit_trail import TABLE, as_attacker, store
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.export import export as write_pieces
from vsql_shared.audit.export_format import readable
from vsql_shared.audit.links import Linked, require_signed
from vsql_shared.audit.rows import timestamp
from vsql_shared.errors import ChainError, SignatureError

HISTORY = ordinary()


@pytest.fixture
def logs(tmp_path: Path, new_database: NewDatabase, capsys: pytest.CaptureFixture[str]) -> Iterator[Logs]:
    made = Logs(tmp_path, new_database("node_a"), new_database("node_b"), capsys)
    store(made.conns["node-a"], HISTORY)
    store(made.conns["node-b"], acknowledged(HISTORY))
    yield made
    made.close()


def export(logs: Logs, *arguments: str, node: str = "node-a") -> Path:
    path = logs.file("report.json")
    code, _, err = logs.syncctl(node, "audit", "export", "--output", str(path), *arguments)
    assert code == 0, err
    return path


SINCE = timestamp(HISTORY.entries[5].entry.event_timestamp).isoformat()


@pytest.mark.parametrize(("arguments", "count"), [((), 11), (("--since", SINCE), 6)])
def test_one_signature_proves_every_exported_entry_to_the_documented_program(
    logs: Logs, arguments: tuple[str, ...], count: int
) -> None:
    path = export(logs, "--proofs", *arguments)
    assert len(json.loads(path.read_text())["entries"]) == count
    done = run_example(path, A)
    said = f"{CHAIN}: verified up to 11\n{CHAIN}: in a checkpoint of 11 entries\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    end = json.loads(path.read_text())["end"]["chains"][CHAIN]
    hashes = [made.entry_hash for made in HISTORY.entries]
    assert end["before"] == [one.hex() for one in tree.tree_of(hashes[: 11 - count])[0]]


def _resigned(by: Any) -> Callable[[dict[str, Any]], object]:
    def change(export: dict[str, Any]) -> None:
        head = Checkpoint(Log(CLUSTER, CHAIN), 11, tree.root_of(HISTORY.head.tree))
        export["end"]["chains"][CHAIN]["checkpoint"] = head.sign(by, 0).encode()

    return change


def _shortened(export: dict[str, Any]) -> None:
    """The last entry taken away, and everything in the file that says so made right."""
    export["entries"].pop()
    last = export["entries"][-1]
    export["end"]["entries"] -= 1
    export["end"]["chains"][CHAIN] |= {"entries": 5, "last_sequence": 10, "last_hash": last["hash"]}


def _later(export: dict[str, Any]) -> None:
    """The first entry taken away likewise."""
    export["entries"].pop(0)
    export["end"]["entries"] -= 1
    export["end"]["chains"][CHAIN] |= {"entries": 5, "first_sequence": 7}


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "cut at the end": _shortened,
    "cut at the beginning": _later,
    "another history before": lambda export: export["end"]["chains"][CHAIN].update(before=["00" * 32] * 2),
    "a stranger's checkpoint": _resigned(signer("node-a", "x")),
    "another chain's checkpoint": lambda export: export["end"]["chains"][CHAIN].update(
        checkpoint=export["end"]["chains"][CHAIN]["checkpoint"].replace("orders", "bills")
    ),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_an_export_whose_signature_is_of_something_else_does_not_verify(logs: Logs, case: str) -> None:
    path = export(logs, "--proofs", "--since", SINCE)
    whole = json.loads(path.read_text())
    FORGERIES[case](whole)
    path.write_text(json.dumps(whole))
    assert run_example(path, A).returncode != 0


def test_nothing_is_signed_of_a_trail_that_does_not_verify_and_the_rest_is_still_exported(logs: Logs) -> None:
    as_attacker(logs.conns["node-a"], f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 3")
    path = logs.file("report.json")
    code, _, err = logs.syncctl("node-a", "audit", "export", "--proofs", "--output", str(path))
    assert (code, "does not verify" in err, path.exists()) == (9, True, False)
    export(logs)
    logs.signing = False
    code, _, err = logs.syncctl("node-a", "audit", "export", "--proofs", "--output", str(path))
    assert (code, "audit.signing_key_path is not set" in err) == (3, True)


CHANGED: dict[str, str] = {
    "an entry altered": f"UPDATE {TABLE} SET document = set_byte(document, 200, get_byte(document, 200) # 1)"
    " WHERE sequence = 3",
    "an entry for another": f"UPDATE {TABLE} SET document ="
    f" (SELECT document FROM {TABLE} WHERE sequence = 4) WHERE sequence = 3",
    "one place taken twice": f"UPDATE {TABLE} SET sequence = 3 WHERE sequence = 4",
    "the last entry altered": f"UPDATE {TABLE} SET document ="
    " set_byte(document, length(document) - 1, get_byte(document, length(document) - 1) # 1)"
    " WHERE sequence = 11",
}


@pytest.mark.parametrize("since", [None, SINCE])
@pytest.mark.parametrize("case", CHANGED)
def test_what_is_altered_between_verifying_and_exporting_is_not_signed(
    logs: Logs, case: str, since: str | None
) -> None:
    """The export reads in a snapshot of its own: what `sign` was given before does not count."""
    given = []

    def sign(log: Log, linked: Linked) -> str:
        require_signed(linked, log, trust(A))
        given.append(log)
        return ""

    conn = logs.conns["node-a"]
    moment = None if since is None else datetime.fromisoformat(since)
    as_attacker(conn, CHANGED[case])
    with pytest.raises((ChainError, SignatureError)):
        list(write_pieces(conn, CLUSTER, "node-a", datetime.now(UTC), moment, sign))
    assert given == []


def test_from_a_time_on_no_chain_has_a_hole_though_a_clock_went_back(logs: Logs) -> None:
    """Entry 7 is stamped earlier than entry 6: it still follows it in the export."""
    back = ordinary(2)
    last = back.entries[-1].entry.event_timestamp
    back.add(
        event_type="operator_action", batch_lsn_start=9, batch_lsn_end=9, event_timestamp=last - 60_000_000
    )
    store(logs.conns["node-a"], chain_of(back))
    path = export(logs, "--since", timestamp(last).isoformat())
    found = [one["sequence"] for one in json.loads(path.read_text())["entries"] if one["chain"] == OTHER]
    assert found == [len(back.entries) - 1, len(back.entries)]


OTHER = "bills.node-a"


def chain_of(history: Any) -> Any:
    """The same history under another name."""
    from tests.audit_history import History

    other = History(chain=OTHER)
    for made in history.entries:
        entry = made.entry
        if entry.event_type == "epoch_opened":
            other.open()
            continue
        names = ("event_type", "batch_lsn_start", "batch_lsn_end", "event_timestamp", "batch", "row_count",
                 "record_count", "partitions", "merkle_root", "continues")  # fmt: skip
        other.add(**{name: getattr(entry, name) for name in names})
    return other


def test_a_table_holds_every_field_and_the_signed_document(logs: Logs) -> None:
    path = export(logs, "--format", "csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11
    for row, made in zip(rows, HISTORY.entries, strict=True):
        assert base64.b64decode(row["document"]) == made.encoded
        assert row["hash"] == made.entry_hash.hex()
        plain = readable(made.entry)
        assert row["sequence"] == str(plain["sequence"])
        assert row["continues"] == str(plain["continues"]).lower()
        assert json.loads(row["partitions"]) == plain["partitions"]
    path.unlink()
    code, _, err = logs.syncctl(
        "node-a", "audit", "export", "--format", "csv", "--proofs", "--output", str(path)
    )
    assert (code, "no place for proofs" in err, path.exists()) == (2, True, False)


def test_a_text_that_a_spreadsheet_would_compute_is_text_in_the_table(logs: Logs) -> None:
    store(logs.conns["node-b"], acknowledgements_of_a_formula())
    path = export(logs, "--format", "csv", node="node-b")
    with path.open(newline="") as file:
        cells = [row["kek_id"] for row in csv.DictReader(file)]
    assert "'=1+1" in cells
    assert not [cell for cell in cells if cell.startswith("=")]


def acknowledgements_of_a_formula() -> Any:
    from tests.audit_history import ACKS, History

    acks = History(ACKS, B, head=acknowledged(HISTORY).head)
    acks.open()
    acks.add(event_type="operator_action", batch_lsn_start=9, batch_lsn_end=9, kek_id="=1+1")
    return acks
