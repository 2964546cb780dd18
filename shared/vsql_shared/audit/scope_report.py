"""The signed report on what a publication leaves out: its words, its bytes, its verification. Pure.

Not here: gathering the facts (pg/scope_facts.py) and files. The format is documented, with a program that
verifies it, in docs/operations/scope-report.md. Rules:

* It says what was checked, how, and what it does not claim. It draws no conclusion about anybody's scope.
* Signed is DSSE's pre-authentication encoding of (media type, canonical JSON without the member `signature`):
  indentation and order of a file's members mean nothing, every name and value does. Canonical is RFC 8785;
  there are no numbers but whole ones.
* `verify` needs the public key and nothing else. What is no report in its exact form is refused before that.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from vsql_shared import lsn
from vsql_shared.audit.dsse import pae
from vsql_shared.audit.entries import canonical_json
from vsql_shared.audit.scope_history import StreamHistory
from vsql_shared.crypto.signing import Signer, fingerprint
from vsql_shared.errors import DecodeError, SignatureError

FORMAT = "vsql-sync-scope-report"
VERSION = 1
MEDIA_TYPE = "application/vnd.vsql-sync.scope-report.v1+json"
MAX_SIZE = 64 << 20
"""Bytes of a report that are read."""
_PREFIX = "ed25519:"
_MADE_BY = "give the whole file that `syncctl publication scope-report NAME --out FILE` wrote"

HOW_CHECKED = (
    (
        "Every epoch of a stream was opened under a scope whose SHA-256 stands in the signed entry "
        "that opened it. While the epoch lasted, each relation message of PostgreSQL was held against"
        " that scope before anything was encrypted, and each row against the number of columns its "
        "table was described with; the stream stops where they differ."
    ),
    (
        "`observed` is read from the table descriptors that were encrypted and sent, not from the "
        "catalog. It was written down before they left, and its SHA-256 stands in the signed manifest"
        " of the batch."
    ),
    (
        "For this report every entry of the streams was verified (signature, order, link to the entry"
        " before, end), and every text against its SHA-256."
    ),
    (
        "Columns count as PCI data that an operator marked or a signed manifest names as such, and those"
        " whose names or types suggest it unless an operator cleared them; those are listed with the"
        " reason that was given."
    ),
)
_SIGNED_EPOCHS = (
    "Every epoch of a stream, but for those under a scope of `sha256` null (opened by a version that signed"
    " none),"
)
NOT_CLAIMED = (
    (
        "That a system is or is not part of a cardholder data environment, or that a requirement is "
        "met: encryption and exclusion are evidence, the entity confirms its scope."
    ),
    (
        "That no PCI data is in other columns: values are not looked at, and a card number in a "
        "column called `note` is found by nobody here."
    ),
    (
        "That a column list keeps anybody out of the source: PostgreSQL's manual warns that whoever "
        "may use the replication protocol can obtain columns that are not published. `readers` names "
        "roles and slots."
    ),
    (
        "Anything about other publications, other ways of replication, backups, exports, or what is "
        "written at a target by others."
    ),
    "That data sent before a column was taken out is gone from Kafka or from targets.",
    (
        "That the source's database and this program were sound: whoever rules both, and has the "
        "signing key, can sign what he likes. Compare with the chain as targets and Kafka have it "
        "(`syncctl audit verify`)."
    ),
)


@dataclass(frozen=True, slots=True)
class PciColumn:
    """A column that counts as PCI data, and why."""

    column: str
    kind: str
    basis: str


@dataclass(frozen=True, slots=True)
class ClearedColumn:
    """A column that looks like PCI data and, an operator said, is not."""

    column: str
    looks_like: str
    reason: str
    cleared_by: str
    cleared_at: datetime


@dataclass(frozen=True, slots=True)
class TableFacts:
    """A table as catalog and decisions have it; `published` None: it is not published any more."""

    name: str
    columns: tuple[str, ...]
    published: tuple[str, ...] | None
    pci: tuple[PciColumn, ...]
    cleared: tuple[ClearedColumn, ...] = ()
    replica_identity: str = "default"
    row_filter: str | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream's history, and the hash of the last entry it covers."""

    history: StreamHistory
    last_hash: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything a report is made of."""

    cluster: str
    node: str
    publication: str
    exclude_pci: bool
    message_prefixes: tuple[str, ...]
    tables: tuple[TableFacts, ...]
    streams: tuple[Stream, ...]
    reader_roles: tuple[str, ...]
    reader_slots: tuple[str, ...]
    other_writers: tuple[str, ...] = ()
    """Nodes that write these tables, too, and send what they write by streams of their own."""


def build(facts: Facts, generated_at: str) -> dict[str, Any]:
    """The report, not signed yet. `generated_at` in ISO 8601."""
    tables = [_table(facts, table) for table in facts.tables]
    how, not_claimed = list(HOW_CHECKED), list(NOT_CLAIMED)
    if any(not digest for stream in facts.streams for *_, digest in stream.history.scope_changes):
        how[0] = how[0].replace("Every epoch of a stream", _SIGNED_EPOCHS, 1)
    if facts.message_prefixes:
        names = ", ".join(facts.message_prefixes)
        not_claimed.append(f"What is in logical messages: those of prefix {names} leave, unread.")
    if facts.other_writers:
        nodes = ", ".join(facts.other_writers)
        not_claimed.append(
            f"What {nodes} sends: the same tables are written there, too, and leave there by a publication of"
            " the same name, of which there is a report for that node."
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "report_type": "pci_scope_reduction",
        "cluster": facts.cluster,
        "node": facts.node,
        "publication": facts.publication,
        "generated_at": generated_at,
        "exclude_pci": facts.exclude_pci,
        "tables": tables,
        "streams": [_stream(stream) for stream in facts.streams],
        "readers": {"roles": list(facts.reader_roles), "slots": list(facts.reader_slots)},
        "how_checked": how,
        "not_claimed": not_claimed,
        "conclusion": _conclusion(facts, tables),
    }


def _table(facts: Facts, table: TableFacts) -> dict[str, Any]:
    published = table.published or ()
    observed = [
        {
            "stream": stream.history.chain,
            "columns": list(one.columns),
            "lsn_from": lsn.text(one.lsn_from) if one.lsn_to else None,
            "lsn_to": lsn.text(one.lsn_to) if one.lsn_to else None,
        }
        for stream in facts.streams
        for one in stream.history.observed.values()
        if one.table == table.name
    ]
    seen = {column for one in observed for column in one["columns"] or ()}
    unobserved = sum(stream.history.unobserved.get(table.name, 0) for stream in facts.streams)
    names = [one.column for one in table.pci]
    return {
        "table": table.name,
        "published": table.published is not None,
        "total_columns": len(table.columns),
        "replicated_columns": len(published),
        "columns": list(published),
        "excluded_pci_columns": [c for c in names if c in table.columns and c not in published],
        "published_pci_columns": [c for c in names if c in published],
        "observed_pci_columns": [c for c in names if c in seen],
        "subscriber_can_contain_pci": any(c in published or c in seen for c in names) or unobserved > 0,
        "pci_columns": [{"column": c.column, "kind": c.kind, "basis": c.basis} for c in table.pci],
        "cleared_columns": [
            {
                "column": one.column,
                "looks_like": one.looks_like,
                "reason": one.reason,
                "cleared_by": one.cleared_by,
                "cleared_at": one.cleared_at.isoformat(),
            }
            for one in table.cleared
        ],
        "replica_identity": table.replica_identity,
        "row_filter": table.row_filter,
        "observed": observed,
        "unobserved_batches": unobserved,
    }


def _stream(stream: Stream) -> dict[str, Any]:
    history = stream.history
    return {
        "stream": history.chain,
        "first_sequence": history.first,
        "last_sequence": history.sequence,
        "last_hash": stream.last_hash,
        "epochs": history.epochs,
        "batches": history.batches,
        "rows": history.rows,
        "lsn_from": lsn.text(history.lsn_from) if history.batches else None,
        "lsn_to": lsn.text(history.lsn_to) if history.batches else None,
        "scopes": [
            {"epoch": epoch, "sequence": sequence, "sha256": digest or None}
            for epoch, sequence, digest in history.scope_changes
        ],
        "unobserved": [
            {"table": table, "batches": count} for table, count in sorted(history.unobserved.items())
        ],
    }


def _conclusion(facts: Facts, tables: Sequence[dict[str, Any]]) -> str:
    """What was found, in one sentence; nothing about what it means."""
    found = sorted(
        {
            f"{t['table']}.{c}"
            for t in tables
            for c in (*t["published_pci_columns"], *t["observed_pci_columns"])
        }
    )
    if found:
        return f"Columns known as PCI data are published, or were seen on a stream: {', '.join(found)}."
    sent = [stream.history for stream in facts.streams if stream.history.batches]
    missed = sum(sum(history.unobserved.values()) for history in sent)
    if missed:
        return (
            f"No column known as PCI data is published, and none was seen; but {missed} batches were sent by"
            " a version that wrote down nothing of what it saw."
        )
    if not sent and any(stream.history.observed for stream in facts.streams):
        return (
            "No column known as PCI data is published, and none was seen in what was written down; no batch"
            " has a manifest yet, so that records of it may have left or not."
        )
    if not sent:
        return "No column known as PCI data is published; nothing has been sent yet, and so nothing observed."
    first, last = min(h.lsn_from for h in sent), max(h.lsn_to for h in sent)
    return (
        "No column known as PCI data is published, and none was seen on the streams, from"
        f" {lsn.text(first)} to {lsn.text(last)}."
    )


def sign(report: dict[str, Any], signer: Signer | None) -> dict[str, Any]:
    """The report with its signer and signature; both null without a signer (dev mode)."""
    who = None if signer is None else {"node": signer.node, "fingerprint": signer.fingerprint}
    signed = {**report, "signer": who}
    if signer is None:
        return {**signed, "signature": None}
    signature = signer.sign(pae(MEDIA_TYPE, canonical_json(signed).encode()))
    return {**signed, "signature": _PREFIX + base64.b64encode(signature).decode()}


def to_text(report: dict[str, Any]) -> str:
    """The report as a file has it."""
    return json.dumps(report, ensure_ascii=False, indent=2) + "\n"


def verify(text: bytes, public_key: bytes) -> dict[str, Any]:
    """Give the report once it is known to be as the owner of `public_key` signed it.

    1. It is a report of this version, in JSON without doubled members or fractions. DecodeError.
    2. It is signed, and says so by the key that was given (another node's report). SignatureError.
    3. The signature is over its every name and value (altered, shortened or extended). SignatureError.
    """
    # 1.
    report = _parse(text)
    signature = report.pop("signature", None)
    signer = report.get("signer")
    # 2.
    if signature is None or not isinstance(signer, dict):
        raise SignatureError(
            "the report is not signed", hint="it proves nothing; have it made again with a signing key"
        )
    ours = fingerprint(public_key)
    if signer.get("fingerprint") != ours:
        raise SignatureError(
            f"the report names signer {str(signer.get('fingerprint'))[:100]}, the key given is {ours}",
            hint="give the public key of the node that made it",
        )
    # 3.
    try:
        message = pae(MEDIA_TYPE, canonical_json(report).encode())
        Ed25519PublicKey.from_public_bytes(public_key).verify(_signature(signature), message)
    except InvalidSignature as error:
        raise SignatureError("the report's signature does not verify: it was altered") from error
    except UnicodeEncodeError as error:
        raise DecodeError("the report holds text that is no Unicode") from error
    return {**report, "signature": signature}


def _signature(text: object) -> bytes:
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        raise DecodeError('the report\'s signature does not begin with "ed25519:"')
    try:
        return base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DecodeError("the report's signature is not base64") from error


def _parse(text: bytes) -> dict[str, Any]:
    if len(text) > MAX_SIZE:
        raise DecodeError(f"a report of {len(text)} bytes, at most {MAX_SIZE} are read")
    try:
        report: Any = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_once,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DecodeError(f"not a scope report: {_no_json(error)}", hint=_MADE_BY) from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise DecodeError(f"not a scope report: expected a JSON object with format {FORMAT!r}", hint=_MADE_BY)
    if report.get("version") != VERSION:
        raise DecodeError(f"a report of version {report.get('version')}, expected {VERSION}", hint="upgrade")
    return report


def _no_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON, or not all of it (line {error.lineno}, column {error.colno})"
    return "no UTF-8" if isinstance(error, UnicodeDecodeError) else "no JSON that is read"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DecodeError("the report has a member twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise DecodeError(f"the report holds the number {text[:40]}, expected whole ones")
