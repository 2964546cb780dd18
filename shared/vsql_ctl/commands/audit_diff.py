"""`syncctl audit diff`: which sealed records differ between a stream's source and its target.

Not here: the comparison (vsql_shared/audit/leaf_diff.py) and what it proves (docs/design/0019).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, printable, render_table
from vsql_ctl.trail import node_database, number_range, trusted_keys
from vsql_shared.errors import RecordError, RefusedError, UserError

if TYPE_CHECKING:
    from vsql_shared.audit.divergence import Batches, Divergence
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

_SHOWN = ("what", "batch", "sequence", "topic", "partition", "position", "offsets")


def batch_range(value: str) -> tuple[int, int]:
    """`17` or `17..40`."""
    return number_range(value, "batch", "batches")


class _Ends(NamedTuple):
    """Which chain is meant, and who is its source."""

    chain: str
    source: str


@click.command(
    "diff",
    epilog=example(
        'syncctl audit diff 1042 --peer-connection "host=node-b dbname=shop user=auditor"',
        "syncctl audit diff 1..5000 --chain payments.node-a --output json",
    ),
)
@click.argument("batches", metavar="BATCH|FIRST..LAST", type=batch_range)
@click.option(
    "--peer-connection",
    metavar="CONNINFO",
    envvar="VSQL_SYNC_PEER_CONNECTION",
    required=True,
    help="Database of the stream's other side; only read.",
)
@click.option(
    "--chain", help="The source's chain; may be left out where there is one stream between the two."
)
@output_option
@pass_operator
def diff(
    operator: Operator,
    batches: tuple[int, int],
    peer_connection: str,
    chain: str | None,
    output: OutputFormat,
) -> None:
    """Name the tuples in which source and target of a stream differ, in one batch or in a range.

    Compares what both sides keep of the sealed records ([audit] leaf_retention), held against the roots each
    has signed. It compares no rows of tables. Ends with 9 when something differs or does not fit, with 0 when
    nothing does; batches that could not be compared are named. Ends with 4 where no batch could be.
    """
    from vsql_shared.audit.leaf_diff import KeptLeaves
    from vsql_shared.audit.leaf_diff import diff as compare
    from vsql_shared.pg import nodes
    from vsql_shared.pg.connect import connect

    settings = operator.settings
    with node_database(settings) as conn, connect(peer_connection, application_name="vsql_sync_ctl") as peer:
        here, there = nodes.local(conn), nodes.local(peer)
        _require_peer(here.name, there.name, there.cluster, settings)
        ends = _choose(conn, peer, here.name, there.name, chain)
        own, other = KeptLeaves(conn, here.name), KeptLeaves(peer, there.name)
        source, target = (own, other) if ends.source == here.name else (other, own)
        found = compare(source, target, ends.chain, *batches, trusted_keys(conn, settings))
    emit(output, _as_json(found), lambda: _as_text(found))
    if not found.ok:
        raise RecordError(
            f"source and target differ: {_summary(found)}",
            record=f"{found.chain} batches {found.first} to {found.last}",
            hint="docs/operations/audit.md says what each finding means",
        )
    if not found.rooted:
        raise RefusedError(
            f"nothing to compare: {found.target} has signed no root of batches {found.first} to {found.last}",
            hint="they are under way, abandoned, skipped, or covered by the first copy",
        )


def _require_peer(here: str, there: str, cluster: str, settings: Settings) -> None:
    if there == here or cluster != settings.cluster.name:
        raise UserError(
            f"--peer-connection leads to node {there} of cluster {cluster}",
            hint=f"give another node of cluster {settings.cluster.name}",
        )


def _choose(conn: Connection, peer: Connection, here: str, there: str, chain: str | None) -> _Ends:
    """The stream between the two that is meant."""
    from vsql_shared.audit.chain import writer_of
    from vsql_shared.names import ack_chain

    own, other = _own_chains(conn), _own_chains(peer)
    found = [_Ends(one, here) for one in sorted(own) if ack_chain(one, there) in other]
    found += [_Ends(one, there) for one in sorted(other) if ack_chain(one, here) in own]
    meant = [one for one in found if one.source == writer_of(one.chain) and chain in (None, one.chain)]
    live = [one for one in meant if ".copy." not in one.chain] if chain is None else meant
    if len(live) != 1:
        names = ", ".join(one.chain for one in found) or "none"
        asked = f" named {chain}" if chain else ""
        raise RefusedError(
            f"{len(live)} streams{asked} between {here} and {there}", hint=f"give --chain, one of: {names}"
        )
    return live[0]


def _own_chains(conn: Connection) -> set[str]:
    from vsql_shared.pg.connect import errors

    with errors("reading the chains"):
        rows = conn.execute("SELECT chain FROM vsql_sync.chain_heads WHERE own").fetchall()
    return {name for (name,) in rows}


def _counts(found: Divergence) -> dict[str, int]:
    from vsql_shared.audit.divergence import ALTERED, EXTRA, MISSING

    return {what: sum(one.what == what for one in found.divergent) for what in (ALTERED, MISSING, EXTRA)}


def _summary(found: Divergence) -> str:
    named = ", ".join(f"{count} {what}" for what, count in _counts(found).items())
    more = " and more" if found.more else ""
    roots = sum(one.last - one.first + 1 for one in found.differing_roots)
    gone = sum(one.last - one.first + 1 for one in found.no_manifest)
    said = [
        f"{named}{more}",
        f"{roots} batches with two roots" if roots else "",
        f"{gone} batches without a manifest" if gone else "",
        f"{len(found.unfit)} findings on leaves that are not to be believed" if found.unfit else "",
    ]
    return "; ".join(one for one in said if one)


def _as_json(found: Divergence) -> dict[str, Any]:
    """For programs; documented in docs/operations/audit.md."""
    from vsql_shared.audit.divergence import ALTERED, EXTRA, MISSING

    by_kind = {
        what: [one for one in found.divergent if one.what == what] for what in (ALTERED, MISSING, EXTRA)
    }
    return {
        "ok": found.ok,
        "chain": found.chain,
        "source": found.source,
        "target": found.target,
        "first": found.first,
        "last": found.last,
        "batches": found.batches,
        "rooted": found.rooted,
        "complete": found.complete,
        "compared": found.compared,
        "tuples": found.tuples,
        "exchanges": found.exchanges,
        **by_kind,
        "more": found.more,
        "unfit": found.unfit,
        "differing_roots": found.differing_roots,
        "not_kept": found.not_kept,
        "not_acknowledged": found.unanswered,
        "skipped": found.skipped,
        "no_manifest": found.no_manifest,
    }


def _as_text(found: Divergence) -> str:
    compared = f"{found.tuples} tuples in {found.compared} of {found.batches} batches"
    lines = [
        f"{found.chain}: source {found.source}, target {found.target}, batches {found.first} to {found.last}",
        f"compared {compared}, {found.exchanges} exchanges: {_summary(found)}",
    ]
    if found.divergent:
        rows = [[getattr(one, name) for name in _SHOWN[:-1]] for one in found.divergent]
        cells = [
            [*row, f"{one.offsets[0]}-{one.offsets[1]}"]
            for row, one in zip(rows, found.divergent, strict=True)
        ]
        lines.append(render_table(_SHOWN, cells))
    lines += [
        f"bad: batch {one.batch} (entry {one.sequence}), node {printable(one.node)}: {printable(one.what)}"
        for one in found.unfit
    ]
    lines += _remarks(found)
    if found.ok and found.rooted:
        count = f"{found.rooted} of {found.last - found.first + 1}"
        lines.append(f"ok: nothing differs in {count} batches, by the roots both sides have signed")
    return "\n".join(lines)


def _remarks(found: Divergence) -> list[str]:
    """What could not be compared, and why."""
    lines = []
    if found.no_manifest:
        lines.append(
            f"node {found.source} has no manifest, and has or had one: {_ranges(found.no_manifest)};"
            " run `syncctl audit verify` there"
        )
    if found.differing_roots:
        lines.append(f"the target has signed another root than the source: {_ranges(found.differing_roots)}")
    lines += [
        f"node {node} keeps no leaves (beyond leaf_retention or leaf_max_size, or none were kept):"
        f" {_ranges(gone)}; where the roots are equal nothing differs, where they are not no tuple is named"
        for node, gone in found.not_kept.items()
    ]
    if found.unanswered:
        lines.append(
            f"no root by the target (under way, abandoned, or first copy): {_ranges(found.unanswered)}"
        )
    if found.skipped:
        lines.append(f"skipped at the target by an operator: {_ranges(found.skipped)}")
    return lines


def _ranges(batches: Iterable[Batches]) -> str:
    shown = [str(one.first) if one.first == one.last else f"{one.first}-{one.last}" for one in batches]
    return f"batches {', '.join(shown[:20])}" + (
        f" and {len(shown) - 20} more runs" if len(shown) > 20 else ""
    )
