"""`syncctl kafka`: what Kafka must allow this node, and the schema of its records; printed, or applied."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from vsql_ctl.context import Operator, OutputFormat, example, output_option, pass_operator
from vsql_ctl.output import emit
from vsql_ctl.session import open_node
from vsql_shared.errors import RefusedError, UserError

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.kafka.rights import Acl, Service

_EXAMPLES = (
    "syncctl kafka acls --producer-principal User:prod --consumer-principal User:cons",
    "syncctl kafka acls --apply --output json",
)


@click.group("kafka", epilog=example(_EXAMPLES[0]))
def kafka() -> None:
    """Print or apply what Kafka must allow this node, and the schema of its records."""


@kafka.command("acls", epilog=example(*_EXAMPLES))
@click.option("--producer-principal", metavar="PRINCIPAL", help="Of the producer; else [kafka.security]'s.")
@click.option("--consumer-principal", metavar="PRINCIPAL", help="Of the consumer; else [kafka.security]'s.")
@click.option("--recovery", is_flag=True, help="With what a producer needs whose chain's end Kafka lost.")
@click.option("--apply", "applied", is_flag=True, help="Add them, as the principal of [kafka.security].")
@output_option
@pass_operator
def acls(
    operator: Operator,
    output: OutputFormat,
    producer_principal: str | None,
    consumer_principal: str | None,
    recovery: bool,
    applied: bool,
) -> None:
    """Print the ACLs this node's streams need and no more, as calls of kafka-acls.

    A principal is as Kafka shows it: User:name, or User:CN=… of a client certificate.
    """
    given: dict[Service, str | None] = {"producer": producer_principal, "consumer": consumer_principal}
    wanted = _wanted(operator, given, recovery=recovery)
    settings = operator.settings
    if applied:
        _apply(settings, wanted)
    from vsql_shared.kafka.rights import commands

    bootstrap = settings.kafka.bootstrap_servers
    data = {"bootstrap_servers": bootstrap, "applied": applied, "acls": [_as_json(acl) for acl in wanted]}
    emit(output, data, lambda: "\n".join(commands(wanted, bootstrap)))


@kafka.command("schema", epilog=example("syncctl kafka schema", "syncctl kafka schema --register"))
@click.option("--register", "registered", is_flag=True, help="Register it, as [kafka.schema_registry] says.")
@output_option
@pass_operator
def schema(operator: Operator, output: OutputFormat, registered: bool) -> None:
    """Print the Avro schema of packs: for tools that read the topics, and for a registry's administrator."""
    from vsql_shared.kafka.schema_registry import SchemaRegistry, pack_schema

    text = pack_schema()
    data: dict[str, object] = {"schema": json.loads(text)}
    if registered:
        settings = operator.settings.kafka.schema_registry
        if settings.url is None:
            raise UserError("no schema registry is configured", hint="set kafka.schema_registry.url")
        # Whoever gives this command means it, whatever the producer may do.
        found = SchemaRegistry(settings.model_copy(update={"auto_register": True})).id_of(text)
        data |= {"url": settings.url, "subject": settings.subject, "id": found}
        click.echo(f"subject {settings.subject} at {settings.url} has it as id {found}", err=True)
    emit(output, data, lambda: text)


def _wanted(operator: Operator, given: dict[Service, str | None], *, recovery: bool) -> list[Acl]:
    from vsql_shared.kafka import rights
    from vsql_shared.pg import status

    settings = operator.settings
    with open_node(operator) as conn:
        streams = status.stream_names(conn)
    if not streams:
        raise RefusedError(
            "this node has no streams, so its services need nothing of Kafka",
            hint="add a peer first: `syncctl node add-peer`",
        )
    principals = {
        service: rights.check_principal(given[service] or _configured(settings, service))
        for service in rights.services(streams)
    }
    if len(principals) > 1 and len(set(principals.values())) == 1:
        click.echo("note: producer and consumer are one principal here; give each its own", err=True)
    return rights.acls(
        settings.cluster.name, settings.cluster.node_name, streams, principals, recovery=recovery
    )


def _configured(settings: Settings, service: Service) -> str:
    principal = settings.kafka.security.principal()
    if principal is None:
        raise UserError(
            f"the {service}'s principal is not known: [kafka.security] has neither user nor certificate",
            hint=f"give --{service}-principal User:name",
        )
    return principal


def _apply(settings: Settings, wanted: list[Acl]) -> None:
    from vsql_shared.kafka import grants
    from vsql_shared.kafka.clients import make_admin
    from vsql_shared.kafka.topics import require_broker

    admin = make_admin(settings)
    require_broker(admin, settings)
    count = grants.apply(admin, wanted)
    click.echo(f"{count} operations are allowed now", err=True)


def _as_json(acl: Acl) -> dict[str, object]:
    return {
        "principal": acl.principal,
        "resource_type": acl.kind,
        "resource_name": acl.name,
        "pattern_type": "prefixed" if acl.prefixed else "literal",
        "operations": acl.operations,
        "permission": "allow",
        "host": "*",
    }
