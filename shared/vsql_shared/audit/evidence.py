"""An evidence bundle: files for an assessor, and one signed manifest that names each by its hash. Pure.

Not here: gathering the files (vsql_ctl/evidence) and directories (the command). The format is in
docs/formats.md, with a worked example. Rules:

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

from vsql_shared.audit import scope_report
from vsql_shared.audit.checkpoint import Opened, cosigner_key, open_checkpoint
from vsql_shared.audit.dsse import pae
from vsql_shared.audit.entries import canonical_json
from vsql_shared.audit.proofs import ConsistencyProof
from vsql_shared.crypto.signing import Signer, fingerprint
from vsql_shared.errors import DecodeError, RecordError, SignatureError, VsqlSyncError

FORMAT = "vsql-sync-evidence"
VERSION = 1
MEDIA_TYPE = "application/vnd.vsql-sync.evidence.v1+json"
MANIFEST = "manifest.json"
"""Name of the signed manifest in a bundle."""
MAX_MANIFEST = 16 << 20
MAX_FILE = 256 << 20
"""Bytes of a manifest, and of one file, that are read."""

SCOPE_REPORT: Final = "scope-report"
CHECKPOINT: Final = "checkpoint"
PREFIX_PROOF: Final = "prefix-proof"
PLAIN: Final = "plain"
"""Kinds of file. The first three carry signatures of their own, which are verified too."""
KINDS = frozenset({SCOPE_REPORT, CHECKPOINT, PREFIX_PROOF, PLAIN})

NOT_CLAIMED = (
    (
        "That any requirement is met, or that a system is or is not part of a cardholder data"
        " environment: the files are evidence, the entity and its assessor conclude."
    ),
    "That what is listed under not_gathered does not exist.",
    (
        "That servers, brokers and key services are as they say: their answers are recorded as they came,"
        " at generated_at. Handshakes are this program's own, beside those of the services."
    ),
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
    generated_at: str,
    software: str,
    files: Iterable[File],
    not_gathered: Iterable[tuple[str, str]],
) -> dict[str, Any]:
    """The manifest, not signed yet. `generated_at` in ISO 8601; `not_gathered`: (what, reason)."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "cluster": cluster,
        "node": node,
        "generated_at": generated_at,
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
    """A bundle that verified: its manifest, and who signed which of the checkpoints in it."""

    manifest: dict[str, Any]
    signed_by: str
    """Fingerprint of the key that signed the manifest."""
    cosigned: tuple[tuple[str, str], ...]
    """(path, node) of each checkpoint whose co-signature was verified."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Public keys the verifier brings: of the node that made the bundle, and of nodes that co-signed."""

    node: bytes
    cosigners: Mapping[str, bytes]


def verify(envelope: bytes, present: Collection[str], read: Callable[[str], bytes], keys: Keys) -> Verified:
    """Verify a bundle off-line; `present` are the paths there are beside the manifest, `read` gives one.

    1. The manifest is signed by the key that was given (altered, unsigned, another node's). SignatureError.
    2. It is a manifest of this version, in its exact form. DecodeError.
    3. Each file it names is there, with its size and hash (missing, altered, exchanged). RecordError.
    4. There is no other file (added afterwards). RecordError.
    5. What is signed by itself verifies: scope reports, checkpoints, proofs; and is of this node and cluster
       (a true document of elsewhere, or of before a change of keys). SignatureError, DecodeError, ChainError.
    6. A co-signer whose key was given has co-signed something (a co-signature left out). SignatureError.
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
    cosigned = _verify_inside(manifest, files, contents, keys)
    for node in keys.cosigners:
        if node not in {one for _, one in cosigned}:
            raise SignatureError(
                f"no checkpoint of the bundle is co-signed by node {node} with the key given"
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
    if manifest.get("version") != VERSION:
        raise DecodeError(
            f"a manifest of version {manifest.get('version')}, expected {VERSION}", hint="upgrade"
        )
    texts = ("cluster", "node", "generated_at", "software")
    lists = ("files", "not_gathered", "not_claimed")
    if any(not isinstance(manifest.get(name), str) for name in texts) or any(
        not isinstance(manifest.get(name), list) for name in lists
    ):
        raise DecodeError("the manifest lacks a member, or has one of another type")
    return manifest


def _files(manifest: Mapping[str, Any]) -> list[File]:
    found = []
    for one in manifest["files"]:
        if not isinstance(one, dict) or one.keys() != {"path", "kind", "about", "sha256", "size"}:
            raise DecodeError("the manifest names a file in another form")
        path, kind = one["path"], one["kind"]
        if not isinstance(path, str) or _PATH.fullmatch(path) is None or kind not in KINDS:
            raise DecodeError(f"the manifest names a file {str(path)[:100]!r} that no bundle has")
        file = File(**one)
        found.append(file)
    if len({file.path for file in found}) != len(found):
        raise DecodeError("the manifest names a file twice")
    return found


def _verify_inside(
    manifest: Mapping[str, Any], files: Iterable[File], contents: Mapping[str, bytes], keys: Keys
) -> list[tuple[str, str]]:
    """Documents with signatures of their own; (path, node) of the co-signatures that verified."""
    cosigned: list[tuple[str, str]] = []
    for file in files:
        if file.kind == PLAIN:
            continue
        try:
            if file.kind == SCOPE_REPORT:
                _scope(manifest, contents[file.path], keys)
            elif file.kind == CHECKPOINT:
                opened = _checkpoint(manifest, _text(contents[file.path]), keys)
                cosigned += [(file.path, node) for node in _cosigners(opened, keys)]
            else:
                _proof(manifest, file.path, contents, keys)
        except VsqlSyncError as error:
            error.message = f"{file.path}: {error.message}"
            error.args = (error.message,)
            raise
    return cosigned


def _scope(manifest: Mapping[str, Any], content: bytes, keys: Keys) -> None:
    report = scope_report.verify(content, keys.node)
    if (report.get("cluster"), report.get("node")) != (manifest["cluster"], manifest["node"]):
        raise SignatureError("it is a report of another node or cluster")


def _checkpoint(manifest: Mapping[str, Any], text: str, keys: Keys) -> Opened:
    """An own chain's is signed by the node, a peer's co-signed by it."""
    node = str(manifest["node"])
    opened = open_checkpoint(text, [(node, keys.node), *keys.cosigners.items()])
    log = opened.checkpoint.log
    if log.cluster != manifest["cluster"]:
        raise SignatureError("it is of another cluster")
    if log.writer == node:
        opened.require_writer()
        return opened
    own = cosigner_key(log.cluster, node, keys.node)
    if own.name not in {one.key.name for one in opened.signatures if one.at is not None}:
        raise SignatureError(f"it is of a chain of node {log.writer} and is not co-signed by {node}")
    return opened


def _cosigners(opened: Opened, keys: Keys) -> list[str]:
    """Nodes beside the maker whose co-signature, by a key that was given, is on a checkpoint."""
    cluster = opened.checkpoint.log.cluster
    names = {one.key.name for one in opened.signatures if one.at is not None}
    return [node for node, key in keys.cosigners.items() if cosigner_key(cluster, node, key).name in names]


def _proof(manifest: Mapping[str, Any], path: str, contents: Mapping[str, bytes], keys: Keys) -> None:
    """A proof lies beside the earlier checkpoint it begins at, under the same name."""
    earlier = f"{path.removesuffix('.proof')}.checkpoint"
    if earlier not in contents:
        raise RecordError(f"the checkpoint it begins at, {earlier}, is missing", record=path)
    before = _checkpoint(manifest, _text(contents[earlier]), keys).checkpoint
    proof = ConsistencyProof.decode(_text(contents[path]))
    node = str(manifest["node"])
    proof.verify(before, [(node, keys.node), *keys.cosigners.items()]).require_writer()


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DecodeError("no UTF-8 text") from error


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
