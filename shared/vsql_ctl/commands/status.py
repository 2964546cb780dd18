"""`syncctl status`: each stream's state, positions and lag."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, human_bytes, human_count, human_seconds, printable, render_table
from vsql_ctl.session import open_node

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vsql_shared.audit.watch_state import Break, Progress
    from vsql_shared.pg.clocks import NodeClock
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.many_writers import SharedTable
    from vsql_shared.pg.nodes import NodeInfo
    from vsql_shared.pg.status import StreamStatus

_HEADERS = (
    "STREAM", "DIR", "STATE", "STAGE", "LAG", "BATCHES", "SECONDS", "ROWS/S", "POSITION", "AUDIT/DAY",
    "CLOCK",
)  # fmt: skip
_TABLES_SHOWN = 5  # diverged ones, of each stream


@click.command(
    "status", epilog=example("syncctl status", "syncctl status --watch", "syncctl status --output json")
)
@click.option("--watch", is_flag=True, help="Show it again and again until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(min=0.2), default=2.0, help="Seconds between.")
@output_option
@pass_operator
def status(operator: Operator, output: OutputFormat, watch: bool, interval: float) -> None:
    """Show each stream's state, positions and lag, as its worker and PostgreSQL say.

    A stream whose worker says nothing any more is "not running"; its figures are the last ones known.
    """
    with open_node(operator) as conn:
        while True:
            seen = _look(conn)
            if watch and output == "table":
                click.clear()
            emit(output, _as_dict(seen), lambda: _text(seen))  # noqa: B023 - called at once
            if not watch:
                return
            time.sleep(interval)


class Trail(NamedTuple):
    """What the background verification says of the audit trail."""

    chains: list[Progress]
    breaks: list[Break]
    begins: dict[str, int]
    """The first entry that is here of each chain that was pruned."""


class _Seen(NamedTuple):
    """Everything that is shown."""

    node: NodeInfo
    streams: list[StreamStatus]
    trail: Trail
    shared: list[SharedTable]
    clocks: list[NodeClock]


def _look(conn: Connection) -> _Seen:
    from vsql_shared.audit import watch_state
    from vsql_shared.audit.bases import noted_begins
    from vsql_shared.pg import clocks, many_writers, nodes
    from vsql_shared.pg import status as stream_status

    node = nodes.local(conn)  # first: a database that is no node has none of the tables
    trail = Trail(watch_state.progress(conn), watch_state.open_breaks(conn), noted_begins(conn))
    return _Seen(node, stream_status.read(conn), trail, many_writers.shared_tables(conn), clocks.read(conn))


def _as_dict(seen: _Seen) -> dict[str, object]:
    node, trail = seen.node, seen.trail
    return {
        "node": node.name,
        "number": node.number,
        "cluster": node.cluster,
        "streams": list(seen.streams),
        "audit": trail_value(trail),
        "shared_tables": list(seen.shared),
        "clocks": list(seen.clocks),
    }


def trail_value(trail: Trail) -> dict[str, object]:
    """The trail's part of the JSON."""
    return {
        "chains": [
            asdict(one) | {"begins_at": trail.begins.get(one.chain, 1)}
            for one in trail.chains
            if one.source == "trail"
        ],
        "topic": next((one for one in trail.chains if one.source == "topic"), None),
        "breaks": trail.breaks,
    }


def _text(seen: _Seen) -> str:
    node, streams = seen.node, seen.streams
    head = f"node {node.name} ({node.number}) of cluster {node.cluster}"
    if not streams:
        return "\n".join([head, "no streams; add a peer: `syncctl node add-peer`", *trail_lines(seen.trail)])
    table = render_table(_HEADERS, [_row(one) for one in streams])
    both = {one.publication for one in seen.shared}
    remarks = [line for one in streams for line in _remarks(one, shared=one.publication in both)]
    more = (*_closed(seen.shared), *clock_lines(seen.clocks), *trail_lines(seen.trail))
    return "\n".join([head, table, *remarks, *more])


def clock_lines(clocks: Sequence[NodeClock]) -> Iterator[str]:
    """How far the clocks of nodes are apart, as far as it was measured."""
    for one in clocks:
        name = "this node's database, against this host" if one.local else printable(one.node)
        text = "not measured yet"
        if one.offset_us is not None and one.uncertainty_us is not None and one.age_seconds is not None:
            text = f"{one.offset_us / 1000:+.1f} ms ± {one.uncertainty_us / 1000:.1f} ms"
            text += f", {human_seconds(max(0.0, one.age_seconds))} ago"
        if one.unanswered > 1:
            text += f"; {one.unanswered} questions were not answered"
        if one.local and one.ntp_source is not None:
            text += f"; the host is {'' if one.ntp_synchronised else 'NOT '}synchronised ({one.ntp_source})"
        if one.future_waits and one.future_most_us is not None:
            text += (
                f"; {one.future_waits} changes had to wait for our clock,"
                f" {one.future_most_us / 1000:.0f} ms at most, {printable(one.future_most_at)}"
            )
        loud = {"warning": "CLOCK: ", "error": "CLOCK, far off: "}.get(one.state, "clock: ")
        yield f"{loud}{name}: {text}"


def _closed(shared: Sequence[SharedTable]) -> Iterator[str]:
    """Tables that every node writes and that clients may not write here yet."""
    closed = [printable(one.table) for one in shared if not one.writable]
    if closed:
        more = f" and {len(closed) - _TABLES_SHOWN} more" if len(closed) > _TABLES_SHOWN else ""
        yield (
            f"closed to clients here until both directions run and the first copy is done:"
            f" {', '.join(closed[:_TABLES_SHOWN])}{more}"
        )


def trail_lines(trail: Trail) -> Iterator[str]:
    """How far the trail is verified, and what of it does not verify."""
    for one in trail.chains:
        first = trail.begins.get(one.chain, 1) if one.source == "trail" else 1
        every = "all of it" if first == 1 else f"all of it from entry {first} on (the rest was pruned)"
        whole = f"not once {every}" if one.whole_at is None else f"{every} at {printable(one.whole_at)}"
        if one.source == "trail":
            last = (
                "" if one.verified_at is None else f", the newest there was at {printable(one.verified_at)}"
            )
            yield f"audit {printable(one.chain)}: verified up to {one.verified_to}{last}; {whole}"
        else:
            yield f"audit topic: compared, {whole}"
    if trail.chains and all(one.source != "topic" for one in trail.chains):
        yield "audit topic: not once compared, all of it"
    for found in trail.breaks:
        place = f"entry {found.sequence}" if found.sequence is not None else "an entry"
        where = f"{found.chain or '(no chain)'}, {place}, in the {found.source}"
        yield f"AUDIT BREAK: {where}, since {printable(found.found_at)}: {printable(found.what)}"


def _row(one: StreamStatus) -> tuple[object, ...]:
    detail = one.detail
    position = detail.get("confirmed_lsn" if one.direction == "out" else "applied_lsn")
    batches = detail.get("unpublished_batches" if one.direction == "out" else "lag_batches")
    return (
        one.chain,
        one.direction,
        one.state if one.desired == "running" or one.state != "not running" else one.desired,
        one.init_state,
        _shown(detail.get("lag_bytes", one.slot["lag_bytes"] if one.slot else None), human_bytes),
        batches,
        _shown(detail.get("lag_seconds"), human_seconds),
        _shown(detail.get("rows_per_s"), human_count),
        position or (one.slot["confirmed_lsn"] if one.slot else None),
        _shown(detail.get("audit_bytes_per_day"), human_bytes),
        _shown(detail.get("clock_offset_ms"), lambda value: f"{value:.0f} ms"),
    )


def _shown(value: Any, how: Any) -> str | None:
    return how(value) if isinstance(value, int | float) else None


def _remarks(one: StreamStatus, *, shared: bool) -> list[str]:
    """What needs a sentence; `shared`: both nodes write its tables."""
    name = f"{one.chain} ({one.direction})"
    return [f"{name}: {line}" for line in (*_standing(one), *_troubles(one), *_ways_back(one, shared=shared))]


def _ways_back(one: StreamStatus, *, shared: bool) -> Iterator[str]:
    """What to do about a stream that is DIVERGED."""
    if one.init_state != "DIVERGED" or one.kind != "live":
        return
    if shared:
        yield (
            "both nodes write its tables, and bringing one of them level again is not built yet: let clients"
            " write on one node only (docs/operations/conflicts.md)"
        )
    elif one.direction == "out":
        yield _way_back(one)


def _way_back(one: StreamStatus) -> str:
    """What works with this version: another stream takes over, and copies anew (docs/operations/slots.md)."""
    targets = ", ".join(printable(target) for target in one.detail.get("targets") or ()) or "each target"
    return (
        f'way back: 1. `syncctl stream retire --chain {one.chain} --reason "…"` here and on {targets};'
        f" 2. empty its tables there; 3. here `syncctl publication create NEW` with the tables of"
        f" {one.publication}, and `syncctl node add-peer … --publication NEW`; 4. `syncctl start` on both"
    )


def _standing(one: StreamStatus) -> Iterator[str]:
    """Why it does not run: paused, never started, or a worker that is silent."""
    if one.stale and one.updated_at is not None:
        yield f"its worker has said nothing since {printable(one.updated_at)}; figures are from then"
    elif one.state == "not running" and one.desired == "running" and one.init_state != "FINISHED":
        yield "is to run and has no worker; start the service (`syncctl daemon start`)"
    if one.desired == "stopped" and one.init_state != "FINISHED":
        yield "was never started; `syncctl start`"
    if one.init_state == "FINISHED" and one.init_reason:
        yield printable(one.init_reason)
    if one.state == "waiting" and one.detail.get("waiting_for"):
        yield f"waits {printable(one.detail['waiting_for'])}"
    if one.desired == "paused":
        yield f"paused: {printable(one.desired_reason)}"
    if one.sequences:
        last = max(sequence["applied_at"] for sequence in one.sequences)
        yield f"{len(one.sequences)} sequences are carried, the last change came {printable(last)}"


def _troubles(one: StreamStatus) -> Iterator[str]:
    """Refusals, errors, roots that differ, and what is wrong with the slot."""
    said = one.detail
    refused = said.get("refused")
    if isinstance(refused, dict):
        where, why = printable(refused.get("record")), printable(refused.get("error"))
        yield f"refused {where}: {why}; decide with `syncctl stream`"
    blocked = said.get("blocked")
    if isinstance(blocked, dict):
        where, why = printable(blocked.get("record")), printable(blocked.get("error"))
        verbs = "retry, skip or park" if blocked.get("transaction") else "retry"
        yield f"blocked by {where}: {why}; mend it, or decide with `syncctl stream` ({verbs})"
    if one.init_state in ("DIVERGED", "FAILED"):
        yield f"{one.init_state}: {printable(one.init_reason)}"
    for table in one.diverged[:_TABLES_SHOWN]:
        name, why = printable(f"{table['schema']}.{table['table']}"), printable(table["reason"])
        yield f"table {name} is DIVERGED, it lacks changes: {why}"
    if len(one.diverged) > _TABLES_SHOWN:
        yield f"{len(one.diverged) - _TABLES_SHOWN} more tables are DIVERGED: vsql_sync.table_sync"
    if said.get("last_error"):
        at = said.get("last_error_at")
        when = (
            datetime.fromtimestamp(at, UTC).isoformat(" ", "seconds") if isinstance(at, int | float) else at
        )
        yield f"last error, {printable(when)}: {printable(said['last_error'])}"
    yield from _waits(one)
    for target, ack in (said.get("targets") or {}).items():
        if ack.get("mismatch"):
            yield f"{target} computed another root: {printable(ack['mismatch'])}"
        if ack.get("passed_over") and ack.get("lag_batches"):
            yield f"a record in the place of {target}'s answers is not by it: {printable(ack['passed_over'])}"
    yield from _at_the_slot(one)


def _waits(one: StreamStatus) -> Iterator[str]:
    """Of a stream whose commits wait for targets: for which they do, or that they do not."""
    said = one.detail.get("synchronous")
    if not isinstance(said, dict):
        return
    from vsql_ctl.commands.sync import waiting_lines

    yield from waiting_lines("clients wait", said)
    if said.get("state") == "degraded":
        why = printable(said.get("degraded_reason"))
        yield f"DEGRADED since {printable(said.get('degraded_at'))}, commits wait for no target: {why}"
    for found in said.get("unwaited") or ():
        yield f"COMMITS PASS BY: {printable(found)}"
    if said.get("server"):
        yield f"writes to its tables are refused: {printable(said['server'])}"


def _at_the_slot(one: StreamStatus) -> Iterator[str]:
    """A slot that is gone or in danger, a stream that stands still, and the way back."""
    stalled = one.detail.get("stalled_seconds")
    if isinstance(stalled, int | float) and one.desired == "running":
        yield f"STALLED: WAL advances, and nothing was confirmed for {human_seconds(stalled)}"
    if one.slot_missing and one.init_state != "DIVERGED":
        yield f"slot {one.slot_name} is gone: the stream will be DIVERGED; see docs/operations/slots.md"
    if one.slot and one.slot["wal_status"] in ("unreserved", "lost"):
        yield f"slot {one.slot_name} is {one.slot['wal_status']}: it loses WAL; see max_slot_wal_keep_size"
    if one.slot and one.init_state == "FINISHED":
        yield f"slot {one.slot_name} was left behind and holds WAL: `syncctl stream retire` again drops it"
