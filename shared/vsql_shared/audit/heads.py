"""Tree heads of chains and proofs of entries, from this node's tables.

Not here: signing (checkpoint.py) and the arithmetic (tree.py). Rules:

* An own chain's head is given only after every entry up to it was held: by its links, and the last signature.
* Of a peer's chain this node has no entries: its head is the one its reader remembers, which verified each
  entry as it came.
* What a proof is made of is read in one pass, in memory that does not grow with the chain; no proof is given
  that does not verify.
* A pruned chain begins behind its base, which is verified (bases.py); of what lies below, nothing is signed.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from vsql_shared.audit.bases import linked_start, require_online
from vsql_shared.audit.checkpoint import Checkpoint, Log, split_view
from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.links import broken, follow, require_signed
from vsql_shared.audit.merkle import leaf_hash, verify_inclusion
from vsql_shared.audit.proofs import ConsistencyProof, InclusionProof, require_prefix
from vsql_shared.audit.tree import (
    MAX_SIZE,
    consistency_ranges,
    decode_tree,
    inclusion_ranges,
    is_known,
    range_roots,
    root_of,
    tree_of,
)
from vsql_shared.audit.verify import PAGE
from vsql_shared.errors import ChainError, RecordError, RefusedError
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import TrustStore

_HINT = "`syncctl audit list` shows the chains and entries there are"


def entry_hashes(conn: Connection, chain: str) -> Generator[bytes]:
    """The hash of each entry of an own chain, from its first row on; the caller holds a transaction."""
    with closing(read_documents(conn, chain)) as documents:
        for document in documents:
            yield document_hash(document)


def read_documents(conn: Connection, chain: str) -> Generator[bytes]:
    """Each signed document of an own chain, from its first row on; the caller holds a transaction.

    Raises ChainError where two rows have one place: in which order they come would be chance.
    """
    last = 0
    with conn.cursor(name="vsql_sync_documents") as cursor:
        cursor.itersize = PAGE
        cursor.execute(
            "SELECT sequence, document FROM vsql_sync.vsql_sync_audit WHERE chain = %s ORDER BY sequence",
            (chain,),
        )
        for sequence, document in cursor:
            if sequence == last:
                raise broken(chain, sequence, "two rows have this place")
            last = sequence
            yield bytes(document)


def own_checkpoint(conn: Connection, trust: TrustStore, log: Log, size: int | None = None) -> Checkpoint:
    """The head of an own chain, whole or at a size.

    Every entry is held by the links and by the signature of the last one (links.py). Raises ChainError,
    SignatureError or DecodeError where it is not, RefusedError where there are not so many entries.
    """
    head = _held(conn, trust, log, size)
    if not head.size:
        raise RefusedError(f"this node has no entries of chain {log.chain}", hint=_HINT)
    if size not in (None, head.size):
        raise RefusedError(f"chain {log.chain} has {head.size} entries, not {size}", hint=_HINT)
    return head


def _held(conn: Connection, trust: TrustStore, log: Log, size: int | None) -> Checkpoint:
    """The head at a size, or at the end where there are not so many entries."""
    with (
        errors("reading the audit trail"),
        conn.transaction(),
        closing(read_documents(conn, log.chain)) as found,
    ):
        start = linked_start(conn, log)
        if size is not None:
            require_online(start.size, size, log.chain)
        linked = follow(islice(found, None if size is None else size - start.size), log, start)
    if linked.last:  # else it is the base itself, whose checkpoint is signed
        require_signed(linked, log, trust)
    return Checkpoint(log, linked.size, root_of(linked.tree))


def own_head(conn: Connection, log: Log, size: int) -> Checkpoint:
    """The head of an own chain at a size it has; the entries are hashed, not verified."""
    with (
        errors("reading the audit trail"),
        conn.transaction(),
        closing(entry_hashes(conn, log.chain)) as hashes,
    ):
        start = linked_start(conn, log)
        require_online(start.size, size, log.chain)
        tree, found = tree_of(islice(hashes, size - start.size), start.tree, start.size)
    if found != size:
        raise RefusedError(f"chain {log.chain} has {found} entries, not {size}", hint=_HINT)
    return Checkpoint(log, size, root_of(tree))


def remembered_checkpoint(conn: Connection, log: Log) -> Checkpoint:
    """The head up to which this node has verified a peer's chain. Raises RefusedError where there is none."""
    with errors("reading what this node remembers of a chain"):
        row = conn.execute(
            "SELECT sequence, tree FROM (SELECT chain, sequence, tree FROM vsql_sync.apply_progress"
            " UNION ALL SELECT chain, sequence, tree FROM vsql_sync.chain_heads WHERE NOT own) h"
            " WHERE chain = %s ORDER BY sequence DESC LIMIT 1",
            (log.chain,),
        ).fetchone()
    if row is None:
        raise RefusedError(
            f"this node has verified nothing of chain {log.chain}, which node {log.writer} writes", hint=_HINT
        )
    sequence, tree = int(row[0]), decode_tree(bytes(row[1]))
    if not is_known(tree, sequence):
        raise RefusedError(
            f"this node remembers entry {sequence} of chain {log.chain} without its tree",
            hint="an earlier version stored its position; it has one once the stream is initialised anew",
        )
    return Checkpoint(log, sequence, root_of(tree))


def require_own(conn: Connection, trust: TrustStore, claimed: Checkpoint) -> Checkpoint:
    """Raise ChainError ("split view") unless a checkpoint somebody has is one of this own chain.

    One of more entries than there are is no less: the trail was cut, or somebody was shown another one.
    """
    mine = _held(conn, trust, claimed.log, claimed.size)
    if mine.size < claimed.size:
        raise split_view(claimed, f"this node has {mine.size} entries: its trail was cut, or is another one")
    if mine.root != claimed.root:
        raise split_view(claimed, f"this node's entries have root {mine.root.hex()}")
    return mine


def place_of(conn: Connection, name: str) -> tuple[str, int]:
    """Chain and sequence of an entry named `CHAIN/SEQUENCE` or by its event_id. Raises RefusedError."""
    chain, mark, number = name.rpartition("/")
    event = sequence = None
    if mark and number.isascii() and number.isdecimal():
        sequence = min(int(number), MAX_SIZE)
    else:
        try:
            event = uuid.UUID(name)
        except ValueError:
            raise RefusedError(
                f"{name!r} names no entry", hint="CHAIN/SEQUENCE or an event_id does"
            ) from None
    with errors("reading the audit trail"):
        row = conn.execute(
            "SELECT chain, sequence FROM vsql_sync.vsql_sync_audit"
            " WHERE event_id = %s OR (chain = %s AND sequence = %s) LIMIT 1",
            (event, chain, sequence),
        ).fetchone()
    if row is None:
        if sequence is not None:
            require_online(_pruned_up_to(conn, chain) + 1, sequence, chain)
        raise RefusedError(f"this node has no entry {name}", hint=_HINT)
    return str(row[0]), int(row[1])


def _pruned_up_to(conn: Connection, chain: str) -> int:
    row = conn.execute("SELECT max(size) FROM vsql_sync.audit_bases WHERE chain = %s", (chain,)).fetchone()
    return int(row[0]) if row is not None and row[0] is not None else 0


def prove_entry(conn: Connection, sequence: int, checkpoint: Checkpoint, note: str) -> InclusionProof:
    """The proof that an own entry is in the tree of `checkpoint`, of which `note` is the signed form."""
    log = checkpoint.log
    if sequence > checkpoint.size:
        raise RefusedError(
            f"entry {sequence} of chain {log.chain} is not below a checkpoint of {checkpoint.size} entries",
            hint="take a later checkpoint",
        )
    wanted = inclusion_ranges(sequence - 1, checkpoint.size)
    with errors("reading the audit trail"), conn.transaction():
        row = conn.execute(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence = %s",
            (log.chain, sequence),
        ).fetchone()
        start = linked_start(conn, log)
        require_online(start.size + 1, sequence, log.chain)
        with closing(entry_hashes(conn, log.chain)) as hashes:
            path = range_roots(hashes, wanted, start.tree, start.size)
    document = bytes(row[0]) if row else b""
    with _as_held(log):
        leaf = leaf_hash(document_hash(document))
        verify_inclusion(sequence - 1, checkpoint.size, leaf, path, checkpoint.root)
    return InclusionProof(document, sequence - 1, tuple(path), note)


def prove_prefix(conn: Connection, old: Checkpoint, new: Checkpoint, note: str) -> ConsistencyProof:
    """The proof that `old` is a prefix of `new`, of which `note` is the signed form."""
    if old.log != new.log or old.size > new.size:
        raise RefusedError(
            f"{old.size} entries of {old.log.chain} are no prefix of {new.size} of {new.log.chain}",
            hint="give the earlier checkpoint first",
        )
    wanted = consistency_ranges(old.size, new.size) if old.size else []
    with (
        errors("reading the audit trail"),
        conn.transaction(),
        closing(entry_hashes(conn, new.log.chain)) as hashes,
    ):
        start = linked_start(conn, new.log)
        require_online(start.size, old.size or start.size, new.log.chain)
        path = range_roots(hashes, wanted, start.tree, start.size)
    with _as_held(new.log):
        require_prefix(old, new, tuple(path))
    return ConsistencyProof(old.size, tuple(path), note)


@contextmanager
def _as_held(log: Log) -> Iterator[None]:
    """What a proof is read from was held in an earlier transaction. Raises ChainError if it changed since."""
    try:
        yield
    except RecordError as error:
        raise ChainError(
            f"chain {log.chain} changed after it was checked: {error.message}",
            record=log.chain,
            hint="no proof is given; `syncctl audit verify` says which entry does not verify",
        ) from error
