"""`syncctl compliance` on a real node and a real topic: what is in a bundle, what is not, and every attack on it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.audit_history import ACKS, CHAIN, A, B, History, acknowledged
from tests.conftest import NewDatabase
from tests.services.test_audit_cli import publish
from tests.services.test_audit_proofs import Logs
from tests.services.test_audit_trail import TABLE, as_attacker, store
from tests.stack import Kafka
from vsql_ctl.cli import main
from vsql_shared.audit import evidence, tree
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED, canonical_json
from vsql_shared.audit.store import remember_head

PASSWORD, ROW, REMOTE = "planted-password-4711", "4111111111111111", "planted-remote-row"
KEK = hashlib.sha256(b"planted kek").digest()
RACK = "planted-client-option"


class Node(Logs):
    """Node A with secrets wherever it may have some, and syncctl on it."""

    def config(self, node: str) -> Path:
        path = super().config(node)
        kek = self.file("dev.kek")
        if not kek.exists():
            kek.write_text(f"vsql-sync KEK file v1 test-kek\n1 {base64.b64encode(KEK).decode()}\n")
            kek.chmod(0o600)
        text = path.read_text().replace("[server]", f'password = "{PASSWORD}"\n[server]')
        text += f'[kafka.security]\nusername = "planted-user"\npassword = "{PASSWORD}"\n'
        text += f'[kafka.client_options]\n"client.rack" = "{RACK}"\n'
        text += f'[encryption.kms]\nprovider = "file"\nkek_id = "test-kek"\n[encryption.kms.file]\npath = "{kek}"\n'
        path.write_text(text)
        return path

    def evidence(self, name: str = "bundle", *arguments: str) -> tuple[int, str, Path]:
        """Make a bundle; exit code, standard error, and where it is."""
        target = self.file(name)
        code, _, err = self.syncctl("node-a", "compliance", "evidence", "--out", str(target), *arguments)
        return code, err, target

    def check(self, target: Path, *arguments: str, key: str = "node-a") -> tuple[int, str, str]:
        """`compliance verify` with public keys alone: no configuration, no database."""
        self._capsys.readouterr()
        words = ["compliance", "verify", str(target), "--key", str(self.key_files(key)[1]), *arguments]
        with pytest.raises(SystemExit) as done:
            main(["--config", "/nowhere.toml", *words])
        shown = self._capsys.readouterr()
        return int(done.value.code or 0), shown.out, shown.err


@pytest.fixture
def node(
    tmp_path: Path,
    new_database: NewDatabase,
    capsys: pytest.CaptureFixture[str],
    kafka: Kafka,
    cluster_name: str,
) -> Iterator[Node]:
    """A has a stream that B acknowledges and has co-signed once; all of it is in Kafka, too."""
    made = Node(tmp_path, new_database("node_a"), new_database("node_b"), capsys, cluster_name)
    made.bootstrap = kafka.bootstrap_servers
    source, acks = History(cluster=cluster_name), History(ACKS, B, cluster=cluster_name)
    source.open()
    acks.open()
    for _ in range(3):
        acks.acknowledge(source.batch())
    head = Checkpoint(Log(cluster_name, CHAIN), source.head.sequence, tree.root_of(source.head.tree))
    note = head.sign(B, 1_760_000_000).encode()
    acks.add(
        event_type=CHECKPOINT_COSIGNED,
        batch_lsn_start=5,
        batch_lsn_end=5,
        source_node_id="node-a",
        target_node_id="node-b",
        detail=canonical_json({"note": note}),
    )
    source.batch()
    conn = made.conns["node-a"]
    store(conn, source)
    store(made.conns["node-b"], acks)
    remember_head(made.conns["node-b"], CHAIN, source.head, None)
    publish_all(made, cluster_name, source, acks)
    conn.execute("CREATE TABLE payments (id int PRIMARY KEY, amount int, pan text)")
    conn.execute("INSERT INTO payments VALUES (1, 5, %s)", (ROW,))
    code, _, err = made.syncctl(
        "node-a", "publication", "create", "orders", "--table", "payments(id, amount)", "--exclude-pci"
    )
    assert code == 0, err
    yield made
    made.close()


def publish_all(made: Node, cluster: str, *histories: History) -> None:
    publish(made, cluster, *(document for history in histories for document in history.documents))


def files_of(target: Path) -> dict[str, bytes]:
    return {
        path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()
    }


def manifest_of(target: Path) -> dict[str, Any]:
    envelope = json.loads((target / "manifest.json").read_text())
    found: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return found


def test_a_bundle_has_everything_and_verifies_with_public_keys_alone(node: Node) -> None:
    code, err, target = node.evidence()
    assert code == 0, err
    assert set(files_of(target)) == {
        "manifest.json",
        "scope/orders.json",
        f"checkpoints/{CHAIN}.checkpoint",
        f"checkpoints/{CHAIN}.cosigned-by.node-b.checkpoint",
        f"checkpoints/{CHAIN}.cosigned-by.node-b.proof",
        "trail.json",
        "keys.json",
        "connections.json",
        "retention.json",
        "access.json",
        "configuration.toml",
    }
    missing = {one["what"] for one in manifest_of(target)["not_gathered"]}
    assert missing == {"ACLs of Kafka"}, missing
    code, out, err = node.check(target, "--cosigner", f"node-b={node.key_files('node-b')[1]}")
    assert code == 0, err
    assert f"checkpoints/{CHAIN}.cosigned-by.node-b.checkpoint by node-b" in out
