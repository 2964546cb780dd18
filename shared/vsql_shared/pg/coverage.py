"""What a KEK version wraps, by this node's tables: what goes with it, and whether anything lives under it.

Not here: orders (shredding.py) and wrapping. Rules:

* A data key goes with a version when every other one that ever wrapped it is destroyed.
* A version is needed while a stream that is still written seals under it, and while it is the last one a key
  was announced under that some target needs: noting a new wrapping and announcing it are two things.
* What an order destroyed is never announced again.
"""

from __future__ import annotations

from dataclasses import dataclass

from vsql_shared.audit.shredding import Covered
from vsql_shared.errors import KeyUnavailableError, RefusedError
from vsql_shared.pg.connect import Connection, errors


@dataclass(frozen=True, slots=True)
class Coverage:
    """What destroying a KEK version would take away."""

    deks: tuple[tuple[str, str], ...]
    """(chain, dek_id)"""
    covers: dict[str, Covered]
    in_use: tuple[str, ...]
    """Data keys that seal now."""
    stranded: tuple[str, ...]
    """Data keys that another version wraps, too, but whose last announcement is under this one, and that some
    target needs: wrapping them anew was cut off."""
    survive: int
    """Data keys it wrapped that another version wraps, too."""


_ONLY_HERE = """
SELECT d.chain, d.dek_id, d.tuples, d.state,
    (d.kms_provider, d.kek_id) = (%(provider)s, %(kek)s) AS announced,
    EXISTS (SELECT FROM vsql_sync.dek_wrappings w WHERE w.dek_id = d.dek_id
            AND (w.kms_provider, w.kek_id) <> (%(provider)s, %(kek)s)
            AND NOT EXISTS (SELECT FROM vsql_sync.shred_orders o WHERE o.state = 'destroyed'
                            AND (o.kms_provider, o.kek_id) = (w.kms_provider, w.kek_id))) AS elsewhere
FROM vsql_sync.deks d
WHERE d.state <> 'destroyed' AND EXISTS (
    SELECT FROM vsql_sync.dek_wrappings w
    WHERE w.dek_id = d.dek_id AND (w.kms_provider, w.kek_id) = (%(provider)s, %(kek)s))
ORDER BY d.chain, d.dek_id
"""
_UNAPPLIED = """
SELECT a.chain, a.dek_id, count(*) FROM vsql_sync.vsql_sync_audit a
WHERE a.event_type = 'replication_batch' AND a.dek_id = ANY(%s) AND EXISTS (
    SELECT FROM vsql_sync.counted_targets t
    WHERE t.chain = a.chain AND t.target <> '*' AND t.acked_sequence < a.sequence)
GROUP BY a.chain, a.dek_id
"""


def of(conn: Connection, provider: str, kek_id: str) -> Coverage:
    """What destroying this version would take away now."""
    with errors("looking at what a KEK version wraps"):
        rows = conn.execute(_ONLY_HERE.encode(), {"provider": provider, "kek": kek_id}).fetchall()
        unapplied = conn.execute(_UNAPPLIED.encode(), ([row[1] for row in rows],)).fetchall()
        working = unfinished(conn)  # a stream that was ended may have left its key as it was
    gone = [(chain, dek_id, tuples) for chain, dek_id, tuples, *_, elsewhere in rows if not elsewhere]
    lost = {dek_id for _, dek_id, _ in gone}
    covers = {
        one: Covered(
            deks=sum(chain == one for chain, _, _ in gone),
            tuples=sum(tuples for chain, _, tuples in gone if chain == one),
            unapplied_batches=sum(n for chain, dek_id, n in unapplied if chain == one and dek_id in lost),
        )
        for one in dict.fromkeys(chain for chain, _, _ in gone)
    }
    needed = {dek_id for _, dek_id, _ in unapplied}
    return Coverage(
        tuple((chain, dek_id) for chain, dek_id, _ in gone),
        covers,
        tuple(row[1] for row in rows if row[3] == "active" and not row[5] and row[0] in working),
        tuple(row[1] for row in rows if row[4] and row[5] and row[1] in needed),
        sum(1 for row in rows if row[5]),
    )


def require_alive(conn: Connection, dek_id: str, provider: str, kek_id: str) -> None:
    """Refuse to announce what an order destroyed; in the transaction that notes the wrapping, behind that.

    Whoever destroys has dek_wrappings locked: either the wrapping is noted before, and the order does not fit
    any more, or what was destroyed is seen here.
    """
    dead, gone = conn.execute(
        "SELECT (SELECT state = 'destroyed' FROM vsql_sync.deks WHERE dek_id = %s), EXISTS (SELECT"
        " FROM vsql_sync.shred_orders WHERE state = 'destroyed' AND (kms_provider, kek_id) = (%s, %s))",
        (dek_id, provider, kek_id),
    ).fetchall()[0]
    if dead or gone:
        raise KeyUnavailableError(
            f"{f'data key {dek_id}' if dead else kek_id} was destroyed by an order",
            hint="nothing is wrapped by it again; if the version was restored, destroy it once more",
        )


def require_unneeded(found: Coverage, kek_id: str) -> None:
    """Raise RefusedError while somebody needs a key this version wraps."""
    if found.in_use:
        raise RefusedError(
            f"{len(found.in_use)} data keys under {kek_id} are in use",
            hint="make the KEK's next version, then `syncctl key rotate-kek` puts it to use",
        )
    if found.stranded:
        raise RefusedError(
            f"{len(found.stranded)} data keys some target needs were announced under {kek_id} last",
            hint="wrapping them anew was cut off: `syncctl key rotate-kek` does it",
        )


def unfinished(conn: Connection) -> set[str]:
    """Chains this node still writes."""
    rows = conn.execute("SELECT chain FROM vsql_sync.streams WHERE direction = 'out' AND state <> 'FINISHED'")
    return {row[0] for row in rows}
