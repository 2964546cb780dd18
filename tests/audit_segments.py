"""Segments and bases of chains for tests, made of real histories and keys. Not a test itself."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.audit_history import CLUSTER, A, B, History
from vsql_shared.audit.base import GONE, Base, Kept
from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead, advance
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.export_format import FORMAT, VERSION, readable
from vsql_shared.audit.tree import root_of
from vsql_shared.crypto.signing import Signer

AT = 1_760_100_000
"""Seconds since 1970 at which cosigners sign."""
KEYS = [("node-a", A.public_key), ("node-b", B.public_key)]


def head_at(history: History, size: int) -> ChainHead:
    """The chain's head behind so many entries."""
    head = EMPTY_HEAD
    for made in history.entries[:size]:
        head = advance(head, made.entry, made.entry_hash)
    return head


def note(history: History, size: int, *by: Signer) -> str:
    """The checkpoint of so many entries, signed by these; by writer and target when none are named."""
    head = Checkpoint(Log(CLUSTER, history.chain), size, root_of(head_at(history, size).tree))
    signed = None
    for one in by or (B, A):
        signed = head.sign(one, AT) if signed is None else head.signed_by(one, AT, signed)
    assert signed is not None
    return signed.encode()


def base(history: History, size: int, *by: Signer) -> Base:
    """Where the chain begins when so many entries are pruned."""
    named = {name for one in history.entries[:size] for name in one.entry.tables_affected}
    kept = Kept()
    for one in history.entries[:size]:
        kept = kept if one.entry.event_type in GONE else kept.take(one.entry_hash)
    return Base(head_at(history, size), note(history, size, *by), tuple(sorted(named)), kept)


def segment(history: History, first: int, last: int) -> list[dict[str, Any]]:
    """The lines of a segment, as values."""
    made = history.entries[first - 1 : last]
    start = head_at(history, first - 1)
    entries = [
        {
            "entry": {
                "chain": history.chain,
                "sequence": one.entry.sequence,
                "hash": one.entry_hash.hex(),
                "kafka_offset": one.entry.sequence,
                "document": base64.b64encode(one.encoded).decode(),
                "entry": json.loads(json.dumps(readable(one.entry))),
            }
        }
        for one in made
    ]
    end = {
        "entries": len(made),
        "first_sequence": first,
        "before": [one.hex() for one in start.tree],
        "last_sequence": last,
        "last_hash": made[-1].entry_hash.hex(),
        "checkpoint": note(history, last),
    }
    header = {"format": FORMAT, "version": VERSION, "cluster": CLUSTER, "node": "node-a"}
    return [
        {"header": header},
        *entries,
        {"end": {"entries": len(made), "chains": {history.chain: end}}},
    ]


def encoded(lines: list[dict[str, Any]]) -> bytes:
    """The bytes of a segment."""
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in lines)
