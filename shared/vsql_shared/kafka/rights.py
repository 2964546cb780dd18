"""What producer and consumer of a node must be allowed in Kafka, and no more: one table, and its ACLs.

Pure: no Kafka here. `RIGHTS` is the table of docs/operations/privileges.md (a test holds them together);
`acls` fills it in for the streams a node has. Rules:

* Nobody writes where only the other side writes: a consumer's principal never to data topics or keys.
* A producer's principal does not read data topics. Only where Kafka lost the end of its chain must it look
  whether the records are still there (docs/design/0002): `RECOVERY`, granted for that time.
* Names of data topics are prefixes: tables come and go. They end at the origin's name and its dot.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vsql_shared import names
from vsql_shared.errors import UserError

Service = Literal["producer", "consumer"]
Kind = Literal["topic", "group"]

DATA = "<cluster>.<publication>.<origin>."
GROUPS = "vsql-sync.<cluster>.<publication>.<origin>."
VERIFY_GROUP = "vsql-sync.audit-verify"
"""Group of `syncctl audit verify --kafka`, in which nothing is committed."""


@dataclass(frozen=True, slots=True)
class Right:
    """One row of the table: a service's operations on a resource; `name` has places for a stream's names."""

    service: Service
    kind: Kind
    name: str
    prefixed: bool
    operations: tuple[str, ...]


class StreamName(NamedTuple):
    """A stream of this node: 'out' or 'in', its publication and the node it comes from."""

    direction: str
    publication: str
    origin: str


@dataclass(frozen=True, slots=True, order=True)
class Acl:
    """Operations one principal is allowed on one resource."""

    principal: str
    kind: Kind
    name: str
    prefixed: bool
    operations: tuple[str, ...]


RIGHTS = (
    Right(
        "producer",
        "topic",
        "<cluster>.audit",
        False,
        ("Create", "Describe", "DescribeConfigs", "Read", "Write"),
    ),
    Right("producer", "topic", "<cluster>.keys", False, ("Create", "Describe", "DescribeConfigs", "Write")),
    Right(
        "producer",
        "topic",
        "<cluster>.clocks",
        False,
        ("Create", "Describe", "DescribeConfigs", "Read", "Write"),
    ),
    Right("producer", "topic", DATA, True, ("Create", "Delete", "Describe", "DescribeConfigs", "Write")),
    Right("producer", "group", GROUPS, True, ("Describe",)),
    Right("producer", "group", VERIFY_GROUP, False, ("Describe",)),
    Right(
        "consumer",
        "topic",
        "<cluster>.audit",
        False,
        ("Create", "Describe", "DescribeConfigs", "Read", "Write"),
    ),
    Right("consumer", "topic", "<cluster>.keys", False, ("Create", "Describe", "DescribeConfigs", "Read")),
    Right(
        "consumer",
        "topic",
        "<cluster>.parked",
        False,
        ("Create", "Describe", "DescribeConfigs", "Read", "Write"),
    ),
    Right(
        "consumer",
        "topic",
        "<cluster>.clocks",
        False,
        ("Create", "Describe", "DescribeConfigs", "Read", "Write"),
    ),
    Right("consumer", "topic", DATA, True, ("Describe", "Read")),
    Right("consumer", "group", GROUPS, True, ("Describe",)),
    Right("consumer", "group", f"{GROUPS}<node>", False, ("Read",)),
    Right("consumer", "group", f"{GROUPS}copy.<node>.<node>", False, ("Read",)),
    Right("consumer", "group", VERIFY_GROUP, False, ("Describe",)),
)
"""Always needed."""

RECOVERY = (
    Right("producer", "topic", "<cluster>.keys", False, ("Read",)),
    Right("producer", "topic", DATA, True, ("Read",)),
)
"""Needed while a producer publishes again what Kafka lost of its chain."""

_DIRECTIONS: dict[str, Service] = {"out": "producer", "in": "consumer"}


_PRINCIPAL = re.compile(r"[A-Za-z]\w*:[^\x00-\x1f\x7f]{1,1000}")


def check_principal(principal: str) -> str:
    """The same. Raises UserError for what is no single principal: `User:*` would allow everybody."""
    if _PRINCIPAL.fullmatch(principal) is None or principal.partition(":")[2].strip() == "*":
        raise UserError(
            f"{principal[:200]!r} is not one principal", hint="write it as User:name, as Kafka shows it"
        )
    return principal


def services(streams: Iterable[StreamName]) -> set[Service]:
    """The services that have something to do for these streams."""
    return {_DIRECTIONS[stream.direction] for stream in streams}


def acls(
    cluster: str,
    node: str,
    streams: Iterable[StreamName],
    principals: Mapping[Service, str],
    *,
    recovery: bool = False,
) -> list[Acl]:
    """The ACLs a node's services need for its streams; one for each principal and resource."""
    wanted: dict[tuple[str, Kind, str, bool], set[str]] = {}
    rights = (*RIGHTS, *RECOVERY) if recovery else RIGHTS
    for stream in streams:
        service = _DIRECTIONS[stream.direction]
        for right in rights:
            if right.service == service:
                place = (principals[service], right.kind, _fill(right, cluster, node, stream), right.prefixed)
                wanted.setdefault(place, set()).update(right.operations)
    return sorted(Acl(*place, tuple(sorted(operations))) for place, operations in wanted.items())


def _fill(right: Right, cluster: str, node: str, stream: StreamName) -> str:
    """A right's resource with this node's names in it, escaped as names.py escapes them."""
    parts = {"cluster": cluster, "node": node, "publication": stream.publication, "origin": stream.origin}
    if right.kind == "group":
        return re.sub(r"<(\w+)>", lambda found: parts[found[1]], right.name)
    text = re.sub(r"<(\w+)>", lambda found: names.topic_part(parts[found[1]]), right.name)
    return names.topic_prefix(text) if right.prefixed else text


def commands(wanted: Iterable[Acl], bootstrap: str) -> list[str]:
    """The same as calls of Kafka's own tool, to be given with `--command-config` of an administrator."""
    return [shlex.join(_words(acl, bootstrap)) for acl in wanted]


def _words(acl: Acl, bootstrap: str) -> list[str]:
    operations = [word for one in acl.operations for word in ("--operation", one)]
    pattern = ["--resource-pattern-type", "prefixed"] if acl.prefixed else []
    head = ["kafka-acls.sh", "--bootstrap-server", bootstrap, "--add", "--allow-principal", acl.principal]
    return [*head, *operations, f"--{acl.kind}", acl.name, *pattern]


def table_rows(rights: Iterable[Right]) -> list[str]:
    """The table's rows as docs/operations/privileges.md has them."""
    return [
        f"| {right.service} | {right.kind} `{right.name}`{', prefixed' if right.prefixed else ''}"
        f" | {', '.join(right.operations)} |"
        for right in rights
    ]
