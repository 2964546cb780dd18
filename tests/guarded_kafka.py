"""A broker as production has it: TLS, SCRAM-SHA-512 or certificates, an authorizer that allows nothing.

    kafka = GuardedKafka(stack, folder)
    kafka.scram("producer")        # [kafka.security] of a user with a password
    kafka.mutual("consumer")       # the same of a client certificate
    kafka.open                     # the administrator's own door: no TLS, everything allowed

Its listeners: CLIENTS (SASL_SSL), MUTUAL (certificates of both sides), EXPIRED (as MUTUAL, with a server
certificate that is past its time), OPEN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # no stubs say so
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from tests.certificates import Authority
from tests.stack import Stack

PASSWORDS = {"admin": "a-secret word", "producer": "p-secret word", "consumer": "c-secret word"}
_STORES = {"ssl.keystore.type": "PEM", "ssl.truststore.type": "PEM"}


class GuardedKafka:
    """The broker, its authority, and what clients write into their configuration."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.make("the brokers' authority")
        self.ca = self.authority.write(folder / "ca.crt")
        self.broker = stack.own_kafka(
            self._properties(),
            listeners=("MUTUAL", "EXPIRED", "OPEN"),
            format_args=[
                argument
                for user, word in PASSWORDS.items()
                for argument in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={word}]")
            ],
            client_config=self.client("admin"),
        )
        self.address, self.open = self.broker.bootstrap_servers, self.broker.address("OPEN")
        self.admin = AdminClient({"bootstrap.servers": self.open})

    def _properties(self) -> Mapping[str, str | int]:
        good = self.authority.issue(self.folder / "broker", "broker", ["127.0.0.1"])
        expired = self.authority.issue(self.folder / "expired", "broker", ["127.0.0.1"], expired=True)
        return {
            "listener.security.protocol.map": (
                "CLIENTS:SASL_SSL,MUTUAL:SSL,EXPIRED:SSL,OPEN:PLAINTEXT,CONTROLLER:PLAINTEXT"
            ),
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
            "listener.name.clients.scram-sha-512.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required"
                f' username="admin" password="{PASSWORDS["admin"]}";'
            ),
            **_STORES,
            "ssl.keystore.location": str(good.both),
            "ssl.truststore.location": str(self.ca),
            "listener.name.mutual.ssl.client.auth": "required",
            "listener.name.expired.ssl.client.auth": "required",
            "listener.name.expired.ssl.keystore.type": "PEM",
            "listener.name.expired.ssl.keystore.location": str(expired.both),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:admin;User:ANONYMOUS",
        }

    def client(self, user: str) -> dict[str, str]:
        """A client's configuration as one of the users, without the address."""
        return {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": PASSWORDS[user],
            "ssl.ca.location": str(self.ca),
        }

    def as_user(self, user: str) -> dict[str, Any]:
        """The same, with it."""
        return {"bootstrap.servers": self.address, **self.client(user)}

    def scram(self, user: str, **changed: str) -> str:
        """[kafka.security] of a user with a password."""
        values = {
            "protocol": "SASL_SSL",
            "mechanism": "SCRAM-SHA-512",
            "username": user,
            "password": PASSWORDS[user],
            "ca_path": str(self.ca),
        }
        return section(values | changed)

    def mutual(self, name: str, authority: Authority | None = None, *, expired: bool = False) -> str:
        """[kafka.security] of a client certificate, made now."""
        file = self.folder / f"client-{name}"
        issued = (authority or self.authority).issue(file, name, expired=expired)
        paths = {"ca_path": self.ca, "cert_path": issued.certificate, "key_path": issued.key}
        return section({"protocol": "SSL"} | {key: str(path) for key, path in paths.items()})

    def allow(self, printed: Sequence[Mapping[str, Any]]) -> None:
        """Add ACLs as `syncctl kafka acls --output json` prints them."""
        asked = [_binding(one, operation) for one in printed for operation in one["operations"]]
        for future in self.admin.create_acls(asked).values():
            future.result(20)

    def deny(self, principal: str, topic: str, operation: AclOperation) -> None:
        """Forbid one thing, whatever is allowed."""
        kind, literal = ResourceType.TOPIC, ResourcePatternType.LITERAL
        denied = AclBinding(kind, topic, literal, principal, "*", operation, AclPermissionType.DENY)
        self.admin.create_acls([denied])[denied].result(20)

    def no_denials(self) -> None:
        """Take back what was forbidden."""
        any_name, any_principal, any_host = None, None, None
        every = AclBindingFilter(
            ResourceType.ANY,
            any_name,  # type: ignore[arg-type]  # None is any; the stubs lack it
            ResourcePatternType.ANY,
            any_principal,  # type: ignore[arg-type]  # as above
            any_host,  # type: ignore[arg-type]  # as above
            AclOperation.ANY,
            AclPermissionType.DENY,
        )
        self.admin.delete_acls([every])[every].result(20)

    def remove(self) -> None:
        """Stop the broker and delete its data."""
        del self.admin
        self.broker.remove()


def section(values: Mapping[str, str]) -> str:
    """[kafka.security] with these values."""
    return "[kafka.security]\n" + "".join(f'{name} = "{value}"\n' for name, value in values.items())


def _binding(printed: Mapping[str, Any], operation: str) -> AclBinding:
    words = "".join(f"_{c}" if c.isupper() else c.upper() for c in operation).removeprefix("_")
    return AclBinding(
        ResourceType[printed["resource_type"].upper()],
        printed["resource_name"],
        ResourcePatternType[printed["pattern_type"].upper()],
        printed["principal"],
        printed["host"],
        AclOperation[words],
        AclPermissionType[printed["permission"].upper()],
    )
