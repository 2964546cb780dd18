"""An evidence bundle: files for an assessor, and one signed manifest that names each by its hash. Pure.

Not here: gathering the files (vsql_ctl/evidence), directories (the command), and what verifies by itself in a
bundle (evidence_documents.py). The format is in docs/formats.md, with a worked example. Rules:

* The manifest is a DSSE envelope in JSON: signed are the exact bytes of its payload. Nothing else counts.
* What could not be gathered is in the manifest, with the reason: a bundle looks no fuller than it is.
* It says what was found. No sentence of it draws a conclusion about a requirement or about anybody's scope.
* Verifying needs public keys only, and those come from the verifier, never from the bundle.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from vsql_shared.audit import evidence_documents
from vsql_shared.audit.dsse import pae
from vsql_shared.audit.entries import canonical_json
from vsql_shared.audit.evidence_documents import CHECKPOINT, PREFIX_PROOF, SCOPE_REPORT, Cosigned, Keys
from vsql_shared.crypto.signing import Signer, fingerprint
from vsql_shared.errors import DecodeError, RecordError, SignatureError

FORMAT = "vsql-sync-evidence"
VERSION = 1
MEDIA_TYPE = "application/vnd.vsql-sync.evidence.v1+json"
MANIFEST = "manifest.json"
"""Name of the signed manifest in a bundle."""
MAX_MANIFEST = 16 << 20
MAX_FILE = 256 << 20
"""Bytes of a manifest, and of one file, that are read."""

PLAIN: Final = "plain"
"""A file without a signature of its own; the other kinds have one, which is verified, too."""
KINDS = frozenset({SCOPE_REPORT, CHECKPOINT, PREFIX_PROOF, PLAIN})

NOT_CLAIMED = (
    (
        "That any requirement is met, or that a system is or is not part of a cardholder data"
        " environment: the files are evidence, the entity and its assessor conclude."
    ),
    "That what is listed under not_gathered does not exist.",
    (
        "That servers, brokers and key services are as they say: their answers are recorded as they came,"
        " between begun_at and generated_at. Handshakes are this program's own, beside those of the services."
    ),
    (
        "That it is the newest bundle of the node, or the only one: an older one stays true, and of several"
        " one can be shown. What a co-signature says, it says of so many entries, at its time."
    ),
    "That the key it is signed with was still the node's at generated_at: its operators know.",
    (
        "That the node's database and this program were sound: whoever rules both, and has the signing"
        " key, can sign what he likes. Co-signatures by other nodes, and their own bundles, are there to"
        " be compared."
    ),
)

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,240}"
_PATH = re.compile(rf"{_PART}(?:/{_PART}){{0,3}}")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a bundle, as its manifest names it."""

    path: str
    kind: str
    about: str
    sha256: str
    size: int


def file_of(path: str, kind: str, about: str, content: bytes) -> File:
    """The manifest's line for a file. Raises RecordError for a path no bundle may have."""
    if _PATH.fullmatch(path) is None or path == MANIFEST or kind not in KINDS:
        raise RecordError(f"a bundle cannot hold a file {path!r} of kind {kind!r}")
    return File(path, kind, about, hashlib.sha256(content).hexdigest(), len(content))


def build(
    cluster: str,
    node: str,
    times: tuple[str, str],
    software: str,
    files: Iterable[File],
    not_gathered: Iterable[tuple[str, str]],
) -> dict[str, Any]:
    """The manifest, not signed yet. `times`: begun and ended, ISO 8601; `not_gathered`: (what, reason)."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "cluster": cluster,
        "node": node,
        "begun_at": times[0],
        "generated_at": times[1],
        "software": software,
        "files": [
            {"path": f.path, "kind": f.kind, "about": f.about, "sha256": f.sha256, "size": f.size}
            for f in sorted(files, key=lambda one: one.path)
        ],
        "not_gathered": [{"what": what, "reason": reason} for what, reason in not_gathered],
        "not_claimed": list(NOT_CLAIMED),
    }


def seal(manifest: Mapping[str, Any], signer: Signer | None) -> bytes:
    """The envelope; without a signer (dev mode) it has no signature, and proves nothing."""
    payload = canonical_json(manifest).encode()
    signatures = []
    if signer is not None:
        signature = signer.sign(pae(MEDIA_TYPE, payload))
        signatures = [{"keyid": signer.fingerprint, "sig": base64.b64encode(signature).decode()}]
    envelope = {
        "payloadType": MEDIA_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": signatures,
    }
    return (json.dumps(envelope, indent=1) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that verified: its manifest, and who co-signed which of the heads in it."""

    manifest: dict[str, Any]
    signed_by: str
    """Fingerprint of the key that signed the manifest."""
    cosigned: tuple[Cosigned, ...]


def verify(envelope: bytes, present: Collection[str], read: Callable[[str], bytes], keys: Keys) -> Verified:
    """Verify a bundle off-line; `present` are the paths there are beside the manifest, `read` gives one.

    1. The manifest is signed by the key that was given (altered, unsigned, another node's). SignatureError.
    2. It is a manifest of this version, in its exact form. DecodeError.
    3. Each file it names is there, with its size and hash (missing, altered, exchanged). RecordError.
    4. There is no other file (added afterwards). RecordError.
    5. What is signed by itself verifies: scope reports, checkpoints, proofs; and is of this node and cluster
       (a true document of elsewhere, or of before a change of keys). SignatureError, DecodeError, ChainError.
    6. Each head of an own chain that others co-signed is proven a prefix of the one head the bundle has of
       that chain (two histories in one bundle). RecordError, ChainError.
    7. A co-signer whose key was given has co-signed something (a co-signature left out), and is not the node
       itself. SignatureError.
    """
    # 1. and 2.
    manifest = open_manifest(envelope, keys.node)
    files = _files(manifest)
    # 3.
    contents: dict[str, bytes] = {}
    for file in files:
        if file.path not in present:
            raise RecordError(f"{file.path} is missing", record=file.path)
        content = read(file.path)
        if len(content) != file.size or hashlib.sha256(content).hexdigest() != file.sha256:
            raise RecordError(f"{file.path} was altered: it is not what was signed", record=file.path)
        if file.kind != PLAIN:
            contents[file.path] = content
    # 4.
    for path in sorted(set(present) - {file.path for file in files}):
        raise RecordError(f"{path} is not in the manifest: it was added", record=path)
    # 5. and 6.
    of_kind = {kind: [file.path for file in files if file.kind == kind] for kind in KINDS}
    cosigned = evidence_documents.verify(manifest, of_kind, contents, keys)
    # 7.
    for node, key in keys.cosigners:
        if node == manifest["node"] or key == keys.node:
            raise SignatureError(f"node {node} made the bundle: its own signature is no co-signature")
        if node not in {one.node for one in cosigned}:
            raise SignatureError(
                f"no checkpoint of the bundle is co-signed by node {node} with the key given",
                hint="if that node has changed its key since, give the earlier one too. Targets co-sign what"
                " they read; a source co-signs acknowledgements only by hand: verify its own bundle",
            )
    return Verified(manifest, fingerprint(keys.node), tuple(cosigned))


def open_manifest(envelope: bytes, public_key: bytes) -> dict[str, Any]:
    """The manifest, once the owner of `public_key` is known to have signed it."""
    outer = _parse(envelope, "manifest")
    if not isinstance(outer, dict) or outer.keys() != {"payloadType", "payload", "signatures"}:
        raise DecodeError("not a manifest: expected a DSSE envelope of payloadType, payload and signatures")
    if outer["payloadType"] != MEDIA_TYPE:
        raise DecodeError(f"a document of type {str(outer['payloadType'])[:100]!r}, expected {MEDIA_TYPE!r}")
    payload, signatures = _unbase64(outer["payload"], "payload"), outer["signatures"]
    if not isinstance(signatures, list) or len(signatures) > 1:
        raise DecodeError("a manifest has one signature")
    if not signatures:
        raise SignatureError(
            "the bundle is not signed", hint="it proves nothing; have it made again with a signing key"
        )
    named = signatures[0]
    if not isinstance(named, dict) or named.keys() != {"keyid", "sig"}:
        raise DecodeError("a manifest's signature has keyid and sig")
    ours = fingerprint(public_key)
    if named["keyid"] != ours:
        raise SignatureError(
            f"the bundle names signer {str(named['keyid'])[:100]}, the key given is {ours}",
            hint="give the public key of the node that made it",
        )
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            _unbase64(named["sig"], "signature"), pae(MEDIA_TYPE, payload)
        )
    except InvalidSignature as error:
        raise SignatureError("the manifest's signature does not verify: it was altered") from error
    return _manifest(payload)


def _manifest(payload: bytes) -> dict[str, Any]:
    manifest = _parse(payload, "manifest")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DecodeError(f"not a manifest: expected an object with format {FORMAT!r}")
    if type(manifest.get("version")) is not int or manifest["version"] != VERSION:
        raise DecodeError(
            f"a manifest of version {manifest.get('version')}, expected {VERSION}", hint="upgrade"
        )
    texts = ("cluster", "node", "begun_at", "generated_at", "software")
    lists = ("files", "not_gathered", "not_claimed")
    if any(not isinstance(manifest.get(name), str) for name in texts) or any(
        not isinstance(manifest.get(name), list) for name in lists
    ):
        raise DecodeError("the manifest lacks a member, or has one of another type")
    listed = [
        (one.get("what"), one.get("reason")) if isinstance(one, dict) else (one,)
        for one in manifest["not_gathered"]
    ]
    if any(len(one) != 2 or any(not isinstance(text, str) for text in one) for one in listed) or any(
        not isinstance(text, str) for text in manifest["not_claimed"]
    ):
        raise DecodeError("the manifest lists something in another form")
    return manifest


def _files(manifest: Mapping[str, Any]) -> list[File]:
    found = []
    for one in manifest["files"]:
        if not isinstance(one, dict) or one.keys() != {"path", "kind", "about", "sha256", "size"}:
            raise DecodeError("the manifest names a file in another form")
        if any(not isinstance(one[name], str) for name in ("path", "kind", "about", "sha256")):
            raise DecodeError("the manifest names a file with something that is no text")
        if _PATH.fullmatch(one["path"]) is None or one["kind"] not in KINDS or type(one["size"]) is not int:
            raise DecodeError(f"the manifest names a file {one['path'][:100]!r} that no bundle has")
        found.append(File(**one))
    if len({file.path for file in found}) != len(found):
        raise DecodeError("the manifest names a file twice")
    return found


def _unbase64(text: object, what: str) -> bytes:
    if not isinstance(text, str):
        raise DecodeError(f"the manifest's {what} is no text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DecodeError(f"the manifest's {what} is not base64") from error


def _parse(raw: bytes, what: str) -> Any:
    if len(raw) > MAX_MANIFEST:
        raise DecodeError(f"a {what} of {len(raw)} bytes, at most {MAX_MANIFEST} are read")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DecodeError(f"not a {what}: {type(error).__name__}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DecodeError("the manifest has a member twice")
    return found
