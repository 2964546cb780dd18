"""Every parser of bytes from outside, as one function from bytes, with valid inputs to begin from.

Not here: who mutates them (tests/unit/test_parser_mutations.py, tests/fuzz/__main__.py). Rules:

* A parser gets any bytes. It may raise an error of ours that says whose bytes are wrong (`REFUSALS`), nothing
  else, and gives what it accepts back unchanged when that is encoded again.
* Seeds are made by the product's own encoders or by hand after PostgreSQL's manual; none is stored.
* A target whose bytes are protected (signatures, tags) also exists with the protection made anew around the
  altered bytes, so that mutations reach what lies behind it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from tests.audit_history import CHAIN, CLUSTER, A, ordinary, trust
from tests.audit_segments import KEYS as SEGMENT_KEYS
from tests.audit_segments import base, encoded, segment
from tests.fuzz import bundles, clock_messages, log_files
from tests.unit import sealed_chain
from tests.unit.apply_tuples import UNSENT, delete, insert, tuple_data, update
from vsql_consumers import frames
from vsql_consumers.fold import fold, only_inserts
from vsql_producers import pgoutput
from vsql_producers.batches import Batches, BatchLimits
from vsql_producers.pgoutput import RelationMessage, TypeMessage
from vsql_producers.seal import PackLimits, Place, Relations, arrange, seal
from vsql_producers.transactions import Descriptor, Messages, Transactions
from vsql_shared.audit.base import Base
from vsql_shared.audit.chain import EMPTY_HEAD
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.dsse import AUDIT_ENTRY, SignedDocument, document_hash, sign_document
from vsql_shared.audit.entries import AuditEntry, canonical_json, peek_chain, signed_place
from vsql_shared.audit.rows import StoredDocument, columns_of
from vsql_shared.audit.segment import Place as SegmentPlace
from vsql_shared.audit.segment import lines, log_of, verify
from vsql_shared.audit.shredding import Covered, ShredOrder, keys_hash
from vsql_shared.changes import MESSAGES, Column, Op, Relation, TableName, Transaction
from vsql_shared.crypto.announce import MEDIA_TYPE, decode_announcement, encode_announcement, unwrap
from vsql_shared.crypto.dek import KeyLimits, SealingKey
from vsql_shared.errors import DecodeError, DivergedError, EnvironmentFault, ProtocolError, VerificationError
from vsql_shared.wire.framing import frame, without_frame
from vsql_shared.wire.pack import (
    CLEAR,
    PackHeader,
    SealedTuple,
    decode_header,
    decode_relation,
    decode_tuples,
    encode_header,
    encode_pack,
    encode_relation,
    header_digest,
    length_prefix,
    relation_hash,
)
from vsql_shared.wire.signals import (
    LogicalMessage,
    SequenceState,
    SequenceValue,
    decode_message,
    decode_sequence,
    encode_message,
    encode_sequence,
)

REFUSALS = (ProtocolError, VerificationError, DivergedError, EnvironmentFault)
"""What a parser may answer with. Everything else that leaves it is a fault of the parser."""

_PLACE = Place("c", "pub.node-a", "node-a", 1)
_TABLE, _TRANSACTION = TableName("public", "t"), Transaction(7, 8, 9)
_HEADER = PackHeader("c", "pub.node-a", "node-a", _TABLE, 0, 1, 2, "dek-1", bytes(32), (_TRANSACTION,))
_WAL = b"w" + bytes(24)
SEGMENT_LOG = Log(CLUSTER, CHAIN)


class Parser(NamedTuple):
    """`run` parses; `seeds` are inputs it accepts."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]


def check(parser: Parser, data: bytes) -> bool:
    """Whether the parser accepts the bytes. Raises what no parser may raise."""
    try:
        parser.run(data)
    except REFUSALS:
        return False
    return True


# What the walsender sends


def _wal_messages() -> list[bytes]:
    columns = b"\x01id\0" + struct.pack(">Ii", 23, -1) + b"\x00v\0" + struct.pack(">Ii", 25, -1)
    return [
        b"B" + struct.pack(">QqI", 500, 7, 42),
        b"O" + struct.pack(">Q", 9) + b"far\0",
        b"Y" + struct.pack(">I", 16400) + b"public\0mood\0",
        b"R" + struct.pack(">I", 77) + b"public\0t\0d" + struct.pack(">H", 2) + columns,
        b"I" + struct.pack(">I", 77) + insert([b"\0\0\0\1", "text"])[1],
        b"U" + struct.pack(">I", 77) + update([b"\0\0\0\2", UNSENT], [b"\0\0\0\1", None])[1],
        b"D" + struct.pack(">I", 77) + delete([b"\0\0\0\2", None])[1],
        b"T" + struct.pack(">IBI", 1, 3, 77),
        b"M" + struct.pack(">BQ", 1, 400) + b"app\0" + struct.pack(">i", 5) + b"hello",
        b"C" + struct.pack(">BQQq", 0, 500, 530, 7),
        b"M" + struct.pack(">BQ", 0, 600) + b"app\0" + struct.pack(">i", 0),
    ]


def _control_frames() -> list[bytes]:
    return [_WAL + message for message in _wal_messages() if message[:1] not in b"IUD"] + [b"k" + bytes(17)]


def _pgoutput(data: bytes) -> None:
    """One frame. What is no frame may be a keepalive."""
    if data[:1] == b"k":
        pgoutput.decode_keepalive(data)
    else:
        pgoutput.decode(data)


def _frames_of(data: bytes) -> list[bytes]:
    """A session of the walsender: each message behind two bytes of length, the frame's head added."""
    out, at = [], 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        out.append(_WAL + data[at + 2 : at + 2 + size])
        at += 2 + size
    return out


def _session(*messages: bytes) -> bytes:
    return b"".join(len(message).to_bytes(2, "big") + message for message in messages)


def _describe(message: RelationMessage, types: Mapping[int, TypeMessage]) -> Descriptor | None:
    if message.table == "unpublished":
        return None
    columns = tuple(
        Column(c.name, c.key, c.type_oid, c.typmod, types[c.type_oid].name if c.type_oid in types else "text")
        for c in message.columns
    )
    return _descriptor(Relation(TableName(message.schema, message.table), message.replica_identity, columns))


def _descriptor(relation: Relation) -> Descriptor:
    encoded = encode_relation(relation)
    return Descriptor(relation.name, encoded, relation_hash(encoded))


def _walsender(data: bytes) -> None:
    """A whole session up to sealed packs, which must decode: whatever it sends, we never publish garbage."""
    messages = Messages(frozenset({"app"}), _descriptor(Relation(MESSAGES, "n", ())))
    transactions = Transactions(_describe, 100, messages=messages)
    batches, relations = Batches(BatchLimits(3, 300, 0.0)), Relations()
    key = SealingKey.generate(_PLACE.cluster, _PLACE.chain, 1, KeyLimits())
    frames_ = _frames_of(data)
    for half in (frames_[: len(frames_) // 2], frames_[len(frames_) // 2 :]):
        for run in transactions.feed(half):
            for batch in [*batches.add(run, 0.0), *batches.due(1.0)]:
                parts = arrange(batch, relations, 64)
                for topic in seal(batch, parts, 1, key, _PLACE, PackLimits(4, 500, 64)).topics:
                    for message in topic.messages:
                        _decode_pack(message)


def _sessions() -> list[bytes]:
    begin, origin, type_, relation, row, change, gone, truncate, inner, commit, outer = _wal_messages()
    return [
        _session(type_, begin, relation, row, change, gone, truncate, inner, commit, outer),
        _session(begin, origin, relation, row, commit, outer),
        _session(begin, relation, *[row] * 9, relation, gone, commit),
    ]


# What lies on the data topics


def _decode_pack(data: bytes) -> tuple[PackHeader, list[SealedTuple]]:
    header, body = decode_header(data)
    return header, decode_tuples(data, body, header_digest(data[:body]))


def _pack_of(header: PackHeader, tuples: Sequence[SealedTuple]) -> bytes:
    records = [
        CLEAR.pack(t.tx, t.lsn, t.index, bytes((t.op,)))
        + t.nonce
        + length_prefix(len(t.ciphertext))
        + t.ciphertext
        for t in tuples
    ]
    return encode_pack(encode_header(header), records)


def _pack(data: bytes) -> None:
    header, tuples = _decode_pack(data)
    again = _decode_pack(_pack_of(header, tuples))
    # The header has several encodings, so leaves may differ; the content may not.
    assert again[0] == header
    assert [t[:6] for t in again[1]] == [t[:6] for t in tuples]


def _packs() -> list[bytes]:
    tuples = [SealedTuple(0, 5, at, Op.INSERT, bytes(12), bytes(16 + at * 3000), b"", b"") for at in range(4)]
    several = _HEADER._replace(transactions=tuple(Transaction(x, x * 10, x) for x in range(5)))
    return [_pack_of(_HEADER, tuples), _pack_of(_HEADER, tuples[:1]), _pack_of(several, tuples[1:3])]


def _framed(data: bytes) -> None:
    """As a consumer takes a message, and with a frame of our own before what it was."""
    pack = without_frame(data)
    _pack(pack)
    assert without_frame(frame(7) + pack) == pack


def _framed_packs() -> list[bytes]:
    return [*_packs(), *(frame(number) + pack for number, pack in enumerate(_packs(), 1))]


def _relation(data: bytes) -> None:
    relation = decode_relation(data)
    assert decode_relation(encode_relation(relation)) == relation


def _relations() -> list[bytes]:
    columns = (
        Column("id", True, 23, -1, "integer"),
        Column("é€", False, 1700, 655366, "numeric(10,2)"),
        Column("m", False, 16400, -1, "public.mood"),
    )
    plain = Relation(TableName("public", "t"), "d", columns, b"0123456789abcdef")
    return [
        encode_relation(plain),
        encode_relation(replace(plain, generated=(("g", bytes(32)),))),
        encode_relation(Relation(TableName("s", "none"), "f", ())),
    ]


# Tuples. The first byte is the number of columns, the second the operation, the third the layout so far.

_TUPLE_OPS = bytes((Op.INSERT, Op.UPDATE, Op.DELETE, Op.COPY, Op.TRUNCATE))


def _tuple(data: bytes) -> None:
    if len(data) < 3:
        return
    columns, op, layout, text = data[0], data[1], (b"b", b"t")[data[2] & 1] * data[0], data[3:]
    if op == Op.TRUNCATE:
        frames.read_truncate(text)
    elif op == Op.COPY:
        fields = frames.read_copied(text, columns)
        assert frames.field_chunks([fields], columns, 1 << 30) == frames.copied_chunks(
            [text], columns, 1 << 30
        )
    elif op in _TUPLE_OPS:
        _change(op, text, layout)


def _change(op: int, text: bytes, layout: bytes) -> None:
    """As the target folds it; what is an INSERT gives the same rows on the way that does not fold."""
    if layout:  # what has no column has no key, and is not folded
        assert list(fold([op], [text], layout, (0,)))
    else:
        frames.read_change(op, text, layout)
    if op == Op.INSERT:
        (folded,) = only_inserts([text], layout)
        assert all(len(row) == len(layout) for row in folded.inserts)


def _hot_insert(data: bytes) -> None:
    """The hot loop alone: it refuses by itself what the others refuse, and else makes the same COPY."""
    if len(data) < 3:
        return
    layout, text = (b"b", b"t")[data[2] & 1] * data[0], data[3:]
    try:
        chunks = frames.insert_chunks([text], layout, 1 << 30)
    except frames.LayoutChange as change:
        layout = change.layout
        chunks = frames.insert_chunks([text], layout, 1 << 30)
    (folded,) = only_inserts([text], layout)
    assert chunks == frames.field_chunks(folded.inserts, len(layout), 1 << 30)


def _tuples() -> list[bytes]:
    copied = tuple_data([b"\0\0\0\1", None]).replace(b"b", b"").replace(b"n", b"\xff\xff\xff\xff")
    found = [
        insert([b"\0\0\0\1", "text"]),
        insert([b"\0\0\0\1", None]),
        update([b"\0\0\0\2", UNSENT], [b"\0\0\0\1", None]),
        update([b"\0\0\0\2", b"x" * 40], [b"\0\0\0\1", b"y"], b"O"),
        delete([b"\0\0\0\2", None]),
        (Op.COPY, copied),
        (Op.TRUNCATE, struct.pack(">BHH", 3, 1, 2)),
    ]
    return [bytes((2, op, layout)) + text for op, text in found for layout in (0, 1)]


# What is no row


def _message(data: bytes) -> None:
    assert encode_message(decode_message(data)) == data


def _messages() -> list[bytes]:
    return [
        encode_message(LogicalMessage(True, 9, "app", b"hello")),
        encode_message(LogicalMessage(False, 2**63 - 1, "é", b"")),
    ]


def _sequence(data: bytes) -> None:
    value = decode_sequence(data)
    assert decode_sequence(encode_sequence(value)) == value


def _sequences() -> list[bytes]:
    name = TableName("public", "t_id_seq")
    return [
        encode_sequence(SequenceValue(name, ("public", "t", "id"), 1, 2**63 - 1, True)),
        encode_sequence(SequenceValue(name, (), -5, -(2**63), False, SequenceState.SET_BACK)),
    ]


# What lies on the audit and keys topics


@cache
def _chain() -> sealed_chain.SealedChain:
    """A chain of one epoch with three batches of two tables, and the keys they need."""
    chain = sealed_chain.SealedChain()
    chain.batch(sealed_chain.rows("t", 1, 2, 3, 4, 5, 6), sealed_chain.rows("u", 7))
    chain.batch(sealed_chain.rows("t", 8), continues=True)
    chain.batch(sealed_chain.rows("u", 9, 10))
    return chain


def _documents() -> list[bytes]:
    log = _chain().log
    found = [value for _, value in [*log[sealed_chain.AUDIT], *log[sealed_chain.KEYS]] if value is not None]
    return [*found, SignedDocument(AUDIT_ENTRY, b"payload", "", b"").encode()]


def _document(data: bytes) -> None:
    assert SignedDocument.decode(data).encode() == data


def _entry(data: bytes) -> None:
    cluster, chain = peek_chain(data)
    entry = AuditEntry.decode(data)
    assert (entry.cluster, entry.chain) == (cluster, chain)
    assert entry.encode() == data
    assert signed_place(data).chain == chain
    document = SignedDocument(AUDIT_ENTRY, data, "", b"")
    assert columns_of(StoredDocument(entry, document, document.encode(), None))["document"]


def _entries() -> list[bytes]:
    payloads = [
        SignedDocument.decode(value).payload for _, value in _chain().log[sealed_chain.AUDIT] if value
    ]
    last = AuditEntry.decode(payloads[-1])
    acknowledged = replace(
        last,
        event_type="batch_applied",
        verdicts=(("applied", last.row_count),),
        ref_epoch=1,
        ref_sequence=2,
        detail=canonical_json({"reason": "é", "counts": [1, 2.5, None, {"a": True}]}),
    )
    return [*payloads, acknowledged.encode()]


def _announcement(data: bytes) -> None:
    announcement = decode_announcement(data)
    assert encode_announcement(announcement) == data
    unwrap(announcement, sealed_chain.kek())


def _announcements() -> list[bytes]:
    return [SignedDocument.decode(value).payload for _, value in _chain().log[sealed_chain.KEYS] if value]


def _shred_order(data: bytes) -> None:
    order = ShredOrder.decode(data)
    assert order.encode() == data


def _shred_orders() -> list[bytes]:
    covers = {sealed_chain.CHAIN: Covered(deks=2, tuples=7, unapplied_batches=1)}
    order = ShredOrder(
        cluster="c",
        node="node-a",
        kms_provider="file",
        kek_id="k/1",
        operator="alice",
        reason="r",
        requested_at=1,
        not_before=2,
        deks_sha256=keys_hash([(sealed_chain.CHAIN, "dek-1")]),
        covers=covers,
    )
    return [order.encode()]


def _text(data: bytes) -> str:
    """What is no text at all is not what this is about."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DecodeError("no text") from error


def _base(data: bytes) -> None:
    text = _text(data)
    base = Base.decode(text)
    assert base.encode() == text
    base.verify(SEGMENT_LOG, SEGMENT_KEYS)


def _bases() -> list[bytes]:
    history = ordinary()
    return [base(history, size).encode().encode() for size in (1, 6)]


def _segment(data: bytes) -> None:
    """A file as an auditor has it, under the name of the first entry."""
    found = data.split(b"\n")
    log_of(found[:2])
    verify(lines(io.BytesIO(data).read), SEGMENT_LOG, SegmentPlace(1, 1), EMPTY_HEAD, trust(A), SEGMENT_KEYS)


def _segments() -> list[bytes]:
    return [encoded(segment(ordinary(), 1, 1))]


# The same behind the consumer's own way in. The first byte says which record is replaced.


def _places() -> list[tuple[tuple[str, int], int]]:
    return [(place, at) for place, records in sorted(_chain().log.items()) for at in range(len(records))]


def _read_with(place: tuple[str, int], at: int, value: bytes) -> None:
    chain = _chain()
    log = {**chain.log, place: list(chain.log[place])}
    log[place][at] = (log[place][at][0], value)
    reading = sealed_chain.read(log, chain.trust)
    if reading.error is not None:
        raise reading.error


def _consumer(data: bytes) -> None:
    """A record of any topic is anything at all."""
    places = _places()
    _read_with(*places[data[0] % len(places)], data[1:]) if data else None


def _consumer_seeds() -> list[bytes]:
    log = _chain().log
    return [bytes((number,)) + (log[place][at][1] or b"") for number, (place, at) in enumerate(_places())]


def _signed(data: bytes) -> None:
    """An entry or announcement is anything at all, and genuinely signed: a faulty node of the cluster."""
    places = [place for place in _places() if place[0] in (sealed_chain.AUDIT, sealed_chain.KEYS)]
    if not data:
        return
    place, at = places[data[0] % len(places)]
    kind = AUDIT_ENTRY if place == sealed_chain.AUDIT else MEDIA_TYPE
    document = sign_document(_chain().signer, kind, data[1:])
    assert len(document_hash(document)) == 32
    _read_with(place, at, document)


def _signed_seeds() -> list[bytes]:
    log = _chain().log
    places = [place for place in _places() if place[0] in (sealed_chain.AUDIT, sealed_chain.KEYS)]
    return [
        bytes((number,)) + SignedDocument.decode(log[place][at][1] or b"").payload
        for number, (place, at) in enumerate(places)
    ]


PARSERS: dict[str, Parser] = {
    "pgoutput": Parser(_pgoutput, _control_frames),
    "walsender": Parser(_walsender, _sessions),
    "pack": Parser(_pack, _packs),
    "framed": Parser(_framed, _framed_packs),
    "relation": Parser(_relation, _relations),
    "tuple": Parser(_tuple, _tuples),
    "insert": Parser(_hot_insert, lambda: [seed for seed in _tuples() if seed[1] == Op.INSERT]),
    "message": Parser(_message, _messages),
    "sequence": Parser(_sequence, _sequences),
    "document": Parser(_document, _documents),
    "entry": Parser(_entry, _entries),
    "announcement": Parser(_announcement, _announcements),
    "clock-question": Parser(clock_messages.question, clock_messages.questions),
    "clock-answer": Parser(clock_messages.answer, clock_messages.answers),
    "host-clock": Parser(clock_messages.host, clock_messages.hosts),
    "shred-order": Parser(_shred_order, _shred_orders),
    "base": Parser(_base, _bases),
    "segment": Parser(_segment, _segments),
    "consumer": Parser(_consumer, _consumer_seeds),
    "signed": Parser(_signed, _signed_seeds),
    "checkpoint": Parser(log_files.checkpoint, log_files.checkpoints),
    "proof": Parser(log_files.proof, log_files.proofs),
    "evidence": Parser(bundles.manifest, bundles.manifests),
    "evidence-payload": Parser(bundles.payload, bundles.payloads),
}
