"""A small evidence bundle, the same in every run: docs/formats.md shows it, tests attack it. Not a test."""

from __future__ import annotations

from tests.audit_history import START, A, B
from vsql_shared.audit import evidence, scope_report, tree
from vsql_shared.audit import evidence_documents as documents
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.notes import SignedNote
from vsql_shared.audit.proofs import ConsistencyProof
from vsql_shared.crypto.signing import Signer

CLUSTER, CHAIN = "shop", "orders.node-a"
BEGUN, AT = "2025-10-09T08:53:20Z", "2025-10-09T08:54:00Z"
CONFIGURATION = '[cluster]\nname = "shop"\nnode_id = 1\nnode_name = "node-a"\n'
_HASHES = [bytes([number]) * 32 for number in range(1, 6)]


def head(size: int, first: int = 1) -> Checkpoint:
    """The chain's head of so many entries; another history where `first` is another."""
    hashes = [bytes([first]) * 32, *_HASHES[1:]][:size]
    return Checkpoint(Log(CLUSTER, CHAIN), size, tree.root_of(tree.tree_of(hashes)[0]))


def note(size: int, *signers: Signer, first: int = 1) -> str:
    """A checkpoint signed by these."""
    made = SignedNote(head(size, first).text, ())
    for signer in signers:
        made = head(size, first).signed_by(signer, START // 1_000_000, made)
    return made.encode()


def prefix(old: int, size: int) -> str:
    """The proof that the earlier head is a prefix of the later one."""
    ranges = tree.range_roots(_HASHES, tree.consistency_ranges(old, size))
    return ConsistencyProof(old, tuple(ranges), note(size, A)).encode()


def report(cluster: str = CLUSTER, node: str = "node-a", by: Signer = A) -> str:
    """A scope report of a publication that has sent nothing."""
    facts = scope_report.Facts(cluster, node, "orders", False, (), (), (), (), ())
    return scope_report.to_text(scope_report.sign(scope_report.build(facts, AT), by))


def contents() -> dict[str, tuple[str, bytes]]:
    """Path → (kind, content)."""
    texts = {
        f"checkpoints/{CHAIN}.checkpoint": (documents.CHECKPOINT, note(5, A)),
        f"checkpoints/{CHAIN}.cosigned-by.node-b.checkpoint": (documents.CHECKPOINT, note(3, A, B)),
        f"checkpoints/{CHAIN}.cosigned-by.node-b.proof": (documents.PREFIX_PROOF, prefix(3, 5)),
        "configuration.toml": (evidence.PLAIN, CONFIGURATION),
        "scope/orders.json": (documents.SCOPE_REPORT, report()),
    }
    return {path: (kind, text.encode()) for path, (kind, text) in texts.items()}


def envelope(
    files: dict[str, tuple[str, bytes]],
    signer: Signer | None = A,
    node: str = "node-a",
    cluster: str = CLUSTER,
) -> bytes:
    """The signed manifest of these files."""
    named = [
        evidence.file_of(path, kind, f"{kind} of the example", raw) for path, (kind, raw) in files.items()
    ]
    missing = [("ACLs of Kafka", "the brokers have no authorizer")]
    return evidence.seal(evidence.build(cluster, node, (BEGUN, AT), "vsql-sync 0.1", named, missing), signer)


def bundle() -> dict[str, bytes]:
    """Every file of the bundle, the manifest too."""
    files = contents()
    return {path: raw for path, (_, raw) in files.items()} | {evidence.MANIFEST: envelope(files)}
