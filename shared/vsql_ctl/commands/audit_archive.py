"""`syncctl audit archive` and `prune`: older segments of the trail go to locked storage, then from here.

Not here: what is due, verified or in the way (vsql_shared/audit/archive.py, pruning.py), buckets (objects/).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.commands.audit_proofs import signing_key
from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit, render_table
from vsql_ctl.trail import node_database, read_text, trusted_keys
from vsql_shared.errors import ChainError, RefusedError, TransientError, UserError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vsql_shared.audit.archive import Node, Plan, Row
    from vsql_shared.audit.base import Base
    from vsql_shared.audit.pruning import Candidate
    from vsql_shared.config import Settings
    from vsql_shared.objects.s3 import S3Store
    from vsql_shared.pg.connect import Connection

_FILE = click.Path(path_type=Path, dir_okay=False)
_DRY = "Show what would be done, and do nothing."
_HELD = {
    False: "every segment that is kept is whole, signed, linked from the first entry on, cosigned and locked",
    True: "these files are whole, signed and linked from the first entry, or the base given, on; locks, and"
    " whether more is archived, the bucket shows. Cosigned is what a key given with --cosigner says",
}
"""What `--verify` held, from the bucket and (True) from files."""


@click.command(
    "archive",
    epilog=example(
        "syncctl audit archive --dry-run",
        "syncctl audit archive",
        "syncctl audit archive --verify",
        "syncctl audit archive --verify --from ./downloaded --key node-a.pub --cosigner node-b=node-b.pub",
    ),
)
@click.option("--chain", help="Only this chain; every own chain when left out.")
@click.option("--dry-run", is_flag=True, help=_DRY)
@click.option(
    "--cosigned",
    "notes",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="A checkpoint another node has cosigned: a segment may end there.",
)
@click.option("--verify", "verifies", is_flag=True, help="Read every archived segment and verify it.")
@click.option(
    "--from",
    "folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="With --verify: downloaded segments, off-line.",
)
@click.option(
    "--key", "keys", type=_FILE, multiple=True, metavar="FILE", help="With --from: a writer's key, of each."
)
@click.option(
    "--cosigner",
    "cosigners",
    multiple=True,
    metavar="NODE=FILE",
    help="With --from: a node that cosigned, and its key.",
)
@click.option(
    "--after",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="With --from: a base of a chain, where its first segments are deleted.",
)
@output_option
@pass_operator
def archive(
    operator: Operator,
    output: OutputFormat,
    *,
    chain: str | None,
    dry_run: bool,
    notes: tuple[Path, ...],
    verifies: bool,
    folder: Path | None,
    keys: tuple[Path, ...],
    cosigners: tuple[str, ...],
    after: tuple[Path, ...],
) -> None:
    """Put entries older than `online_months` into locked storage, in segments that verify by themselves.

    Each ends at a checkpoint that another node has cosigned. It is read back and verified before it counts.
    Takes the node's signing key. With --verify nothing is stored: what is archived is read and verified,
    and the first bad segment of each chain is named (exit code 9).
    """
    if folder is not None:
        from vsql_ctl.archive_check import verify_folder

        if not verifies or not keys:
            raise UserError("--from goes with --verify and --key")
        rows, problems = verify_folder(folder, keys, cosigners, after)
        return _shown(output, rows, problems, offline=True)
    if keys or cosigners or after:
        raise UserError(
            "--key, --cosigner and --after go with --from", hint="else the keys pinned here count"
        )
    with _working(operator.settings) as (node, opened):
        if verifies:
            from vsql_ctl.archive_check import verify_bucket

            rows, problems = verify_bucket(node, opened(), chain)
            return _shown(output, rows, problems, offline=False)
        _take_notes(node, notes, chain)
        if dry_run:
            return _show_plans(output, _plans(node, operator.settings, chain))
        _run(node, operator.settings, opened(), chain, output)
    return None


@contextmanager
def _working(settings: Settings) -> Iterator[tuple[Node, Any]]:
    """The node and how its bucket is opened; nobody else archives or prunes meanwhile."""
    from vsql_shared.audit.archive import Node, hold_alone
    from vsql_shared.objects import open_store
    from vsql_shared.pg import nodes

    with ExitStack() as closing, node_database(settings) as conn:
        hold_alone(conn)
        local = nodes.local(conn)
        archive = settings.audit.archive

        def opened() -> S3Store:
            store = open_store(archive)
            closing.callback(store.close)
            return store

        yield (
            Node(
                conn,
                local.cluster,
                local.name,
                trusted_keys(conn, settings),
                archive.prefix,
                settings.audit.retention_months,
                archive.segment_entries,
            ),
            opened,
        )


def _take_notes(node: Node, notes: tuple[Path, ...], chain: str | None) -> None:
    from vsql_shared.audit import cosigned, heads
    from vsql_shared.audit.bases import pinned
    from vsql_shared.audit.checkpoint import open_checkpoint
    from vsql_shared.audit.notes import MAX_NOTE_SIZE
    from vsql_shared.pg import oplog
    from vsql_shared.pg.connect import errors

    for path in notes:
        text = read_text(path, MAX_NOTE_SIZE)
        head = open_checkpoint(text, pinned(node.conn)).checkpoint
        if chain not in (None, head.log.chain):
            raise UserError(f"{path} is of chain {head.log.chain}")
        heads.require_own(node.conn, node.trust, head)
        with errors("taking a cosigned checkpoint"), node.conn.transaction():
            cosigned.remember(node.conn, node.log(head.log.chain), text)
            oplog.record(node.conn, "audit.cosigned", "chain", head.log.chain, new={"size": head.size})


def _plans(node: Node, settings: Settings, chain: str | None) -> list[Plan]:
    from vsql_shared.audit.archive import before, own_chains, plan

    cutoff = before(node.conn, settings.audit.online_months)
    return [plan(node, one, cutoff) for one in own_chains(node, chain)]


def _show_plans(output: OutputFormat, plans: list[Plan]) -> None:
    rows = [
        {
            "chain": one.chain,
            "archived": one.start.sequence,
            "due": [{"first": place.first, "last": place.last} for place in one.segments],
            "waiting": one.waiting,
        }
        for one in plans
    ]

    def text() -> str:
        cells = [
            [
                row["chain"],
                row["archived"],
                ", ".join(f"{p.first}-{p.last}" for p in one.segments),
                one.waiting,
            ]
            for row, one in zip(rows, plans, strict=True)
        ]
        return render_table(("chain", "archived up to", "due segments", "not cosigned"), cells)

    emit(output, rows, text)


def _run(node: Node, settings: Settings, store: S3Store, chain: str | None, output: OutputFormat) -> None:
    from vsql_shared.audit.archive import adopt, archive, own_chains

    done: list[Row] = []
    for name in own_chains(node, chain):
        for row in adopt(node, store, name):
            _note_archived(node, row, "taken up, an earlier run had stored it:")
            done.append(row)
    signer = signing_key(node.conn, settings)
    failed: VerificationError | None = None
    for one in _plans(node, settings, chain):
        head = one.start
        try:
            for place in one.segments:
                row = archive(node, store, signer, one.chain, head, place, datetime.now(UTC))
                _note_archived(node, row, "archived")
                done.append(row)
                head = row.head
        except VerificationError as error:  # what is wrong with one chain keeps no other on-line
            click.echo(f"{one.chain}: {error.message}", err=True)
            failed = failed or error
        if one.waiting:
            entries = f"{one.waiting} {'entry is' if one.waiting == 1 else 'entries are'}"
            click.echo(f"{one.chain}: {entries} due and not cosigned yet", err=True)
    emit(output, [_segment(row) for row in done], lambda: _segments(done))
    if failed is not None:
        raise failed


def _note_archived(node: Node, row: Row, how: str) -> None:
    from vsql_shared.pg import oplog
    from vsql_shared.pg.connect import errors

    with errors("noting the segment in the operators' log"):
        oplog.record(node.conn, "audit.archive", "segment", row.key, new={"sha256": row.sha256.hex()})
    click.echo(f"{how} {row.key} ({row.size} bytes)", err=True)


def _segment(row: Row) -> dict[str, Any]:
    return {
        "chain": row.chain,
        "first": row.place.first,
        "last": row.place.last,
        "bucket": row.bucket,
        "key": row.key,
        "version": row.version,
        "sha256": row.sha256.hex(),
        "bytes": row.size,
        "retain_until": row.retain_until,
    }


def _segments(rows: list[Row]) -> str:
    if not rows:
        return "nothing is due"
    cells = [[row.key, row.place.first, row.place.last, row.size, row.retain_until] for row in rows]
    return render_table(("object", "first", "last", "bytes", "locked until"), cells)


def _shown(
    output: OutputFormat, rows: list[dict[str, Any]], problems: list[dict[str, str]], *, offline: bool
) -> None:
    """What was verified, and what was not looked at; ends with 9 where something does not verify."""
    found = {"ok": not problems, "chains": rows, "problems": problems}

    def text() -> str:
        names = ("chain", "segments", "no longer kept", "archived up to", "cosigned by")
        cells = [
            [row["chain"], row["segments"], row["expired"], row["last"], ", ".join(row["cosigned"])]
            for row in rows
        ]
        parts = [render_table(names, cells) if rows else "no chain is archived"]
        parts += [
            f"{row['chain']}: entries up to {row['after']} were not looked at (--after)"
            for row in rows
            if row["after"]
        ]
        parts += [f"bad: {one['what']}" for one in problems]
        if not problems and any(row["segments"] for row in rows):
            parts.append(f"ok: {_HELD[offline]}")
        return "\n".join(parts)

    emit(output, found, text)
    if problems:
        raise ChainError(
            f"the archive does not verify: {problems[0]['what']}",
            hint=f"{'download it anew' if offline else 'keep what is there'}: every version of an object is"
            " locked (docs/operations/audit.md)",
        )


@click.command("prune", epilog=example("syncctl audit prune --dry-run", "syncctl audit prune"))
@click.option("--chain", help="Only this chain; every live stream of this node when left out.")
@click.option("--dry-run", is_flag=True, help=_DRY)
@click.option("--reason", default="", metavar="TEXT", help="Why; it stands in the operators' log.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="Seconds to wait for the stream's producer.",
)
@output_option
@pass_operator
def prune(
    operator: Operator, output: OutputFormat, chain: str | None, dry_run: bool, reason: str, timeout: float
) -> None:
    """Take archived entries out of the database and of the audit topic, and keep the chain provable.

    Refuses what is not proven: each segment is read from the archive and verified again, with its lock; one
    of the stream's targets must have cosigned the checkpoint at its end, all must have acknowledged it. The
    stream's producer says so in the chain, signed, before anything is removed.
    """
    from vsql_shared.audit.pruning import candidate, live_chains, require_still_archived

    with _working(operator.settings) as (node, opened):
        names = live_chains(node.conn)
        if chain is not None and chain not in names:
            raise RefusedError(
                f"{chain!r} is no live stream this node sends",
                hint="chains of acknowledgements and of first copies stay on-line",
            )
        rows: list[dict[str, Any]] = []
        store: S3Store | None = None
        for one in [name for name in names if chain in (None, name)]:
            base = _unfinished(node, one)
            found = candidate(node, one, operator.settings.audit.online_months)
            if not dry_run and (base is not None or found.segments):
                store = store or opened()
                if base is not None:
                    require_still_archived(node, store, base, found.log, _verified)
                else:
                    base = _order(node, store, found, operator.settings, reason, timeout)
            rows.append(_pruned(node, found, base, reason, timeout, dry_run=dry_run))
        emit(output, rows, lambda: _prunings(rows, dry_run=dry_run))


def _unfinished(node: Node, chain: str) -> Base | None:
    """A base the chain says already, whose rows are still here: a crash, or a timeout, came between."""
    from vsql_shared.audit.bases import said_base, start_of

    base = said_base(node.conn, node.trust, node.log(chain))
    return base if base is not None and start_of(node.conn, node.log(chain)) != base.head else None


def _verified(key: str) -> None:
    click.echo(f"verified {key}", err=True)


def _order(
    node: Node, store: S3Store, found: Candidate, settings: Settings, reason: str, timeout: float
) -> Base:
    from vsql_shared.audit.pruning import require_archived, require_prunable

    base = require_archived(node, store, found.log, found.segments, _verified)
    require_prunable(node.conn, found.log, base, settings.audit.online_months)
    _obeyed(node.conn, found.log.chain, "prune-chain", {"base": base.encode()}, base, reason, timeout)
    return base


def _pruned(
    node: Node, found: Candidate, base: Base | None, reason: str, timeout: float, *, dry_run: bool
) -> dict[str, Any]:
    """The last two steps, and what came of it."""
    from vsql_shared.audit.bases import start_of
    from vsql_shared.audit.pruning import delete

    chain = found.log.chain
    begins = start_of(node.conn, found.log).sequence
    upto = found.segments[-1].place.last if found.segments else begins
    row = {"chain": chain, "pruned": begins, "removed": 0, "partitions": 0, "why": found.why}
    if dry_run or base is None:
        return row | {"pruned": upto if base is None else base.head.sequence}
    _obeyed(node.conn, chain, "prune-topic", {}, base, reason, timeout)
    removed, dropped = delete(node.conn, base, found.log)
    return row | {"pruned": base.head.sequence, "removed": removed, "partitions": dropped}


def _obeyed(
    conn: Connection,
    chain: str,
    verb: str,
    args: dict[str, object],
    base: Base,
    reason: str,
    timeout: float,
) -> None:
    """Give the stream's producer an order, and wait until it stands in the chain."""
    from vsql_shared.pg import commands, oplog
    from vsql_shared.pg.connect import errors

    with errors("ordering to prune"), conn.transaction():
        said = {"order": verb, "size": base.head.sequence, "reason": reason}
        line = oplog.record(conn, "audit.prune", "stream", chain, new=said)
        number = commands.request(conn, "producer", verb, {**args, "audit_log": line}, reason, chain)
    answers = commands.wait(conn, number, 1, timeout)
    if not answers:
        raise TransientError(
            f"no answer within {timeout:g} s from the producer of {chain}: no row was removed",
            hint="the order stands for an hour. Is the producer at work? Give the command again: it goes on"
            " where it stopped",
        )
    if not answers[0].ok:
        raise RefusedError(f"the producer of {chain} does not do it: {answers[0].message}")


def _prunings(rows: list[dict[str, Any]], *, dry_run: bool) -> str:
    if not rows:
        return "this node sends no live stream: nothing of it is pruned"
    if dry_run:
        cells = [[row["chain"], row["pruned"], row["why"]] for row in rows]
        return render_table(("chain", "may be pruned up to", "no further because"), cells)
    cells = [[row["chain"], row["pruned"], row["removed"], row["why"]] for row in rows]
    return render_table(("chain", "pruned up to", "rows removed now", "no further because"), cells)


COMMANDS = (archive, prune)
