"""The parser of an evidence bundle's manifest, as functions from bytes, for tests/fuzz/parsers.py.

The signature is made anew around the mutated payload, so that mutations reach what lies behind it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

from tests import evidence_example as example
from tests.audit_history import A
from vsql_shared.audit import evidence
from vsql_shared.audit import evidence_documents as documents
from vsql_shared.audit.dsse import pae

_FILES = {path: raw for path, (_, raw) in example.contents().items()}
_KEYS = documents.Keys(A.public_key)


def manifest(data: bytes) -> None:
    """A whole envelope."""
    evidence.verify(data, _FILES.keys(), _FILES.__getitem__, _KEYS)


def manifests() -> Sequence[bytes]:
    """Envelopes that verify."""
    return [example.envelope(example.contents())]


def payload(data: bytes) -> None:
    """A payload, signed as it is."""
    signature = base64.b64encode(A.sign(pae(evidence.MEDIA_TYPE, data))).decode()
    envelope = {
        "payloadType": evidence.MEDIA_TYPE,
        "payload": base64.b64encode(data).decode(),
        "signatures": [{"keyid": A.fingerprint, "sig": signature}],
    }
    manifest(json.dumps(envelope).encode())


def payloads() -> Sequence[bytes]:
    """Payloads of bundles that verify."""
    return [base64.b64decode(json.loads(one)["payload"]) for one in manifests()]
