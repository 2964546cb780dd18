"""Audit entries: the payload of every document of a chain, as values and as canonical bytes.

Not here: signatures (dsse.py) and order (chain.py). Rules:

* The fields are exactly those of schemas/avro/audit_entry.avsc.
* An entry is checked whenever it is encoded or decoded: lists sorted and free of duplicates, numbers in
  range, texts without NUL (PostgreSQL cannot store it), roots and sums that agree with each other. What
  the checks refuse has never been signed by a correct writer.
* One content, one encoding: decoding encodes again and compares.
* No row value is in an entry; `detail` is a canonical JSON object of names, counts and reasons.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Final, Self

import fastavro

from vsql_shared.audit.merkle import EMPTY_ROOT, batch_root
from vsql_shared.changes import PartitionRoot
from vsql_shared.crypto.signing import Signed
from vsql_shared.errors import DecodeError, ProtocolError
from vsql_shared.wire.pack import schema

FORMAT = 1
ZERO_HASH = bytes(32)

EPOCH_OPENED: Final = "epoch_opened"
REPLICATION_BATCH: Final = "replication_batch"
COPY_STARTED: Final = "copy_started"
COPY_FINISHED: Final = "copy_finished"
BATCH_APPLIED: Final = "batch_applied"
BATCH_REFUSED: Final = "batch_refused"
BATCH_SKIPPED: Final = "batch_skipped"
BATCH_COVERED: Final = "batch_covered"
OPERATOR_ACTION: Final = "operator_action"
KEY_ROTATED: Final = "key_rotated"
KEY_DESTROYED: Final = "key_destroyed"
TRANSACTION_REPLAYED: Final = "transaction_replayed"
CHECKPOINT_COSIGNED: Final = "checkpoint_cosigned"
TRAIL_PRUNED: Final = "trail_pruned"
SIGNING_KEY_ENDED: Final = "signing_key_ended"
EVENT_TYPES = frozenset(
    {
        EPOCH_OPENED,
        REPLICATION_BATCH,
        COPY_STARTED,
        COPY_FINISHED,
        BATCH_APPLIED,
        BATCH_REFUSED,
        BATCH_SKIPPED,
        BATCH_COVERED,
        OPERATOR_ACTION,
        KEY_ROTATED,
        KEY_DESTROYED,
        TRANSACTION_REPLAYED,
        CHECKPOINT_COSIGNED,
        TRAIL_PRUNED,
        SIGNING_KEY_ENDED,
    }
)
"""What this version writes. Readers accept other types too: they link the chain and bring no batch."""

BATCH_EVENTS = frozenset({REPLICATION_BATCH, BATCH_APPLIED, BATCH_SKIPPED, BATCH_COVERED})
"""Events that bring a chain's batch number and position forward, when they carry a batch."""

COVERED: Final = "covered"
"""Verdict on changes that came with the first copy; their records were not read."""

SHREDDED: Final = "shredded"
"""Verdict on changes whose data key was destroyed on purpose; their records were not opened."""

VERDICTS = ("applied", COVERED, "displaced", "lost", "missing", "parked", SHREDDED, "skipped")

MAX_DETAIL_SIZE = 64 << 10
"""Bytes of `detail`."""
_MAX_LONG = (1 << 63) - 1
_MAX_INT = (1 << 31) - 1
_MAX_TIME = 253_402_300_800_000_000 - 1  # microseconds; the last of year 9999, where datetime ends
_MAX_EVENT_TYPE = 64


def canonical_json(value: Mapping[str, Any]) -> str:
    """JSON as `detail` must have it: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


ORDER: Final = "order"
"""Key in the detail of a manifest; BY_ROW is the one value it may have."""
BY_ROW: Final = "row"
"""The batch needs no other order than that of each row, which its partition keeps: members may apply it side
by side. Any other batch is applied alone, in the order of the source."""

LAST: Final = "last"
"""Key in the detail of a manifest: xid and commit time (µs) of the transaction that ends at batch_lsn_end. A
position alone could be another transaction's, in a source restored from a snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One entry of a chain. Hashes and UUIDs are raw bytes, times µs since 1970, positions ints.

    The defaults are what entries without a batch carry.
    """

    format: int = FORMAT
    cluster: str
    chain: str
    epoch: int
    incarnation: bytes
    sequence: int
    event_id: bytes
    event_type: str
    event_timestamp: int
    source_node_id: str
    target_node_id: str = "*"
    batch_lsn_start: int
    batch_lsn_end: int
    tables_affected: tuple[str, ...] = ()
    row_count: int = 0
    contains_pci: bool = False
    pci_columns: tuple[str, ...] = ()
    dek_id: str = ""
    kek_id: str = ""
    algorithm: str = ""
    merkle_root: bytes = EMPTY_ROOT
    prev_event_hash: bytes
    signer_node_id: str
    batch: int = 0
    record_count: int = 0
    continues: bool = False
    partitions: tuple[PartitionRoot, ...] = ()
    system_identifier: str = ""
    timeline: int = 0
    ref_epoch: int = 0
    ref_sequence: int = 0
    ref_hash: bytes = ZERO_HASH
    target_lsn: int = 0
    verdicts: tuple[tuple[str, int], ...] = ()
    detail: str = "{}"

    def encode(self) -> bytes:
        """Canonical Avro. Raises ProtocolError when the entry breaks a rule of its format."""
        check(self)
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        record["partitions"] = [asdict(part) for part in self.partitions]
        record["verdicts"] = [{"name": name, "count": count} for name, count in self.verdicts]
        out = io.BytesIO()
        try:
            fastavro.schemaless_writer(out, schema("audit_entry"), record)
        except (ValueError, TypeError, OverflowError, AttributeError, KeyError) as error:
            raise ProtocolError(f"audit entry cannot be encoded: {type(error).__name__}") from error
        return out.getvalue()

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Parse a payload. Raises DecodeError: garbage, another format, a broken rule, not canonical."""
        try:
            raw: Any = fastavro.schemaless_reader(io.BytesIO(payload), schema("audit_entry"), None)
        except Exception as error:  # fastavro raises many types on garbage; all mean the same here
            raise DecodeError(f"not an audit entry: {type(error).__name__}") from error
        if raw["format"] != FORMAT:
            raise DecodeError(
                f"audit entry of format {raw['format']}, expected {FORMAT}", hint="upgrade this node"
            )
        for name in ("tables_affected", "pci_columns"):
            raw[name] = tuple(raw[name])
        raw["partitions"] = tuple(PartitionRoot(**part) for part in raw["partitions"])
        raw["verdicts"] = tuple((verdict["name"], verdict["count"]) for verdict in raw["verdicts"])
        entry = cls(**raw)
        try:
            encoded = entry.encode()
        except ProtocolError as error:
            raise DecodeError(error.message) from error
        if encoded != payload:
            raise DecodeError("audit entry is not in its canonical encoding")
        return entry


def signed_place(payload: bytes) -> Signed:
    """Where and when an entry says it was signed. Raises DecodeError."""
    entry = AuditEntry.decode(payload)
    return Signed(entry.chain, entry.sequence, entry.event_timestamp)


_CHAIN_SCHEMA: Any = None


def peek_chain(payload: bytes) -> tuple[str, str]:
    """Give (cluster, chain) from the start of an unverified payload. Raises DecodeError.

    Cheap, to pass over the entries of other chains in a shared partition; nothing else may be read from it.
    """
    global _CHAIN_SCHEMA  # noqa: PLW0603  # parsed once, from the schema file, when first needed
    if _CHAIN_SCHEMA is None:
        whole = schema("audit_entry")
        head = [{"name": f["name"], "type": f["type"]} for f in whole["fields"][:3]]
        _CHAIN_SCHEMA = fastavro.parse_schema({"type": "record", "name": "AuditEntryHead", "fields": head})
    try:
        raw: Any = fastavro.schemaless_reader(io.BytesIO(payload), _CHAIN_SCHEMA, None)
    except Exception as error:  # as in decode
        raise DecodeError(f"not an audit entry: {type(error).__name__}") from error
    if raw["format"] != FORMAT:
        raise DecodeError(
            f"audit entry of format {raw['format']}, expected {FORMAT}", hint="upgrade this node"
        )
    return raw["cluster"], raw["chain"]


def check(entry: AuditEntry) -> None:
    """Raise ProtocolError when an entry breaks a rule of its own format; the message names the field."""
    _check_texts(entry)
    _check_numbers(entry)
    _check_lists(entry)
    _check_detail(entry.detail)
    _check_batch(entry)


def _refuse(field: str, problem: str) -> ProtocolError:
    return ProtocolError(f"audit entry, field {field}: {problem}")


_TEXTS = (
    "cluster",
    "chain",
    "event_type",
    "source_node_id",
    "target_node_id",
    "dek_id",
    "kek_id",
    "algorithm",
    "signer_node_id",
    "system_identifier",
    "detail",
)
_NEVER_EMPTY = ("cluster", "chain", "event_type", "source_node_id", "target_node_id", "signer_node_id")
_LONGS = (
    "batch_lsn_start",
    "batch_lsn_end",
    "row_count",
    "batch",
    "record_count",
    "ref_epoch",
    "ref_sequence",
    "target_lsn",
)
_SIZES = (
    ("incarnation", 16),
    ("event_id", 16),
    ("merkle_root", 32),
    ("prev_event_hash", 32),
    ("ref_hash", 32),
)


def _check_texts(entry: AuditEntry) -> None:
    for name in _TEXTS:
        if "\0" in getattr(entry, name):
            raise _refuse(name, "holds a NUL character")
    for name in _NEVER_EMPTY:
        if not getattr(entry, name):
            raise _refuse(name, "is empty")
    if len(entry.event_type) > _MAX_EVENT_TYPE:
        raise _refuse("event_type", f"longer than {_MAX_EVENT_TYPE} characters")


def _check_numbers(entry: AuditEntry) -> None:
    for name in _LONGS:
        if not 0 <= getattr(entry, name) <= _MAX_LONG:
            raise _refuse(name, f"{getattr(entry, name)} is out of range")
    for name in ("epoch", "sequence"):
        if not 1 <= getattr(entry, name) <= _MAX_LONG:
            raise _refuse(name, f"{getattr(entry, name)}, expected 1 or more")
    if not 0 <= entry.event_timestamp <= _MAX_TIME:
        raise _refuse("event_timestamp", f"{entry.event_timestamp} is out of range")
    if not 0 <= entry.timeline <= _MAX_INT:
        raise _refuse("timeline", f"{entry.timeline} is out of range")
    if entry.batch_lsn_start > entry.batch_lsn_end and not entry.continues:
        raise _refuse("batch_lsn_end", "is before batch_lsn_start")
    for name, size in _SIZES:
        if len(getattr(entry, name)) != size:
            raise _refuse(name, f"{len(getattr(entry, name))} bytes, expected {size}")


def _must_ascend(field: str, keys: Sequence[Any]) -> None:
    if any(left >= right for left, right in pairwise(keys)):
        raise _refuse(field, "is not sorted, or holds a duplicate")


def _check_lists(entry: AuditEntry) -> None:
    for name in ("tables_affected", "pci_columns"):
        values: tuple[str, ...] = getattr(entry, name)
        _must_ascend(name, values)
        if any("\0" in value or not value for value in values):
            raise _refuse(name, "holds an empty name or a NUL character")
    if entry.pci_columns and not entry.contains_pci:
        raise _refuse("contains_pci", f"false with {len(entry.pci_columns)} pci_columns")
    _must_ascend("verdicts", [name for name, _ in entry.verdicts])
    for name, count in entry.verdicts:
        if not name or "\0" in name or not 0 <= count <= _MAX_LONG:
            raise _refuse("verdicts", "holds an empty name or a count out of range")
    _must_ascend("partitions", [(part.topic, part.partition) for part in entry.partitions])
    for part in entry.partitions:
        _check_partition(part)


def _check_partition(part: PartitionRoot) -> None:
    where = f"partitions, {part.topic!r}/{part.partition}"
    if not part.topic or "\0" in part.topic or not 0 <= part.partition <= _MAX_INT:
        raise _refuse(where, "is no topic-partition")
    if not 0 <= part.first_offset <= part.last_offset <= _MAX_LONG:
        raise _refuse(where, f"offsets {part.first_offset} to {part.last_offset}")
    # Every pack holds at least one record and takes an offset of its own.
    if not 1 <= part.packs <= min(part.records, part.last_offset - part.first_offset + 1):
        raise _refuse(where, f"{part.packs} packs for {part.records} records")
    if part.records > _MAX_LONG or len(part.sub_root) != 32:
        raise _refuse(where, "its record count or sub_root is out of range")


def _check_detail(detail: str) -> None:
    if len(detail) > MAX_DETAIL_SIZE:
        raise _refuse("detail", f"longer than {MAX_DETAIL_SIZE} characters")
    try:
        value = json.loads(detail)
        canonical = canonical_json(value) if isinstance(value, dict) else ""
    except (ValueError, RecursionError) as error:
        raise _refuse("detail", f"is not JSON: {type(error).__name__}") from error
    if canonical != detail:
        raise _refuse("detail", "is not a canonical JSON object; build it with canonical_json()")


def _check_batch(entry: AuditEntry) -> None:
    """Hold together what a batch says of itself: its root, its counts, its verdicts."""
    if entry.event_type == REPLICATION_BATCH:
        if not entry.batch or not entry.partitions:
            raise _refuse("batch", "a manifest has a batch number and partitions")
        if sum(part.records for part in entry.partitions) != entry.record_count:
            raise _refuse("record_count", "is not the sum of the partitions' records")
        if batch_root([part.sub_root for part in entry.partitions]) != entry.merkle_root:
            raise _refuse("merkle_root", "is not the root over the partitions' sub_roots")
        if entry.row_count > entry.record_count:
            raise _refuse("row_count", "is larger than record_count")
    elif entry.event_type in (BATCH_APPLIED, BATCH_COVERED):
        if not entry.batch or not entry.ref_epoch or not entry.ref_sequence:
            raise _refuse("ref_sequence", "an acknowledgement names a batch and its manifest")
        if sum(count for _, count in entry.verdicts) != entry.row_count:
            raise _refuse("verdicts", "do not sum to row_count")
    elif not entry.batch and (entry.merkle_root != EMPTY_ROOT or entry.row_count or entry.partitions):
        raise _refuse("merkle_root", "an entry without a batch carries the empty tree and no rows")
