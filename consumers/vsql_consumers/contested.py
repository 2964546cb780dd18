"""Write changes of tables that every node writes: each against what is there, by its version.

Not here: who stands (contest.py), and that a target transaction is one of the source (pipeline.py), so that
its commit is the version of all it wrote. Rules:

1. A row is locked before it is judged, and its version read in a statement that begins after: one statement
   that waits sees the locked row, and what functions in FROM said of the one before.
2. A row that is not there is put there before its tombstone is read, also by a delete, which takes it away
   again: the unique index waits for whoever is about to insert or to delete that key, and holds it for us. So
   only who has a key writes its tombstone.
3. A delete leaves a tombstone even where it met nothing: what it deletes may come later.
4. A change of the key is a delete and an insert, each with its own judgement. It is lost when both fall.
5. A version that cannot be compared stops the stream: its writer's clock went back, or nobody knows any more
   how old the row here is.
6. A change that stands over another node's row is the whole row, in columns that its node lacks, too: there
   they have the default, once they are added. Who adds a column first would else keep its own values in it.
7. Every conflict is in vsql_sync.conflict_log, written in the applying transaction, with who stands.
8. Where a table's strategy orders by generations, rows bring theirs in a column, and tombstones keep it: a
   delete's is one above that of the row it deleted.
"""

# ruff: noqa: S608 - put together from quoted names and statements.py
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from vsql_consumers import versions
from vsql_consumers.contest import Act, Decision, Kind, Local, Version, Writer, decide
from vsql_consumers.fold import unchanged
from vsql_consumers.frames import Layout
from vsql_consumers.setwise import Guard, bury
from vsql_consumers.slowpath import TRIES, Change, RowWriter
from vsql_consumers.stage import Stage, run
from vsql_consumers.statements import NEW, OLD, Plan, quoted, table_sql
from vsql_shared.changes import Op, TableName, Transaction
from vsql_shared.errors import DatabaseError, DecodeError, DivergedError
from vsql_shared.strategies import GENERATION, GENERATIONS, SYMMETRIC, Strategy

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection

LOST = "lost"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LACKING = """
SELECT attname FROM pg_attribute
 WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped AND attname <> ALL (%s)
   AND attgenerated = '' AND attidentity = '' AND (atthasdef OR NOT attnotnull)
 ORDER BY attnum
"""
_RESOLUTION = {Act.WRITE: "APPLIED_REMOTE", Act.KEEP: "KEPT_LOCAL", Act.ASK: "PENDING"}


class Tombstones(NamedTuple):
    """A multi-writer table's rules: its table of tombstones, as SQL, its key, and its strategy."""

    table: str
    key: tuple[str, ...]
    strategy: Strategy
    adding: tuple[str, ...] = ()
    """Columns that add up."""


@dataclass(slots=True)
class Contest:
    """What a session knows of the nodes that write its tables; `now` is the transaction being applied."""

    chain: str
    origin: str
    number: int
    """Replication origin of the stream."""
    remote: Writer
    writers: Mapping[int, tuple[str, Writer]]
    """Replication origin → node; 0 is this one."""
    tables: Mapping[TableName, Tombstones]
    now: Transaction | None = None
    late: bool = False
    """What is applied is not in its place of the stream: it was parked, and is replayed."""
    pci: bool = False
    """The manifest of what is applied says that it has PCI data."""
    lost: int = 0
    """Changes of the transaction that fell so far."""
    nodes: Mapping[str, Writer] = field(default_factory=dict)
    """All that are known, by name."""
    sources: frozenset[str] = frozenset()
    """Nodes whose streams of the publication come here."""

    def version(self) -> Version:
        """Of what is being applied."""
        if self.now is None:
            raise DatabaseError("a change of a multi-writer table came outside of a transaction")
        return Version(self.now.commit_time, self.remote)

    def require(self, table: TableName) -> Tombstones:
        """The rules of a table. Raises DatabaseError: it was not prepared, and would be written unguarded."""
        rules = self.tables.get(table)
        if rules is None:
            raise DatabaseError(
                f"every node writes the tables of this stream, and {table} was not prepared for it here",
                hint="it was renamed, or came into the publication later: repeat `syncctl node add-peer`",
            )
        return rules

    def guard(self, plan: Plan) -> Guard:
        """What keeps a set of changes from touching another node's rows."""
        rules = self.require(plan.name)
        before = moment(self.version().time or 0).isoformat()
        ours = (
            f"coalesce((SELECT o.roident = {self.number} AND o.timestamp <= '{before}'"
            " FROM pg_xact_commit_timestamp_origin(t.xmin) o (timestamp, roident)),"
            " age(t.xmin) <= age(pg_current_xact_id()::xid))"
        )
        buried = ours
        if rules.adding:
            ours = buried = "false"  # a tombstone stands, whoever left it
        return Guard(ours, rules.table, generation_of(plan, rules, self.origin), buried, bool(rules.adding))

    def node_of(self, origin: int) -> tuple[str, Writer]:
        """Who wrote under an origin; one that is no stream's counts as this node."""
        return self.writers.get(origin) or self.writers[0]

    @property
    def third_nodes(self) -> bool:
        """Whether another stream than this one may bring a row."""
        return not self.sources <= {self.origin}

    def named(self, node: str) -> Writer:
        """A node that vsql_sync.row_versions names. Raises DatabaseError."""
        writer = self.nodes.get(node)
        if writer is None:
            raise DatabaseError(
                f"a row's version names node {node}, which is not in vsql_sync.nodes",
                hint="vsql_sync.row_versions or vsql_sync.nodes was altered; initialise the node anew",
            )
        return writer


def generation_of(plan: Plan, rules: Tombstones, origin: str) -> int | None:
    """Position of the column of generations, None where the strategy needs none. Raises DatabaseError."""
    if rules.strategy not in GENERATIONS:
        return None
    for n in plan.written:
        if plan.relation.columns[n].name == GENERATION:
            return n
    raise DatabaseError(
        f"table {plan.name} has strategy {rules.strategy}, and its changes do not bring column {GENERATION}",
        hint=f"it was dropped or renamed on node {origin}: give it back, and skip what was written meanwhile",
    )


def moment(microseconds: int) -> datetime:
    """A commit time of a stream. Raises DecodeError: no time PostgreSQL knows."""
    try:
        return _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        raise DecodeError(f"a commit time of {microseconds} µs is out of range") from None


class _Found(NamedTuple):
    """What is there: judged by `local`, and named in the log by the rest."""

    local: Local
    node: str
    time: datetime | None
    came: int = 1
    """Generation of the change."""
    kept: bool = False
    """It is an entry of vsql_sync.row_versions."""


Found = _Found


class ContestedWriter(RowWriter):
    """Writes staged changes of one multi-writer table, one by one."""

    def __init__(self, conn: Connection, plan: Plan, layout: Layout, stage: Stage, contest: Contest) -> None:
        super().__init__(conn, plan, layout, stage)
        self._contest = contest
        self._rules = contest.require(plan.name)
        self._generation = generation_of(plan, self._rules, contest.origin)
        self._lacking: str | None = None
        if plan.relation.replica_identity != "f":
            raise DatabaseError(
                f"table {plan.name} is written by every node, and its changes do not bring the whole row",
                hint=f"ALTER TABLE {plan.name} REPLICA IDENTITY FULL on node {contest.origin}",
            )
        columns = [plan.columns[n].name for n in plan.key]
        if sorted(columns) != sorted(self._rules.key):
            raise DatabaseError(
                f"table {plan.name} is written by every node, and its identity here is not its primary key",
                hint="the primary key must be the same on every node",
            )

    def write(self, number: int, change: Change) -> str | None:
        """Write one change. Returns "", or None when it could not be decided."""
        if change.op == Op.UPDATE and not self._keeps_key(change.old, change.new or []):
            gone = self._judge(number, Change(change.at, Op.DELETE, change.old, None), OLD)
            come = self._judge(number, Change(change.at, Op.INSERT, None, change.new), NEW)
            stands = None if gone is None or come is None else gone or come
        else:
            stands = self._judge(number, change, NEW if change.op == Op.INSERT else OLD)
        if stands is None:
            return None
        self._contest.lost += not stands
        return ""

    def _judge(self, number: int, change: Change, side: str) -> bool | None:
        """Write a change if it stands, and whether it does; None when that could not be decided."""
        for _ in range(TRIES):
            stands = (
                self._against_row(number, change, side)
                if self._lock_key(number, side)
                else self._against_tombstone(number, change, side)
            )
            if stands is not None:
                return stands
        return None

    def _against_row(self, number: int, change: Change, side: str) -> bool | None:
        """The row is there, and locked."""
        found = self._version(number, change.op, side, live=True)
        if found is None:
            return None
        decision = self._decide(change, found, seen=self._saw(number, change, side))
        self._log(number, side, decision, found, change)
        if decision.act is not Act.WRITE:
            return False
        at = self._new_key if side == NEW else self._old_key
        if change.op == Op.DELETE:
            gone = self._delete(number, at) == 1
            self._bury(number, side)
            return gone or None
        keep = self._plan.key if change.op == Op.UPDATE else ()
        written = self._update(number, at, unchanged(change.new or []), keep) == 1
        if written and found.local.version.writer != self._contest.remote:
            self._reset(number, at)
        return written or None

    def _reset(self, number: int, at: str) -> None:
        """Give columns that the change's node does not have the values they have there, once it has them."""
        if self._lacking is None:
            sent = [column.name for column in self._plan.relation.columns]
            rows = self._conn.execute(_LACKING, (table_sql(self._plan.name), sent)).fetchall()
            self._lacking = ", ".join(f"{quoted(row[0])} = DEFAULT" for row in rows)
        if values := self._lacking:
            table, stage = self._plan.table, self._stage.name
            text = f"UPDATE {table} t SET {values} FROM {stage} s WHERE {_set()} AND {at}"
            run(self._conn, [self._numbered(text, number).decode()])

    def _against_tombstone(self, number: int, change: Change, side: str) -> bool | None:
        """No row was there: take its key first, then see what was left of it."""
        self._conn.execute("SAVEPOINT vsql_taken", prepare=False)
        if not self._take(number, change):
            self._conn.execute("RELEASE SAVEPOINT vsql_taken", prepare=False)
            return None
        found = self._version(number, change.op, side, live=False)
        decision = self._decide(change, found)
        stands = decision.act is Act.WRITE
        undo = [] if stands else ["ROLLBACK TO SAVEPOINT vsql_taken"]
        run(self._conn, [*undo, "RELEASE SAVEPOINT vsql_taken"])
        self._log(number, side, decision, found, change)
        if stands and change.op == Op.DELETE:
            self._delete(number, self._new_key if side == NEW else self._old_key)
            self._bury(number, side)
        return stands

    def _take(self, number: int, change: Change) -> bool:
        """Insert the change's row, or the one it deletes; false where somebody else has the key now."""
        if None in (change.new or []):
            raise DatabaseError(
                f"an update of {self._plan.name} must become an insert, and does not bring the whole row",
                hint="multi-writer tables need REPLICA IDENTITY FULL on every node",
            )
        plan, stage, layout = self._plan, self._stage.name, self._layout
        side = OLD if change.op == Op.DELETE else NEW
        return bool(
            self._run(
                number, "", ("insert", side), lambda: plan.insert(stage, _set(), layout, race=True, side=side)
            )
        )

    def _saw(self, number: int, change: Change, side: str) -> bool:
        """Whether a change of a row was made of the very row that is here; asked where no order is."""
        if self._rules.strategy in SYMMETRIC or change.op == Op.INSERT:
            return False
        found = self._new_key if side == NEW else self._old_key
        text = self._text(
            ("saw", side),
            lambda: (
                f"SELECT 1 FROM {self._stage.name} s, {self._plan.table} t"
                f" WHERE {_set()} AND {found} AND {self._plan.image(self._layout, OLD)}"
            ),
        )
        return self._conn.execute(self._numbered(text, number), prepare=False).fetchone() is not None

    def _decide(self, change: Change, found: _Found | None, *, seen: bool = False) -> Decision:
        contest = self._contest
        version, local = contest.version(), None if found is None else found.local
        if found is not None:
            version = version._replace(generation=found.came)
        decision = self._rule(change, version, local, seen=seen)
        if decision.act is Act.STOP and found is not None:
            raise DivergedError(
                f"the clock of node {contest.origin} went back: it changed a row of {self._plan.name} at"
                f" {found.time}, and then again at {moment(version.time or 0)}; no node can say which of that"
                " and another node's change stands",
                hint="slew clocks, never step them; UPDATE the row on this node as it shall be,"
                " then `syncctl stream retry`",
            )
        return decision

    def _rule(self, change: Change, version: Version, local: Local | None, *, seen: bool) -> Decision:
        strategy, late = self._rules.strategy, self._contest.late
        return decide(change.op, version, local, strategy, late=late, seen=seen)

    def _lock_key(self, number: int, side: str) -> bool:
        """Lock the row of a key as it is after every wait; false when there is none."""
        found = self._new_key if side == NEW else self._old_key
        text = self._text(
            ("lock", side),
            lambda: (
                f"SELECT 1 FROM {self._stage.name} s, {self._plan.table} t"
                f" WHERE {_set()} AND {found} FOR UPDATE OF t"
            ),
        )
        return self._conn.execute(self._numbered(text, number), prepare=False).fetchone() is not None

    def _version(self, number: int, op: int, side: str, *, live: bool) -> _Found | None:
        """Of a row that is locked, or of a tombstone: in a statement of its own, with a new snapshot."""
        found = self._new_key if side == NEW else self._old_key
        table = self._plan.table if live else self._rules.table
        kept, entry = "false, NULL::timestamptz, NULL", ""
        if live and self._rules.adding:
            kept = "v.row_xmin IS NOT NULL, v.at, v.node"
            entry = versions.joined(self._plan.name, self._rules.key)
        text = self._text(
            ("look", op, side, live),
            lambda: (
                "SELECT o.timestamp, o.roident, a.here <= a.now, (pg_current_xact_id()::text::bigint"
                f" + a.now - a.here)::text, {self._generations(op)}, {kept}"
                f" FROM {self._stage.name} s, {table} t{entry},"
                " LATERAL pg_xact_commit_timestamp_origin(t.xmin) o (timestamp, roident),"
                " LATERAL (SELECT age(t.xmin)::bigint, age(pg_current_xact_id()::xid)::bigint)"
                " a (here, now)"
                f" WHERE {_set()} AND {found}"
            ),
        )
        row = self._conn.execute(self._numbered(text, number), prepare=False).fetchone()
        if row is None:
            return None
        time, origin, ours, xid, here, came, is_kept, at, by = row
        contest = self._contest
        if is_kept:
            if at is None and here == came and self._rules.strategy in SYMMETRIC:
                raise self._unknown(None)
            version = Version(None if at is None else _microseconds(at), contest.named(by), here)
            return _Found(Local(live, version), by, at, came, True)
        if time is None and ours:
            return _Found(Local(live, contest.version()), contest.origin, None, came)
        if time is None and here == came:
            self._require_younger(xid)
        node, writer = contest.node_of(origin or 0)
        microseconds = None if time is None else _microseconds(time)
        return _Found(Local(live, Version(microseconds, writer, here)), node, time, came)

    def _generations(self, op: int) -> str:
        """Of what is here and of the change, as SQL; all alike where the strategy needs none."""
        n = self._generation
        if n is None:
            return "1, 1"
        came = self._plan.value(n, self._layout, OLD if op == Op.DELETE else NEW)
        return f"t.{self._plan.column(n)}, {came}{' + 1' if op == Op.DELETE else ''}"

    def _require_younger(self, xid: str) -> None:
        """The change is younger than a row whose commit time nobody knows. Raises DivergedError."""
        row = self._conn.execute(
            "SELECT min(at) FROM vsql_sync.horizons WHERE below::text::numeric > %s::numeric", (xid,)
        ).fetchone()
        latest = None if row is None else row[0]
        came = moment(self._contest.version().time or 0)
        if latest is None or came <= latest:
            raise self._unknown(latest)

    def _unknown(self, latest: datetime | None) -> DivergedError:
        came, before = moment(self._contest.version().time or 0), latest or "now"
        return DivergedError(
            f"a change of {self._plan.name} at {came} meets a row whose commit time this server does not"
            f" have any more, and which may be younger: known is only that it is from before {before}",
            hint="the stream lagged for longer than commit timestamps are kept; UPDATE the row on this"
            " node as it shall be, then `syncctl stream retry`",
        )

    def _bury(self, number: int, side: str) -> None:
        """Leave a tombstone with this transaction's version."""
        text = self._text(
            ("bury", side),
            lambda: bury(
                self._plan, self._stage.name, _set(), self._layout, side, self._rules.table, self._generation
            ),
        )
        run(self._conn, [self._numbered(text, number).decode()])

    def _log(self, number: int, side: str, decision: Decision, found: _Found | None, change: Change) -> None:
        contest, plan = self._contest, self._plan
        now = contest.now
        if now is None or decision.kind is None:
            return
        tuples: tuple[str | None, ...] = (None, None, None)
        if self._may_be_shown():
            tuples = self._tuples(number, side, decision.kind, change)
        resolution = _RESOLUTION[decision.act]
        settled = decision.act is not Act.ASK
        generations: tuple[int | None, int | None] = (None, None)
        if found is not None and self._generation is not None:
            generations = (found.local.version.generation, found.came)
        self._conn.execute(
            "INSERT INTO vsql_sync.conflict_log (subscription, table_schema, table_name, conflict_type,"
            " local_tuple, remote_tuple, row_key, local_generation, remote_generation, local_origin,"
            " remote_origin, local_xact_ts, remote_xact_ts, origin_xid, resolution, resolved_at, resolved_by)"
            " VALUES (%s, %s, %s, %s, %s::jsonb, %s::jsonb, %s::jsonb, %s, %s, %s, %s, %s, %s, %s, %s,"
            " CASE WHEN %s THEN now() END, CASE WHEN %s THEN %s END)",
            (
                contest.chain, plan.name.schema, plan.name.table, decision.kind.value, *tuples, *generations,
                None if found is None else found.node, contest.origin,
                None if found is None else found.time, moment(now.commit_time),
                now.xid, resolution, settled, settled, self._rules.strategy,
            ),
        )  # fmt: skip

    def _may_be_shown(self) -> bool:
        """Whether the log may hold rows of the table: it has no PCI data, by the marks of this moment."""
        row = self._conn.execute(
            "SELECT EXISTS (SELECT FROM vsql_sync.pci_marks WHERE (table_schema, table_name) = (%s, %s))",
            self._plan.name,
        ).fetchone()
        return not self._contest.pci and row is not None and not row[0]

    def _tuples(self, number: int, side: str, kind: Kind, change: Change) -> tuple[str | None, ...]:
        """Both rows as JSON text: what is there, and what came; and the key they are of."""
        plan, stage = self._plan, self._stage.name
        found = self._new_key if side == NEW else self._old_key
        here = f"(SELECT to_jsonb(t)::text FROM {plan.table} t, {stage} s WHERE {_set()} AND {found})"
        if kind in {Kind.INSERT_DELETED, Kind.UPDATE_DELETED, Kind.UPDATE_MISSING, Kind.DELETE_MISSING}:
            here = "NULL::text"
        came = "NULL::text"
        if change.op != Op.DELETE:
            came = self._json([n for n in plan.written if (change.new or [])[n] is not None], NEW)
        # An UPDATE is found by its old key, which the new one is, or this would be an INSERT.
        select = f"SELECT {here}, {came}, {self._json(plan.key, side)}"
        row = self._conn.execute(self._numbered(select, number), prepare=False).fetchone()
        return (None, None, None) if row is None else tuple(row)

    def _json(self, columns: Sequence[int], side: str) -> str:
        """Staged values of some columns as one JSON text, as SQL."""
        values = ", ".join(
            f"{self._plan.value(n, self._layout, side)} AS {self._plan.column(n)}" for n in columns
        )
        stage = self._stage.name
        return f"(SELECT to_jsonb(r)::text FROM (SELECT {values} FROM {stage} s WHERE {_set()}) r)"


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _set() -> str:
    """The staged change, by its mark."""
    return RowWriter.SET
