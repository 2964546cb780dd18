"""vsql_sync.clocks: what was measured of other nodes' clocks. Written by the service that measures.

Rules: a measure counts until `fresh_until`, by this database's clock; later it is shown with its age, and
nothing follows from it: a node that is gone raises no alarm for ever. Nor before it was made: this clock was
set back since.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from vsql_shared.clocks.exchange import Measure, Reading
from vsql_shared.clocks.host import HostClock
from vsql_shared.errors import DatabaseError
from vsql_shared.pg.connect import Connection, errors

_READ = """
SELECT n.node_id, n.is_local,
       CASE WHEN pg_catalog.clock_timestamp() BETWEEN c.measured_at AND c.fresh_until THEN c.state
            ELSE 'unknown' END,
       c.offset_us, c.uncertainty_us, c.measured_at,
       extract(epoch FROM pg_catalog.clock_timestamp() - c.measured_at)::float8, coalesce(c.unanswered, 0),
       c.ntp_source, c.ntp_synchronised, coalesce(f.waits, 0), f.most_ahead_us, f.most_at
FROM vsql_sync.nodes n LEFT JOIN vsql_sync.clocks c USING (node_id)
LEFT JOIN vsql_sync.future_commits f USING (node_id)
WHERE c.node_id IS NOT NULL OR f.node_id IS NOT NULL ORDER BY n.is_local DESC, n.number
"""
_MEASURED = """
INSERT INTO vsql_sync.clocks AS c (node_id, offset_us, uncertainty_us, measured_at, fresh_until, state)
SELECT node_id, %(offset)s, %(uncertainty)s, clock_timestamp(),
       clock_timestamp() + make_interval(secs => %(fresh)s), %(state)s
  FROM vsql_sync.nodes WHERE node_id = %(node)s
ON CONFLICT (node_id) DO UPDATE SET offset_us = excluded.offset_us, uncertainty_us = excluded.uncertainty_us,
    measured_at = excluded.measured_at, fresh_until = excluded.fresh_until, state = excluded.state,
    unanswered = 0
"""
_ASKED = """
INSERT INTO vsql_sync.clocks AS c (node_id, asked_at, unanswered)
SELECT node_id, clock_timestamp(), %(unanswered)s FROM vsql_sync.nodes WHERE node_id = %(node)s
ON CONFLICT (node_id) DO UPDATE SET asked_at = excluded.asked_at, unanswered = excluded.unanswered
"""
_HOST = """
UPDATE vsql_sync.clocks SET ntp_source = %s, ntp_synchronised = %s
 WHERE node_id = (SELECT node_id FROM vsql_sync.nodes WHERE is_local)
"""
_FUTURE = """
INSERT INTO vsql_sync.future_commits AS f (node_id, waits, most_ahead_us, most_at)
SELECT node_id, %(waits)s, %(ahead)s, clock_timestamp() FROM vsql_sync.nodes WHERE node_id = %(node)s
ON CONFLICT (node_id) DO UPDATE SET waits = f.waits + excluded.waits, last_at = clock_timestamp(),
    most_at = CASE WHEN excluded.most_ahead_us > f.most_ahead_us THEN excluded.most_at ELSE f.most_at END,
    most_ahead_us = greatest(f.most_ahead_us, excluded.most_ahead_us)
"""


@dataclass(frozen=True, slots=True)
class NodeClock:
    """What is known of a node's clock; of this node itself: its database's against its host's."""

    node: str
    local: bool
    state: str
    """ok, warning, error; unknown where nothing was measured lately."""
    offset_us: int | None
    """Its clock minus ours; of this node: its database's minus its host's."""
    uncertainty_us: int | None
    measured_at: datetime | None
    age_seconds: float | None
    unanswered: int
    ntp_source: str | None
    ntp_synchronised: bool | None
    future_waits: int
    """Changes of it that had to wait for our clock."""
    future_most_us: int | None
    future_most_at: datetime | None


def read(conn: Connection) -> list[NodeClock]:
    """This node's own, then the others that were asked or heard of."""
    with errors("reading what was measured of clocks"):
        return [NodeClock(*row) for row in conn.execute(_READ)]


def now(conn: Connection) -> Reading:
    """What the database's clock says."""
    before = time.monotonic()
    with errors("reading the database's clock"):
        row = conn.execute(
            "SELECT (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::bigint"
        ).fetchone()
    after = time.monotonic()
    if row is None:
        raise DatabaseError("the database says no time")
    return Reading(int(row[0]), before, after)


def asked(conn: Connection, node: str, unanswered: int) -> None:
    """A question goes to a node; `unanswered`: it and those before it since the last answer."""
    with errors("noting a question about time"):
        conn.execute(_ASKED, {"node": node, "unanswered": unanswered})


def measured(conn: Connection, node: str, found: Measure, state: str, fresh_seconds: float) -> None:
    """A measure, and for how long it counts."""
    values = {"node": node, "offset": found.offset_us, "uncertainty": found.uncertainty_us}
    with errors("noting a measure of a clock"):
        conn.execute(_MEASURED, {**values, "state": state, "fresh": fresh_seconds})


def host(conn: Connection, found: HostClock | None) -> None:
    """What this node's host says of its clock; its row is there."""
    with errors("noting who keeps this host's clock"):
        conn.execute(_HOST, (found and found.source, found and found.synchronised))


def came_from_the_future(conn: Connection, node: str, waits: int, most_ahead_us: int) -> None:
    """Changes of a node had to wait until our clock was past them."""
    with errors("noting commits from the future"):
        conn.execute(_FUTURE, {"node": node, "waits": waits, "ahead": most_ahead_us})


def fresh(conn: Connection, node: str) -> Measure | None:
    """What was measured of a node lately; None where nothing was."""
    with errors("reading what was measured of a clock"):
        row = conn.execute(
            "SELECT offset_us, uncertainty_us FROM vsql_sync.clocks"
            " WHERE node_id = %s AND pg_catalog.clock_timestamp() BETWEEN measured_at AND fresh_until",
            (node,),
        ).fetchone()
    return None if row is None else Measure(*row)


def peers(conn: Connection) -> tuple[str, ...]:
    """All other nodes this one knows."""
    with errors("reading the nodes"):
        rows: Iterable[tuple[str]] = conn.execute(
            "SELECT node_id FROM vsql_sync.nodes WHERE NOT is_local ORDER BY node_id"
        ).fetchall()
    return tuple(name for (name,) in rows)
