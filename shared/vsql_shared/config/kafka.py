"""[kafka]: the brokers, how to reach them, and the shape of our topics.

Gives the settings for a client; constructs none and imports no client library.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from cryptography import x509
from pydantic import Field, field_validator, model_validator

from vsql_shared.config.limits import LimitsSettings
from vsql_shared.config.schema_registry import SchemaRegistrySettings
from vsql_shared.config.secrets import PasswordSource
from vsql_shared.config.section import Section
from vsql_shared.config.values import Bootstrap, ConfigPath, Duration, Whole, refusal
from vsql_shared.errors import ConfigError

KafkaRole = Literal["producer", "consumer", "admin"]
ClientOption = str | int | float | bool

# What the protocol depends on, or a key of its own says: changing it behind our back loses data or leaks.
_OURS_PREFIXES = ("sasl.", "ssl.", "transactional.")
_OURS = {
    "acks": "every record is acknowledged by all replicas",
    "request.required.acks": "every record is acknowledged by all replicas",
    "allow.auto.create.topics": "topics are created with a fixed shape",
    "auto.offset.reset": "positions come from the database",
    "bootstrap.servers": "set kafka.bootstrap_servers",
    "metadata.broker.list": "set kafka.bootstrap_servers",
    "check.crcs": "records are checked when they are fetched",
    "enable.auto.commit": "offsets are committed after the target's commit",
    "enable.auto.offset.store": "offsets are committed after the target's commit",
    "enable.ssl.certificate.verification": "brokers are always verified; set kafka.security.ca_path",
    "enable.gapless.guarantee": "set by vsql-sync",
    "enable.idempotence": "the producer is always idempotent",
    "group.id": "named after the stream",
    "group.instance.id": "named after the stream",
    "isolation.level": "set by vsql-sync",
    "max.in.flight": "order depends on it",
    "max.in.flight.requests.per.connection": "order depends on it",
    "message.max.bytes": "set limits.message_max_bytes",
    "partitioner": "partitions are chosen by vsql-sync",
    "plugin.library.paths": "no code is loaded from here",
    "queue.buffering.max.kbytes": "set limits.kafka_queue_bytes",
    "queued.max.messages.kbytes": "set limits.kafka_queue_bytes",
    "security.protocol": "set kafka.security.protocol",
}


# librdkafka knows no least version of TLS. These exist in TLS 1.2 only, so an older one has nothing to agree
# on; the ciphers of TLS 1.3 are chosen elsewhere and are not touched.
_TLS_1_2_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class KafkaSecurity(PasswordSource):
    """[kafka.security]: TLS and authentication towards the brokers."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Kafka's security protocol."""
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """SASL mechanism; used with the SASL_ protocols."""
    username: Annotated[str, Field(min_length=1)] | None = None
    """SASL user."""
    ca_path: ConfigPath | None = None
    """CA certificates that sign the brokers', PEM; the system's own when absent."""
    cert_path: ConfigPath | None = None
    """Client certificate for mutual TLS, PEM."""
    key_path: ConfigPath | None = None
    """Key of the client certificate, PEM; readable by this user only."""

    @model_validator(mode="after")
    def _complete(self) -> KafkaSecurity:
        secret = (self.password, self.password_file, self.password_command)
        if self.uses_sasl and (self.username is None or all(source is None for source in secret)):
            raise refusal(f"protocol {self.protocol} needs username and a password (or _file, _command)")
        if (self.cert_path is None) != (self.key_path is None):
            raise refusal("cert_path and key_path are given together")
        return self

    @property
    def uses_sasl(self) -> bool:
        """Whether the protocol authenticates by user and password."""
        return self.protocol.startswith("SASL_")

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.protocol.endswith("SSL")

    def principal(self) -> str | None:
        """Who we are to the brokers, where it can be told: the user, or the client certificate's subject."""
        if self.uses_sasl:
            return f"User:{self.username}"
        if not self.uses_tls or self.cert_path is None:
            return None
        try:
            certificate = x509.load_pem_x509_certificate(self.cert_path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"kafka.security.cert_path: cannot read {self.cert_path}: {error.strerror}",
                hint="give a file this user may read",
            ) from None
        except ValueError:
            raise ConfigError(
                f"kafka.security.cert_path: {self.cert_path} holds no certificate in PEM form",
                hint="the client certificate first, then those that sign it",
            ) from None
        # As Java writes it (RFC 2253), unless the brokers have ssl.principal.mapping.rules.
        return f"User:{certificate.subject.rfc4514_string()}"

    def client_options(self) -> dict[str, ClientOption]:
        """The part of a client's settings that authenticates it; holds the password in clear."""
        options: dict[str, ClientOption] = {"security.protocol": self.protocol}
        if self.uses_sasl and self.username is not None:
            password = self.read_password("kafka.security")
            options["sasl.mechanism"] = self.mechanism
            options["sasl.username"] = self.username
            options["sasl.password"] = password.get_secret_value() if password else ""
        if self.uses_tls:
            options["ssl.endpoint.identification.algorithm"] = "https"
            options["ssl.cipher.suites"] = _TLS_1_2_CIPHERS
            paths = {
                "ssl.ca.location": self.ca_path,
                "ssl.certificate.location": self.cert_path,
                "ssl.key.location": self.key_path,
            }
            options |= {name: str(path) for name, path in paths.items() if path is not None}
        return options


class KafkaSettings(Section):
    """[kafka]: the cluster that carries the sealed records."""

    bootstrap_servers: Bootstrap = "127.0.0.1:9092"
    """Brokers to begin with, host:port, comma-separated or a list."""
    security: KafkaSecurity = KafkaSecurity()
    """TLS and authentication."""
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()
    """For tools that read the topics."""
    partitions: Annotated[Whole, Field(ge=1, le=1_000)] = 1
    """Partitions of a table's topic where its publication is applied partitioned; others have one."""
    replication_factor: Annotated[Whole, Field(ge=1, le=15)] = 1
    """Copies of each partition of a new topic; 3 in production."""
    min_insync_replicas: Annotated[Whole, Field(ge=1, le=15)] = 1
    """Copies that must have a record before it counts as written; 2 in production."""
    retention: Annotated[Duration, Field(ge=timedelta(minutes=1))] = timedelta(days=7)
    """How long a data topic keeps records."""
    client_options: dict[str, ClientOption] = Field(default_factory=dict)
    """Further settings of the Kafka client (librdkafka's names), except those vsql-sync sets itself."""

    @field_validator("client_options")
    @classmethod
    def _not_ours(cls, options: dict[str, ClientOption]) -> dict[str, ClientOption]:
        for name in sorted(options):
            reason = _OURS.get(name)
            if reason is None and name.startswith(_OURS_PREFIXES):
                reason = "set it in [kafka.security]"
            if reason is not None:
                raise refusal(f"{name} is not accepted here: {reason}")
        return options

    @model_validator(mode="after")
    def _replicas(self) -> KafkaSettings:
        if self.min_insync_replicas > self.replication_factor:
            raise refusal(
                f"min_insync_replicas ({self.min_insync_replicas}) must not exceed"
                f" replication_factor ({self.replication_factor})"
            )
        return self

    def client_config(self, role: KafkaRole, limits: LimitsSettings | None = None) -> dict[str, ClientOption]:
        """Settings for one confluent_kafka client; holds the password in clear: pass it on, never print it.

        A consumer's group.id is added by whoever subscribes.
        """
        config: dict[str, ClientOption] = dict(self.client_options)
        config |= {"bootstrap.servers": self.bootstrap_servers, **self.security.client_options()}
        config.setdefault("client.id", f"vsql-sync-{role}")
        # A topic somebody deleted must not come back in the brokers' default shape because we asked for it.
        config["allow.auto.create.topics"] = False
        bounds = limits or LimitsSettings()
        if role == "producer":
            config |= {"enable.idempotence": True, "acks": "all"}
            config["message.max.bytes"] = bounds.message_max_bytes
            config["queue.buffering.max.kbytes"] = bounds.kafka_queue_bytes // 1024
            # Ciphertext does not compress; trying costs time only.
            config.setdefault("compression.type", "none")
        elif role == "consumer":
            config |= {"enable.auto.commit": False, "enable.auto.offset.store": False}
            config |= {"auto.offset.reset": "error", "check.crcs": True}
            config["queued.max.messages.kbytes"] = bounds.kafka_queue_bytes // 1024
        return config
