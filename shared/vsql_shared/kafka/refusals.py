"""Why brokers do not let us in, when a client only says that nobody answers.

librdkafka tries again for ever and tells the reason by its error callback alone. `Complaints` keeps the last
one; `explain` makes it one error: what, where, what to do. No secret is in any of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError

from vsql_shared import tls
from vsql_shared.errors import BrokerError, VsqlSyncError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vsql_shared.config import Settings
    from vsql_shared.config.kafka import KafkaSecurity

_SSL, _AUTHENTICATION = KafkaError._SSL, KafkaError._AUTHENTICATION  # noqa: SLF001 - public names of librdkafka
# librdkafka's guesses, which it tells as a lost connection.
_OTHER_PROTOCOL = re.compile(r"incorrect security\.protocol|PLAINTEXT broker listener|SSL listener")
_PLACE = re.compile(r"(?:\w+://)?(\[[0-9a-f:]+\]|[^\s:/]+):(\d+)/")


class Complaints:
    """An error callback that remembers why a connection was refused, and passes everything on."""

    def __init__(self, pass_on: Callable[[KafkaError], None]) -> None:
        self._pass_on = pass_on
        self.last: KafkaError | None = None

    def __call__(self, error: KafkaError) -> None:
        """Take what the client has to say."""
        if error.code() in (_SSL, _AUTHENTICATION) or _OTHER_PROTOCOL.search(error.str()):
            self.last = error
        self._pass_on(error)


def explain(settings: Settings, error: KafkaError | None) -> VsqlSyncError | None:
    """The error of a refused connection; None when nobody refused, but nobody answered.

    Without a complaint the handshake is tried all the same: a broker that does not like our certificate may
    just hang up.
    """
    security = settings.kafka.security
    host, port = _place(error.str() if error else "", settings.kafka.bootstrap_servers)
    where = f"Kafka at {host}:{port}"
    if error is not None and error.code() == _AUTHENTICATION:
        return BrokerError(
            f"{where} refuses user {security.username} ({security.mechanism}): {_words(error)}",
            hint="check kafka.security: username, password and mechanism",
        ).refusing("authentication")
    reason = tls.refusal(host, port, _means(security)) if security.uses_tls else None
    if reason is not None:
        return BrokerError(
            f"no TLS with {where}: {reason.text}", hint=f"{reason.hint} (kafka.security.ca_path, cert_path)"
        ).refusing("tls")
    if error is not None and error.code() == _SSL:
        return BrokerError(f"no TLS with {where}: {_words(error)}", hint="check kafka.security").refusing(
            "tls"
        )
    if error is None and (security.uses_tls or not tls.spoken(host, port)):
        return None
    return BrokerError(
        f"{where} ends the connection although kafka.security.protocol is {security.protocol}",
        hint="set the protocol of the brokers' listener: SSL or SASL_SSL where it has TLS",
    ).refusing("tls")


def _means(security: KafkaSecurity) -> tls.Means:
    return tls.Means(security.ca_path, security.cert_path, security.key_path)


def _place(text: str, bootstrap: str) -> tuple[str, int]:
    """The broker an error is about, else the first one of the configuration."""
    found = _PLACE.search(text)
    if found is not None:
        return found[1].strip("[]"), int(found[2])
    host, _, port = bootstrap.split(",", maxsplit=1)[0].strip().rpartition(":")
    return host.strip("[]"), int(port)


def _words(error: KafkaError) -> str:
    """The client's words without the broker's name before them and how long it took after them."""
    text = re.sub(r"^\S+: ", "", error.str())
    return re.sub(r" \((?:after \d+ms|verify that)[^)]*\)", "", text).strip()
