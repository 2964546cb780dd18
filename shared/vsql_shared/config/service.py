"""[cluster], [server], [metrics], [log]: who this node is and how its processes run."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from vsql_shared.config.section import Section
from vsql_shared.config.values import Address, ClusterName, ConfigPath, Duration, NodeName, Size, Whole

NodeId = Annotated[Whole, Field(ge=1, le=1023)]


class ClusterSettings(Section):
    """[cluster]: this node's place among the others."""

    name: ClusterName
    """Name of the cluster; begins the name of every topic."""
    node_id: NodeId
    """Number of this node, unique in the cluster, 1 to 1023."""
    node_name: NodeName
    """Name of this node, unique in the cluster."""


class TlsSettings(Section):
    """[server.tls]: certificate of this node's own listeners."""

    cert_path: ConfigPath | None = None
    """Certificate chain, PEM."""
    key_path: ConfigPath | None = None
    """Private key, PEM; readable by this user only."""


class ServerSettings(Section):
    """[server]: how the services run."""

    mode: Literal["dev", "prod"] = "prod"
    """"prod" requires TLS and a signing key; "dev" is for trying things, and says so every minute."""
    listen_addr: Address = "127.0.0.1:8444"
    """Address of the node's API."""
    tls: TlsSettings = TlsSettings()
    """Certificate of the listeners."""
    state_dir: ConfigPath | None = None
    """Folder of the daemon's pid file and logs; by default under XDG_STATE_HOME, or /var/lib for root."""
    standby: bool = False
    """Whether a service waits while another one of its role runs for this node, to take over from it."""
    stop_timeout: Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(hours=1))] = timedelta(
        seconds=60
    )
    """How long a stopping service may take to finish its batch before it is killed."""


class MetricsSettings(Section):
    """[metrics]: HTTP for health, readiness and Prometheus."""

    enabled: bool = True
    """Whether the services listen."""
    producer_addr: Address = "127.0.0.1:9464"
    """Address of the producer's endpoint; port 0 takes a free one."""
    consumer_addr: Address = "127.0.0.1:9465"
    """Address of the consumer's endpoint; port 0 takes a free one."""


class LogSettings(Section):
    """[log]: what the services write to standard error, and the daemon to files."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is written."""
    format: Literal["json", "text"] = "json"
    """One JSON object a line for programs, or text for people."""
    file_max_bytes: Annotated[Size, Field(ge=64 * 2**10, le=2**30)] = 10 * 2**20
    """Bytes of one of the daemon's log files before it is rotated."""
    file_keep: Annotated[Whole, Field(ge=1, le=100)] = 5
    """Rotated log files that are kept."""
