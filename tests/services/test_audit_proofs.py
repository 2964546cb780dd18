"""`syncctl audit checkpoint`, `prove`, `prove-prefix`, `verify-proof`: two real nodes, and off-line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.audit_history import ACKS, CHAIN, CLUSTER, A, B, History, acknowledged, ordinary, signer
from tests.conftest import NewDatabase
from tests.services.test_audit_cli import Pair
from tests.services.test_audit_trail import TABLE, as_attacker, store
from vsql_shared.audit import tree
from vsql_shared.audit.checkpoint import Checkpoint, Log, open_checkpoint
from vsql_shared.audit.heads import own_head
from vsql_shared.audit.notes import SignedNote
from vsql_shared.audit.proofs import InclusionProof
from vsql_shared.audit.store import recall_head, remember_head
from vsql_shared.crypto.signing import public_pem, write_new_file
from vsql_shared.names import ack_chain
from vsql_shared.pg import nodes

KEYS = [("node-a", A.public_key), ("node-b", B.public_key)]


class Logs(Pair):
    """Two nodes whose configuration has their signing keys."""

    def key_files(self, name: str, seed: str = "") -> tuple[Path, Path]:
        """The private and the public key file of a test's signer."""
        key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{name}{seed}".encode()).digest())
        private, public = self._folder / f"{name}{seed}.key", self._folder / f"{name}{seed}.pub"
        if not private.exists():
            pem = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_new_file(private, pem, 0o600)
            public.write_text(public_pem(key.public_key().public_bytes_raw()))
        return private, public

    signing = True
    seed = ""

    def config(self, node: str) -> Path:
        path = super().config(node)
        if self.signing:
            private = self.key_files(node, self.seed)[0]
            path.write_text(path.read_text() + f'[audit]\nsigning_key_path = "{private}"\n')
        return path

    def file(self, name: str) -> Path:
        return self._folder / name

    def make(self, node: str, name: str, *arguments: object) -> Path:
        """What a command writes with --output."""
        path = self.file(name)
        code, out, err = self.syncctl(node, "audit", *map(str, arguments), "--output", str(path))
        assert (code, out) == (0, ""), err
        assert path.stat().st_mode & 0o077 == 0
        return path

    def offline(self, path: Path, *arguments: object) -> tuple[int, Any, str]:
        """`verify-proof` with the writer's public key, and no configuration."""
        self._capsys.readouterr()
        key = self.key_files("node-a")[1]
        from vsql_ctl.cli import main

        words = [
            "audit",
            "verify-proof",
            str(path),
            "--key",
            str(key),
            "--output",
            "json",
            *map(str, arguments),
        ]
        with pytest.raises(SystemExit) as done:
            main(["--config", "/nowhere.toml", *words])
        shown = self._capsys.readouterr()
        return int(done.value.code or 0), json.loads(shown.out) if shown.out else None, shown.err


@pytest.fixture
def logs(tmp_path: Path, new_schema: NewDatabase, capsys: pytest.CaptureFixture[str]) -> Iterator[Logs]:
    """A has a stream; B has applied all of it and remembers its head."""
    made = Logs(tmp_path, new_schema("node_a"), new_schema("node_b"), capsys)
    source = ordinary()
    store(made.conns["node-a"], source)
    store(made.conns["node-b"], acknowledged(source))
    remember_head(made.conns["node-b"], CHAIN, source.head, None)
    yield made
    made.close()


SIZE = len(ordinary().entries)
ROOT = tree.root_of(ordinary().head.tree)


def test_heads_are_stored_with_their_trees_and_go_on_from_them(logs: Logs) -> None:
    source = ordinary()
    for name in ("node-a", "node-b"):
        recalled = recall_head(logs.conns[name], CHAIN)
        assert recalled is not None
        assert recalled[0] == source.head
        assert (
            tree.root_of(recalled[0].tree) == own_head(logs.conns["node-a"], Log(CLUSTER, CHAIN), SIZE).root
        )
    more = History(head=source.head)
    more.open()
    more.batch()
    store(logs.conns["node-a"], more)
    after = recall_head(logs.conns["node-a"], CHAIN)
    assert after is not None
    mine = own_head(logs.conns["node-a"], Log(CLUSTER, CHAIN), SIZE + 2)
    assert tree.root_of(after[0].tree) == mine.root


def test_writer_and_peer_sign_one_checkpoint_in_either_order(logs: Logs) -> None:
    first = logs.make("node-a", "a", "checkpoint", "--chain", CHAIN)
    opened = open_checkpoint(first.read_text(), KEYS)
    assert (opened.checkpoint.size, opened.checkpoint.root) == (SIZE, ROOT)
    both = logs.make("node-b", "ab", "checkpoint", "--add", first)
    alone = logs.make("node-b", "b", "checkpoint", "--chain", CHAIN)
    again = logs.make("node-a", "ba", "checkpoint", "--add", alone)
    node_b = f"node-b={logs.key_files('node-b')[1]}"
    for path in (both, again):
        code, found, err = logs.offline(path, "--cosigner", node_b)
        assert code == 0, err
        assert (found["size"], found["root"], found["signed_by"]) == (SIZE, ROOT.hex(), "node-a")
        assert [one["node"] for one in found["cosigned"]] == ["node-b"]
    code, _, err = logs.offline(first, "--cosigner", node_b)
    assert (code, "not cosigned by node node-b" in err) == (9, True)
    code, _, err = logs.offline(alone)
    assert (code, "no signature by a known key" in err) == (9, True)


def test_the_source_signs_its_targets_acknowledgements_too(logs: Logs) -> None:
    acks = acknowledged(ordinary())
    remember_head(logs.conns["node-a"], ACKS, acks.head, None)
    note = logs.make("node-a", "acks", "checkpoint", "--chain", ACKS)
    opened = open_checkpoint(logs.make("node-b", "both", "checkpoint", "--add", note).read_text(), KEYS)
    opened.require_writer()
    assert (opened.checkpoint.log.writer, len(opened.signatures)) == ("node-b", 2)


@pytest.mark.parametrize("entry", [f"{CHAIN}/1", f"{CHAIN}/5", f"{CHAIN}/{SIZE}"])
def test_an_entry_is_proven_off_line_with_the_public_key_alone(logs: Logs, entry: str) -> None:
    proof = logs.make("node-a", "proof", "prove", entry)
    code, found, err = logs.offline(proof)
    assert code == 0, err
    assert f"{found['chain']}/{found['sequence']}" == entry
    assert found["entry"]["signer_node_id"] == "node-a"
    read = InclusionProof.decode(proof.read_text())
    other = ordinary().documents[read.index - 1]
    logs.file("forged").write_text(InclusionProof(other, read.index, read.hashes, read.checkpoint).encode())
    code, _, err = logs.offline(logs.file("forged"))
    assert (code, "leads to root" in err) == (9, True)


def test_an_entry_is_proven_by_its_event_id_in_a_cosigned_checkpoint(logs: Logs) -> None:
    first = logs.make("node-a", "a", "checkpoint", "--chain", CHAIN, "--size", 7)
    made = ordinary().entries[4]
    from uuid import UUID

    event = UUID(bytes=made.entry.event_id)
    proof = logs.make("node-a", "proof", "prove", event, "--checkpoint", first)
    code, found, err = logs.offline(proof)
    assert (code, found["sequence"], found["size"]) == (0, 5, 7), err
    code, _, err = logs.syncctl("node-a", "audit", "prove", f"{CHAIN}/8", "--checkpoint", str(first))
    assert (code, "is not below a checkpoint of 7 entries" in err) == (4, True), err


def test_a_prefix_is_proven_between_two_checkpoints_and_to_the_present(logs: Logs) -> None:
    old = logs.make("node-a", "old", "checkpoint", "--chain", CHAIN, "--size", 4)
    new = logs.make("node-a", "new", "checkpoint", "--chain", CHAIN)
    for name, arguments in (("one", (old, new)), ("two", (old,)), ("same", (new, new))):
        proof = logs.make("node-a", name, "prove-prefix", *arguments)
        code, found, err = logs.offline(proof, "--old", arguments[0])
        assert code == 0, err
        assert (found["size"], found["prefix"]) == (SIZE, SIZE if name == "same" else 4)
    code, _, err = logs.offline(logs.file("one"), "--old", new)
    assert (code, "the proof is from 4 entries" in err) == (9, True), err
    code, _, err = logs.offline(logs.file("one"))
    assert (code, "--old" in err) == (2, True), err
    code, _, err = logs.offline(new, "--old", old)
    assert (code, "prove-prefix" in err) == (2, True), err


def other_history(size: int = SIZE) -> History:
    """What the source shows to somebody else: signed by it, as long, not the same."""
    other = History()
    other.open()
    while len(other.entries) < size:
        other.batch(7)
    return other


def other_checkpoint(path: Path, size: int = SIZE) -> Path:
    head = Checkpoint(Log(CLUSTER, CHAIN), size, tree.root_of(other_history(size).head.tree))
    path.write_text(head.signed_by(A, 0, SignedNote(head.text, ())).encode())
    return path


def test_a_split_view_is_named_by_peer_writer_and_auditor(logs: Logs) -> None:
    forged = other_checkpoint(logs.file("other"))
    for node in ("node-b", "node-a"):
        code, out, err = logs.syncctl(node, "audit", "checkpoint", "--add", str(forged))
        assert (code, out) == (9, ""), err
        assert f"split view: chain {CHAIN} shows two histories" in err
        assert ROOT.hex() in err
        assert tree.root_of(other_history().head.tree).hex() in err
    longer = other_checkpoint(logs.file("longer"), SIZE + 1)
    code, _, err = logs.syncctl("node-a", "audit", "checkpoint", "--add", str(longer))
    assert (code, f"this node has {SIZE} entries: its trail was cut" in err) == (9, True), err
    good = logs.make("node-a", "a", "checkpoint", "--chain", CHAIN)
    code, _, err = logs.offline(good, "--old", forged)
    assert (code, "split view" in err) == (9, True), err
    for command in (("prove-prefix", str(other_checkpoint(logs.file("short"), 4))),
                    ("prove", f"{CHAIN}/2", "--checkpoint", str(forged))):  # fmt: skip
        code, out, err = logs.syncctl("node-a", "audit", *command)
        assert (code, out) == (9, ""), err
        assert "split view" in err


def test_two_targets_find_that_the_source_showed_them_two_histories(
    logs: Logs, new_schema: NewDatabase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    third = signer("node-c")
    own, shown = ack_chain(CHAIN, "node-c"), other_history()
    acks = History(own, third)
    acks.open()
    for made in shown.entries[1:]:
        acks.acknowledge(made, target_node_id="node-c")
    two = Pair(tmp_path, new_schema("split_a"), new_schema("split_c"), capsys)
    try:
        conn = two.conns["node-b"]
        conn.execute("UPDATE vsql_sync.nodes SET node_id = 'node-c', node_name = 'node-c' WHERE is_local")
        nodes.pin(conn, "node-c", third.public_key)
        store(conn, acks)
        nodes.pin(logs.conns["node-b"], "node-c", third.public_key)
        code, found = logs.verify("node-b", "--peer-connection", two.infos["node-b"])
    finally:
        two.close()
    assert code == 9
    split = [one for one in found["problems"] if "split view" in one["what"]]
    assert [(one["chain"], one["sequence"]) for one in split] == [(CHAIN, 2)], found
    assert ACKS in split[0]["what"]
    assert own in split[0]["what"]


def cosigned_by_b(logs: Logs, *notes: str) -> None:
    """B's chain goes on with these entries."""
    acks = History(ACKS, B, head=acknowledged(ordinary()).head)
    acks.open()
    for note in notes:
        detail = json.dumps({"note": note}, separators=(",", ":"), ensure_ascii=False)
        acks.add(event_type="checkpoint_cosigned", batch_lsn_start=5, batch_lsn_end=5, detail=detail)
    store(logs.conns["node-b"], acks)


def note_of(size: int, by: History | None = None, chain: str = CHAIN) -> str:
    hashes = [made.entry_hash for made in (by or ordinary()).entries]
    head = Checkpoint(Log(CLUSTER, chain), size, tree.root_of(tree.tree_of(hashes[:size])[0]))
    return head.sign(B, 9).encode()


COSIGNED: dict[str, tuple[tuple[str, ...], str | None]] = {
    "true heads": ((note_of(2), note_of(7), note_of(7), note_of(SIZE)), None),
    "another root": ((note_of(2), note_of(5, other_history()), note_of(SIZE)), "split view"),
    "more than there is": ((note_of(SIZE + 1, other_history(SIZE + 1)),), f"the source has {SIZE}"),
    "less than before": ((note_of(7), note_of(2)), "2 entries of chain orders.node-a after 7"),
    "another chain": ((note_of(2, chain="bills.node-a"),), "no head of chain orders.node-a"),
    "no note": (("?",), "no head of chain orders.node-a"),
}


@pytest.mark.parametrize("case", COSIGNED)
@pytest.mark.parametrize("node", ["node-a", "node-b"])
def test_heads_a_target_cosigned_are_held_against_the_sources_entries(
    logs: Logs, case: str, node: str
) -> None:
    notes, expected = COSIGNED[case]
    cosigned_by_b(logs, *notes)
    peer = logs.infos["node-b" if node == "node-a" else "node-a"]
    code, found = logs.verify(node, "--peer-connection", peer)
    if expected is None:
        assert (code, found["problems"]) == (0, [])
        return
    assert code == 9
    assert [one["chain"] for one in found["problems"]] == [ACKS]
    assert expected in found["problems"][0]["what"]


ALTERED: dict[str, tuple[str, str]] = {
    "another entry in its place": (
        f"SET document = (SELECT document FROM {TABLE} WHERE chain = '{CHAIN}' AND sequence = 4)",
        "there stands entry 4",
    ),
    "altered bytes": ("SET document = set_byte(document, 200, get_byte(document, 200) # 1)", f"{CHAIN}/"),
    "another number": ("SET sequence = 99", "there stands entry 4"),
    "another chain": ("SET chain = 'bills.node-a'", "there stands entry 4"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_nothing_is_signed_of_a_chain_that_was_altered(logs: Logs, case: str) -> None:
    change, said = ALTERED[case]
    as_attacker(logs.conns["node-a"], f"UPDATE {TABLE} {change} WHERE chain = '{CHAIN}' AND sequence = 3")
    for command in (("checkpoint", "--chain", CHAIN), ("prove", f"{CHAIN}/2")):
        code, out, err = logs.syncctl("node-a", "audit", *command)
        assert (code, out) == (9, ""), err
        assert said in err
    code, out, err = logs.syncctl("node-a", "audit", "checkpoint", "--chain", CHAIN, "--size", "2")
    assert (code, out.splitlines()[1]) == (0, "2"), err


def test_nothing_is_signed_where_two_rows_have_one_place(logs: Logs) -> None:
    """By chance they come in their order, and every link holds."""
    as_attacker(logs.conns["node-a"], f"UPDATE {TABLE} SET sequence = 3 WHERE sequence = 4")
    for command in (("checkpoint", "--chain", CHAIN), ("prove", f"{CHAIN}/2")):
        code, out, err = logs.syncctl("node-a", "audit", *command)
        assert (code, out, f"chain {CHAIN} does not verify" in err) == (9, "", True), err


def test_a_peer_behind_or_ahead_signs_only_what_it_has_verified(logs: Logs) -> None:
    old = logs.make("node-a", "old", "checkpoint", "--chain", CHAIN, "--size", 4)
    code, out, err = logs.syncctl("node-b", "audit", "checkpoint", "--add", str(old))
    assert (code, out) == (4, "")
    assert f"has verified {SIZE} entries of chain {CHAIN}, the checkpoint is of 4" in err
    code, _, err = logs.syncctl("node-b", "audit", "checkpoint", "--chain", CHAIN, "--size", "4")
    assert (code, "not at 4" in err) == (4, True)
    code, _, err = logs.syncctl("node-a", "audit", "checkpoint", "--chain", CHAIN, "--size", str(SIZE + 1))
    assert (code, f"has {SIZE} entries, not {SIZE + 1}" in err) == (4, True)
    code, _, err = logs.syncctl("node-a", "audit", "checkpoint", "--chain", ACKS)
    assert (code, "has verified nothing of chain" in err) == (4, True)


def test_a_head_without_its_tree_is_not_signed(logs: Logs) -> None:
    logs.conns["node-b"].execute("UPDATE vsql_sync.chain_heads SET tree = '' WHERE chain = %s", (CHAIN,))
    code, out, err = logs.syncctl("node-b", "audit", "checkpoint", "--chain", CHAIN)
    assert (code, out) == (4, "")
    assert "without its tree" in err


def test_only_the_nodes_own_key_signs(logs: Logs) -> None:
    logs.signing = False
    code, _, err = logs.syncctl("node-a", "audit", "checkpoint", "--chain", CHAIN)
    assert (code, "audit.signing_key_path is not set" in err) == (3, True), err
    logs.signing, logs.seed = True, "x"
    code, _, err = logs.syncctl("node-a", "audit", "checkpoint", "--chain", CHAIN)
    assert (code, "is not the key of node node-a" in err) == (3, True), err


@pytest.mark.parametrize(
    "arguments",
    [
        ("checkpoint",),
        ("checkpoint", "--chain", CHAIN, "--add", "x"),
        ("checkpoint", "--add", "/nowhere"),
        ("checkpoint", "--chain", "no chain"),
        ("prove", "no entry"),
        ("prove", f"{CHAIN}/99999999999999999999999"),
        ("prove", "5b7e6d1e-0000-4000-8000-000000000000"),
    ],
)
def test_what_cannot_be_meant_is_refused(logs: Logs, arguments: tuple[str, ...]) -> None:
    code, out, err = logs.syncctl("node-a", "audit", *arguments)
    assert code in (2, 4, 9), err
    assert out == ""
    assert "error:" in err


def test_what_does_not_verify_is_named_by_its_file_and_a_typo_is_no_broken_trail(logs: Logs) -> None:
    good = logs.make("node-a", "a", "checkpoint", "--chain", CHAIN)
    proof = logs.make("node-a", "p", "prove-prefix", good)
    for path in (good, proof):
        code, _, err = logs.offline(path, "--old", proof)
        assert (code, f"{proof}: checkpoint of " in err) == (8, True), err
        assert "it is damaged" in err
    for command in (("verify", "--chain", "orders"), ("checkpoint", "--chain", "bills.node-a")):
        code, _, err = logs.syncctl("node-a", "audit", *command)
        assert (code, "this node has no entries" in err or "has no chain" in err) == (4, True), err
    public = str(logs.key_files("node-a")[1])
    for chain, cluster in (("orders", CLUSTER), (CHAIN, "my shop")):
        named = ("audit", "verifier-key", chain, "--cluster", cluster, "--key", public)
        code, out, err = logs.syncctl("node-a", *named)
        assert (code, out) == (2, ""), err


def test_who_signed_and_when_is_readable(logs: Logs) -> None:
    alone = logs.make("node-b", "b", "checkpoint", "--chain", CHAIN)
    both = logs.make("node-a", "ba", "checkpoint", "--add", alone)
    keys = [str(logs.key_files(node)[1]) for node in ("node-a", "node-b")]
    named = ("--key", keys[0], "--cosigner", f"node-b={keys[1]}")
    code, out, err = logs.syncctl("node-a", "audit", "verify-proof", str(both), *named)
    assert code == 0, err
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert shown["keys"] == A.fingerprint
    assert shown["cosigned"].startswith(f"node-b at {datetime.now(UTC).year}-")


def test_keys_are_printed_as_other_tools_take_them(logs: Logs) -> None:
    public = str(logs.key_files("node-a")[1])
    code, out, err = logs.syncctl(
        "node-a", "audit", "verifier-key", CHAIN, "--cluster", CLUSTER, "--key", public
    )
    assert (code, out) == (0, Log(CLUSTER, CHAIN).key(A.public_key).vkey + "\n"), err
    public = str(logs.key_files("node-b")[1])
    named = ("--cluster", CLUSTER, "--key", public, "--cosigner", "node-b")
    code, out, err = logs.syncctl("node-a", "audit", "verifier-key", CHAIN, *named)
    assert (code, out.split("+")[0]) == (0, "vsql-sync/shop/node-b"), err
