"""`syncctl key retire` and `revoke`: the end of a node's signing key, as this node sees it.

Not here: what a signature is worth afterwards (crypto/signing.py, pg/signers.py).
"""

from __future__ import annotations

import click

from vsql_ctl.context import Operator, confirm, example, pass_operator, yes_option
from vsql_ctl.output import render_table

_FINGERPRINT = click.option(
    "--fingerprint", required=True, metavar="SHA256:…", help="The key, as `syncctl key inventory` shows it."
)
_REASON = click.option("--reason", required=True, metavar="TEXT", help="Why; kept in the audit log.")


@click.command("retire", epilog=example('syncctl key retire --fingerprint SHA256:… --reason "yearly change"'))
@_FINGERPRINT
@_REASON
@yes_option
@pass_operator
def retire(operator: Operator, fingerprint: str, reason: str, yes: bool) -> None:
    """End a signing key that a node hands over: what it signed until now stays valid here.

    Stop that node's services before, so that nothing is signed with it any more; then pin the new key.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.pg import signers

    confirm(f"Retire signing key {fingerprint} on this node?", yes=yes)
    with open_node(operator) as conn:
        node = signers.retire(conn, fingerprint, reason)
    click.echo(f"key {fingerprint} of node {node} is retired")


@click.command("revoke", epilog=example('syncctl key revoke --fingerprint SHA256:… --reason "laptop stolen"'))
@_FINGERPRINT
@_REASON
@yes_option
@pass_operator
def revoke(operator: Operator, fingerprint: str, reason: str, yes: bool) -> None:
    """End a signing key that may be stolen: only entries this node knows already stay valid here."""
    from vsql_ctl.session import open_node
    from vsql_shared.pg import signers

    confirm(f"Revoke signing key {fingerprint} on this node? Its streams stop here.", yes=yes)
    with open_node(operator) as conn:
        seen = signers.revoke(conn, fingerprint, reason)
    rows = [(chain, sequence) for chain, sequence in sorted(seen.items())]
    click.echo(f"key {fingerprint} is revoked; entries that stay valid:")
    click.echo(render_table(("chain", "up to sequence"), rows))


COMMANDS = (retire, revoke)
