"""`syncctl key enroll`, `shred`, `approve`, `destroy`: a KEK version's end.

Not here: what is signed (audit/shredding.py), the states of an order (pg/shredding.py), the proof of what was
done (key_proof.py). Rules:

* Ordering, approving, destroying are three acts; the first two are two people's, each with their own key.
* Nothing is destroyed before its time, nor by a command that was only asked to schedule it.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vsql_ctl.context import (
    Operator,
    OutputFormat,
    confirm,
    example,
    output_option,
    pass_operator,
    yes_option,
)
from vsql_ctl.files import read_file, write_file
from vsql_ctl.output import emit, render_pairs, render_table
from vsql_shared.errors import RefusedError, TransientError, UserError

if TYPE_CHECKING:
    from vsql_shared.pg.connect import Connection
    from vsql_shared.pg.shredding import Row

_FILE = click.Path(path_type=Path, dir_okay=False)
_LONGEST_SIGNATURE = 1 << 10  # a raw one has 64 bytes; what is longer is another file
_operator_option = click.option("--operator", "name", metavar="NAME", required=True, help="Whose key it is.")


@click.command(
    "enroll",
    epilog=example(
        "syncctl key enroll --operator alice --key alice.pub",
        'syncctl key enroll --operator alice --end --reason "left"',
    ),
)
@_operator_option
@click.option("--key", "path", type=_FILE, metavar="FILE", help="Their public Ed25519 key.")
@click.option("--end", is_flag=True, help="They order and approve nothing more.")
@click.option("--reason", default="", metavar="TEXT", help="Why it ends; kept in the audit log.")
@pass_operator
def enroll(operator: Operator, name: str, path: Path | None, end: bool, reason: str) -> None:
    """Make a person's key known: those who may order, and approve, that a KEK version is destroyed.

    Everybody makes their own key (`syncctl key generate --output DIR`) and gives the public half.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.crypto.signing import load_public_key
    from vsql_shared.pg import shredding

    if end == (path is not None):
        raise UserError("give --key FILE to enroll, or --end", hint="one of them")
    with open_node(operator) as conn:
        if path is None:
            print_ = shredding.end_operator(conn, name, reason)
        else:
            print_ = shredding.enroll(conn, name, load_public_key(path))
    click.echo(f"key {print_} of operator {name} {'has ended' if end else 'is enrolled'}")


@click.command(
    "shred",
    epilog=example(
        'syncctl key shred --kek kek/0001 --operator alice --key alice.key --reason "3 years are over"',
        'syncctl key shred --cancel 3 --reason "legal hold"',
    ),
)
@click.option("--kek", "kek_id", metavar="KEK", help="The version, as `syncctl key inventory` names it.")
@click.option("--operator", "name", metavar="NAME", help="Who orders it.")
@click.option("--key", "path", type=_FILE, metavar="FILE", help="Their private key.")
@click.option("--after", default="7d", show_default=True, metavar="TIME", help="Not before so much time.")
@click.option("--cancel", "number", type=int, metavar="ORDER", help="Withdraw an order instead.")
@click.option("--reason", required=True, metavar="TEXT", help="Why; it stands in what is signed.")
@yes_option
@output_option
@pass_operator
def shred(  # noqa: PLR0917 - one parameter an option, as click gives them
    operator: Operator,
    output: OutputFormat,
    kek_id: str | None,
    name: str | None,
    path: Path | None,
    after: str,
    number: int | None,
    reason: str,
    yes: bool,
) -> None:
    """Order that a KEK version is destroyed, and with it all data that no other version covers.

    Nothing is destroyed yet: another operator approves, then the time must have come, then `syncctl key
    destroy` does it. Data keys that a later version wraps, too (`syncctl key rotate-kek`), are not touched.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.crypto.signing import load_signer
    from vsql_shared.pg import coverage, shredding

    if number is not None and (kek_id or name or path):  # whose order it is, is not looked at
        raise UserError("--cancel takes --reason and nothing else", hint="it withdraws the order it names")
    with open_node(operator) as conn:
        if number is not None:
            row = shredding.cancel(conn, number, reason)
        else:
            if kek_id is None or name is None or path is None:
                raise UserError("an order needs --kek, --operator and --key", hint="or --cancel ORDER")
            kms = operator.settings.encryption.kms
            listed = _require_retiring(operator, kek_id)
            found = coverage.of(conn, kms.provider, kek_id)
            if not (found.deks or found.survive or kek_id in listed):
                raise RefusedError(f"nobody knows a KEK version {kek_id}", hint="see `syncctl key inventory`")
            unapplied = sum(one.unapplied_batches for one in found.covers.values())
            confirm(
                f"Order that {kek_id} is destroyed? {len(found.deks)} data keys are lost with it,"
                f" {unapplied} batches under them are not applied everywhere.",
                yes=yes,
            )
            signer = load_signer(path, name, strict=True)
            row = shredding.request(conn, signer, kms.provider, kek_id, reason, _duration(after))
    _show(output, row)


def _duration(text: str) -> timedelta:
    from pydantic import TypeAdapter, ValidationError

    from vsql_shared.config.values import Duration

    try:
        found: timedelta = TypeAdapter(Duration).validate_python(text)
    except ValidationError:
        raise UserError(f"--after {text!r} is no time", hint='write "7d", "24h", "30m" or "0s"') from None
    return found


def _require_retiring(operator: Operator, kek_id: str) -> set[str]:
    """Refuse the version that wraps; one that is not in the KMS any more may be ordered. What the KMS has."""
    from vsql_shared.kms import open_provider

    settings = operator.settings
    provider = open_provider(settings.encryption.kms, strict=settings.server.mode == "prod")
    try:
        versions = provider.versions()
        if any(one.active and one.kek_id == kek_id for one in versions):
            raise RefusedError(
                f"{kek_id} is the version that wraps",
                hint="make the next version, then `syncctl key rotate-kek`",
            )
        return {one.kek_id for one in versions}
    finally:
        provider.close()


def _show(output: OutputFormat, row: Row) -> None:
    shown = _said(row)
    if row.state in ("requested", "scheduled") and shown["unapplied_batches"]:
        click.echo(
            f"warning: {shown['unapplied_batches']} batches are not applied everywhere, and lost to their"
            " targets with these keys; `syncctl key rotate-kek` before the order keeps them",
            err=True,
        )
    emit(output, shown, lambda: render_pairs(shown))


def _said(row: Row) -> dict[str, Any]:
    """What the order's signed bytes say."""
    from vsql_shared.audit.dsse import SignedDocument, document_hash
    from vsql_shared.audit.rows import timestamp
    from vsql_shared.audit.shredding import ShredOrder

    order = ShredOrder.decode(SignedDocument.decode(row.document).payload)
    return {
        "order": row.id,
        "state": {"scheduled": "scheduled for destruction"}.get(row.state, row.state),
        "kek": order.kek_id,
        "ordered_by": order.operator,
        "reason": order.reason,
        "not_before": timestamp(order.not_before),
        "deks": sum(one.deks for one in order.covers.values()),
        "tuples": sum(one.tuples for one in order.covers.values()),
        "unapplied_batches": sum(one.unapplied_batches for one in order.covers.values()),
        "sha256": document_hash(row.document).hex(),
    }


@click.command(
    "approve",
    epilog=example(
        "syncctl key approve 3 --operator bob --key bob.key",
        "syncctl key approve 3 --to-sign order-3.bin",
        "syncctl key approve 3 --operator bob --signature order-3.sig",
    ),
)
@click.argument("number", type=int, metavar="ORDER")
@click.option("--operator", "name", metavar="NAME", help="Who approves; not who ordered.")
@click.option("--key", "path", type=_FILE, metavar="FILE", help="Their private key.")
@click.option("--signature", type=_FILE, metavar="FILE", help="Or their Ed25519 signature, 64 bytes.")
@click.option("--to-sign", type=_FILE, metavar="FILE", help="Only write the bytes to be signed elsewhere.")
@yes_option
@output_option
@pass_operator
def approve(
    operator: Operator,
    output: OutputFormat,
    number: int,
    name: str | None,
    path: Path | None,
    signature: Path | None,
    to_sign: Path | None,
    yes: bool,
) -> None:
    """Approve an order to destroy a KEK version, as a second person. It is then scheduled.

    The signature may be made on another machine:
    `openssl pkeyutl -sign -rawin -inkey bob.key -in order-3.bin -out order-3.sig`.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.audit.shredding import to_approve
    from vsql_shared.crypto.signing import load_signer
    from vsql_shared.pg import shredding

    with open_node(operator) as conn:
        row = shredding.to_be_approved(conn, number)
        if to_sign is not None:
            write_file(to_sign, to_approve(row.document))
            _show(output, row)
            click.echo(f"wrote {to_sign}", err=True)
            return
        where = path or signature
        if name is None or where is None or (path is not None and signature is not None):
            raise UserError("an approval needs --operator, and --key or --signature")
        if not yes:
            click.echo(render_pairs(_said(row)), err=True)
        confirm(f"Approve that {row.kek_id} is destroyed?", yes=yes)
        if path is not None:
            signer = load_signer(path, name, strict=True)
            approver, approval = signer.fingerprint, signer.sign(to_approve(row.document))
        else:
            approver, approval = _enrolled(conn, name), read_file(where, _LONGEST_SIGNATURE)
        row = shredding.approve(conn, number, approver, approval)
    _show(output, row)


def _enrolled(conn: Connection, name: str) -> str:
    from vsql_shared.pg import shredding

    found = [key.fingerprint for key in shredding.operators(conn, present=True) if key.node == name]
    if not found:
        raise RefusedError(f"no operator {name!r} is enrolled", hint="`syncctl key enroll`")
    return found[0]


@click.command("destroy", epilog=example("syncctl key destroy 3", "syncctl key destroy 3 --elsewhere"))
@click.argument("number", type=int, metavar="ORDER")
@click.option(
    "--elsewhere", is_flag=True, help="It was destroyed with the key service's own tools; only record it."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds to wait until the chains say so.",
)
@yes_option
@output_option
@pass_operator
def destroy(
    operator: Operator, output: OutputFormat, number: int, elsewhere: bool, timeout: float, yes: bool
) -> None:
    """Carry out an approved order whose time has come. This cannot be undone.

    The KEK version is destroyed in the token or file; with a key service, its administrator does that, and
    --elsewhere says so. Then each stream's chain names, signed, the data keys that are gone with it. Given
    again, it has those chains say so that have not.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.kms import destroy_version
    from vsql_shared.pg import commands, shredding

    with open_node(operator) as conn:
        row = shredding.load(conn, number)
        if row.state == "destroyed":
            asked = shredding.tell_again(conn, number)
        else:
            row, _, found = shredding.require_due(conn, number)
            unapplied = sum(one.unapplied_batches for one in found.covers.values())
            question = (
                f"Destroy {row.kek_id} for good, and {len(found.deks)} data keys with it?"
                f" {unapplied} batches under them are not applied everywhere."
            )
            confirm(question, yes=yes)
            _require_same_provider(operator, row)
            _require_retiring(operator, row.kek_id)
            if not elsewhere:
                destroy_version(operator.settings.encryption.kms, row.kek_id)
            _require_gone(operator, row.kek_id)
            asked = shredding.record_destroyed(conn, number)
        answers = [one for number in asked for one in commands.wait(conn, number, 1, timeout)]
    said = [{"stream": one.chain, "done": one.ok, "message": one.message} for one in answers]
    emit(
        output,
        {"order": number, "kek": row.kek_id, "state": "destroyed", "streams": said},
        lambda: "\n".join(
            [
                f"{row.kek_id} is destroyed",
                render_table(("stream", "done", "message"), [tuple(one.values()) for one in said]),
            ]
        ),
    )
    if len(answers) < len(asked):
        raise TransientError(
            f"{len(asked) - len(answers)} streams have not said so in their chains yet",
            hint="their producers do when they run again; until then their targets wait",
        )
    if not all(one.ok for one in answers):
        raise RefusedError("a stream does not say so in its chain", hint="the table says why")


def _require_same_provider(operator: Operator, row: Row) -> None:
    """Refuse where we would ask another KMS than the order is about: it has none of that one's keys."""
    used = operator.settings.encryption.kms.provider
    if used != row.kms_provider:
        raise RefusedError(
            f"{row.kek_id} is in the KMS of provider {row.kms_provider}, this configuration is for {used}",
            hint="give --config with [encryption.kms] of the KEK's own provider",
        )


def _require_gone(operator: Operator, kek_id: str) -> None:
    from vsql_shared.kms import open_provider

    settings = operator.settings
    provider = open_provider(settings.encryption.kms, strict=settings.server.mode == "prod")
    try:
        if provider.remains(kek_id):
            raise RefusedError(
                f"the KMS still has {kek_id}, or can restore it",
                hint="one that is only scheduled or disabled there can come back: wait until it is gone",
            )
    finally:
        provider.close()


COMMANDS = (enroll, shred, approve, destroy)
