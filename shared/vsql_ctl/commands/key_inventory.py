"""`syncctl key inventory`: every key this node knows, with state, age, use, limits, strength and custodian.

Not here: the keys. Rules: nothing secret is read; a KMS that does not answer does not keep the rest from
being shown; a state is worked out from what was recorded and signed, not from a KMS that refuses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, human_bytes, render_table

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.config.encryption import KmsSettings
    from vsql_shared.kms.base import KekVersion
    from vsql_shared.pg.connect import Connection

ACTIVE, RETIRING, RETIRED = "active", "retiring", "retired"
SCHEDULED, DESTROYED = "scheduled for destruction", "destroyed"
NOT_FOUND, UNKNOWN = "not found", "unknown"

_DEK_COLUMNS = (
    "dek_id", "chain", "epoch", "kms_provider", "kek_id", "algorithm", "state", "tuples", "bytes",
    "created_at", "retired_at",
)  # fmt: skip
_SIGNER_COLUMNS = ("fingerprint", "node_name", "pinned_at", "pinned_by", "retired_at", "revoked_at")
_OPERATOR_COLUMNS = ("fingerprint", "operator", "enrolled_at", "enrolled_by", "ended_at")
_ORDER_COLUMNS = (
    "id", "kms_provider", "kek_id", "state", "requested_at", "not_before", "approved_at", "ended_at"
)  # fmt: skip
# Bits of security (NIST SP 800-57 part 1): what is said of keys that no provider describes.
_DEK_BITS, _SIGNING_BITS = 256, 128
# Manifests that some target has not acknowledged: their keys are still needed.
_NEEDED = (
    "SELECT DISTINCT a.dek_id FROM vsql_sync.vsql_sync_audit a JOIN"
    " (SELECT chain, min(acked_sequence) AS acked FROM vsql_sync.counted_targets WHERE target <> '*'"
    "  GROUP BY chain) t USING (chain) WHERE a.sequence > t.acked AND a.dek_id <> ''"
)
_WRAPPED = (
    "SELECT w.kms_provider, w.kek_id, count(*), min(w.announced_at), max(w.announced_at)"
    " FROM vsql_sync.dek_wrappings w GROUP BY 1, 2"
    " UNION ALL SELECT DISTINCT d.kms_provider, d.kek_id, 0, min(d.created_at), max(d.created_at)"
    " FROM vsql_sync.deks d WHERE NOT EXISTS (SELECT FROM vsql_sync.dek_wrappings w"
    "   WHERE (w.kms_provider, w.kek_id) = (d.kms_provider, d.kek_id)) GROUP BY 1, 2"
)


@click.command(
    "inventory", epilog=example("syncctl key inventory", "syncctl key inventory --output json --limit 0")
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Newest data keys shown; 0 for all.",
)
@output_option
@pass_operator
def inventory(operator: Operator, output: OutputFormat, limit: int) -> None:
    """List data keys, KEK versions and signing keys, with their state, age, use and strength."""
    from vsql_shared.pg.connect import connect
    from vsql_shared.pg.migrate import require_current

    settings = operator.settings
    with connect(settings.connection.conninfo(), application_name="vsql_sync_ctl") as conn:
        require_current(conn)
        found = collect(conn, settings, limit)
    emit(output, found, lambda: _text(found))


def collect(conn: Connection, settings: Settings, limit: int = 0) -> dict[str, Any]:
    """The inventory as `--output json` has it; 0: all data keys."""
    from vsql_shared.kms.base import weakness

    versions, problem = _kek_versions(settings.encryption.kms, strict=settings.server.mode == "prod")
    orders = _rows(conn, _ORDER_COLUMNS, "shred_orders ORDER BY id")
    return {
        "deks": _deks(conn, settings, orders, limit),
        "deks_total": conn.execute("SELECT count(*) FROM vsql_sync.deks").fetchall()[0][0],
        "dek_limits": {
            "tuples": settings.encryption.dek.max_tuples,
            "bytes": settings.encryption.dek.max_bytes,
            "rotation": settings.encryption.dek.rotation,
        },
        "keks": _keks(conn, settings.encryption.kms, None if problem else versions, orders),
        "kek_problem": problem,
        "kek_warnings": [text for text in map(weakness, versions) if text]
        + _still_there(settings.encryption.kms.provider, versions, orders),
        "signing_keys": [_signer(row) for row in _rows(conn, _SIGNER_COLUMNS, _BY_NODE)],
        "operator_keys": _rows(conn, _OPERATOR_COLUMNS, "operator_keys ORDER BY operator, enrolled_at"),
        "shred_orders": orders,
    }


_BY_NODE = "signers ORDER BY node_name, pinned_at"


def _rows(conn: Connection, columns: Sequence[str], rest: str, *values: object) -> list[dict[str, Any]]:
    """Rows of a table of ours as dicts; `columns` and `rest` are constants of this module."""
    from psycopg import sql

    from vsql_shared.pg.connect import errors

    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    query = sql.SQL("SELECT {} FROM vsql_sync.").format(names).as_string(conn) + rest
    with errors("reading the keys"):
        return [dict(zip(columns, row, strict=True)) for row in conn.execute(query.encode(), values or None)]


def _age(since: Any) -> int | None:
    """Seconds, whole."""
    return None if since is None else max(0, int(time.time() - since.timestamp()))


def _deks(
    conn: Connection, settings: Settings, orders: Sequence[dict[str, Any]], limit: int
) -> list[dict[str, Any]]:
    from vsql_shared.pg import coverage

    rest = "deks ORDER BY state NOT IN ('active', 'retiring'), created_at DESC, dek_id"
    rows = _rows(conn, _DEK_COLUMNS, f"{rest} LIMIT %s", limit) if limit else _rows(conn, _DEK_COLUMNS, rest)
    needed = {row[0] for row in conn.execute(_NEEDED)}
    doomed = {
        dek_id
        for one in orders
        if one["state"] == "scheduled"
        for _, dek_id in coverage.of(conn, one["kms_provider"], one["kek_id"]).deks
    }
    dek = settings.encryption.dek
    for row in rows:
        if row["state"] == DESTROYED:
            continue
        if row["dek_id"] in doomed:
            row["state"] = SCHEDULED
        elif row["state"] != ACTIVE:
            row["state"] = RETIRING if row["dek_id"] in needed else RETIRED
    return [
        row
        | {
            "strength_bits": _DEK_BITS,
            "age_seconds": _age(row["created_at"]),
            "used": round(max(row["tuples"] / dek.max_tuples, row["bytes"] / dek.max_bytes), 4),
        }
        for row in rows
    ]


def _kek_versions(kms: KmsSettings, *, strict: bool) -> tuple[list[KekVersion], str]:
    """What the KMS holds, or why it does not say: an inventory without it is still worth something."""
    from vsql_shared.errors import VsqlSyncError
    from vsql_shared.kms import open_provider

    try:
        provider = open_provider(kms, strict=strict)
        try:
            return provider.versions(), ""
        finally:
            provider.close()
    except VsqlSyncError as error:
        return [], str(error)


def _keks(
    conn: Connection,
    kms: KmsSettings,
    versions: Sequence[KekVersion] | None,
    orders: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The KMS's versions, and those that wrapped a key here and are not there (destroyed, or elsewhere).

    `versions`: None where the KMS did not answer.
    """
    used = {(row[0], row[1]): row[2:] for row in conn.execute(_WRAPPED)}
    ordered = {(o["kms_provider"], o["kek_id"]): o["state"] for o in orders if o["state"] != "cancelled"}
    present = {(kms.provider, version.kek_id): version for version in versions or ()}
    rows = []
    for name in [*present, *sorted({*used, *ordered} - present.keys())]:
        version, (deks, since, last) = present.get(name), used.get(name, (0, None, None))
        rows.append(
            {
                "kms_provider": name[0],
                "kek_id": name[1],
                "algorithm": _wrapped_with(conn, *name),
                "strength_bits": None if version is None else version.strength_bits,
                "state": kek_state(
                    version, ordered.get(name), asked=versions is not None and name[0] == kms.provider
                ),
                "deks": deks,
                "in_use_since": since,
                "last_wrapped_at": last,
                "age_seconds": _age(since),
                "custodian": kms.custodian or None,
            }
        )
    return rows


def kek_state(version: KekVersion | None, ordered: str | None, *, asked: bool) -> str:
    """A version's state; `asked`: its KMS has said which ones it has."""
    if ordered == "destroyed":
        return DESTROYED
    if ordered == "scheduled":
        return SCHEDULED
    if version is None:
        return NOT_FOUND if asked else UNKNOWN
    return ACTIVE if version.active else RETIRING


def _wrapped_with(conn: Connection, provider: str, kek_id: str) -> str | None:
    """How a version wraps, by the newest announcement under it."""
    from vsql_shared.audit.dsse import SignedDocument
    from vsql_shared.crypto.announce import decode_announcement

    row = conn.execute(
        "SELECT announcement FROM vsql_sync.deks WHERE (kms_provider, kek_id) = (%s, %s)"
        " AND announcement IS NOT NULL ORDER BY created_at DESC LIMIT 1",
        (provider, kek_id),
    ).fetchone()
    return decode_announcement(SignedDocument.decode(bytes(row[0])).payload).wrap_algorithm if row else None


def _still_there(
    provider: str, versions: Sequence[KekVersion], orders: Sequence[dict[str, Any]]
) -> list[str]:
    """Versions that were destroyed and are there again: somebody restored them."""
    there = {(provider, version.kek_id) for version in versions}
    return [
        f"KEK {o['kek_id']} was destroyed by order {o['id']} and is in the KMS: restored from a backup?"
        for o in orders
        if o["state"] == "destroyed" and (o["kms_provider"], o["kek_id"]) in there
    ]


def _signer(row: dict[str, Any]) -> dict[str, Any]:
    state = "revoked" if row["revoked_at"] else "retired" if row["retired_at"] else ACTIVE
    more = {"algorithm": "Ed25519", "strength_bits": _SIGNING_BITS, "state": state}
    return row | more | {"age_seconds": _age(row["pinned_at"]), "custodian": row["pinned_by"]}


def _days(seconds: int | None) -> str:
    return "" if seconds is None else f"{seconds / 86_400:.1f} d"


def _text(found: dict[str, Any]) -> str:
    deks = [
        (d["dek_id"], d["chain"], d["epoch"], d["state"], d["tuples"], human_bytes(d["bytes"]),
         f"{d['used']:.1%}", d["kek_id"], d["created_at"], _days(d["age_seconds"]), d["retired_at"])
        for d in found["deks"]
    ]  # fmt: skip
    keks = [
        (k["kms_provider"], k["kek_id"], k["algorithm"], k["strength_bits"], k["state"], k["deks"],
         _days(k["age_seconds"]), k["custodian"])
        for k in found["keks"]
    ]  # fmt: skip
    signers = [
        (s["node_name"], s["fingerprint"], s["strength_bits"], s["state"], s["pinned_at"], s["pinned_by"],
         s["retired_at"], s["revoked_at"])
        for s in found["signing_keys"]
    ]  # fmt: skip
    limits = found["dek_limits"]
    parts = [
        f"Data keys ({len(deks)} of {found['deks_total']}), AES-256-GCM, {_DEK_BITS} bits",
        f"{limits['rotation']}, at most {limits['tuples']} tuples or {human_bytes(limits['bytes'])}",
        render_table(
            ("dek", "stream", "epoch", "state", "tuples", "size", "used", "kek", "created", "age", "retired"),
            deks,
        ),
        "\nKey-encryption keys",
    ]
    if found["kek_problem"]:
        parts.append(f"the KMS does not answer: {found['kek_problem']}")
    parts += [f"warning: {text}" for text in found["kek_warnings"]]
    parts += [
        render_table(
            ("provider", "kek", "algorithm", "bits", "state", "deks", "in use for", "custodian"), keks
        ),
        "\nSigning keys, Ed25519",
        render_table(("node", "fingerprint", "bits", "state", "pinned", "by", "retired", "revoked"), signers),
    ]
    if found["operator_keys"]:
        parts += ["\nOperators' keys, Ed25519", _table(_OPERATOR_COLUMNS, found["operator_keys"])]
    if found["shred_orders"]:
        parts += ["\nOrders to destroy a KEK version", _table(_ORDER_COLUMNS, found["shred_orders"])]
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    return render_table(columns, [tuple(row[name] for name in columns) for row in rows])
