"""`syncctl compliance` on a real node and a real topic: what is in a bundle, what is not, attacks on it."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.audit_history import ACKS, CHAIN, B, History, ordinary
from tests.audit_segments import base
from tests.conftest import NewDatabase
from tests.guarded_kafka import PASSWORDS, GuardedKafka
from tests.services.test_audit_cli import publish
from tests.services.test_audit_proofs import Logs
from tests.services.test_audit_trail import TABLE, as_attacker, store
from tests.services.test_audit_watch import settings_for
from tests.stack import Kafka, Stack
from vsql_ctl.cli import main
from vsql_ctl.evidence import connections, retention
from vsql_ctl.evidence.brokers import Brokers
from vsql_shared.audit import tree, watch_state
from vsql_shared.audit.base import Base
from vsql_shared.audit.checkpoint import Checkpoint, Log
from vsql_shared.audit.entries import CHECKPOINT_COSIGNED, canonical_json
from vsql_shared.audit.store import remember_head
from vsql_shared.audit.verify import Problem
from vsql_shared.errors import VsqlSyncError
from vsql_shared.kms.file import generate_kek_file
from vsql_shared.pg import roles

PASSWORD, ROW, REMOTE = "planted-password-4711", "4111111111111111", "planted-remote-row"
RACK = "planted-client-option"
ARGUMENT = "planted-argument-of-a-command"


class Node(Logs):
    """Node A with secrets wherever it may have some, and syncctl on it."""

    security = ""
    """[kafka.security], if it is not the planted one."""

    def config(self, node: str) -> Path:
        path = super().config(node)
        kek = self.file("dev.kek")
        if not kek.exists():
            generate_kek_file(kek, "test-kek")
        text = path.read_text().replace("[server]", f'password = "{PASSWORD}"\n[server]')
        planted = f'[kafka.security]\nusername = "planted-user"\npassword = "{PASSWORD}"\n'
        text += self.security or planted
        text += f'[encryption.kms.pkcs11]\npin_command = "pin --with {ARGUMENT}"\n'
        text += f'[encryption.kms.vault]\ntoken_command = "token {ARGUMENT}"\n'
        text += f'secret_id_command = "id {ARGUMENT}"\n'
        text += f'[[peers]]\nnode_id = 7\nnode_name = "planted"\nconnection = "host=h password={ARGUMENT}"\n'
        text += f'[kafka.client_options]\n"client.rack" = "{RACK}"\n'
        text += '[encryption.kms]\nprovider = "file"\nkek_id = "test-kek"\n'
        text += f'[encryption.kms.file]\npath = "{kek}"\n'
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
    new_schema: NewDatabase,
    capsys: pytest.CaptureFixture[str],
    kafka: Kafka,
    cluster_name: str,
) -> Iterator[Node]:
    """A has a stream that B acknowledges and has co-signed once; all of it is in Kafka, too."""
    made = Node(tmp_path, new_schema("node_a"), new_schema("node_b"), capsys, cluster_name)
    try:
        replicate(made, kafka, cluster_name)
        yield made
    finally:
        made.close()


def replicate(made: Node, kafka: Kafka, cluster_name: str) -> None:
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
    conn.execute("CREATE TABLE public.payments (id int PRIMARY KEY, amount int, pan text)")
    conn.execute("INSERT INTO public.payments VALUES (1, 5, %s)", (ROW,))
    code, _, err = made.syncctl(
        "node-a", "publication", "create", "orders", "--table", "payments(id, amount)", "--exclude-pci"
    )
    assert code == 0, err


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
        "writers.json",
        "configuration.toml",
    }
    missing = {one["what"]: one["reason"] for one in manifest_of(target)["not_gathered"]}
    assert missing.keys() == {f"settings of topic {node.cluster}.keys", "ACLs of Kafka"}, missing
    # Kafka's client shows an empty list of brokers that look at none.
    assert "have no authorizer" in missing["ACLs of Kafka"]
    code, out, err = node.check(target, "--cosigner", f"node-b={node.key_files('node-b')[1]}")
    assert code == 0, err
    head = f"checkpoints/{CHAIN}.cosigned-by.node-b.checkpoint"
    assert f"{head}, 4 entries, by node-b at 2025-10-09T08:53:20Z" in out


def test_no_secret_and_no_row_is_in_a_bundle(node: Node) -> None:
    conn = node.conns["node-a"]
    conn.execute(
        "INSERT INTO vsql_sync.conflict_log (subscription, table_schema, table_name, conflict_type,"
        " local_tuple, remote_tuple) VALUES ('x', 'public', 'payments', 'update_missing', %s, %s)",
        (json.dumps({"pan": ROW}), json.dumps({"pan": REMOTE})),
    )
    code, err, target = node.evidence()
    assert code == 0, err
    private = node.key_files("node-a")[0]
    seed = hashlib.sha256(b"node-a").digest()
    secrets = [PASSWORD, ROW, REMOTE, RACK, ARGUMENT, "BEGIN PRIVATE", *_forms(seed)]
    secrets += [word for word in node.file("dev.kek").read_text().split()[-1:] if len(word) > 30]
    assert len(secrets) == 10
    secrets += [line for line in private.read_text().splitlines() if not line.startswith("-----")]
    files = files_of(target) | {"payload": json.dumps(manifest_of(target)).encode()}
    shown = [(name, secret) for name, raw in files.items() for secret in secrets if secret.encode() in raw]
    assert shown == []
    assert '"****' in (target / "configuration.toml").read_text()
    assert all((target / name).stat().st_mode & 0o077 == 0 for name in (".", *files_of(target)))
    assert PASSWORD not in err


def _forms(secret: bytes) -> list[str]:
    return [secret.hex(), base64.b64encode(secret).decode(), secret.hex().upper()]


def test_a_bundle_says_what_it_does_not_claim_and_draws_no_conclusion(node: Node) -> None:
    _, _, target = node.evidence()
    _, out, _ = node.check(target)
    everything = " ".join(raw.decode() for raw in files_of(target).values()) + out
    everything += json.dumps(manifest_of(target))
    assert "compliant" not in everything.lower()
    assert "out of scope" not in everything.lower()
    assert "outside CDE" not in everything
    assert "It does not claim:" in out


def test_what_cannot_be_gathered_is_listed_with_its_reason(node: Node) -> None:
    node.bootstrap = "127.0.0.1:1"
    as_attacker(node.conns["node-a"], f"UPDATE {TABLE} SET document = 'x' WHERE sequence = 2")
    code, err, target = node.evidence("bundle", "--no-trail")
    assert code == 0, err
    missing = {one["what"]: one["reason"] for one in manifest_of(target)["not_gathered"]}
    assert missing.keys() == {
        "scope report of publication orders",
        f"checkpoint of chain {CHAIN}",
        "co-signatures of targets, from the audit topic",
        "verification of every entry of the trail",
        "TLS of the Kafka brokers",
        f"settings of topic {node.cluster}.audit",
        f"settings of topic {node.cluster}.keys",
        "ACLs of Kafka",
        "names of the cluster's topics",
    }
    assert all(missing.values())
    # Brokers that are away are waited for once: what needs them has one and the same reason.
    own = "scope report", "checkpoint", "verification"
    assert len({reason for what, reason in missing.items() if not what.startswith(own)}) == 1, missing
    assert PASSWORD not in str(missing)
    assert f"not gathered: checkpoint of chain {CHAIN}" in err
    code, out, err = node.check(target)
    assert (code, "left out by --no-trail" in out) == (0, True), err


def test_a_topic_that_is_not_there_is_named(kafka: Kafka, tmp_path: Path, cluster_name: str) -> None:
    settings = settings_for(tmp_path, kafka.bootstrap_servers)
    with pytest.raises(VsqlSyncError, match=f"describe topic {cluster_name}.keys"):
        retention.topic(settings, Brokers(settings), f"{cluster_name}.keys")


def test_a_trail_that_does_not_verify_is_shown_as_such(node: Node) -> None:
    as_attacker(node.conns["node-a"], f"UPDATE {TABLE} SET row_count = 99 WHERE sequence = 3")
    code, err, target = node.evidence()
    assert code == 0, err
    found = json.loads((target / "trail.json").read_text())
    assert (found["ok"], found["problems"][0]["sequence"]) == (False, 3)
    # Whoever makes it and whoever verifies it is told without opening that file.
    assert f"found: 1 problem of the trail: chain {CHAIN}, entry 3" in err
    code, out, _ = node.check(target)
    assert (code, "verifying every entry of the trail in this node's database found 1 problem" in out) == (
        0,
        True,
    )


def test_breaks_of_the_past_are_in_a_bundle(node: Node) -> None:
    conn = node.conns["node-a"]
    for sequence in (3, 4):
        watch_state.note(conn, "trail", Problem(CHAIN, sequence, None, "altered"))
    watch_state.end(conn, "trail", CHAIN)
    watch_state.note(conn, "topic", Problem(CHAIN, 9, None, "lost"))
    code, err, target = node.evidence()
    assert (code, "finds 1 break now, and found 3 ever" in err) == (0, True), err
    breaks = json.loads((target / "retention.json").read_text())["trail"]["breaks"]
    assert [(one["sequence"], one["gone_at"] is None) for one in breaks] == [
        (3, False),
        (4, False),
        (9, True),
    ]


def test_what_was_archived_and_where_chains_were_pruned_is_in_a_bundle(node: Node) -> None:
    conn, made = node.conns["node-a"], base(ordinary(), 6)
    conn.execute(
        "INSERT INTO vsql_sync.audit_segments (chain, first_sequence, last_sequence, bucket, object_key,"
        " object_version, sha256, bytes, retain_until, head, note)"
        " VALUES (%s, 1, 6, 'trail', 'k', 'v', %s, 7, '2100-01-01', '{}', '')",
        (CHAIN, bytes(32)),
    )
    conn.execute(
        "INSERT INTO vsql_sync.audit_bases (chain, size, base) VALUES (%s, 6, %s)", (CHAIN, made.encode())
    )
    code, err, target = node.evidence()
    assert code == 0, err
    about = {one["path"]: one["about"] for one in manifest_of(target)["files"]}["retention.json"]
    assert "1 segment in the archive, as noted when read back there, not read again now" in about
    trail = json.loads((target / "retention.json").read_text())["trail"]
    (segment,) = trail["archived"]
    assert (segment["chain"], segment["first_sequence"], segment["last_sequence"]) == (CHAIN, 1, 6)
    assert (segment["bucket"], segment["object"], segment["sha256"]) == ("trail", "k", "00" * 32)
    (pruned,) = trail["pruned"]
    assert (pruned["chain"], pruned["entries"], Base.decode(pruned["base"])) == (CHAIN, 6, made)
    settings = trail["settings"]
    assert (settings["audit.retention_months"], settings["audit.online_months"]) == (12, 3)


def test_rights_that_nobody_has_granted_are_in_a_bundle(node: Node) -> None:
    """PostgreSQL gives PUBLIC some where no rights were ever granted."""
    _, _, target = node.evidence()
    grants = json.loads((target / "access.json").read_text())["postgresql"]["grants"]
    public = {(one["object"], one["privilege"]) for one in grants if one["grantee"] == "PUBLIC"}
    assert ("database", "CONNECT") in public
    assert ("schema public", "USAGE") in public
    functions = {
        one["object"] for one in grants if one["object"].startswith("function vsql_sync.note_audit_break")
    }
    assert len(functions) == 1
    assert all(name not in functions for name, _ in public)


def test_a_user_who_does_not_see_all_sessions_says_so(node: Node) -> None:
    conn = node.conns["node-a"]
    assert connections.sees_all(conn)
    roles.create(conn)
    conn.execute(f"SET ROLE {roles.VIEWER}")
    assert not connections.sees_all(conn)
    conn.execute("RESET ROLE")


def test_a_directory_with_something_in_it_is_left_alone(node: Node) -> None:
    target = node.file("full")
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    code, err, _ = node.evidence("full")
    assert (code, "is not empty" in err) == (4, True)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    node.file("link").symlink_to(target)
    assert node.evidence("link")[0] == 4
    (target / "notes.txt").unlink()
    assert node.evidence("full")[0] == 0
    assert node.check(target)[0] == 0


def test_a_bundle_that_was_interrupted_is_not_there(node: Node) -> None:
    before = sorted(node.file(".").iterdir())
    node.conns["node-a"].execute("ALTER TABLE vsql_sync.streams RENAME TO gone")
    code, err, target = node.evidence()
    # What fails is listed; only what nothing can be made without ends it.
    assert (code, "retention of the trail" in err) == (0, True), err
    shutil.rmtree(target)
    node.conns["node-a"].execute("ALTER TABLE vsql_sync.audit_log RENAME TO gone_too")
    code, err, target = node.evidence()
    assert code == 5, err
    assert sorted(node.file(".").iterdir()) == before


@pytest.mark.parametrize("seed", ["", "other"])
def test_only_this_nodes_key_signs_a_bundle(node: Node, seed: str) -> None:
    node.seed = seed
    code, err, target = node.evidence()
    assert (code, target.exists()) == ((0, True) if not seed else (3, False)), err


def test_without_a_key_a_bundle_proves_nothing_and_says_so(node: Node) -> None:
    node.signing = False
    code, err, target = node.evidence()
    assert (code, "the bundle proves nothing" in err) == (0, True)
    assert "checkpoints" in {one["what"] for one in manifest_of(target)["not_gathered"]}
    code, _, err = node.check(target)
    assert (code, "is not signed" in err) == (9, True)


def test_a_bundle_is_noted_in_the_operators_log(node: Node) -> None:
    _, _, target = node.evidence()
    logged = node.conns["node-a"].execute(
        "SELECT target_id FROM vsql_sync.audit_log WHERE action = 'compliance.evidence'"
    )
    assert logged.fetchall() == [(str(target),)]


def test_tls_and_rights_of_brokers_that_guard_themselves_are_in_the_bundle(
    node: Node, stack: Stack, tmp_path: Path
) -> None:
    guarded = GuardedKafka(stack, tmp_path)
    try:
        node.bootstrap, node.security = guarded.address, guarded.scram("admin")
        topic = {"resource_type": "topic", "pattern_type": "literal", "operations": ["Read"], "host": "*"}
        for name in (f"{node.cluster}.audit", "somebody-elses", "*"):
            guarded.allow(
                [topic | {"principal": "User:producer", "resource_name": name, "permission": "allow"}]
            )
        code, err, target = node.evidence()
        assert code == 0, err
        (broker,) = json.loads((target / "connections.json").read_text())["kafka"]
        assert (broker["protocol"], broker["tls"], broker["verifies"]) == ("SASL_SSL", True, True)
        assert broker["version"] in ("TLSv1.2", "TLSv1.3")
        assert broker["certificate"]["subject"] == "CN=broker"
        acls = json.loads((target / "access.json").read_text())["kafka_acls"]
        assert {one["name"] for one in acls} == {f"{node.cluster}.audit", "*"}
        configured = json.loads((target / "connections.json").read_text())["configured_certificates"]
        assert [one["key"] for one in configured] == ["kafka.security.ca_path"]
        assert all(
            word.encode() not in raw for word in PASSWORDS.values() for raw in files_of(target).values()
        )
        # A principal that may not look says so.
        node.security = guarded.scram("consumer")
        _, _, target = node.evidence("another")
        missing = {one["what"]: one["reason"] for one in manifest_of(target)["not_gathered"]}
        assert "AUTHORIZATION" in missing["ACLs of Kafka"].upper()
    finally:
        guarded.remove()
