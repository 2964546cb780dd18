"""Every name vsql-sync gives to things outside of it: topics, chains, slots, origins, groups.

Pure. One place, because producer, consumer and syncctl must agree to the letter.
"""

from __future__ import annotations

import hashlib

# Kafka allows 249 characters in a topic name; the rest of a longer one is replaced by a hash.
_TOPIC_MAX = 249
_KEPT = _TOPIC_MAX - 33  # of a name that is too long; a dash and 32 hex digits follow
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-")


def topic_part(name: str) -> str:
    """Escape one part of a topic name: every byte outside [a-z0-9-] becomes `_xx` (hex).

    So 'Order Items' and 'order_items' cannot meet in one topic.
    """
    return "".join(chr(b) if b in _PLAIN else f"_{b:02x}" for b in name.encode())


def _topic(*parts: str) -> str:
    full = ".".join(topic_part(part) for part in parts)
    if len(full) <= _TOPIC_MAX:
        return full
    digest = hashlib.sha256(full.encode()).hexdigest()[:32]
    return f"{full[:_KEPT]}-{digest}"


def topic_prefix(text: str) -> str:
    """What every topic's name begins with whose parts begin like this, shortened names included."""
    return text[:_KEPT]


def live_chain(publication: str, origin: str) -> str:
    """Chain (and stream) of a publication's changes, signed by the origin node."""
    return f"{publication}.{origin}"


def live_chain_of(chain: str) -> str:
    """The live chain that a chain of the same stream belongs to; neither part of its name holds a dot."""
    return ".".join(chain.split(".")[:2])


def copy_chain(publication: str, origin: str, target: str) -> str:
    """Chain of a first copy for one target, signed by the origin node."""
    return f"{publication}.{origin}.copy.{target}"


def ack_chain(chain: str, target: str) -> str:
    """Chain of a target's acknowledgements of `chain`, signed by the target node."""
    return f"{chain}.ack.{target}"


def data_topic(cluster: str, chain: str, schema: str, table: str) -> str:
    """One table's topic in a stream: `<cluster>.<publication>.<origin>[.copy.<target>].<schema>.<table>`."""
    return _topic(cluster, *chain.split("."), schema, table)


def audit_topic(cluster: str) -> str:
    """Compacted topic with every chain's entries."""
    return _topic(cluster, "audit")


def keys_topic(cluster: str) -> str:
    """Compacted topic with the announcements of data keys."""
    return _topic(cluster, "keys")


def parked_topic(cluster: str) -> str:
    """Dead-letter topic: sealed batches that operators set aside. No data topic has so few parts."""
    return _topic(cluster, "parked")


def clocks_topic(cluster: str) -> str:
    """Questions and answers about the time, worth nothing after a minute. No data topic has so few parts."""
    return _topic(cluster, "clocks")


def clock_key(asker: str, answerer: str, kind: str) -> bytes:
    """Kafka key of a question, or of its answer: one for each pair and direction."""
    return f"{asker}/{answerer}/{kind}".encode()


def audit_key(chain: str, epoch: int, incarnation: bytes, sequence: int) -> bytes:
    """Kafka key of an audit entry; unique, so that compaction removes nothing."""
    return f"{chain}/{epoch}/{incarnation.hex()}/{sequence}".encode()


def group_id(cluster: str, chain: str, target: str) -> str:
    """Consumer group under which the target commits its offsets, for ordinary lag tools."""
    return f"vsql-sync.{cluster}.{chain}.{target}"


def _digest16(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def slot_name(cluster: str, publication: str, origin: str, target: str = "*") -> str:
    """Replication slot: `vsql_` and 16 hex digits; at most 63 bytes whatever the names are."""
    return f"vsql_{_digest16(cluster, publication, origin, target)}"


def origin_name(cluster: str, publication: str, origin: str, target: str) -> str:
    """Replication origin under which `target` applies the stream."""
    return f"vsql_{_digest16(cluster, publication, origin, target)}"


def advisory_key(chain: str, direction: str) -> int:
    """Key of the session advisory lock that admits one worker per stream and direction (signed 64 bits)."""
    digest = hashlib.sha256(f"vsql-sync\0{chain}\0{direction}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
