"""Replication slots of this node's outgoing streams, made by `syncctl start` before anything else.

A change is captured if its transaction ends after the slot was made: so once `start` has returned, everything
committed from then on travels. A slot that was made once is never made again here: a missing one is a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vsql_shared.errors import RefusedError
from vsql_shared.pg.connect import Connection, errors

_FAILOVER_SINCE = 170000


class MissingSlot(NamedTuple):
    """A stream whose slot has not been made yet."""

    chain: str
    slot: str


def missing(conn: Connection, chains: Sequence[str] = ()) -> list[MissingSlot]:
    """Outgoing live streams (of `chains`, or all) that have no slot yet."""
    with errors("looking for streams without a slot"):
        rows = conn.execute(
            "SELECT chain, slot_name FROM vsql_sync.streams WHERE direction = 'out' AND kind = 'live'"
            " AND NOT slot_created AND state <> 'FINISHED'"
            " AND (cardinality(%(chains)s::text[]) = 0 OR chain = ANY(%(chains)s))"
            " ORDER BY chain",
            {"chains": list(chains)},
        ).fetchall()
    return [MissingSlot(*row) for row in rows]


def open_transactions(conn: Connection) -> int:
    """Transactions under way on this server that have written: making a slot waits for them to end."""
    with errors("looking for open transactions"):
        row = conn.execute(
            "SELECT count(*) FROM pg_catalog.pg_stat_activity"
            " WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()"
        ).fetchone()
    return int(row[0]) if row else 0


def make(conn: Connection, wanted: MissingSlot) -> None:
    """Make the slot (with failover on 17 and later) and note it. `conn` must be in autocommit mode.

    A crash between the two leaves a slot that the next `start`, or the producer, adopts.
    """
    failover = ", failover => true" if conn.info.server_version >= _FAILOVER_SINCE else ""
    with errors(f"creating replication slot {wanted.slot} of {wanted.chain}"):
        row = _look(conn, wanted.slot)
        if row is None:
            conn.execute(
                "SELECT pg_catalog.pg_create_logical_replication_slot(%s, 'pgoutput'" + failover + ")",
                (wanted.slot,),
            )
            row = _look(conn, wanted.slot)
        if row is None or not row[0]:
            raise RefusedError(
                f"{wanted.chain}: replication slot {wanted.slot} is of another plugin or database",
                hint="two clusters must not share a name on one server; drop it if nobody needs it",
            )
        # Beyond this position nothing was confirmed: a slot that is, is not this one any more.
        conn.execute(
            "UPDATE vsql_sync.streams SET slot_created = true, (confirmed_lsn, slot_from) = (%s, %s)"
            " WHERE chain = %s AND direction = 'out' AND NOT slot_created",
            (row[1], row[1], wanted.chain),
        )


def _look(conn: Connection, slot: str) -> tuple[bool, str] | None:
    """(whether it is a permanent pgoutput slot of this database, its position); None where there is none."""
    row = conn.execute(
        "SELECT coalesce(plugin = 'pgoutput' AND database = current_database() AND NOT temporary, false),"
        " confirmed_flush_lsn::text FROM pg_catalog.pg_replication_slots WHERE slot_name = %s",
        (slot,),
    ).fetchone()
    return None if row is None else (row[0], row[1])
