"""The way back of a transaction that was parked: read, verified, opened and applied once more.

Not here: how it got there (parking.py). Rules (docs/design/0011):

* The topic is not believed: a manifest must have the hash that was written down when it was verified, and
  everything else must be what the manifest says. Records that others wrote between ours are not looked at.
* The keys topic is read once, for the data keys of all of it. Records an operator ignores are none.
* It is one target transaction, which also says that it was done: a second one finds that and changes nothing.
* Of the batches' other transactions, and of sequences, nothing is written again.
* A signed entry says so afterwards; a crash in between leaves that to the next start.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from psycopg.types.json import Jsonb

from vsql_consumers.parking import MANIFEST, Lies, prefix
from vsql_consumers.source import read_records
from vsql_consumers.unseal import Announcements, Descriptor, open_batch
from vsql_consumers.verify import Pack, Part, record_name, verify_batch
from vsql_shared import failpoints, lsn, names
from vsql_shared.audit.dsse import document_hash
from vsql_shared.audit.entries import TRANSACTION_REPLAYED, AuditEntry
from vsql_shared.audit.rows import microseconds, parse
from vsql_shared.changes import Op, OpenedBatch, Transaction
from vsql_shared.crypto.announce import KeyRing
from vsql_shared.errors import DecodeError, DivergedError, RecordError, RefusedError
from vsql_shared.pg.connect import Connection, errors
from vsql_shared.wire.pack import decode_header, decode_relation, relation_hash

if TYPE_CHECKING:
    from vsql_consumers.acknowledge import Acknowledger
    from vsql_consumers.apply import Applier
    from vsql_consumers.means import Means
    from vsql_consumers.state import Position

_OFFSET = re.compile("0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class _Batch:
    """A row of parked_batches."""

    sequence: int
    entry_hash: bytes
    lies: Lies
    dek_id: str
    known: Mapping[bytes, Descriptor]


class Replay:
    """Brings one parked transaction back."""

    def __init__(self, means: Means, decision: int, ignored: Collection[tuple[str, int, int]]) -> None:
        """`ignored`: records an operator had passed over."""
        self._means, self._decision, self._ignored = means, decision, ignored

    def run(self, applier: Applier, position: Position) -> str:
        """Apply it and say so, in one transaction; what came of it, in words. None may be open.

        Raises RefusedError when there is no such transaction, and whatever verifying and applying raise.
        """
        with errors("reading what is parked"):
            transaction, before = self._load()
        if before:
            return f"it was replayed before, at {before}"
        verdicts: dict[str, int] = {}
        try:
            with errors("reading what is parked"):
                batches = self._batches()
            keys = self._announced({batch.dek_id for batch in batches})
            for batch in batches:
                opened = self._open(batch, transaction, keys)
                for name, count in applier.apply([opened], late=True)[0].items():
                    verdicts[name] = verdicts.get(name, 0) + count
            failpoints.hit("consumer.before-replay-commit")
            applier.finish(
                position.head.lsn_end, transaction.commit_time, lambda conn: self._note(conn, verdicts)
            )
        except BaseException:
            applier.abort()
            raise
        failpoints.hit("consumer.after-replay-commit")
        return "replayed: " + ", ".join(f"{count} {name}" for name, count in sorted(verdicts.items()))

    def _load(self) -> tuple[Transaction, str]:
        """The transaction, and when it was replayed: "" for not yet."""
        row = self._means.control.execute(
            "SELECT xid, commit_lsn::text, commit_time, replayed_at FROM vsql_sync.parked"
            " WHERE decision = %s AND chain = %s",
            (self._decision, self._means.stream.chain),
        ).fetchone()
        if row is None:
            raise RefusedError(f"nothing is parked under decision {self._decision}")
        when = "" if row[3] is None else row[3].isoformat()
        return Transaction(row[0], lsn.parse(row[1]), microseconds(row[2])), when

    def _batches(self) -> list[_Batch]:
        rows = self._means.control.execute(
            "SELECT sequence, entry_hash, topic, offsets, dek_id, descriptors"
            " FROM vsql_sync.parked_batches WHERE decision = %s ORDER BY sequence",
            (self._decision,),
        ).fetchall()
        return [
            _Batch(sequence, bytes(digest), Lies(topic, offsets), dek_id, _descriptors(encoded))
            for sequence, digest, topic, offsets, dek_id, encoded in rows
        ]

    def _announced(self, dek_ids: Collection[str]) -> Announcements:
        """The announcements of data keys: the keys topic is read from its beginning."""
        means, settings = self._means, self._means.settings
        cluster, stream = settings.cluster.name, means.stream
        ring = KeyRing(1, settings.encryption.dek.cached_for.total_seconds())
        found = Announcements(cluster, stream.chain, stream.origin, means.trust, ring)
        group = names.group_id(cluster, stream.chain, stream.target)
        wanted, place = {name.encode() for name in dek_ids}, (names.keys_topic(cluster), 0)
        for offset, key, value in read_records(settings, "vsql-sync-replay-keys", group, place, 0):
            if key in wanted and (*place, offset) not in self._ignored:
                found.feed(*place, offset, key, value)
        return found

    def _open(self, batch: _Batch, transaction: Transaction, keys: Announcements) -> OpenedBatch:
        """Read, verify and open a batch; everything but the transaction is left out."""
        means, settings = self._means, self._means.settings
        group = names.group_id(settings.cluster.name, means.stream.chain, means.stream.target)
        place, client = (batch.lies.topic, 0), f"vsql-sync-replay-{means.stream.chain}"
        ours, last = set(batch.lies.offsets), batch.lies.offsets[-1]
        records = read_records(settings, client, group, place, batch.lies.offsets[0])
        found = {
            key.decode(errors="replace"): value
            for offset, key, value in takewhile(lambda record: record[0] <= last, records)
            if offset in ours and key is not None and value is not None
        }
        entry = _manifest(found, batch)
        verified = verify_batch(entry, list(_parts(found, entry)), means.stream.origin)
        key = keys.open(entry, means.provider)
        opened, _ = open_batch(verified, key, batch.known, batch.entry_hash)
        if transaction not in opened.transactions:
            raise RecordError(f"batch {opened.batch} does not have the transaction", record=str(place))
        return only(opened, transaction)

    def _note(self, conn: Connection, verdicts: dict[str, int]) -> None:
        done = conn.execute(
            "UPDATE vsql_sync.parked SET replayed_at = now(), verdicts = %s"
            " WHERE decision = %s AND replayed_at IS NULL",
            (Jsonb(verdicts), self._decision),
        )
        if done.rowcount != 1:
            raise DivergedError("a parked transaction was replayed by somebody else meanwhile")


def only(opened: OpenedBatch, transaction: Transaction) -> OpenedBatch:
    """The batch without what is not of this transaction, and without values of sequences.

    Tables that only others changed are not asked for: they may be gone by now.
    """
    wanted = opened.transactions.index(transaction)
    kept = [
        at
        for at, (number, op) in enumerate(zip(opened.tx_of, opened.ops, strict=True))
        if number == wanted and op != Op.SEQUENCE
    ]
    opened.tx_of = [wanted] * len(kept)
    opened.relation_of = [opened.relation_of[at] for at in kept]
    opened.plaintexts = [opened.plaintexts[at] for at in kept]
    opened.ops = [opened.ops[at] for at in kept]
    return opened


def _descriptors(encoded: Iterable[bytes]) -> dict[bytes, Descriptor]:
    texts = [bytes(text) for text in encoded]
    return {relation_hash(text): Descriptor(decode_relation(text), text) for text in texts}


def _manifest(found: Mapping[str, bytes], batch: _Batch) -> AuditEntry:
    """The manifest that was verified when the batch was parked. Raises RecordError when it is not there."""
    for key, value in found.items():
        if key.endswith(f"/{MANIFEST}") and document_hash(value) == batch.entry_hash:
            return parse(value).entry
    raise RecordError(
        f"the parked manifest {batch.sequence} is not in the dead-letter topic, or was altered",
        record=record_name(batch.lies.topic, 0, batch.lies.offsets[0]),
        hint="records were deleted or overwritten; what was parked cannot be replayed",
    )


def _parts(found: Mapping[str, bytes], entry: AuditEntry) -> Iterator[Part]:
    """The packs of each partition the manifest names; whether they are those it means is verified next."""
    start = prefix(entry.chain, entry.epoch, entry.batch)
    for root in entry.partitions:
        here = f"{start}/{root.topic}/{root.partition}/"
        ends = (key.removeprefix(here) for key in found if key.startswith(here))
        offsets = sorted(int(end) for end in ends if _OFFSET.fullmatch(end))
        packs = []
        for offset in offsets:
            message = found[f"{here}{offset}"]
            try:
                header, body = decode_header(message)
            except DecodeError as error:
                raise RecordError(error.message, record=f"{here}{offset}") from error
            packs.append(Pack(offset, message, header, body))
        yield Part(root, packs)


def sign_replays(conn: Connection, chain: str, acknowledger: Acknowledger) -> None:
    """Put into this node's chain which transactions were replayed, each once."""
    with errors("reading what was replayed"):
        rows = conn.execute(
            "SELECT decision, xid, commit_lsn::text, verdicts FROM vsql_sync.parked"
            " WHERE chain = %s AND replayed_at IS NOT NULL AND NOT replay_signed ORDER BY replayed_at",
            (chain,),
        ).fetchall()
    for decision, xid, at, verdicts in rows:
        detail = {
            "decision": decision,
            "xid": xid,
            "lsn": at,
            "changes": sum(verdicts.values()),
            "verdicts": verdicts,
        }
        acknowledger.say(TRANSACTION_REPLAYED, detail, _Signed(decision))


@dataclass(frozen=True, slots=True)
class _Signed:
    """Notes, in the transaction of the entry, that it was written."""

    decision: int

    def __call__(self, conn: Connection) -> None:
        conn.execute("UPDATE vsql_sync.parked SET replay_signed = true WHERE decision = %s", (self.decision,))
