"""The documented program that verifies an export: true ones of several keys, forgeries by a trusted node."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.audit_example import run_example
from tests.audit_history import ACKS, CHAIN, CLUSTER, A, B, History, acknowledged, ordinary, signer
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.export_format import FORMAT, VERSION, readable
from vsql_shared.crypto.signing import Signer

OLD = signer("node-a", "old")


def schema(name: str) -> Any:
    return json.loads(resources.files("vsql_schemas").joinpath(f"avro/{name}.avsc").read_text("utf-8"))


def exported(histories: list[History], keys: dict[str, Signer], by: Signer | None = None) -> dict[str, Any]:
    """What `audit export` writes of these chains; `keys` as the file claims them; `by` signs checkpoints."""
    made = [(history, one) for history in histories for one in history.entries]
    ends: dict[str, Any] = {}
    for history in histories:
        last = history.entries[-1]
        ends[history.chain] = {
            "entries": len(history.entries), "first_sequence": 1, "last_sequence": last.entry.sequence,
            "last_hash": last.entry_hash.hex(),
        }  # fmt: skip
        if by is not None:
            head = Checkpoint(
                Log(CLUSTER, history.chain), len(history.entries), tree.root_of(history.head.tree)
            )
            ends[history.chain] |= {"before": [], "checkpoint": head.sign(by, 0).encode()}
    return {
        "header": {
            "format": FORMAT, "version": VERSION, "cluster": CLUSTER, "node": "node-a",
            "keys": [
                {"node": node, "fingerprint": key.fingerprint,
                 "public_key": base64.b64encode(key.public_key).decode(), "revoked_at": None}
                for node, key in keys.items()
            ],
            "schemas": {name: schema(name) for name in ("signed_document", "audit_entry")},
        },
        "entries": [
            {"chain": history.chain, "sequence": one.entry.sequence, "hash": one.entry_hash.hex(),
             "kafka_offset": None, "document": base64.b64encode(one.encoded).decode(),
             "entry": readable(one.entry)}
            for history, one in made
        ],
        "end": {"entries": len(made), "chains": ends},
    }  # fmt: skip


def verify(folder: Path, export: dict[str, Any], *trusted: Signer) -> tuple[int, str, str]:
    file = folder / "report.json"
    file.write_text(json.dumps(export))
    done = run_example(file, *trusted)
    return done.returncode, done.stdout, done.stderr


def test_a_chain_of_two_keys_of_its_writer_verifies_with_both(tmp_path: Path) -> None:
    history = History(by=OLD)
    history.open()
    history.batch()
    rotated = History(by=A, head=history.head)
    rotated.open()
    rotated.batch()
    history.entries += rotated.entries
    history.head = rotated.head
    export = exported([history], {"node-a": OLD}, by=A)
    export["header"]["keys"] += exported([], {"node-a": A})["header"]["keys"]
    code, out, err = verify(tmp_path, export, OLD, A)
    assert (code, out.splitlines()[-1]) == (0, f"{CHAIN}: in a checkpoint of 4 entries"), err
    assert verify(tmp_path, export, A)[0] != 0


def test_chains_of_both_sides_verify_and_each_checkpoint_by_its_own_writer(tmp_path: Path) -> None:
    source = ordinary()
    both = [source, acknowledged(source)]
    code, out, err = verify(tmp_path, exported(both, {"node-a": A, "node-b": B}), A, B)
    assert (code, out) == (0, f"{CHAIN}: verified up to 11\n{ACKS}: verified up to 7\n"), err


def _in_anothers_name() -> History:
    """A chain of node-a's as node-b would write it."""
    forged = History(by=Signer(B._private_key, "node-a"))  # the same key under another name
    forged.open()
    forged.batch(9)
    return forged


def _in_his_own_name() -> History:
    """The same, and the entries say that node-b signed them."""
    forged = History(by=B)
    forged.open()
    forged.batch(9)
    return forged


@pytest.mark.parametrize("claimed", ["node-a", "node-b"])
@pytest.mark.parametrize("forged", [_in_anothers_name, _in_his_own_name])
def test_a_trusted_node_cannot_write_anothers_chain_whatever_the_file_says_of_keys(
    tmp_path: Path, forged: Any, claimed: str
) -> None:
    code, _, err = verify(tmp_path, exported([forged()], {claimed: B}), A, B)
    assert code != 0
    assert "AssertionError" in err


def test_a_checkpoint_by_another_trusted_node_than_the_writer_is_refused(tmp_path: Path) -> None:
    by_b = Signer(B._private_key, "node-a")  # as above
    export = exported([ordinary()], {"node-a": A, "node-b": B}, by=by_b)
    assert verify(tmp_path, export, A, B)[0] != 0


def test_an_entry_of_another_cluster_is_refused(tmp_path: Path) -> None:
    other = History(cluster="shop2")
    other.open()
    assert verify(tmp_path, exported([other], {"node-a": A}), A)[0] != 0
