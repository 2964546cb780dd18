"""Where the origin's signing keys ended, as its chain says: read ahead, and remembered.

Not here: what such an entry must be (audit/key_ends.py). Rules (docs/design/0025):

* What a chain says of an end is looked for where it is needed before its turn comes: whenever a stream is
  opened, and every few seconds while it is refused, in what it has not read yet; and in all of it where
  something is refused. Only a signature by a
  living key of the origin counts there.
* Of entries before an end those count that lead to it. The partition is read once more, to know which.
* What is learned makes the stream be opened anew with it, as if an operator had changed the keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from vsql_consumers import state
from vsql_consumers.source import read_chain
from vsql_shared import names
from vsql_shared.audit.key_ends import WayFinder
from vsql_shared.crypto.signing import PinnedKey, TrustStore, Way
from vsql_shared.errors import TransientError
from vsql_shared.pg import key_ends, signers

if TYPE_CHECKING:
    from vsql_consumers.means import Means
    from vsql_consumers.state import Stream
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

_log = logging.getLogger(__name__)
_WATCH_SECONDS = 3.0


def look_at_start(settings: Settings, conn: Connection, stream: Stream) -> list[PinnedKey]:
    """The pinned keys, with what the chain says of their end behind the stream's place in it.

    A retired key's entry counts by its time until then: what a thief laid there must not come first.
    """
    begin = state.load_position(conn, stream.chain).audit_offset
    return look_ahead(settings, conn, stream, signers.load(conn), begin)


def look_ahead(
    settings: Settings, conn: Connection, stream: Stream, trusted: Sequence[PinnedKey], begin: int = 0
) -> list[PinnedKey]:
    """The pinned keys now, with ends of keys that the chain says from an offset up to where it is now."""
    if key_ends.unsaid(trusted, stream.origin, stream.chain):
        place = (settings.cluster.name, stream.origin)
        if key_ends.learn(conn, signers.load(conn), *place, _read(settings, stream, begin)):
            _log.warning(
                "the chain says where a signing key of its writer ended", extra={"chain": stream.chain}
            )
    return signers.load(conn)


def watch(
    settings: Settings, conn: Connection, stream: Stream, trusted: Sequence[PinnedKey]
) -> Callable[[], bool]:
    """Whether the origin has other keys since a stream was refused, or has said where one of them ended.

    A source's next key is pinned before it has said anything. Asked at most every few seconds.
    """
    due = time.monotonic() + _WATCH_SECONDS

    def of_origin(keys: Sequence[PinnedKey]) -> list[PinnedKey]:
        return [key for key in keys if key.node == stream.origin]

    def altered() -> bool:
        nonlocal due
        if time.monotonic() < due:
            return False
        due = time.monotonic() + _WATCH_SECONDS
        with suppress(TransientError):  # Kafka is away: asked again
            return of_origin(look_at_start(settings, conn, stream)) != of_origin(trusted)
        return False

    return altered


def trust_of(
    settings: Settings, conn: Connection, stream: Stream, trusted: Sequence[PinnedKey]
) -> TrustStore:
    """Whose signatures count, and which entries lead to ends that are still to be read."""
    unsigned = not settings.is_prod
    store = TrustStore(trusted, allow_unsigned=unsigned)
    position = state.load_position(conn, stream.chain)
    if store.proven_from(stream.origin, stream.chain) <= position.head.sequence:
        return store
    way = _way(settings, stream, trusted, position.head.sequence)
    return TrustStore(trusted, allow_unsigned=unsigned, ways={stream.chain: way})


def _way(settings: Settings, stream: Stream, trusted: Sequence[PinnedKey], after: int) -> Way:
    ends = [
        key.ends[stream.chain] for key in trusted if key.node == stream.origin and stream.chain in key.ends
    ]
    finder = WayFinder(stream.chain, after, max(ends))
    for document in _read(settings, stream, 0):
        finder.feed(document)
    return finder.way()


def _read(settings: Settings, stream: Stream, begin: int) -> Iterator[bytes]:
    cluster, chain = settings.cluster.name, stream.chain
    group = names.group_id(cluster, chain, settings.cluster.node_name)
    place = (names.audit_topic(cluster), stream.audit_partition)
    for _, document in read_chain(settings, f"vsql-sync-ends-{chain}", group, place, chain, begin):
        yield document


def take(means: Means, encoded: bytes) -> None:
    """An entry whose turn has come. What it says is remembered before anything behind it is applied."""
    stream, conn = means.stream, means.control
    place = (means.settings.cluster.name, stream.origin)
    if key_ends.note(conn, signers.load(conn), *place, encoded):
        _log.warning("a signing key of node %s ended", stream.origin, extra={"chain": stream.chain})
