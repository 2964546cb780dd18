"""ACLs asked of the brokers, as an administrator would with kafka-acls. Which ones: rights.py."""

from __future__ import annotations

import re
from collections.abc import Iterable

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from vsql_shared.errors import BrokerError, TransientError
from vsql_shared.kafka.clients import from_exception
from vsql_shared.kafka.rights import Acl

TIMEOUT_SECONDS = 30.0


def bindings(acl: Acl) -> list[AclBinding]:
    """One ACL as Kafka has it: a binding for each operation, from any host."""
    pattern = ResourcePatternType.PREFIXED if acl.prefixed else ResourcePatternType.LITERAL
    return [
        AclBinding(
            ResourceType[acl.kind.upper()],
            acl.name,
            pattern,
            acl.principal,
            "*",
            AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()],
            AclPermissionType.ALLOW,
        )
        for operation in acl.operations
    ]


def apply(admin: AdminClient, wanted: Iterable[Acl]) -> int:
    """Add the ACLs; one that is there already stays as it is. Returns how many there are now."""
    asked = [binding for acl in wanted for binding in bindings(acl)]
    for future in admin.create_acls(asked, request_timeout=TIMEOUT_SECONDS).values():
        try:
            future.result(TIMEOUT_SECONDS + 1)
        except TimeoutError:
            raise TransientError("no Kafka broker answers while ACLs are added") from None
        except KafkaException as error:
            raise _refused(error) from error
    return len(asked)


def _refused(error: KafkaException) -> Exception:
    code = error.args[0].code()
    if code == KafkaError.CLUSTER_AUTHORIZATION_FAILED:
        return BrokerError(
            "Kafka refuses to add ACLs: this principal may not Alter the cluster",
            hint="run it with an administrator's [kafka.security], or give the printed commands to one",
        )
    if code == KafkaError.SECURITY_DISABLED:
        return BrokerError(
            "Kafka refuses to add ACLs: the brokers have no authorizer",
            hint="set authorizer.class.name on every broker; until then every principal may do everything",
        )
    return from_exception(error, "add ACLs")
