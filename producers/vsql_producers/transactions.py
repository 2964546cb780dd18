"""From WAL frames to runs of transactions: what is replicated, in the order of the source. Pure.

Not here: how batches are cut (batches.py) and what a tuple holds. Rules:

* A transaction comes whole at its commit, but perhaps over several chunks of frames: a *run* is what one
  chunk holds of one transaction. Its commit position is known from its BEGIN on.
* Dropped: transactions that reached this node through a replication origin (they are another node's),
  transactions whose commit record starts before the resume position (already in a manifest), tables of schema
  vsql_sync and such as are not published any more, and logical messages of prefixes nobody named. What is
  left without a change makes no run, only a position.
* A logical message without a transaction is one of its own. PostgreSQL says where its record ends, and a
  commit record may begin there: so it commits one byte before its end (docs/design/0007).
* TRUNCATE of several tables becomes one record per table.
* A row has as many columns as its table was described with, or the stream stops: some versions of PostgreSQL
  sent others where there was a column list.
* A relation message counts even where its transaction is dropped: the walsender sends it once a session.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from vsql_producers import pgoutput
from vsql_producers.pgoutput import (
    KIND_AT,
    RELATION_ID,
    Begin,
    Commit,
    Message,
    Origin,
    RelationMessage,
    Truncate,
    TypeMessage,
    relation_key,
)
from vsql_producers.projection import Projection
from vsql_shared import lsn
from vsql_shared.changes import Op, TableName, Transaction
from vsql_shared.errors import DecodeError, DivergedError, EnvironmentFault

OWN_SCHEMA = "vsql_sync"
# Relation ids that no table can have.
MESSAGE_KEY, SEQUENCE_KEY = relation_key(0), relation_key(1)
_ROWS = re.compile(rb"[IUD]+")
# Relation id, kind of the first tuple, and its number of columns.
_shape_of = itemgetter(slice(26, 33))


class NotCarried(EnvironmentFault):
    """A commit waits for rows that this stream does not send."""


class Descriptor(NamedTuple):
    """A table as the target is told of it: the sealed descriptor's plaintext, its hash, what it carries."""

    name: TableName
    encoded: bytes
    hash: bytes
    pci_columns: tuple[str, ...] = ()
    key: tuple[int, ...] = ()
    """Columns that identify a row, where the table's rows are spread over partitions by them (spread.py)."""
    columns: int | None = None
    """How many each row has as pgoutput sends it; None: rows of this kind are not counted."""
    projection: Projection | None = None
    """Takes columns out of each row."""


class RelationChange(NamedTuple):
    """From `position` (of a run's or batch's frames) on, frames of `key` follow `descriptor`."""

    position: int
    key: bytes
    descriptor: Descriptor


class Messages(NamedTuple):
    """The logical messages that are carried, and what says of them that they are no rows."""

    prefixes: frozenset[str]
    descriptor: Descriptor


Describe = Callable[[RelationMessage, Mapping[int, TypeMessage]], Descriptor | None]
"""None: the table is not one to replicate."""


@dataclass(slots=True)
class Run:
    """Consecutive frames of one transaction; `end_lsn` is 0 while it goes on in the next run."""

    transaction: Transaction
    frames: list[bytes] = field(default_factory=list)
    relations: list[RelationChange] = field(default_factory=list)
    end_lsn: int = 0


class Transactions:
    """Groups frames; keeps the transaction that is under way and which relation id is which table."""

    def __init__(
        self,
        describe: Describe,
        resume_lsn: int,
        confirmed_lsn: int | None = None,
        messages: Messages | None = None,
        last: tuple[int, int] | None = None,
    ) -> None:
        """`confirmed_lsn`: where the slot begins to send; None when that is not below `resume_lsn`.

        `last`: xid and commit time of the transaction that ends at `resume_lsn`, where that is known.
        """
        self._describe = describe
        self._messages = messages
        self._described_messages = False
        self._resume_lsn = resume_lsn
        # The transaction the chain ends with comes again when the slot has not confirmed it.
        self._must_meet = confirmed_lsn is not None and confirmed_lsn < resume_lsn
        self._last = last
        self._begin: Begin | None = None
        self._dropped = self._begun = False
        self._run: Run | None = None
        self._known: set[bytes] = set()
        self._widths: dict[bytes, bytes] = {}
        self._projections: dict[bytes, Projection] = {}
        self._passed_over: set[bytes] = set()
        self._others: dict[bytes, TableName] = {}
        self._types: dict[int, TypeMessage] = {}
        self._changes: list[RelationChange] = []
        self.strict = False
        """Commits wait for this stream: a table that it passes over would be taken for one that was sent."""
        self.received_lsn = 0
        """End of the last transaction that was received, dropped ones included."""

    @property
    def is_open(self) -> bool:
        """Whether a transaction began and did not end yet."""
        return self._begin is not None

    def feed(self, frames: list[bytes]) -> list[Run]:
        """Take the next frames, in order; returns what they complete or continue. Raises DecodeError."""
        runs: list[Run] = []
        done = 0
        for rows in _ROWS.finditer(pgoutput.kinds(frames)):
            start, stop = rows.span()
            for frame in frames[done:start]:
                self._control(frame, runs)
            self._rows(frames[start:stop])
            done = stop
        for frame in frames[done:]:
            self._control(frame, runs)
        if self._run is not None and self._run.frames:
            runs.append(self._run)
            self._run, self._begun = None, True
        return runs

    def _rows(self, frames: list[bytes]) -> None:
        if self._begin is None:
            raise DecodeError("a row outside of a transaction")
        if self._dropped:
            return
        if self._passed_over:
            if self.strict:
                self._require_carried(frame[RELATION_ID] for frame in frames)
            frames = [frame for frame in frames if frame[RELATION_ID] not in self._passed_over]
        if frames:
            self._current(self._begin).frames += self._as_described(frames)

    def _require_carried(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if key in self._others:
                raise NotCarried(
                    f"PostgreSQL's publication has {self._others[key]}, which the stream does not carry",
                    hint="its commits wait: give it its name back, or `syncctl sync disable`",
                )

    def _as_described(self, frames: list[bytes]) -> list[bytes]:
        """Rows with the columns their tables were described with. Raises DecodeError for one with others."""
        for shape in set(map(_shape_of, frames)):
            expected = self._widths.get(shape[:4])
            if expected is not None and shape[5:] != expected:
                raise DecodeError(
                    f"a row of {int.from_bytes(shape[5:], 'big')} columns, its table was described with"
                    f" {int.from_bytes(expected, 'big')}"
                )
        if not self._projections:
            return frames
        projections = self._projections
        return [
            projections[key](frame) if (key := frame[RELATION_ID]) in projections else frame
            for frame in frames
        ]

    def _current(self, begin: Begin) -> Run:
        if self._run is None:
            self._run = Run(Transaction(begin.xid, begin.final_lsn, begin.commit_time))
        if self._changes:
            at = len(self._run.frames)
            self._run.relations += [change._replace(position=at) for change in self._changes]
            self._changes.clear()
        return self._run

    def _control(self, frame: bytes, runs: list[Run]) -> None:
        message = pgoutput.decode(frame)
        if isinstance(message, Begin):
            self._on_begin(message)
        elif isinstance(message, Commit):
            self._on_commit(message, runs)
        elif isinstance(message, RelationMessage):
            self._on_relation(message)
        elif isinstance(message, TypeMessage):
            self._types[message.oid] = message
        elif isinstance(message, Origin):
            # Only without the option origin 'none' (PostgreSQL 15): the change is another node's.
            self._dropped = True
        elif isinstance(message, Truncate):
            self._on_truncate(message, pgoutput.frame_lsn(frame))
        else:
            self._on_message(message, frame, runs)

    def _on_begin(self, begin: Begin) -> None:
        if self._begin is not None:
            raise DecodeError(f"transaction {begin.xid} begins inside of transaction {self._begin.xid}")
        self._begin, self._begun = begin, False
        self._dropped = begin.final_lsn < self._resume_lsn
        self.require_met(begin.final_lsn)

    def require_met(self, position: int) -> None:
        """Raise DivergedError when the WAL goes past the chain's end without what it ends with.

        Everything that ends at or below `position` was received.
        """
        if self._must_meet and position >= self._resume_lsn:
            raise DivergedError(
                f"the chain ends with a transaction that ended at {lsn.text(self._resume_lsn)}, and this"
                " server's WAL holds none",
                hint="it was restored from an older state; targets hold what it lost: initialise them anew",
            )

    def _on_commit(self, commit: Commit, runs: list[Run]) -> None:
        begin = self._begin
        if begin is None or begin.final_lsn != commit.commit_lsn:
            raise DecodeError(f"a commit at {commit.commit_lsn:X} that belongs to no transaction")
        if self._run is None and self._begun:
            self._run = Run(Transaction(begin.xid, begin.final_lsn, begin.commit_time))
        if self._run is not None:
            self._run.end_lsn = commit.end_lsn
            runs.append(self._run)
        self._run = self._begin = None
        self.received_lsn = commit.end_lsn
        if self._must_meet and commit.end_lsn == self._resume_lsn:
            self._meet(begin)

    def _meet(self, begin: Begin) -> None:
        """The WAL has a transaction that ends where the chain does: the one that was sent, or another one."""
        self._must_meet = False
        if self._last not in (None, (begin.xid, begin.commit_time)):
            raise DivergedError(
                f"the chain ends with a transaction that ended at {lsn.text(self._resume_lsn)}, and this"
                " server's WAL holds another one there",
                hint="it was restored from an older state; targets hold what it lost: initialise them anew",
            )

    def _on_relation(self, message: RelationMessage) -> None:
        key = relation_key(message.relation_id)
        self._known.add(key)
        descriptor = None if message.schema == OWN_SCHEMA else self._describe(message, self._types)
        if descriptor is None:
            self._passed_over.add(key)
            if message.schema != OWN_SCHEMA:
                self._others[key] = TableName(message.schema, message.table)
            return
        self._passed_over.discard(key)
        self._others.pop(key, None)
        self._widths.pop(key, None)
        self._projections.pop(key, None)
        if descriptor.columns is not None:
            self._widths[key] = descriptor.columns.to_bytes(2, "big")
        if descriptor.projection is not None:
            self._projections[key] = descriptor.projection
        self._changes.append(RelationChange(0, key, descriptor))

    def _on_message(self, message: Message, frame: bytes, runs: list[Run]) -> None:
        """Anyone may emit one, so it is never more than data. The walsender sends those of every prefix."""
        begin = self._begin
        if message.transactional != (begin is not None):
            raise DecodeError("a logical message on the wrong side of a transaction's bounds")
        if begin is None:
            self._alone(message, frame, runs)
        elif not self._dropped and self._carries(message):
            self._current(begin).frames.append(_message_frame(message, frame))

    def _carries(self, message: Message) -> bool:
        """Whether its prefix was named; the first one is described before it goes."""
        if self._messages is None or message.prefix not in self._messages.prefixes:
            return False
        if not self._described_messages:
            self._described_messages = True
            self._changes.append(RelationChange(0, MESSAGE_KEY, self._messages.descriptor))
        return True

    def _alone(self, message: Message, frame: bytes, runs: list[Run]) -> None:
        """One that is not part of a transaction: its own begin and commit."""
        end = message.lsn
        begin = Begin(end - 1, pgoutput.frame_time(frame), 0)
        self.require_met(begin.final_lsn)
        if begin.final_lsn >= self._resume_lsn and self._carries(message):
            run = self._current(begin)
            run.frames.append(_message_frame(message, frame))
            run.end_lsn = end
            runs.append(run)
            self._run = None
        self.received_lsn = end
        self._must_meet = self._must_meet and end != self._resume_lsn

    def _on_truncate(self, message: Truncate, lsn: int) -> None:
        if self._begin is None:
            raise DecodeError("a TRUNCATE outside of a transaction")
        keys = [relation_key(relation_id) for relation_id in message.relation_ids]
        if not self._known.issuperset(keys):
            raise DecodeError("a TRUNCATE of a table that was not described")
        if self.strict and not self._dropped:
            self._require_carried(keys)
        keys = [key for key in keys if key not in self._passed_over]
        if self._dropped or not keys:
            return
        size = len(keys).to_bytes(2, "big")
        frames = self._current(self._begin).frames
        for position, key in enumerate(keys):
            plaintext = bytes((message.options,)) + position.to_bytes(2, "big") + size
            frames.append(pgoutput.make_frame(Op.TRUNCATE, key, lsn, plaintext))


def _message_frame(message: Message, frame: bytes) -> bytes:
    """As a record: what pgoutput sent, after its kind byte."""
    return pgoutput.make_frame(Op.MESSAGE, MESSAGE_KEY, message.lsn, frame[KIND_AT + 1 :])
