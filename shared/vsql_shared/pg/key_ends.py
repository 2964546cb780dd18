"""Where signing keys ended: this node's own, to be said in its chains, and peers', as their chains say it.

Not here: what an end is worth (crypto/signing.py), the entries' form (audit/key_ends.py), an operator's act
(signers.py). Rules:

* A row of `signed_ends` counts as far as its document does: a living key of the key's node signed it, and it
  says what the row says. Nobody who may write rows can move an end.
* The end of an own key that was revoked is fixed in the transaction of the act: what this node's table has by
  then. A thief's entry that lies in Kafka and not in the table is not in the chain.
* The end of an own key that was handed over: the last entry it signed in the chain the next key goes on with.
* Each chain says its own end; chains that nobody writes any more are named in all others of the node.
* What a former key said of those before it stays known here, for the next one to say again: the entries it
  was read from may have been pruned.
* An own key that was revoked, and has no entry in a chain, ended there before it began. So did one that was
  handed over before the stream was made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from vsql_shared.audit.chain_names import acknowledged, writer_of
from vsql_shared.audit.dsse import SignedDocument, document_hash
from vsql_shared.audit.entries import SIGNING_KEY_ENDED, ZERO_HASH
from vsql_shared.audit.key_ends import RETIRED, REVOKED, KeyEnd, lesser, living, require_handover, said_in
from vsql_shared.crypto.signing import End, PinnedKey
from vsql_shared.errors import ChainError, DecodeError, EnvironmentFault, RefusedError, SignatureError
from vsql_shared.names import ack_chain, advisory_key
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_shared.crypto.signing import Signer

_log = logging.getLogger(__name__)

_LOCK_KEY = 1987277165
"""As SQL 021 has it."""
_ROWS = (
    "SELECT fingerprint, chain, sequence, entry_hash, document FROM vsql_sync.signed_ends ORDER BY 1, 2, 3"
)
_NOTE = (
    "INSERT INTO vsql_sync.signed_ends (fingerprint, chain, sequence, entry_hash, said_by, document)"
    " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
)
# Chains this node writes: its streams' and its acknowledgements'.
_WRITTEN = (
    "SELECT chain, direction FROM vsql_sync.streams WHERE state <> 'FINISHED'"
    " AND (origin = %(node)s AND direction = 'out' OR direction = 'in')"
)
_SIGNED = (
    "SELECT DISTINCT ON (chain) chain, sequence, document FROM vsql_sync.vsql_sync_audit"
    " WHERE signer_key = %s ORDER BY chain, sequence DESC"
)


def with_ends(conn: Connection, keys: list[PinnedKey]) -> list[PinnedKey]:
    """These keys, with the ends that were signed since. All keys of a node must be among them."""
    if not any(key.ended for key in keys):
        return keys
    with errors("reading where signing keys ended"):
        cluster = conn.execute("SELECT cluster FROM vsql_sync.nodes WHERE is_local").fetchone()
        rows = conn.execute(_ROWS).fetchall()
        own: dict[str, dict[str, list[Any]]] = dict(
            conn.execute(
                "SELECT fingerprint, ended_heads FROM vsql_sync.signers"
                " WHERE revoked_at IS NOT NULL AND ended_heads <> '{}'"
            ).fetchall()
        )
    if cluster is None:
        return keys
    found: dict[str, dict[str, End]] = {}
    owner = {key.fingerprint: key.node for key in keys}
    alive = {node: tuple(sorted(living(keys, node).items())) for node in set(owner.values())}
    for print_, chain, sequence, entry_hash, document in rows:
        node = owner.get(print_, "")
        said = _said(bytes(document), cluster[0], node, alive.get(node, ()))
        end = End(sequence, bytes(entry_hash))
        if said is not None and said.key == print_ and said.ends.get(chain) == end:
            ends = found.setdefault(print_, {})
            ends[chain] = lesser(ends.get(chain), end)
    for print_, heads in own.items():
        fixed = {chain: End(sequence, bytes.fromhex(digest)) for chain, (sequence, digest) in heads.items()}
        found[print_] = found.get(print_, {}) | fixed
    return [replace(key, ends=found[key.fingerprint]) if key.fingerprint in found else key for key in keys]


@lru_cache(maxsize=1024)
def _said(document: bytes, cluster: str, node: str, alive: tuple[tuple[str, bytes], ...]) -> KeyEnd | None:
    """A service looks at its keys several times a second; a signature is verified once."""
    return said_in(document, cluster, node, dict(alive))


def note(
    conn: Connection, keys: Iterable[PinnedKey], cluster: str, node: str, encoded: bytes, chain: str = ""
) -> KeyEnd | None:
    """Remember an entry that says where a key of `node` ended; None when it says nothing that counts.

    With `chain`, only one that says it of this chain.
    """
    pins = list(keys)
    alive = living(pins, node)
    said = said_in(encoded, cluster, node, alive)
    ended = next((key for key in pins if said and (key.node, key.fingerprint) == (node, said.key)), None)
    if said is None or ended is None or not ended.ended or (chain and chain not in said.ends):
        return None
    signer = SignedDocument.decode(encoded).signer
    try:
        if said.handover:
            require_handover(said, cluster, node, ended.public_key, signer)
    except (DecodeError, SignatureError) as error:
        _log.error("an entry that says where a signing key ended does not count: %s", error)
        return None
    with errors("noting where a signing key ended"):
        for name, end in said.ends.items():
            conn.execute(_NOTE, (said.key, name, end.sequence, end.entry_hash, signer, encoded))
    return said


def unsaid(keys: Iterable[PinnedKey], node: str, chain: str) -> bool:
    """Whether a key of the node has ended, and the node has not said where it did in this chain."""
    return any(key.node == node and key.ended and chain not in key.ends for key in keys)


# This node's own keys


def require_announced(conn: Connection, former: str, following: str) -> None:
    """Raise RefusedError when a key that was handed over named another one than the next."""
    row = conn.execute("SELECT handover FROM vsql_sync.signers WHERE fingerprint = %s", (former,)).fetchone()
    if row is None or row[0] is None:
        return
    document = SignedDocument.decode(bytes(row[0]))
    if json.loads(document.payload).get("next") != following:
        raise RefusedError(
            f"key {former} was handed over to another key than {following}",
            hint="configure the key that was given to `syncctl key retire --next`",
        )


def hold_writers(conn: Connection) -> None:
    """Wait for entries that are being added; in the transaction that fixes an end."""
    conn.execute("SELECT pg_catalog.pg_advisory_xact_lock(%s::bigint)", (_LOCK_KEY,))


def require_drained(conn: Connection, owner: str) -> None:
    """Raise RefusedError while a worker writes a stream of this node; none begins in this transaction.

    Kafka is ahead of the table under load, and targets apply what Kafka has: an end that is fixed then leaves
    genuine entries behind it. A graceful stop records them all.
    """
    if not _is_local(conn, owner):
        return
    chains = conn.execute(
        "SELECT chain FROM vsql_sync.streams WHERE direction = 'out' AND state <> 'FINISHED' ORDER BY 1"
    ).fetchall()
    for (chain,) in chains:
        free = conn.execute(
            "SELECT pg_catalog.pg_try_advisory_xact_lock(%s::bigint)", (advisory_key(chain, "out"),)
        ).fetchone()
        if free is None or not free[0]:
            raise RefusedError(
                f"stream {chain} is at work: targets may have applied entries this node has not recorded",
                hint="stop the producer first, it records what it has sent; or give --now, and then"
                " `syncctl key trust` for what a target has beyond, before the next key is used",
            )


def fix_own(conn: Connection, owner: str, fingerprint: str) -> None:
    """The end of this node's own key is what its table has now; of another node's there is nothing to fix."""
    if not _is_local(conn, owner):
        return
    heads = {chain: [end.sequence, end.entry_hash.hex()] for chain, end in _signed(conn, fingerprint).items()}
    conn.execute(
        "UPDATE vsql_sync.signers SET ended_heads = %s WHERE fingerprint = %s", (Jsonb(heads), fingerprint)
    )


def move_own(conn: Connection, owner: str, fingerprint: str, chain: str, end: End) -> None:
    """An entry the table lacked is the own key's last one: told by a peer that has it."""
    if not _is_local(conn, owner):
        if any(key.fingerprint == fingerprint and chain in key.ends for key in load_own(conn, owner)):
            raise RefusedError(
                f"node {owner} has said, signed by its next key, where key {fingerprint} ended in {chain}",
                hint="what lies behind that does not count",
            )
        return
    _require_further(conn, fingerprint, chain, end)
    said = conn.execute(
        "SELECT 1 FROM vsql_sync.vsql_sync_audit WHERE chain = %s AND sequence > coalesce("
        " (SELECT (ended_heads -> %s::text ->> 0)::bigint FROM vsql_sync.signers WHERE fingerprint = %s), 0)"
        " LIMIT 1",
        (chain, chain, fingerprint),
    ).fetchone()
    if said is not None:
        raise RefusedError(
            f"chain {chain} has gone on behind the end of key {fingerprint}: it cannot be moved any more",
            hint="targets that hold more are to be initialised anew",
        )
    conn.execute(
        "UPDATE vsql_sync.signers SET ended_heads = ended_heads || jsonb_build_object(%s::text, %s::jsonb)"
        " WHERE fingerprint = %s",
        (chain, Jsonb([end.sequence, end.entry_hash.hex()]), fingerprint),
    )


def _require_further(conn: Connection, fingerprint: str, chain: str, end: End) -> None:
    """Raise RefusedError unless an end lies behind the present one: entries that count stay so."""
    row = conn.execute(
        "SELECT (ended_heads -> %s::text ->> 0)::bigint FROM vsql_sync.signers WHERE fingerprint = %s",
        (chain, fingerprint),
    ).fetchone()
    present = int(row[0] or 0) if row is not None else 0
    if end.sequence <= present:
        raise RefusedError(
            f"key {fingerprint} counts up to entry {present} of chain {chain} already",
            hint="an end is only ever moved further; give the highest entry that a target has",
        )


def _is_local(conn: Connection, node: str) -> bool:
    row = conn.execute("SELECT node_id FROM vsql_sync.nodes WHERE is_local").fetchone()
    return row is not None and row[0] == node


def _signed(conn: Connection, fingerprint: str) -> dict[str, End]:
    """Chain → the last entry a key signed in this node's table."""
    with errors("looking for the last entries of a signing key"):
        rows = conn.execute(_SIGNED, (fingerprint,)).fetchall()
    return {chain: End(sequence, document_hash(bytes(document))) for chain, sequence, document in rows}


def require_signing(conn: Connection, signer: Signer | None) -> None:
    """Raise EnvironmentFault when this node's configured key has ended here: it signs nothing any more."""
    if signer is None:
        return
    with errors("looking whether the signing key has ended"):
        row = conn.execute(
            "SELECT CASE WHEN revoked_at IS NOT NULL THEN 'revoked' ELSE 'retired' END FROM vsql_sync.signers"
            " WHERE fingerprint = %s AND coalesce(revoked_at, retired_at) IS NOT NULL",
            (signer.fingerprint,),
        ).fetchone()
    if row is not None:
        raise EnvironmentFault(
            f"the configured signing key {signer.fingerprint} was {row[0]} on this node",
            hint="point audit.signing_key_path (or _label) at the next one, `syncctl node init`, restart",
        )


def own_pins(conn: Connection, node: str, chain: str) -> list[PinnedKey]:
    """Whose signatures count on a chain of this node: its keys, each up to where it ended.

    A key that was handed over counts as if it lived, until the next one has said where it ended; not in a
    chain that was made later.
    """
    keys = load_own(conn, node)
    if not unsaid(keys, node, chain):
        return keys
    with errors("looking which ends of keys were said"):
        row = conn.execute("SELECT cluster FROM vsql_sync.nodes WHERE is_local").fetchone()
    if row is None:
        return keys
    learn(conn, keys, row[0], node, _own_words(conn))
    keys = load_own(conn, node)
    told = _told(conn, row[0], node, keys)
    return [_as_own(conn, chain, key, told.get(key.fingerprint, {})) for key in keys]


def _as_own(conn: Connection, chain: str, key: PinnedKey, told: Mapping[str, End]) -> PinnedKey:
    """An own key for a reader of one chain, with its end there as far as this node can know it."""
    if not key.ended or chain in key.ends:
        return key
    if chain in told:
        return replace(key, ends={**key.ends, chain: told[chain]})
    if _never_signed(conn, chain, key):
        return replace(key, ends={**key.ends, chain: End(0, ZERO_HASH)})
    return key if key.revoked else replace(key, retired_at=None)


def _never_signed(conn: Connection, chain: str, key: PinnedKey) -> bool:
    """Whether nothing an ended own key signed in a chain can count: the table has nothing of it.

    What a retired one signed may still lie in Kafka alone, unless the stream is younger than its end.
    """
    if _is_pruned(conn, chain):
        return False
    with errors("looking whether a key signed in a chain"):
        row = conn.execute(
            "SELECT EXISTS (SELECT FROM vsql_sync.vsql_sync_audit WHERE chain = %(chain)s"
            " AND signer_key = %(key)s), EXISTS (SELECT FROM vsql_sync.streams s JOIN vsql_sync.signers k"
            " ON k.fingerprint = %(key)s WHERE s.chain IN (%(chain)s::text, %(acknowledged)s::text)"
            " AND s.created_at > k.retired_at)",
            {"chain": chain, "key": key.fingerprint, "acknowledged": acknowledged(chain)},
        ).fetchone()
    return row is not None and not row[0] and (key.revoked or bool(row[1]))


def _own_words(conn: Connection) -> list[bytes]:
    """What this node's chains say of keys, in its own table."""
    with errors("looking which ends of keys were said"):
        rows = conn.execute(
            # Also what was kept when a chain was pruned.
            "SELECT document FROM vsql_sync.audit_documents WHERE event_type = %s AND chain IS NOT NULL",
            (SIGNING_KEY_ENDED,),
        ).fetchall()
    return [bytes(document) for (document,) in rows]


def _told(conn: Connection, cluster: str, node: str, keys: Iterable[PinnedKey]) -> dict[str, dict[str, End]]:
    """Key → chain → its end, as any of this node's keys said it in this node's own table."""
    pins = {key.fingerprint: key.public_key for key in keys if key.node == node}
    told: dict[str, dict[str, End]] = {}
    for document in _own_words(conn):
        said = said_in(document, cluster, node, pins)
        if said is None:
            continue
        ends = told.setdefault(said.key, {})
        ends |= {chain: lesser(ends.get(chain), end) for chain, end in said.ends.items()}
    return told


def load_own(conn: Connection, node: str) -> list[PinnedKey]:
    """This node's keys, as they are."""
    from vsql_shared.pg import signers

    return signers.load(conn, node)


def owed(
    conn: Connection, cluster: str, node: str, chain: str, signer: Signer | None
) -> list[dict[str, Any]]:
    """Details of the entries this chain has yet to say, signed by `signer`; what is said is remembered."""
    keys = load_own(conn, node)
    ended = [
        key for key in keys if key.ended and signer is not None and key.fingerprint != signer.fingerprint
    ]
    if not ended or signer is None:
        return []
    said: dict[str, set[str]] = {}
    with errors("looking which ends of keys a chain says"):
        rows = conn.execute(
            # Also what was kept when the chain was pruned.
            "SELECT document FROM vsql_sync.audit_documents WHERE chain = %s AND event_type = %s"
            " ORDER BY sequence",
            (chain, SIGNING_KEY_ENDED),
        ).fetchall()
    for (document,) in rows:
        found = said_in(bytes(document), cluster, node, {signer.fingerprint: signer.public_key})
        if found is not None:
            said.setdefault(found.key, set()).update(found.ends)
            note(conn, keys, cluster, node, bytes(document))
    details: list[dict[str, Any]] = []
    told = _told(conn, cluster, node, keys)
    for key in ended:
        if chain not in said.get(key.fingerprint, ()):
            details += _ends_of(conn, node, chain, key, told.get(key.fingerprint, {})).as_details()
    return details


def _ends_of(
    conn: Connection, node: str, chain: str, key: PinnedKey, told_before: Mapping[str, End]
) -> KeyEnd:
    """What `chain` says of a key: its own end, and those of chains that nobody writes any more."""
    # One that was revoked before ends were fixed has none.
    ends = {
        **told_before,
        **(key.ends if key.revoked and key.ends else _signed(conn, key.fingerprint)),
    }
    with errors("looking which chains are written"):
        rows = conn.execute(_WRITTEN, {"node": node}).fetchall()
        row = conn.execute(
            "SELECT handover FROM vsql_sync.signers WHERE fingerprint = %s", (key.fingerprint,)
        ).fetchone()
    written = {ack_chain(name, node) if direction == "in" else name for name, direction in rows}
    told = {name: end for name, end in ends.items() if name not in written and _is_of(name, node)}
    handover = bytes(row[0]) if row is not None and row[0] is not None and not key.revoked else b""
    if chain in ends or not _is_pruned(conn, chain):
        told[chain] = ends.get(chain, End(0, ZERO_HASH))
    return KeyEnd(key.fingerprint, REVOKED if key.revoked else RETIRED, told, handover)


def _is_pruned(conn: Connection, chain: str) -> bool:
    """Whether a key's entries may be there no more: then it cannot be said that it signed none."""
    with errors("looking where a chain was pruned"):
        row = conn.execute("SELECT 1 FROM vsql_sync.audit_bases WHERE chain = %s", (chain,)).fetchone()
    return row is not None


def _is_of(chain: str, node: str) -> bool:
    try:
        return writer_of(chain) == node
    except ChainError:
        return False


def learn(
    conn: Connection, keys: Iterable[PinnedKey], cluster: str, node: str, documents: Iterable[bytes]
) -> bool:
    """Note what documents of a chain say of its writer's keys; whether any says something."""
    pins, learned = list(keys), False
    for encoded in documents:
        learned = note(conn, pins, cluster, node, encoded) is not None or learned
    return learned
