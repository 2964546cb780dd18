"""`syncctl audit verify-proof` by files alone: what is asked with --old is answered, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.audit_history import CHAIN, CLUSTER, A, History, ordinary
from vsql_ctl.cli import main
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.proofs import ConsistencyProof, InclusionProof
from vsql_shared.crypto.signing import public_pem

HISTORY = ordinary()
SIZE = len(HISTORY.entries)


def other() -> History:
    """Another history by the same node, as long."""
    history = History()
    history.open()
    while len(history.entries) < SIZE:
        history.batch(7)
    return history


def checkpoint(history: History, size: int) -> str:
    hashes = [made.entry_hash for made in history.entries[:size]]
    return Checkpoint(Log(CLUSTER, CHAIN), size, tree.root_of(tree.tree_of(hashes)[0])).sign(A, 0).encode()


def inclusion(history: History, sequence: int) -> str:
    hashes = [made.entry_hash for made in history.entries]
    path = tree.range_roots(hashes, tree.inclusion_ranges(sequence - 1, SIZE))
    document = history.documents[sequence - 1]
    return InclusionProof(document, sequence - 1, tuple(path), checkpoint(history, SIZE)).encode()


def consistency(history: History, old: int) -> str:
    hashes = [made.entry_hash for made in history.entries]
    path = tree.range_roots(hashes, tree.consistency_ranges(old, SIZE))
    return ConsistencyProof(old, tuple(path), checkpoint(history, SIZE)).encode()


class Auditor:
    """Files in a folder, and node-a's public key."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder, self._capsys = folder, capsys
        (folder / "node-a.pub").write_text(public_pem(A.public_key))

    def verify(self, proof: str, old: str | None = None) -> tuple[int, Any, str]:
        """Exit code, what was found, what was said."""
        (self._folder / "proof").write_text(proof)
        words = ["audit", "verify-proof", str(self._folder / "proof"), "--output", "json"]
        words += ["--key", str(self._folder / "node-a.pub")]
        if old is not None:
            (self._folder / "old").write_text(old)
            words += ["--old", str(self._folder / "old")]
        with pytest.raises(SystemExit) as done:
            main(words)
        shown = self._capsys.readouterr()
        return int(done.value.code or 0), json.loads(shown.out) if shown.out else None, shown.err


@pytest.fixture
def auditor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Auditor:
    return Auditor(tmp_path, capsys)


def test_an_entry_is_proven_to_be_in_the_checkpoint_the_auditor_keeps(auditor: Auditor) -> None:
    code, found, err = auditor.verify(inclusion(HISTORY, 3), checkpoint(HISTORY, SIZE))
    assert (code, found["sequence"], found["prefix"]) == (0, 3, SIZE), err
    assert (found["signed_by"], found["keys"]) == ("node-a", [A.fingerprint])


def test_an_entry_of_another_history_than_the_kept_checkpoints_is_a_split_view(auditor: Auditor) -> None:
    assert auditor.verify(inclusion(other(), 3))[0] == 0
    code, found, err = auditor.verify(inclusion(other(), 3), checkpoint(HISTORY, SIZE))
    assert (code, found, "split view" in err) == (9, None, True)


@pytest.mark.parametrize("size", [1, SIZE - 1])
def test_a_kept_checkpoint_that_says_nothing_of_the_proof_is_not_passed_over(
    auditor: Auditor, size: int
) -> None:
    for history in (HISTORY, other()):
        for proof in (inclusion(history, 3), checkpoint(history, SIZE)):
            code, found, err = auditor.verify(proof, checkpoint(HISTORY, size))
            assert (code, found, "prove-prefix" in err) == (2, None, True)


def test_a_prefix_is_proven_to_the_kept_checkpoint_and_to_no_other(auditor: Auditor) -> None:
    code, found, err = auditor.verify(consistency(HISTORY, 4), checkpoint(HISTORY, 4))
    assert (code, found["size"], found["prefix"]) == (0, SIZE, 4), err
    assert auditor.verify(consistency(HISTORY, 4), checkpoint(other(), 4))[0] == 9
    assert auditor.verify(consistency(HISTORY, 4))[0] == 2
