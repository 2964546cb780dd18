"""Checkpoints for a bundle: of this node's chains, of those it reads, and what targets have co-signed.

Rules: nothing is signed that was not held first (audit/heads.py). What a target co-signed is taken from its
chain on the audit topic, verified by its pinned key, and signed by this node only if its own entries agree.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from vsql_ctl.evidence.brokers import Brokers
from vsql_ctl.evidence.bundle import Bundle
from vsql_shared.audit import heads
from vsql_shared.audit.chain import writer_of
from vsql_shared.audit.checkpoint import Log, cosigned_in, open_checkpoint
from vsql_shared.audit.compare import ack_target
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, verify_document
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED, AuditEntry, peek_chain, signed_place
from vsql_shared.audit.evidence_documents import CHECKPOINT, PREFIX_PROOF
from vsql_shared.errors import ChainError, DecodeError, SignatureError
from vsql_shared.pg import signers
from vsql_shared.pg.connect import errors

if TYPE_CHECKING:
    from vsql_shared.audit.checkpoint import Checkpoint
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import Signer, TrustStore
    from vsql_shared.pg.connect import Connection

_OWN = "SELECT chain FROM vsql_sync.chain_heads WHERE own ORDER BY 1"
_REMEMBERED = (
    "SELECT chain FROM vsql_sync.apply_progress WHERE sequence > 0"
    " UNION SELECT chain FROM vsql_sync.chain_heads WHERE NOT own ORDER BY 1"
)


_TARGETS = "SELECT chain, target FROM vsql_sync.stream_targets ORDER BY 1, 2"


class Checkpoints:
    """Makes the files below `checkpoints/`."""

    def __init__(
        self,
        conn: Connection,
        settings: Settings,
        signer: Signer,
        trust: TrustStore,
        bundle: Bundle,
        kafka: Brokers,
    ) -> None:
        self._conn, self._settings, self._signer, self._kafka = conn, settings, signer, kafka
        self._trust, self._bundle = trust, bundle
        self._cluster = settings.cluster.name

    def gather(self) -> None:
        """Own chains, each with what targets co-signed of it; then chains of others."""
        with errors("reading which chains there are"):
            own = [str(row[0]) for row in self._conn.execute(_OWN)]
            remembered = [str(row[0]) for row in self._conn.execute(_REMEMBERED)]
        # First what was co-signed: heads that are taken afterwards have it in them.
        cosigned: dict[tuple[str, str], AuditEntry] | None = None
        with self._bundle.trying("co-signatures of targets, from the audit topic"):
            cosigned = self._read_cosigned()
        heads_now: dict[str, tuple[Checkpoint, str]] = {}
        for chain in own:
            with self._bundle.trying(f"checkpoint of chain {chain}"):
                head = heads.own_checkpoint(self._conn, self._trust, Log(self._cluster, chain))
                heads_now[chain] = head, self._add(chain, head, "this node's chain, signed now")
        if cosigned is not None:
            with self._bundle.trying("which targets have co-signed what"):
                self._cosigned(cosigned, heads_now)
        for chain in remembered:
            with self._bundle.trying(f"checkpoint of chain {chain}, as this node has verified it"):
                head = heads.remembered_checkpoint(self._conn, Log(self._cluster, chain))
                self._add(chain, head, "a peer's chain as far as this node has verified it, co-signed now")

    def _add(self, name: str, head: Checkpoint, about: str) -> str:
        note = head.sign(self._signer, int(time.time())).encode()
        self._bundle.add(f"checkpoints/{name}.checkpoint", CHECKPOINT, about, note)
        return note

    def _read_cosigned(self) -> dict[tuple[str, str], AuditEntry]:
        """(own chain, target) → the newest entry by which it co-signed a head."""
        from vsql_shared.audit.history import read_topic
        from vsql_shared.kafka.clients import make_consumer
        from vsql_shared.names import audit_topic

        found = _Cosigned(self._trust, self._cluster, self._signer.node)
        self._kafka.client()  # brokers that are away are waited for once
        consumer = make_consumer(self._settings, "syncctl", "vsql-sync.audit-verify")
        try:
            read_topic(consumer, audit_topic(self._cluster), found)
        finally:
            consumer.close()
        return found.last

    def _cosigned(
        self, last: dict[tuple[str, str], AuditEntry], heads_now: dict[str, tuple[Checkpoint, str]]
    ) -> None:
        for (chain, target), entry in sorted(last.items()):
            if chain in heads_now:
                with self._bundle.trying(f"what {target} co-signed of chain {chain}"):
                    self._add_cosigned(chain, target, entry, *heads_now[chain])
        with errors("reading the targets"):
            targets = {(str(row[0]), str(row[1])) for row in self._conn.execute(_TARGETS)}
        for chain, target in sorted(targets - last.keys()):
            self._bundle.missing(
                f"co-signature of chain {chain} by {target}",
                "there is none of a head of it on the audit topic",
            )
        for chain in sorted(heads_now.keys() - {chain for chain, _ in targets | last.keys()}):
            if ack_target(chain) is None:
                self._bundle.missing(f"co-signature of chain {chain}", "it has no target")

    def _add_cosigned(self, chain: str, target: str, entry: AuditEntry, head: Checkpoint, note: str) -> None:
        claimed = cosigned_in(entry)
        if claimed is None:
            raise ChainError(
                f"entry {entry.sequence} of chain {entry.chain} co-signs no head that can be read"
            )
        heads.require_own(self._conn, self._trust, claimed)
        opened = open_checkpoint(
            str(json.loads(entry.detail)["note"]),
            [(key.node, key.public_key) for key in signers.load(self._conn, target) if not key.revoked],
        )
        both = claimed.signed_by(self._signer, int(time.time()), opened.note).encode()
        proof = heads.prove_prefix(self._conn, claimed, head, note).encode()
        name = f"checkpoints/{chain}.cosigned-by.{target}"
        self._bundle.add(
            f"{name}.checkpoint", CHECKPOINT, f"this node's chain, co-signed by {target}, newest", both
        )
        self._bundle.add(
            f"{name}.proof", PREFIX_PROOF, f"what {target} co-signed is a prefix of the chain now", proof
        )


class _Cosigned:
    """The newest co-signing entry of each chain of acknowledgements of this node's chains."""

    def __init__(self, trust: TrustStore, cluster: str, node: str) -> None:
        self._trust, self._cluster, self._node = trust, cluster, node
        self.last: dict[tuple[str, str], AuditEntry] = {}

    def feed(self, encoded: bytes, where: str) -> None:  # noqa: ARG002 - what reads the topic gives it
        """Take the next document; what is not a genuine co-signing entry is passed over."""
        try:
            document = SignedDocument.decode(encoded)
            if CHECKPOINT_COSIGNED.encode() not in document.payload:
                return  # seen without parsing: there is one of these in thousands
            named = ack_target(peek_chain(document.payload)[1])
            if named is None or writer_of(named[0]) != self._node:
                return
            entry = AuditEntry.decode(
                verify_document(self._trust, named[1], document, AUDIT_ENTRY, signed_place)
            )
        except (DecodeError, SignatureError, ChainError):
            return
        if (entry.cluster, entry.signer_node_id) != (self._cluster, named[1]):
            return
        claimed, before = cosigned_in(entry), self.last.get(named)
        # One that cannot be read hides no other; of the others the newest counts.
        if claimed is None or claimed.log != Log(self._cluster, named[0]):
            return
        if before is None or entry.sequence > before.sequence:
            self.last[named] = entry
