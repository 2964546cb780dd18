"""An evidence bundle verifies with public keys alone, and every manipulation of it is found and named."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import evidence_example as example
from tests.audit_history import START, A, B, signer
from tests.evidence_example import CHAIN, bundle, contents, envelope, note, prefix, report
from vsql_ctl.cli import main
from vsql_shared.audit import evidence
from vsql_shared.audit import evidence_documents as documents
from vsql_shared.audit.dsse import pae
from vsql_shared.audit.entries import canonical_json
from vsql_shared.crypto.signing import public_pem
from vsql_shared.errors import DecodeError, RecordError, SignatureError, VsqlSyncError

Files = dict[str, bytes]
CHECKPOINT = f"checkpoints/{CHAIN}.checkpoint"
COSIGNED = f"checkpoints/{CHAIN}.cosigned-by.node-b.checkpoint"
PROOF = f"checkpoints/{CHAIN}.cosigned-by.node-b.proof"
STRANGER = signer("node-x")


def verify(files: Files, *, cosigned: bool = True) -> evidence.Verified:
    """As an assessor does, who has the keys of both nodes."""
    keys = documents.Keys(A.public_key, [("node-b", B.public_key)] if cosigned else [])
    others = {path: raw for path, raw in files.items() if path != evidence.MANIFEST}
    return evidence.verify(files[evidence.MANIFEST], others.keys(), others.__getitem__, keys)


def test_a_bundle_verifies_and_names_who_cosigned() -> None:
    found = verify(bundle())
    assert found.cosigned == ((COSIGNED, "node-b", 3, START // 1_000_000),)
    assert found.signed_by == A.fingerprint
    assert [one["path"] for one in found.manifest["files"]] == sorted(contents())
    assert verify(bundle(), cosigned=False).cosigned == ()


def outer(files: Files, **changed: Any) -> Files:
    """Another envelope around the same payload."""
    parsed = json.loads(files[evidence.MANIFEST])
    return files | {evidence.MANIFEST: json.dumps(parsed | changed).encode()}


def inner(files: Files, change: Callable[[dict[str, Any]], object], *, resigned: bool = False) -> Files:
    """Another payload; signed again by the node itself where `resigned`."""
    parsed = json.loads(files[evidence.MANIFEST])
    manifest = json.loads(base64.b64decode(parsed["payload"]))
    change(manifest)
    if resigned:
        return files | {evidence.MANIFEST: evidence.seal(manifest, A)}
    payload = base64.b64encode(canonical_json(manifest).encode()).decode()
    return outer(files, payload=payload)


def with_file(path: str, kind: str, text: str) -> Files:
    """A bundle the node itself has signed, with another file in the place of one, or beside them."""
    files = contents() | {path: (kind, text.encode())}
    return {one: raw for one, (_, raw) in files.items()} | {evidence.MANIFEST: envelope(files)}


def without(path: str) -> Files:
    """A bundle the node itself has signed without one of the files."""
    files = {one: value for one, value in contents().items() if one != path}
    return {one: raw for one, (_, raw) in files.items()} | {evidence.MANIFEST: envelope(files)}


def other_node() -> Files:
    """A true bundle of another node, given for node-a's."""
    files = {"configuration.toml": contents()["configuration.toml"]}
    raws = {path: raw for path, (_, raw) in files.items()}
    return raws | {evidence.MANIFEST: envelope(files, B, "node-b")}


def other_kind() -> Files:
    """A signature of the node over the same bytes as another kind of document."""
    files = bundle()
    payload = base64.b64decode(json.loads(files[evidence.MANIFEST])["payload"])
    signature = base64.b64encode(A.sign(pae("application/json", payload))).decode()
    return outer(files, signatures=[{"keyid": A.fingerprint, "sig": signature}])


def resigned_by(name: str) -> Files:
    files = contents()
    raws = {path: raw for path, (_, raw) in files.items()}
    return raws | {evidence.MANIFEST: envelope(files, STRANGER if name == "stranger" else None)}


def forged_keyid() -> Files:
    """A stranger's signature under the node's name."""
    files = resigned_by("stranger")
    sig = json.loads(files[evidence.MANIFEST])["signatures"][0]["sig"]
    return outer(files, signatures=[{"keyid": A.fingerprint, "sig": sig}])


def renamed() -> Files:
    files = bundle()
    files["configuration2.toml"] = files.pop("configuration.toml")
    return files


def exchanged() -> Files:
    files = bundle()
    files[CHECKPOINT], files[COSIGNED] = files[COSIGNED], files[CHECKPOINT]
    return files


def cut(files: Files, path: str, count: int) -> Files:
    return files | {path: files[path][:count]}


# What somebody does to a bundle → what is said of it.
MANIPULATIONS: dict[str, tuple[Callable[[], Files], str]] = {
    "a byte of a file is altered": (
        lambda: bundle() | {"configuration.toml": example.CONFIGURATION.replace("1", "2").encode()},
        "configuration.toml was altered",
    ),
    "a file is cut": (lambda: cut(bundle(), "scope/orders.json", 40), "scope/orders.json was altered"),
    "a file is emptied": (lambda: cut(bundle(), CHECKPOINT, 0), "was altered"),
    "a file is taken out": (
        lambda: {p: raw for p, raw in bundle().items() if p != "scope/orders.json"},
        "scope/orders.json is missing",
    ),
    "a file is added": (
        lambda: bundle() | {"scope/other.json": b"{}"},
        "scope/other.json is not in the manifest",
    ),
    "a file is renamed": (renamed, "configuration.toml is missing"),
    "two files are exchanged": (exchanged, "was altered"),
    "the manifest says another hash": (
        lambda: inner(bundle(), lambda m: m["files"][3].update(sha256="0" * 64)),
        "signature does not verify",
    ),
    "what was not gathered is taken out of the manifest": (
        lambda: inner(bundle(), lambda m: m.update(not_gathered=[])),
        "signature does not verify",
    ),
    "the manifest gets another time": (
        lambda: inner(bundle(), lambda m: m.update(generated_at="2026-10-09T08:54:00Z")),
        "signature does not verify",
    ),
    "the signature is taken off": (lambda: outer(bundle(), signatures=[]), "is not signed"),
    "a stranger signs it": (lambda: resigned_by("stranger"), "names signer"),
    "a stranger signs it under the node's name": (forged_keyid, "signature does not verify"),
    "another node's true bundle": (other_node, "names signer"),
    "a signature over another kind of document": (other_kind, "signature does not verify"),
    "the envelope says another kind": (
        lambda: outer(bundle(), payloadType="text/plain"),
        "of type 'text/plain'",
    ),
    "a later version": (
        lambda: inner(bundle(), lambda m: m.update(version=2), resigned=True),
        "a manifest of version 2",
    ),
    "a scope report of another cluster": (
        lambda: with_file("scope/orders.json", documents.SCOPE_REPORT, report("shop2")),
        "scope/orders.json: it is a report",
    ),
    "a scope report signed by another node": (
        lambda: with_file("scope/orders.json", documents.SCOPE_REPORT, report(by=B)),
        "scope/orders.json: the report names",
    ),
    "a checkpoint nobody signed who may": (
        lambda: with_file(CHECKPOINT, documents.CHECKPOINT, note(5, STRANGER)),
        "no signature by a known key",
    ),
    "a checkpoint only the target signed": (
        lambda: with_file(CHECKPOINT, documents.CHECKPOINT, note(5, B)),
        "is not signed by node node-a",
    ),
    "a co-signature is taken off": (
        lambda: with_file(COSIGNED, documents.CHECKPOINT, note(3, A)),
        "is co-signed by node node-b",
    ),
    "a co-signed head of another history": (
        lambda: with_file(COSIGNED, documents.CHECKPOINT, note(3, A, B, first=9)),
        f"{PROOF}: ",
    ),
    "a proof between other heads": (
        lambda: with_file(PROOF, documents.PREFIX_PROOF, prefix(2, 5)),
        f"{PROOF}: the proof is from 2 entries",
    ),
    "a proof without the head it begins at": (lambda: without(COSIGNED), "is missing"),
    "two histories: the head is another than what was co-signed leads to": (
        lambda: with_file(CHECKPOINT, documents.CHECKPOINT, note(5, A, first=9)),
        f"{PROOF}: it leads to 5 entries",
    ),
    "two histories: the proof ends before the head": (
        lambda: with_file(PROOF, documents.PREFIX_PROOF, prefix(3, 4)),
        f"{PROOF}: it leads to 4 entries",
    ),
    "two histories: a co-signed head without a proof": (
        lambda: without(PROOF),
        f"{COSIGNED}: the proof that it is a prefix of the chain is missing",
    ),
    "two histories: a co-signed head without the chain's own": (lambda: without(CHECKPOINT), f"{PROOF}: "),
    "two histories: another head under another chain's name": (
        lambda: with_file("checkpoints/bills.node-a.checkpoint", documents.CHECKPOINT, note(5, A, first=9)),
        "which has no such place",
    ),
    "two histories: another head under a directory": (
        lambda: with_file(f"checkpoints/x/{CHAIN}.checkpoint", documents.CHECKPOINT, note(5, A, first=9)),
        "which has no such place",
    ),
}


@pytest.mark.parametrize("case", MANIPULATIONS)
def test_a_manipulated_bundle_is_found_and_the_place_is_named(case: str) -> None:
    make, named = MANIPULATIONS[case]
    with pytest.raises(VsqlSyncError) as found:
        verify(make())
    assert isinstance(found.value, RecordError | SignatureError | DecodeError)
    assert named in found.value.message, found.value.message


def others(files: Files, *cosigners: tuple[str, bytes], node: bytes = A.public_key) -> evidence.Verified:
    rest = {path: raw for path, raw in files.items() if path != evidence.MANIFEST}
    keys = documents.Keys(node, cosigners)
    return evidence.verify(files[evidence.MANIFEST], rest.keys(), rest.__getitem__, keys)


@pytest.mark.parametrize("name", ["node-a", "node-b"])
def test_the_makers_own_signature_is_no_cosignature(name: str) -> None:
    with pytest.raises(SignatureError, match="no co-signature"):
        others(bundle(), (name, A.public_key))


def test_of_a_node_that_changed_its_key_one_of_both_has_cosigned() -> None:
    found = others(bundle(), ("node-b", STRANGER.public_key), ("node-b", B.public_key))
    assert [(one.node, one.size) for one in found.cosigned] == [("node-b", 3)]
    with pytest.raises(SignatureError, match="is co-signed by node node-b"):
        others(bundle(), ("node-b", STRANGER.public_key))


MALFORMED: dict[str, Callable[[], Files]] = {
    "empty": lambda: bundle() | {evidence.MANIFEST: b""},
    "no JSON": lambda: bundle() | {evidence.MANIFEST: b"\xff"},
    "a list": lambda: bundle() | {evidence.MANIFEST: b"[]"},
    "a member twice": lambda: bundle() | {evidence.MANIFEST: b'{"payload":1,"payload":1}'},
    "a payload that is no text": lambda: outer(bundle(), payload=1),
    "a payload that is no base64": lambda: outer(bundle(), payload="?"),
    "two signatures": lambda: outer(bundle(), signatures=[{}, {}]),
    "a signature of another form": lambda: outer(bundle(), signatures=["x"]),
    "a signature that is no base64": lambda: outer(
        bundle(), signatures=[{"keyid": A.fingerprint, "sig": "?"}]
    ),
    "too deep": lambda: bundle() | {evidence.MANIFEST: b"[" * 100_000},
    "no files": lambda: inner(bundle(), lambda m: m.pop("files"), resigned=True),
    "a file of another form": lambda: inner(bundle(), lambda m: m["files"].append({}), resigned=True),
    "a file twice": lambda: inner(bundle(), lambda m: m["files"].append(m["files"][0]), resigned=True),
    "a path that leaves the bundle": lambda: inner(
        bundle(), lambda m: m["files"][0].update(path="../x"), resigned=True
    ),
    "an absolute path": lambda: inner(bundle(), lambda m: m["files"][0].update(path="/x"), resigned=True),
    "a path that is no text": lambda: inner(bundle(), lambda m: m["files"][0].update(path=1), resigned=True),
    "a kind that is no text": lambda: inner(bundle(), lambda m: m["files"][0].update(kind=[]), resigned=True),
    "a size that is no number": lambda: inner(
        bundle(), lambda m: m["files"][0].update(size=True), resigned=True
    ),
    "a version that is no number": lambda: inner(bundle(), lambda m: m.update(version=True), resigned=True),
    "a reason of another form": lambda: inner(
        bundle(), lambda m: m.update(not_gathered=["x"]), resigned=True
    ),
    "a reason that is no text": lambda: inner(
        bundle(), lambda m: m.update(not_gathered=[{"what": "x", "reason": 1}]), resigned=True
    ),
    "a claim that is no text": lambda: inner(bundle(), lambda m: m.update(not_claimed=[1]), resigned=True),
    "a kind nobody knows": lambda: inner(bundle(), lambda m: m["files"][0].update(kind="x"), resigned=True),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_manifest_is_a_typed_error(case: str) -> None:
    with pytest.raises(DecodeError):
        verify(MALFORMED[case]())


@given(st.binary(max_size=200))
def test_garbage_is_a_typed_error(raw: bytes) -> None:
    with pytest.raises(VsqlSyncError):
        verify(bundle() | {evidence.MANIFEST: raw})


@given(st.data())
def test_no_changed_byte_of_any_file_passes(data: st.DataObject) -> None:
    files = bundle()
    path = data.draw(st.sampled_from(sorted(set(files) - {evidence.MANIFEST})))
    at = data.draw(st.integers(0, len(files[path]) - 1))
    raw = bytearray(files[path])
    raw[at] ^= 1
    with pytest.raises(RecordError, match=re.escape(path)):
        verify(files | {path: bytes(raw)})


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a//b", "a/./b", ".x", "manifest.json", "a b", "", "a/b/c/d/e"]
)
def test_no_bundle_holds_a_file_of_such_a_path(path: str) -> None:
    with pytest.raises(RecordError):
        evidence.file_of(path, evidence.PLAIN, "x", b"")


# The command, off-line


def written(folder: Path) -> Path:
    for path, raw in bundle().items():
        target = folder / "bundle" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(raw)
    for one in (A, B):
        (folder / f"{one.node}.pub").write_text(public_pem(one.public_key))
    return folder / "bundle"


def command(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    words = ["compliance", "verify", str(folder), "--key", str(folder.parent / "node-a.pub"), *more]
    with pytest.raises(SystemExit) as done:
        main(["--config", "/nowhere.toml", *words])
    shown = capsys.readouterr()
    return int(done.value.code or 0), shown.out, shown.err


def test_the_command_needs_no_configuration_and_says_what_is_not_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path)
    code, out, err = command(
        folder, capsys, "--cosigner", f"node-b={tmp_path / 'node-b.pub'}", "--output", "json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["verifies"] is True
    assert found["cosigned"] == [
        {"path": COSIGNED, "node": "node-b", "size": 3, "at": "2025-10-09T08:53:20Z"}
    ]
    code, out, _ = command(folder, capsys)
    assert (code, "It does not claim:" in out, "Not gathered:" in out) == (0, True, True)
    assert "compliant" not in out


def _link(folder: Path) -> None:
    (folder / "configuration.toml").unlink()
    (folder / "configuration.toml").symlink_to(folder.parent / "node-a.pub")


ON_DISK: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "the manifest is taken out": (lambda d: (d / "manifest.json").unlink(), 9, "holds no manifest.json"),
    "a file becomes a link": (_link, 9, "configuration.toml is no ordinary file"),
    "a hidden file is added": (
        lambda d: (d / ".hidden").write_text("x"),
        9,
        ".hidden is not in the manifest",
    ),
    "a file is altered": (
        lambda d: (d / "configuration.toml").write_text("x"),
        9,
        "configuration.toml was altered",
    ),
}


@pytest.mark.parametrize("case", ON_DISK)
def test_the_command_names_what_was_done_to_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    folder = written(tmp_path)
    change, expected, named = ON_DISK[case]
    change(folder)
    code, _, err = command(folder, capsys)
    assert (code, named in err) == (expected, True), err


def test_a_bundle_that_is_not_there_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path)
    code, _, err = command(tmp_path / "none", capsys)
    assert (code, "cannot read" in err) == (2, True), err
