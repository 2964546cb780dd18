"""`python -m vsql_consumers --tail CHAIN`: print a stream's changes, verified and opened, as JSON lines.

It applies and acknowledges nothing: a reader beside the stream, for somebody who holds the keys. Rules:

* What is printed went through the same verification as what is applied; the first refusal ends it.
* It begins after what this node applied, or with --from-start where the chain begins.
* Rows go to standard output only, never to a log.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vsql_consumers import render, state
from vsql_consumers.collect import Collector
from vsql_consumers.source import Source
from vsql_consumers.state import Position
from vsql_consumers.unseal import Announcements, Descriptor, open_batch
from vsql_consumers.verify import verify_batch
from vsql_shared import names
from vsql_shared.audit.chain import ChainReader
from vsql_shared.changes import OpenedBatch
from vsql_shared.config import check_files, load_settings
from vsql_shared.crypto.announce import KeyRing
from vsql_shared.crypto.signing import PinnedKey, TrustStore
from vsql_shared.errors import RefusedError, TransientError, VsqlSyncError
from vsql_shared.kms import open_provider, open_signer
from vsql_shared.observe.logging import setup
from vsql_shared.observe.process import harden
from vsql_shared.pg import signers
from vsql_shared.pg.connect import Connection, connect, errors

if TYPE_CHECKING:
    from vsql_shared.config import Settings

_POLL_SECONDS = 0.2


def main(argv: list[str]) -> int:
    """Print changes until --limit, Ctrl-C, or an error; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vsql_consumers --tail")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--tail", required=True, metavar="CHAIN")
    parser.add_argument("--from-start", action="store_true")
    parser.add_argument("--limit", type=int, default=0)
    args = parser.parse_args(argv)
    harden()
    try:
        settings = load_settings(args.config)
        check_files(settings)
        setup("warning", settings.log.format, service="tail", stream=args.tail)
        _print(Tail(settings, args.tail, from_start=args.from_start), args.limit)
    except KeyboardInterrupt:
        return 130
    except VsqlSyncError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _print(tail: Tail, limit: int) -> None:
    printed = 0
    for batch in tail.batches():
        for change in render.changes(batch):
            sys.stdout.write(json.dumps(change, ensure_ascii=False) + "\n")
            printed += 1
            if printed == limit:
                return
        sys.stdout.flush()


class Tail:
    """Reads one chain, of this node or of a peer."""

    def __init__(self, settings: Settings, chain: str, *, from_start: bool) -> None:
        self._settings, self._chain = settings, chain
        with (
            connect(
                settings.connection.conninfo("consumer"), application_name=f"vsql-sync tail {chain}"
            ) as conn,
            errors("reading the stream's progress"),
        ):
            self._origin, self._partition, incoming = _stream(conn, chain)
            self._trust = TrustStore(
                [*signers.load(conn), *_own_key(settings)], allow_unsigned=not settings.is_prod
            )
            begin = incoming and not from_start
            self._position = state.load_position(conn, chain) if begin else Position()
            self._known: dict[bytes, Descriptor] = state.load_descriptors(conn, chain) if begin else {}

    def batches(self) -> Iterator[OpenedBatch]:
        """Every batch from here on; never ends by itself."""
        settings, chain = self._settings, self._chain
        cluster = settings.cluster.name
        audit, keys = (names.audit_topic(cluster), self._partition), (names.keys_topic(cluster), 0)
        at = self._position
        collector = Collector(
            ChainReader(cluster, chain, self._origin, self._trust, at.head),
            self._trust,
            audit,
            at.audit_offset,
            at.offsets,
            settings.limits.collect_buffer_bytes,
        )
        announced = Announcements(cluster, chain, self._origin, self._trust, KeyRing())
        provider = open_provider(settings.encryption.kms, strict=settings.is_prod)
        name = f"vsql-sync-tail-{os.getpid()}"
        source = Source(settings, name, name)
        try:
            source.assign([(*keys, -1)])
            self._pump(source, collector, announced, until=source.ends(*keys)[1])
            source.assign_all([(*audit, at.audit_offset), *collector.wanted()])
            while True:
                self._pump(source, collector, announced)
                while (ready := collector.next_ready()) is not None:
                    if ready.entry is None or not ready.parts:
                        continue
                    verified = verify_batch(ready.entry, ready.parts, self._origin)
                    if not announced.knows(ready.entry.dek_id):
                        self._pump(source, collector, announced, until=source.ends(*keys)[1])
                    key = announced.open(ready.entry, provider)
                    opened, new = open_batch(verified, key, self._known, ready.entry_hash)
                    self._known.update(new)
                    yield opened
        finally:
            source.close()
            provider.close()

    def _pump(
        self, source: Source, collector: Collector, announced: Announcements, until: int | None = None
    ) -> None:
        """Take what has arrived; with `until`, go on to that offset of the keys topic."""
        keys = (names.keys_topic(self._settings.cluster.name), 0)
        while True:
            polled = source.poll(_POLL_SECONDS)
            if polled.lost:
                raise TransientError(f"topic {polled.lost[0].topic} no longer has what the chain names")
            for record in polled.records:
                if (record.topic, record.partition) == keys:
                    announced.feed(*record)
                else:
                    collector.feed(record.topic, record.partition, record.offset, record.value)
            for end in polled.ends:
                collector.delivered(end.topic, end.partition, end.offset)
            source.assign_all(collector.wanted())
            flow = collector.flow()
            source.pause(flow.pause)
            source.resume(flow.resume)
            if until is None or announced.next_offset >= until:
                return


def _own_key(settings: Settings) -> list[PinnedKey]:
    """This node's own key, for its outgoing streams."""
    signer = open_signer(settings)
    if signer is None:
        return []
    return [PinnedKey(signer.node, signer.public_key, signer.fingerprint, revoked=False)]


def _stream(conn: Connection, chain: str) -> tuple[str, int, bool]:
    """(origin, audit partition, whether this node applies it). Raises RefusedError for an unknown stream."""
    rows = conn.execute(
        "SELECT origin, audit_partition, direction = 'in' FROM vsql_sync.streams WHERE chain = %s"
        " ORDER BY direction",
        (chain,),
    ).fetchall()
    if not rows:
        raise RefusedError(f"this node knows no stream {chain!r}", hint="see `syncctl status`")
    return rows[0][0], rows[0][1], rows[0][2]
