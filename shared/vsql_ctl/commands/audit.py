"""`syncctl audit`: look at the signed trail, verify it, hand it to somebody else."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.audit_report import Findings, as_json, as_text, words
from vsql_ctl.commands.audit_archive import COMMANDS as ARCHIVE
from vsql_ctl.commands.audit_diff import diff
from vsql_ctl.commands.audit_export import export_trail
from vsql_ctl.commands.audit_proofs import COMMANDS
from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, render_table
from vsql_ctl.trail import moment, node_database, number_range, trusted_keys
from vsql_shared.errors import ChainError, RefusedError, UserError

if TYPE_CHECKING:
    from vsql_shared.audit.chain import ChainHead
    from vsql_shared.audit.compare import Comparison
    from vsql_shared.audit.history import KafkaHistory
    from vsql_shared.audit.verify import Problem, Report
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import TrustStore
    from vsql_shared.pg.connect import Connection

_SETTLE_SECONDS = 5.0  # how long entries that are in Kafka may take to reach the table
_AGAIN_SECONDS = 1.0  # between two looks at the same
_MAX_LIMIT = 100_000


def entry_range(value: str) -> tuple[int, int]:
    """`17` or `17..40`."""
    return number_range(value, "entry", "entries")


@click.group("audit", epilog=example("syncctl audit verify", "syncctl audit list --since 2026-02-01"))
def audit() -> None:
    """List, verify, compare, prove and export the signed trail of this node."""


@audit.command(
    "list",
    epilog=example(
        'syncctl audit list --since "2026-02-01" --contains-pci true',
        "syncctl audit list --chain payments.node-a --limit 10 --output json",
    ),
)
@click.option(
    "--since", type=moment, metavar="TIME", help="Entries from this time on (UTC unless it has a zone)."
)
@click.option("--until", type=moment, metavar="TIME", help="Entries before this time.")
@click.option("--contains-pci", type=click.BOOL, help="Only batches with, or without, PCI columns.")
@click.option("--chain", help="Only this chain, e.g. payments.node-a.")
@click.option("--event-type", help="Only this kind, e.g. replication_batch.")
@click.option(
    "--limit",
    type=click.IntRange(1, _MAX_LIMIT),
    default=100,
    show_default=True,
    help="At most so many entries, the newest ones.",
)
@output_option
@pass_operator
def list_entries(
    operator: Operator,
    output: OutputFormat,
    limit: int,
    since: datetime | None,
    until: datetime | None,
    contains_pci: bool | None,
    chain: str | None,
    event_type: str | None,
) -> None:
    """Show entries as the table's columns have them, oldest first.

    `audit verify` says whether they are true.
    """
    filters = {
        "since": since,
        "until": until,
        "contains_pci": contains_pci,
        "chain": chain,
        "event_type": event_type,
    }
    with node_database(operator.settings) as conn:
        rows = _select(conn, filters, limit)

    emit(output, rows, lambda: _list(rows))


def _list(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no entries"
    names = ("event_timestamp", "chain", "sequence", "event_type", "batch", "row_count", "contains_pci")
    shown = ("time", "chain", "sequence", "event", "batch", "rows", "pci", "tables")
    cells = [[*(row[name] for name in names), ", ".join(row["tables_affected"])] for row in rows]
    return render_table(shown, cells)


_FILTERS = {
    "since": "event_timestamp >= %s",
    "until": "event_timestamp < %s",
    "contains_pci": "contains_pci = %s",
    "chain": "chain = %s",
    "event_type": "event_type = %s",
}


def _select(conn: Connection, filters: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    from psycopg import sql

    from vsql_shared.audit.rows import COLUMNS, UNSIGNED_COLUMNS
    from vsql_shared.pg.connect import errors

    columns = [name for name in (*COLUMNS, *UNSIGNED_COLUMNS) if name != "document"]
    wanted = {name: value for name, value in filters.items() if value is not None}
    query = sql.SQL(
        "SELECT {} FROM vsql_sync.vsql_sync_audit WHERE {}"
        " ORDER BY event_timestamp DESC, sequence DESC LIMIT {}"
    ).format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(" AND ").join([sql.SQL("true"), *(sql.SQL(_FILTERS[name]) for name in wanted)]),
        sql.Literal(limit),
    )
    with errors("reading the audit trail"):
        found = conn.execute(query, list(wanted.values())).fetchall()
    return [dict(zip(columns, row, strict=True)) for row in reversed(found)]


@audit.command(
    "verify",
    epilog=example(
        "syncctl audit verify",
        'syncctl audit verify --kafka --peer-connection "host=node-b dbname=shop user=auditor"',
        "syncctl audit verify --chain payments.node-a --range 90000..120000",
    ),
)
@click.option("--chain", help="Only this chain; all chains of this node when left out.")
@click.option(
    "--peer-connection",
    metavar="CONNINFO",
    envvar="VSQL_SYNC_PEER_CONNECTION",
    help="Verify the peer's trail too, and compare both sides' roots and memories.",
)
@click.option("--kafka", is_flag=True, help="Compare with the audit topic too.")
@click.option(
    "--range",
    "entries",
    type=entry_range,
    metavar="FIRST..LAST",
    help="With --chain: only these entries, in this node's table.",
)
@output_option
@pass_operator
def verify(
    operator: Operator,
    output: OutputFormat,
    chain: str | None,
    peer_connection: str | None,
    kafka: bool,
    entries: tuple[int, int] | None,
) -> None:
    """Verify every entry: hash chain, signatures, columns, the end of each chain, operators' acts, roots.

    Names the first bad entry of each chain and ends with 9 when there is one, with 0 when there is none.
    """
    from vsql_shared.pg.connect import connect

    settings = operator.settings
    if entries is not None and (chain is None or peer_connection or kafka):
        raise UserError(
            "--range goes with --chain, and with neither --peer-connection nor --kafka",
            hint="`syncctl audit diff FIRST..LAST` compares batches with the peer",
        )
    with node_database(settings) as conn:
        findings, trust = verify_own(conn, settings, chain, entries)
        if peer_connection:
            with connect(peer_connection, application_name="vsql_sync_ctl") as peer:
                _verify_peer(conn, peer, settings, trust, findings, chain)
        if kafka:
            _verify_kafka(conn, settings, trust, findings)
    emit(output, as_json(findings), lambda: as_text(findings))
    problems = findings.problems
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more findings)" if len(problems) > 1 else ""
        raise ChainError(
            f"the trail does not verify: {words(first)}{more}",
            record=f"{first.chain}/{first.sequence}" if first.sequence is not None else first.chain,
            hint="keep the database as it is, compare with Kafka and the peer (docs/operations/audit.md)",
        )


def verify_own(
    conn: Connection, settings: Settings, chain: str | None, entries: tuple[int, int] | None = None
) -> tuple[Findings, TrustStore]:
    """This node's own trail, by itself: entries, receipts, operators' acts.

    With `entries` only these of `chain`.
    """
    from vsql_shared.audit.acts import compare_acts
    from vsql_shared.audit.compare import compare_receipts
    from vsql_shared.audit.verify import has_chain, noted_segments, verify_table
    from vsql_shared.audit.verify_range import verify_range
    from vsql_shared.pg import nodes

    node = nodes.local(conn)
    if chain is not None and not has_chain(conn, chain):
        raise RefusedError(
            f"node {node.name} has no chain {chain!r}", hint="`syncctl audit list` shows the chains it has"
        )
    trust = trusted_keys(conn, settings)
    if chain is not None and entries is not None:
        part = verify_range(conn, trust, node.cluster, chain, entries)
        return Findings(node.name, {node.name: part}, entries=entries), trust
    report = verify_table(conn, trust, node.cluster, chain)
    findings = Findings(node.name, {node.name: report})
    bad = findings.bad_chains()
    findings.found += noted_segments(conn, report)
    findings.found += compare_receipts(conn, trust, node.name, chain, bad)
    findings.found += compare_acts(conn, node.name, chain, bad)
    return findings, trust


def _verify_peer(
    conn: Connection,
    peer: Connection,
    settings: Settings,
    trust: TrustStore,
    findings: Findings,
    chain: str | None,
) -> None:
    from vsql_shared.audit.acts import compare_acts
    from vsql_shared.audit.verify import known_bases, verify_table
    from vsql_shared.pg import nodes

    other = nodes.local(peer)
    if other.name == findings.node or other.cluster != settings.cluster.name:
        raise UserError(
            f"--peer-connection leads to node {other.name} of cluster {other.cluster}",
            hint=f"give another node of cluster {settings.cluster.name}",
        )
    name = _other_side(chain, other.name) if chain is not None else None
    report = verify_table(peer, trust, other.cluster, name)
    findings.reports[other.name] = known_bases(conn, peer, other.cluster, report)
    bad = findings.bad_chains()
    nodes_named = (findings.node, other.name)
    compared, found = _compare(conn, peer, nodes_named, (chain, name), bad)
    # A producer at work stores an entry right after Kafka, and so the target, has it: look again until the
    # findings stay what they are.
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (before := _wrong(compared, found)) and time.monotonic() < deadline:
        time.sleep(_AGAIN_SECONDS)
        compared, found = _compare(conn, peer, nodes_named, (chain, name), bad)
        if _wrong(compared, found) == before:
            break
    findings.comparisons += compared
    findings.found += found + compare_acts(peer, other.name, name, bad)


def _wrong(compared: list[Comparison], found: list[Problem]) -> list[Problem]:
    return [one.problem for one in compared if one.problem] + found


def _compare(
    conn: Connection,
    peer: Connection,
    names: tuple[str, str],
    chains: tuple[str | None, str | None],
    bad: set[str],
) -> tuple[list[Comparison], list[Problem]]:
    """What both nodes say of each other's chains; names and chains are this node's, then the peer's."""
    from vsql_shared.audit.compare import compare_memory, compare_nodes
    from vsql_shared.audit.views import compare_cosigned, split_views

    chain = chains[0]
    compared = compare_nodes(conn, peer, chain, bad) + compare_nodes(peer, conn, chain, bad)
    found = split_views(conn, peer, chain, bad)
    found += compare_cosigned(conn, peer, chain, bad) + compare_cosigned(peer, conn, chain, bad)
    found += compare_memory(conn, peer, names[1], chain) + compare_memory(peer, conn, names[0], chains[1])
    return compared, found


def _other_side(chain: str, peer: str) -> str:
    """The peer's chain that belongs to one of this node's: its acknowledgements, or what it acknowledges."""
    from vsql_shared.audit.compare import ack_target
    from vsql_shared.names import ack_chain

    acknowledged = ack_target(chain)
    return acknowledged[0] if acknowledged else ack_chain(chain, peer)


def _verify_kafka(conn: Connection, settings: Settings, trust: TrustStore, findings: Findings) -> None:
    from vsql_shared.audit.history import KafkaHistory

    report, cluster = findings.reports[findings.node], settings.cluster.name
    # A consumer at work stores an entry right before Kafka has it: read again while it has its time.
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        # Before the topic is: what is taken off it for a base goes behind the entry that says it.
        history = KafkaHistory(
            cluster, findings.node, trust, report, _base_heads(conn, trust, cluster, report)
        )
        found = _compare_topic(conn, settings, history)
        if not found:
            break
        # Pruned meanwhile: read anew. Each time costs a signed entry more, so this ends.
        pruned = history.pruned_further(_base_heads(conn, trust, cluster, report))
        if not pruned and not (history.lacks and time.monotonic() < deadline):
            break
    findings.found += found


def _base_heads(conn: Connection, trust: TrustStore, cluster: str, report: Report) -> dict[str, ChainHead]:
    """Of each chain that was pruned, the head before the first entry Kafka must have."""
    from vsql_shared.audit.bases import signed_base
    from vsql_shared.audit.checkpoint import Log
    from vsql_shared.audit.watch import is_name

    # Not what is noted beside it: a row that was altered is no reason to end here.
    names = [one.chain for one in report.chains if is_name(one.chain)]
    bases = {name: signed_base(conn, trust, Log(cluster, name)) for name in names}
    return {name: base.head for name, base in bases.items() if base is not None}


def _compare_topic(conn: Connection, settings: Settings, history: KafkaHistory) -> list[Problem]:
    """What the topic has otherwise than the trail."""
    from vsql_shared.audit.history import read_topic
    from vsql_shared.audit.store import recall_head
    from vsql_shared.kafka.clients import make_consumer
    from vsql_shared.names import audit_topic

    consumer = make_consumer(settings, "syncctl", "vsql-sync.audit-verify")
    try:
        read_topic(consumer, audit_topic(settings.cluster.name), history)
    finally:
        consumer.close()
    # A producer at work stores an entry right after Kafka has it: give what is under way its time.
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        heads = {name: recall_head(conn, name) for name in history.chains}
        now = {name: (head[0].sequence, head[0].entry_hash) for name, head in heads.items() if head}
        if not history.lagging(now) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return history.problems(now)


for _command in (export_trail, diff, *COMMANDS, *ARCHIVE):
    audit.add_command(_command)
