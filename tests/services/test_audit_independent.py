"""Checkpoints and proofs before other people's code: note and tlog of Go, and transparency.dev's Merkle tree.

The program is tests/independent/main.go. It needs `go` and, once, a module proxy; without them the tests are
skipped and say so. docs/independent-verifier.md has an output of it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.audit_history import CHAIN, CLUSTER, A, B, History, ordinary
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log, cosigner_key
from vsql_shared.audit.notes import SignedNote
from vsql_shared.audit.proofs import ConsistencyProof, InclusionProof
from vsql_shared.crypto.signing import Signer

SOURCE = Path(__file__).parents[1] / "independent"
BUILD_SECONDS = 240
LOG = Log(CLUSTER, CHAIN)
LOG_KEY = LOG.key(A.public_key).vkey
COSIGNER_KEY = cosigner_key(CLUSTER, "node-b", B.public_key).vkey
HISTORY = ordinary(20)
HASHES = [made.entry_hash for made in HISTORY.entries]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("NOT VERIFIED BY AN INDEPENDENT IMPLEMENTATION: there is no `go` on the PATH")
    program = tmp_path_factory.mktemp("independent") / "verify"
    built = subprocess.run(
        [go, "build", "-o", str(program), "."],
        cwd=SOURCE, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS,
    )  # fmt: skip
    if built.returncode and (
        "dial tcp" in built.stderr or "lookup" in built.stderr or "toolchain" in built.stderr
    ):
        pytest.skip(
            f"NOT VERIFIED BY AN INDEPENDENT IMPLEMENTATION: its modules are not to be had: {built.stderr}"
        )
    assert built.returncode == 0, built.stderr
    return program


def run(program: Path, *arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def head(size: int, hashes: list[bytes] = HASHES) -> Checkpoint:
    return Checkpoint(LOG, size, tree.root_of(tree.tree_of(hashes[:size])[0]))


def signed(checkpoint: Checkpoint, *signers: Signer) -> str:
    note = SignedNote(checkpoint.text, ())
    for one in signers:
        note = checkpoint.signed_by(one, 1_760_000_000, note)
    return note.encode()


def inclusion(sequence: int, size: int) -> InclusionProof:
    path = tree.range_roots(HASHES, tree.inclusion_ranges(sequence - 1, size))
    return InclusionProof(
        HISTORY.documents[sequence - 1], sequence - 1, tuple(path), signed(head(size), A, B)
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 24])
def test_every_entry_is_proven_to_the_independent_verifier(verifier: Path, tmp_path: Path, size: int) -> None:
    file = tmp_path / "entry.tlog-proof"
    for sequence in range(1, size + 1):
        file.write_text(inclusion(sequence, size).encode())
        code, said = run(verifier, "inclusion", file, LOG_KEY, COSIGNER_KEY)
        assert code == 0, said
        assert f"entry {sequence} is in it" in said
        assert f"root {head(size).root.hex()}" in said
        assert "signed by vsql-sync/shop/node-b" in said


@pytest.mark.parametrize(
    ("old", "size"), [(1, 1), (1, 2), (3, 7), (4, 8), (6, 24), (16, 24), (23, 24), (24, 24)]
)
def test_every_prefix_is_proven_to_the_independent_verifier(
    verifier: Path, tmp_path: Path, old: int, size: int
) -> None:
    before, file = tmp_path / "old.checkpoint", tmp_path / "prefix.proof"
    before.write_text(signed(head(old), A))
    path = tree.range_roots(HASHES, tree.consistency_ranges(old, size))
    file.write_text(ConsistencyProof(old, tuple(path), signed(head(size), A, B)).encode())
    code, said = run(verifier, "consistency", before, file, LOG_KEY, COSIGNER_KEY)
    assert code == 0, said
    assert f"the first {old} entries are a prefix of the {size}" in said


def line(number: int, text: str) -> Callable[[str], str]:
    def change(proof: str) -> str:
        lines = proof.split("\n")
        lines[number] = text
        return "\n".join(lines)

    return change


FORGED: dict[str, Callable[[str], str]] = {
    "another index": line(2, "index 3"),
    "another document": line(1, "extra AAAA"),
    "another hash": line(3, "A" * 43 + "="),
    "another size": lambda proof: proof.replace("\n17\n", "\n18\n"),
    "another chain": lambda proof: proof.replace("orders.node-a", "bills.node-a"),
    "a signature less": lambda proof: proof[: proof.rindex("— ")],
    "another time of the cosignature": lambda proof: proof.replace("AAAAABo53gA", "AAAAABo53gB"),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_we_refuse_the_independent_verifier_refuses(verifier: Path, tmp_path: Path, case: str) -> None:
    good = inclusion(3, 17).encode()
    forged = FORGED[case](good)
    assert forged != good
    file = tmp_path / "forged.tlog-proof"
    file.write_text(forged)
    code, said = run(verifier, "inclusion", file, LOG_KEY, COSIGNER_KEY)
    assert (code, "refused:" in said) == (1, True), said


def test_another_history_is_no_prefix_to_the_independent_verifier(verifier: Path, tmp_path: Path) -> None:
    other = History()
    other.open()
    for _ in range(9):
        other.batch(7)
    before, file = tmp_path / "old.checkpoint", tmp_path / "prefix.proof"
    before.write_text(signed(head(6, [made.entry_hash for made in other.entries]), A))
    path = tree.range_roots(HASHES, tree.consistency_ranges(6, 24))
    file.write_text(ConsistencyProof(6, tuple(path), signed(head(24), A)).encode())
    code, said = run(verifier, "consistency", before, file, LOG_KEY)
    assert (code, "transparency-dev/merkle" in said) == (1, True), said
