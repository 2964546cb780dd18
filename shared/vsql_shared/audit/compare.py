"""Comparing the two sides of a stream: what the source signed, and what the target says it applied.

Not here: verifying either side's trail by itself (verify.py); do that first, because this module believes
the entries it is given. Rules:

* Every acknowledgement names a manifest: same hash, same batch, positions and counts, and the root the
  target computed itself equals the source's.
* From the first acknowledged batch to the last one, each is acknowledged or skipped by an operator's
  decision; abandoned fragments are not. A target that joined late says `batch_covered` once for all batches
  its first copy covers: it counts the changes nobody had acknowledged, and has no root of its own. Batches
  after the last acknowledgement are under way.
* Changes that were not applied by an operator's decision are counted: the verdicts say how many, and the
  detail of the same entry names their transactions, which sum to it.
* What a peer remembers of a chain must still be in it: a rewritten or shortened history is found here.
* A chain is pruned only below what each target has acknowledged (docs/design/0020). So one that begins behind
  all that a target remembers, or acknowledged, was not pruned: its source hides something.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vsql_shared.audit.chain import writer_of
from vsql_shared.audit.dsse import AUDIT_ENTRY, document_hash, open_document
from vsql_shared.audit.entries import (
    BATCH_APPLIED,
    BATCH_COVERED,
    BATCH_SKIPPED,
    COVERED,
    EPOCH_OPENED,
    REPLICATION_BATCH,
    TRANSACTION_REPLAYED,
    AuditEntry,
    signed_place,
)
from vsql_shared.audit.merkle import EMPTY_ROOT
from vsql_shared.audit.rows import StoredDocument
from vsql_shared.audit.store import iterate
from vsql_shared.audit.verify import Problem
from vsql_shared.errors import DecodeError, SignatureError
from vsql_shared.names import ack_chain
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

_SAME = ("merkle_root", "batch", "batch_lsn_start", "batch_lsn_end", "row_count", "continues")
"""Fields an acknowledgement repeats from its manifest; `merkle_root` is the target's own computation."""
_PASSED_OVER = frozenset({"skipped", "parked"})
"""Verdicts an operator decided on."""
_ANSWERS = frozenset({BATCH_APPLIED, BATCH_SKIPPED, BATCH_COVERED})


@dataclass(frozen=True, slots=True)
class Comparison:
    """One stream to one target: how many batches both sides agree on, and the first they do not."""

    chain: str
    target: str
    compared: int
    under_way: int
    problem: Problem | None
    passed_over: int = 0
    """Changes an operator had skipped or parked."""
    replayed: int = 0
    """Of the parked ones: those that were replayed since."""


def ack_target(chain: str) -> tuple[str, str] | None:
    """(stream's chain, target) of a chain of acknowledgements; None for another chain."""
    stream, mark, target = chain.rpartition(".ack.")
    return (stream, target) if mark and chain.count(".") >= 3 else None


def compare_roots(
    chain: str,
    target: str,
    manifests: Iterable[StoredDocument],
    acks: Iterable[StoredDocument],
    pruned: int = 0,
) -> Comparison:
    """Walk both chains side by side, in memory of one manifest at a time.

    `pruned`: manifests up to this sequence are gone. What acknowledges them is passed over, as long as the
    target has acknowledged all of them, and of what `batch_covered` counts only the rest is counted again.
    """
    source = _Manifests(manifests)
    compared = counted = passed_over = replayed = 0
    last: AuditEntry | None = None
    for stored in acks:
        ack = stored.entry
        if ack.event_type == TRANSACTION_REPLAYED:
            replayed += _replayed(ack)
        if ack.event_type not in _ANSWERS:
            continue
        last = ack
        if ack.ref_sequence <= pruned:
            continue
        manifest = source.find(ack.ref_sequence)
        what = _disagreement(manifest, ack)
        if what is None and ack.event_type == BATCH_COVERED:
            what = _miscounted(source.rows - counted, ack, pruned)
        elif what is None and compared and source.passed is not None:
            ack, what = source.passed.entry, f"target {target} did not acknowledge this batch"
        if what is not None:
            problem = Problem(ack.chain, ack.sequence, str(uuid.UUID(bytes=ack.event_id)), what)
            return Comparison(chain, target, compared, 0, problem, passed_over, replayed)
        compared, counted = compared + 1, counted + ack.row_count
        passed_over += sum(count for name, count in ack.verdicts if name in _PASSED_OVER)
    if last is not None and last.ref_sequence < pruned:
        what = _hidden(pruned, f"target {target} has acknowledged up to {last.ref_sequence}")
        problem = Problem(last.chain, last.sequence, str(uuid.UUID(bytes=last.event_id)), what)
        return Comparison(chain, target, compared, 0, problem, passed_over, replayed)
    return Comparison(chain, target, compared, source.rest(), None, passed_over, replayed)


def _hidden(pruned: int, what: str) -> str:
    return f"the chain begins behind entry {pruned}, as if it was pruned there; {what} only"


class _Manifests:
    """The source's side as a queue: `find` moves forward and notes a batch that was passed over."""

    def __init__(self, entries: Iterable[StoredDocument]) -> None:
        self._entries = iter(entries)
        self.passed: StoredDocument | None = None
        self.rows = self._unfinished = 0
        """Changes of the batches so far, and of a transaction that is not complete."""

    def find(self, sequence: int) -> StoredDocument | None:
        """The manifest of this sequence; None when it is not there or already behind."""
        self.passed = None
        for stored in self._entries:
            entry = stored.entry
            self._count(entry)
            if entry.sequence == sequence:
                return stored if entry.event_type == REPLICATION_BATCH else None
            self._pass(stored)
        return None

    def _count(self, entry: AuditEntry) -> None:
        if entry.event_type == EPOCH_OPENED:
            self._unfinished = 0
        elif entry.event_type == REPLICATION_BATCH:
            self._unfinished += entry.row_count
            if not entry.continues:
                self.rows, self._unfinished = self.rows + self._unfinished, 0

    def rest(self) -> int:
        """Batches after the last one found, abandoned ones aside."""
        waiting: list[int] = []
        for stored in self._entries:
            if stored.entry.event_type == REPLICATION_BATCH:
                waiting.append(stored.entry.sequence)
            elif stored.entry.event_type == EPOCH_OPENED and stored.entry.ref_sequence:
                waiting = [sequence for sequence in waiting if sequence < stored.entry.ref_sequence]
        return len(waiting)

    def _pass(self, stored: StoredDocument) -> None:
        entry = stored.entry
        if entry.event_type == REPLICATION_BATCH:
            self.passed = self.passed or stored
        elif entry.event_type == EPOCH_OPENED and entry.ref_sequence and self.passed:
            # Fragments that were abandoned are nobody's to acknowledge.
            self.passed = self.passed if self.passed.entry.sequence < entry.ref_sequence else None


def _disagreement(manifest: StoredDocument | None, ack: AuditEntry) -> str | None:
    """What an acknowledgement says otherwise than its manifest, None when they agree."""
    if manifest is None:
        return f"names manifest {ack.ref_sequence}, which the source does not have there"
    if manifest.entry_hash != ack.ref_hash or manifest.entry.epoch != ack.ref_epoch:
        return (
            f"names manifest {ack.ref_sequence} with hash {ack.ref_hash.hex()}, "
            f"the source has {manifest.entry_hash.hex()}"
        )
    if ack.event_type in (BATCH_SKIPPED, BATCH_COVERED):
        return None
    unnamed = _unnamed(ack)
    if unnamed is not None:
        return unnamed
    wrong = [name for name in _SAME if getattr(manifest.entry, name) != getattr(ack, name)]
    if "merkle_root" in wrong:
        return (
            f"the target computed root {ack.merkle_root.hex()} for batch {ack.batch}, "
            f"the source signed {manifest.entry.merkle_root.hex()}"
        )
    return f"differs from manifest {ack.ref_sequence} in {', '.join(wrong)}" if wrong else None


def _unnamed(ack: AuditEntry) -> str | None:
    """What is passed over is named: the transactions of the detail sum to the verdicts."""
    try:
        named = Counter[str]()
        for one in json.loads(ack.detail).get("passed_over", ()):
            named[one["verdict"]] += one["changes"]
    except (KeyError, TypeError, ValueError):
        return "names the transactions it passes over in a way that cannot be read"
    said = {name: count for name, count in ack.verdicts if name in _PASSED_OVER}
    if said == named:
        return None
    return f"passes over {said}, the transactions it names have {dict(named)}"


def _replayed(entry: AuditEntry) -> int:
    """Changes of a parked transaction that was replayed; 0 where that cannot be read."""
    found = json.loads(entry.detail).get("changes")
    return found if isinstance(found, int) else 0


def _miscounted(rows: int, ack: AuditEntry, pruned: int) -> str | None:
    """What is passed over is counted: the source's chain up to there has as many changes, and no fewer.

    Of a pruned chain only those that are left can be counted again.
    """
    if ack.row_count == rows or (pruned and ack.row_count > rows):
        return None
    least = "at least " if pruned else ""
    return f"covers {ack.row_count} changes, it should be {least}{rows} up to manifest {ack.ref_sequence}"


def compare_nodes(
    source: Connection, target: Connection, chain: str | None = None, skip: Collection[str] = ()
) -> list[Comparison]:
    """Compare each chain of acknowledgements in `target` with its manifests, where `source` has them.

    `skip` names chains that do not verify by themselves: what they say is not compared.
    """
    out = []
    manifests = set(chain_names(source)) - set(skip)
    for name in chain_names(target):
        if name in skip:
            continue
        found = ack_target(name)
        if found and chain in (None, found[0], name) and found[0] in manifests:
            pruned = first_sequence(source, found[0]) - 1
            out.append(compare_roots(*found, iterate(source, found[0]), iterate(target, name), pruned))
    return out


def chain_names(conn: Connection) -> list[str]:
    """Every chain of this database's trail."""
    with errors("reading the audit trail"):
        rows = conn.execute("SELECT DISTINCT chain FROM vsql_sync.vsql_sync_audit ORDER BY 1").fetchall()
    return [name for (name,) in rows]


def first_sequence(conn: Connection, chain: str) -> int:
    """The first entry this database has of an own chain; 1 where it has none. verify.py holds the rest."""
    with errors("reading the audit trail"):
        row = conn.execute(
            "SELECT min(sequence) FROM vsql_sync.vsql_sync_audit WHERE chain = %s", (chain,)
        ).fetchone()
    return int(row[0]) if row is not None and row[0] is not None else 1


def compare_memory(
    conn: Connection, peer: Connection, peer_name: str, chain: str | None = None
) -> list[Problem]:
    """Hold this node's chains against what `peer` remembers of them: verified heads and applied batches."""
    with errors("reading what the peer remembers"):
        rows = peer.execute(
            "SELECT chain, sequence, entry_hash FROM vsql_sync.chain_heads WHERE NOT own"
            " UNION SELECT chain, sequence, entry_hash FROM vsql_sync.apply_progress"
            " UNION SELECT chain, sequence, NULL FROM vsql_sync.receipts ORDER BY 1, 2"
        ).fetchall()
    own = set(chain_names(conn)) | _remembered(conn)
    problems: dict[str, Problem] = {}
    last = {name: sequence for name, sequence, _ in rows}
    for name, sequence, entry_hash in rows:
        if name in own and chain in (None, name) and name not in problems:
            what = _still_there(conn, name, sequence, entry_hash, last[name])
            if what is not None:
                problems[name] = Problem(name, sequence, None, f"node {peer_name} remembers {what}")
    return list(problems.values())


def _remembered(conn: Connection) -> set[str]:
    with errors("reading remembered heads"):
        rows = conn.execute("SELECT chain FROM vsql_sync.chain_heads WHERE own").fetchall()
    return {name for (name,) in rows}


def _still_there(
    conn: Connection, chain: str, sequence: int, entry_hash: bytes | None, last: int
) -> str | None:
    """`last`: the highest entry that is remembered of this chain."""
    with errors("reading the audit trail"):
        rows = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = %s",
            (chain, sequence),
        ).fetchall()
    hashes = [document_hash(bytes(one)) for (one,) in rows]
    if not hashes and sequence < (first := first_sequence(conn, chain)):
        # That the chain may begin there is what verify.py holds.
        if last < first - 1:
            return _hidden(first - 1, f"entry {sequence} is remembered, and up to {last}")
        if sequence < first - 1:
            return None
        hashes = _followed(conn, chain, first)
    if not hashes:
        return f"entry {sequence}, which is not here: the chain was cut"
    if entry_hash is not None and bytes(entry_hash) not in hashes:
        return (
            f"entry {sequence} with hash {bytes(entry_hash).hex()}, which is not here: history was rewritten"
        )
    return None


def _followed(conn: Connection, chain: str, sequence: int) -> list[bytes]:
    """The hash of the entry before this one, as this one names it."""
    with errors("reading the audit trail"):
        rows = conn.execute(
            "SELECT prev_event_hash FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = %s",
            (chain, sequence),
        ).fetchall()
    return [bytes(one) for (one,) in rows]


def compare_receipts(
    conn: Connection,
    trust: TrustStore,
    node: str,
    chain: str | None = None,
    skip: Collection[str] = (),
) -> list[Problem]:
    """On a target: hold the receipts its applying transactions left against its acknowledgements.

    A receipt that is marked acknowledged has its entry, with the same root and verdicts; one that is not
    yet must have the root its manifest was signed with.
    """
    problems: dict[str, Problem] = {}
    with errors("reading the receipts"):
        rows = conn.execute(
            "SELECT chain, sequence, merkle_root, verdicts, acked, CASE WHEN NOT acked THEN manifest END"
            " FROM vsql_sync.receipts ORDER BY chain, sequence"
        ).fetchall()
    acks: Iterator[StoredDocument] = iter(())
    found: dict[int, AuditEntry] = {}
    current = None
    for name, sequence, root, verdicts, acked, manifest in rows:
        acks_name = ack_chain(name, node)
        if chain not in (None, name, acks_name) or name in problems or acks_name in skip:
            continue
        if name != current:
            current, acks = name, iterate(conn, acks_name)
            found = {}
        what = (
            _check_acked(acks, found, sequence, bytes(root), verdicts)
            if acked
            else _check_open(trust, name, bytes(manifest), _computed(bytes(root), verdicts))
        )
        if what is not None:
            problems[name] = Problem(name, sequence, None, what)
    return list(problems.values())


def _check_acked(
    acks: Iterator[StoredDocument],
    found: dict[int, AuditEntry],
    sequence: int,
    root: bytes,
    verdicts: dict[str, int],
) -> str | None:
    """Both run in the order of the manifests; what was read beyond the receipts is forgotten as they pass."""
    while sequence not in found and (stored := next(acks, None)) is not None:
        found.clear()
        if stored.entry.event_type == BATCH_APPLIED:
            found[stored.entry.ref_sequence] = stored.entry
        if stored.entry.ref_sequence > sequence:
            break
    ack = found.get(sequence)
    if ack is None:
        return "the receipt says it was acknowledged, and there is no acknowledgement"
    if ack.merkle_root != root:
        return f"the receipt has root {root.hex()}, the acknowledgement {ack.merkle_root.hex()}"
    if dict(ack.verdicts) != verdicts:
        return "the receipt and the acknowledgement have different verdicts"
    return None


def _computed(root: bytes, verdicts: dict[str, int]) -> bytes | None:
    """The root a receipt has; None where what came with a copy, or was skipped, has none of its own."""
    without = COVERED in verdicts or ("skipped" in verdicts and root == EMPTY_ROOT)
    return None if without else root


def _check_open(trust: TrustStore, chain: str, manifest: bytes, root: bytes | None) -> str | None:
    """`root` is None where this node computed none."""
    try:
        payload = open_document(trust, writer_of(chain), manifest, AUDIT_ENTRY, signed_place)
        entry = AuditEntry.decode(payload)
    except (DecodeError, SignatureError) as error:
        return f"its manifest does not verify: {error.message}"
    if root is not None and entry.merkle_root != root:
        return f"this node computed root {root.hex()}, the source signed {entry.merkle_root.hex()}"
    return None
