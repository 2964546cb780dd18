"""`syncctl key retire`, `revoke`, `trust`: the end of a node's signing key, as this node sees it.

Not here: what a signature is worth afterwards (crypto/signing.py, pg/signers.py).
"""

from __future__ import annotations

from pathlib import Path

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
from vsql_ctl.output import emit, render_table
from vsql_shared.errors import UserError

_HASH_SIZE = 32
_FINGERPRINT = click.option(
    "--fingerprint", required=True, metavar="SHA256:…", help="The key, as `syncctl key inventory` shows it."
)
_REASON = click.option("--reason", required=True, metavar="TEXT", help="Why; kept in the audit log.")


@click.command(
    "retire",
    epilog=example(
        'syncctl key retire --fingerprint SHA256:… --reason "yearly change"',
        "syncctl key retire --fingerprint SHA256:… --next new/vsql-sync-signing.pub --reason yearly",
    ),
)
@_FINGERPRINT
@click.option(
    "--next",
    "following",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The next key's .pub file; the old key, still configured, signs that it follows.",
)
@_REASON
@yes_option
@output_option
@pass_operator
def retire(
    operator: Operator,
    fingerprint: str,
    following: Path | None,
    reason: str,
    yes: bool,
    output: OutputFormat,
) -> None:
    """End a signing key that a node hands over: what it signed until now stays valid here.

    Stop that node's services before; then pin the new key. The node's chains say where the old one ended,
    signed by the new one, as soon as its services run with it.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.pg import signers

    confirm(f"Retire signing key {fingerprint} on this node?", yes=yes)
    handover = b"" if following is None else _handover(operator, fingerprint, following)
    with open_node(operator) as conn:
        node = signers.retire(conn, fingerprint, reason, handover)
    shown = {"fingerprint": fingerprint, "node": node, "state": "retired", "announced": following is not None}
    emit(output, shown, lambda: f"key {fingerprint} of node {node} is retired")


def _handover(operator: Operator, fingerprint: str, following: Path) -> bytes:
    """The old key's word for the next one. Raises UserError unless it is the one that is configured."""
    from vsql_shared.audit.key_ends import sign_handover
    from vsql_shared.crypto.signing import fingerprint as fingerprint_of
    from vsql_shared.crypto.signing import load_public_key
    from vsql_shared.kms import open_signer

    signer, new = open_signer(operator.settings), fingerprint_of(load_public_key(following))
    if signer is None or signer.fingerprint != fingerprint:
        raise UserError(
            f"the configured signing key is not {fingerprint}, so it cannot name the next one",
            hint="give --next on the key's own node, before its configuration changes",
        )
    if new == fingerprint:
        raise UserError(f"{following} holds the key that is retired", hint="--next names the next one")
    return sign_handover(signer, operator.settings.cluster.name, new)


@click.command("revoke", epilog=example('syncctl key revoke --fingerprint SHA256:… --reason "laptop stolen"'))
@_FINGERPRINT
@_REASON
@click.option(
    "--now",
    is_flag=True,
    help="On the key's own node: even while its producer runs. What a target has that this node had not"
    " recorded does not count then, until `syncctl key trust` here says so, before the next key is used.",
)
@yes_option
@output_option
@pass_operator
def revoke(
    operator: Operator, fingerprint: str, reason: str, now: bool, yes: bool, output: OutputFormat
) -> None:
    """End a signing key that may be stolen: only entries this node knows already stay valid here.

    On the key's own node, whose producer is stopped before, it signs nothing from now on. The next key signs
    into every chain where it ended; peers that have pinned that one count what leads there, and nothing else.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.pg import signers

    confirm(f"Revoke signing key {fingerprint} on this node? Its streams stop here.", yes=yes)
    with open_node(operator) as conn:
        seen = signers.revoke(conn, fingerprint, reason, now=now)
        own = signers.own_heads(conn, fingerprint)
    rows = [(chain, sequence) for chain, sequence in sorted(seen.items())]
    text = f"key {fingerprint} is revoked; entries that stay valid:\n"
    text += render_table(("chain", "up to sequence"), rows)
    if own:
        text += "\nthe last entries of this node, for its peers' `syncctl key trust`:\n"
        text += render_table(("chain", "sequence", "hash"), own)
    shown = {
        "fingerprint": fingerprint,
        "state": "revoked",
        "trusted_to": seen,
        "own": [dict(zip(("chain", "sequence", "hash"), row, strict=True)) for row in own],
    }
    emit(output, shown, lambda: text)


@click.command(
    "trust",
    epilog=example(
        "syncctl key trust --fingerprint SHA256:… --chain pub.node-a --sequence 17 --hash 9f86… --reason IR-7"
    ),
)
@_FINGERPRINT
@click.option("--chain", required=True, help="The node's chain, as it told you.")
@click.option("--sequence", required=True, type=click.IntRange(min=1), help="Its last genuine entry.")
@click.option("--hash", "told", required=True, metavar="HEX", help="That entry's hash, from the node itself.")
@_REASON
@yes_option
@pass_operator
def trust(
    operator: Operator, fingerprint: str, chain: str, sequence: int, told: str, reason: str, yes: bool
) -> None:
    """Trust a revoked key for what its node signed before it stopped, and this node had not seen by then.

    The node's operator reads number and hash to you, by another channel than Kafka, as `syncctl key revoke`
    shows them there. What lies in Kafka must lead to exactly that entry. Then `syncctl stream retry`.
    """
    from vsql_ctl.session import open_node
    from vsql_shared.audit.history import read_topic
    from vsql_shared.audit.told import SaidBases, ToldHead
    from vsql_shared.kafka.clients import make_consumer
    from vsql_shared.names import audit_topic
    from vsql_shared.pg import signers

    settings, cluster = operator.settings, operator.settings.cluster.name
    confirm(f"Trust revoked key {fingerprint} up to entry {sequence} of {chain}?", yes=yes)
    with open_node(operator) as conn:
        keys, topic, digest = signers.load(conn), audit_topic(cluster), _hash(told)
        bases = SaidBases(cluster, chain, keys, fingerprint, sequence)
        consumer = make_consumer(settings, "syncctl", "vsql-sync.key-trust")
        try:
            read_topic(consumer, topic, bases)
            told_head = ToldHead(cluster, chain, keys, fingerprint, sequence, digest, bases.starts)
            read_topic(consumer, topic, told_head)
        finally:
            consumer.close()
        told_head.require()
        node = signers.trust_up_to(conn, fingerprint, chain, sequence, digest, reason)
    click.echo(f"key {fingerprint} of node {node} is trusted up to entry {sequence} of {chain}")


def _hash(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != _HASH_SIZE:
        raise UserError(f"--hash {text[:80]!r} is not 64 hexadecimal digits")
    return found


COMMANDS = (retire, revoke, trust)
