"""The documents of an evidence bundle that are signed by themselves: reports, heads of chains, proofs. Pure.

Not here: the manifest, and that each file is the one it names (evidence.py). Rules:

* Each is of the node and the cluster of the manifest, and stands where documents of its kind and chain do.
* Of a chain there is one history: one head, and every other head of it is proven to be its prefix.
* Keys come from the verifier, never from the bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from vsql_shared.audit import scope_report
from vsql_shared.audit.checkpoint import Checkpoint, Opened, cosigner_key, open_checkpoint
from vsql_shared.audit.proofs import ConsistencyProof
from vsql_shared.errors import DecodeError, RecordError, SignatureError, VsqlSyncError

SCOPE_REPORT: Final = "scope-report"
CHECKPOINT: Final = "checkpoint"
PREFIX_PROOF: Final = "prefix-proof"


class Cosigned(NamedTuple):
    """A co-signature that verified: on which head, by whom, when (Unix time)."""

    path: str
    node: str
    size: int
    at: int


@dataclass(frozen=True, slots=True)
class Keys:
    """Public keys the verifier brings: of the node that made the bundle, and of nodes that co-signed.

    A node may have several, of which one must have co-signed: it has changed its key.
    """

    node: bytes
    cosigners: Sequence[tuple[str, bytes]] = ()

    def known(self, maker: str) -> list[tuple[str, bytes]]:
        """(node, key) of everybody who is believed."""
        return [(maker, self.node), *self.cosigners]


def verify(
    manifest: Mapping[str, Any],
    of_kind: Mapping[str, Sequence[str]],
    contents: Mapping[str, bytes],
    keys: Keys,
) -> list[Cosigned]:
    """Verify the documents of a bundle, by kind; the co-signatures that verified."""
    cosigned: list[Cosigned] = []
    heads: dict[str, Checkpoint] = {}
    for path in of_kind[SCOPE_REPORT]:
        with _naming(path):
            _scope(manifest, contents[path], keys)
    for path in of_kind[CHECKPOINT]:
        with _naming(path):
            opened = _checkpoint(manifest, path, _text(contents[path]), keys)
            heads[path] = opened.checkpoint
            cosigned += _cosigners(path, opened, keys)
    for path in of_kind[PREFIX_PROOF]:
        with _naming(path):
            _proof(manifest, path, _text(contents[path]), heads, keys)
    for path, head in heads.items():
        if path != _head_path(head) and _proof_path(path) not in of_kind[PREFIX_PROOF]:
            raise RecordError(f"{path}: the proof that it is a prefix of the chain is missing", record=path)
    return cosigned


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except VsqlSyncError as error:
        error.message = f"{path}: {error.message}"
        error.args = (error.message,)
        raise


def _head_path(head: Checkpoint) -> str:
    """Where the one head is that a bundle has of a chain."""
    return f"checkpoints/{head.log.chain}.checkpoint"


def _proof_path(path: str) -> str:
    return f"{path.removesuffix('.checkpoint')}.proof"


def _scope(manifest: Mapping[str, Any], content: bytes, keys: Keys) -> None:
    report = scope_report.verify(content, keys.node)
    if (report.get("cluster"), report.get("node")) != (manifest["cluster"], manifest["node"]):
        raise SignatureError("it is a report of another node or cluster")


def _checkpoint(manifest: Mapping[str, Any], path: str, text: str, keys: Keys) -> Opened:
    """An own chain's is signed by the node, a peer's co-signed by it. It stands under its chain's name."""
    node = str(manifest["node"])
    opened = open_checkpoint(text, keys.known(node))
    log, own = opened.checkpoint.log, _head_path(opened.checkpoint)
    if log.cluster != manifest["cluster"]:
        raise SignatureError("it is of another cluster")
    earlier = log.writer == node and path.startswith(f"{own.removesuffix('.checkpoint')}.cosigned-by.")
    if path != own and not (earlier and path.endswith(".checkpoint")):
        raise RecordError(f"it is of chain {log.chain}, which has no such place in a bundle", record=path)
    if log.writer == node:
        opened.require_writer()
        return opened
    by = cosigner_key(log.cluster, node, keys.node)
    if by.name not in {one.key.name for one in opened.signatures if one.at is not None}:
        raise SignatureError(f"it is of a chain of node {log.writer} and is not co-signed by {node}")
    return opened


def _cosigners(path: str, opened: Opened, keys: Keys) -> list[Cosigned]:
    """Co-signatures on a checkpoint by nodes beside the maker, by a key that was given."""
    head = opened.checkpoint
    signed = {one.key: one.at for one in opened.signatures}
    found = []
    for node, key in keys.cosigners:
        at = signed.get(cosigner_key(head.log.cluster, node, key))
        if at is not None:
            found.append(Cosigned(path, node, head.size, at))
    return found


def _proof(
    manifest: Mapping[str, Any], path: str, text: str, heads: Mapping[str, Checkpoint], keys: Keys
) -> None:
    """A proof lies beside the checkpoint it begins at, and leads to the bundle's head of that chain."""
    before = heads.get(f"{path.removesuffix('.proof')}.checkpoint")
    if before is None:
        raise RecordError("the checkpoint it begins at is missing", record=path)
    opened = ConsistencyProof.decode(text).verify(before, keys.known(str(manifest["node"])))
    opened.require_writer()
    if heads.get(_head_path(before)) != opened.checkpoint:
        raise RecordError(
            f"it leads to {opened.checkpoint.size} entries of {before.log.chain} that are not the head the"
            f" bundle has, {_head_path(before)}: two histories, or a head of another time",
            record=path,
        )


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DecodeError("no UTF-8 text") from error
