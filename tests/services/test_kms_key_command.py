"""`syncctl key` as a process, with key files, a real database and a real token."""

from __future__ import annotations

import json
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.conftest import NewDatabase
from tests.softhsm import make_token
from tests.syncctl import syncctl as run_syncctl
from tests.vault_server import ROOT_TOKEN, vault_server
from vsql_shared.crypto.signing import fingerprint, load_public_key
from vsql_shared.kms.file import FileKek, generate_kek_file
from vsql_shared.pg import commands, migrate, nodes
from vsql_shared.pg.connect import Connection, connect

CHAIN = "pub.node-a"


def syncctl(*words: str, cwd: Path, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    named = ["--config", str(config)] if config else []
    return run_syncctl(*named, *words, cwd=cwd, timeout=60)


def write_config(folder: Path, conninfo: str, more: str = "") -> Path:
    parts = conninfo_to_dict(conninfo)
    password = f'password = "{parts["password"]}"\n' if parts.get("password") else ""
    path = folder / "vsql-sync.toml"
    path.touch(0o600)
    path.write_text(
        f'[cluster]\nname = "c"\nnode_id = 1\nnode_name = "node-a"\n[connection]\nhost = "{parts["host"]}"\n'
        f'port = {parts["port"]}\ndatabase = "{parts["dbname"]}"\nuser = "{parts["user"]}"\n{password}'
        f'[server]\nmode = "dev"\n{more}'
    )
    return path


class NodeOnDisk:
    """A database that is a node, its configuration with a KEK file, and nothing running."""

    def __init__(self, folder: Path, conninfo: str) -> None:
        self.folder = folder
        self.kek = folder / "dev.kek"
        generate_kek_file(self.kek)
        self.config = write_config(folder, conninfo, f'[encryption.kms.file]\npath = "{self.kek}"\n')
        assert syncctl("key", "generate", "--output", "keys", cwd=folder).returncode == 0
        self.public_key = load_public_key(folder / "keys" / "vsql-sync-signing.pub")
        self.conn: Connection = connect(conninfo, application_name="test")
        migrate.install(self.conn)
        nodes.register_local(self.conn, 1, "node-a", "c", self.public_key)

    def key(self, *words: str) -> subprocess.CompletedProcess[str]:
        return syncctl("key", *words, cwd=self.folder, config=self.config)

    def add_stream(self, chain: str, desired: str = "running") -> None:
        self.conn.execute(
            "INSERT INTO vsql_sync.streams (chain, direction, publication, origin, desired)"
            " VALUES (%s, 'out', 'pub', 'node-a', %s)",
            (chain, desired),
        )

    def add_dek(self, dek_id: str, kek_id: str, state: str, *, provider: str = "file") -> None:
        self.conn.execute(
            "INSERT INTO vsql_sync.deks (dek_id, chain, epoch, kms_provider, kek_id, algorithm, created_at,"
            " tuples, bytes, state) VALUES (%s, %s, 3, %s, %s, 'AES-256-GCM', now(), 12, 2048, %s)",
            (dek_id, CHAIN, provider, kek_id, state),
        )


@pytest.fixture
def node(tmp_path: Path, new_database: NewDatabase) -> Iterator[NodeOnDisk]:
    made = NodeOnDisk(tmp_path, new_database("keys"))
    yield made
    made.conn.close()


def test_generate_makes_a_private_pair_in_a_new_folder_and_says_its_fingerprint(tmp_path: Path) -> None:
    done = syncctl("key", "generate", "--output", "keys", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    private = tmp_path / "keys" / "vsql-sync-signing.key"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert fingerprint(load_public_key(private.with_suffix(".pub"))) in done.stdout
    assert "PRIVATE" not in done.stdout


def test_generate_refuses_to_overwrite_a_key(tmp_path: Path) -> None:
    syncctl("key", "generate", "--output", ".", cwd=tmp_path)
    before = (tmp_path / "vsql-sync-signing.key").read_bytes()
    again = syncctl("key", "generate", "--output", ".", cwd=tmp_path)
    assert again.returncode == 6
    assert "is not overwritten" in again.stderr
    assert (tmp_path / "vsql-sync-signing.key").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "nothing to make"),
        (("--rotate",), "belong to --kek FILE"),
        (("--kek-id", "name", "--output", "x"), "belong to --kek FILE"),
        (("--kek", "f", "--rotate", "--kek-id", "n"), "--rotate keeps the name"),
    ],
)
def test_generate_says_what_does_not_fit_together(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = syncctl("key", "generate", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_kek_file_is_made_named_and_rotated_without_being_shown(tmp_path: Path) -> None:
    made = syncctl("key", "generate", "--kek", "dev.kek", "--kek-id", "team", cwd=tmp_path)
    assert "team/1" in made.stdout
    rotated = syncctl("key", "generate", "--kek", "dev.kek", "--rotate", cwd=tmp_path)
    assert "team/2" in rotated.stdout
    path = tmp_path / "dev.kek"
    assert FileKek(path, "team").kek_id == "team/2"
    for line in path.read_text().splitlines()[1:]:
        assert line.split()[1] not in made.stdout + rotated.stdout


def test_a_kek_file_bears_the_configured_name_when_there_is_a_configuration(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, "host=127.0.0.1 port=1 dbname=d user=u", '[encryption.kms]\nkek_id = "of-the-config"\n'
    )
    done = syncctl("key", "generate", "--kek", "dev.kek", cwd=tmp_path, config=config)
    assert "of-the-config/1" in done.stdout
    missing = syncctl("key", "generate", "--kek", "other.kek", cwd=tmp_path, config=tmp_path / "none.toml")
    assert missing.returncode == 3
    assert not (tmp_path / "other.kek").exists()
    (tmp_path / "elsewhere").mkdir()
    assert "vsql-sync-kek/1" in syncctl("key", "generate", "--kek", "k", cwd=tmp_path / "elsewhere").stdout


def test_a_kek_is_made_in_the_configured_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOFTHSM2_CONF", raising=False)  # given back after the test
    token = make_token(tmp_path, label="of-the-command")
    config = write_config(
        tmp_path,
        "host=127.0.0.1 port=1 dbname=d user=u",
        f'[encryption.kms]\nprovider = "pkcs11"\nkek_id = "hsm-kek"\n[encryption.kms.pkcs11]\n'
        f'module = "{token.module}"\ntoken_label = "{token.label}"\nkey_label = "kek"\n'
        f'pin = "{token.pin.get_secret_value()}"\n',
    )
    for version in ("0001", "0002"):
        done = syncctl("key", "generate", "--kek-pkcs11", cwd=tmp_path, config=config)
        assert done.returncode == 0, done.stderr
        assert f"hsm-kek/{version}" in done.stdout
        assert token.pin.get_secret_value() not in done.stdout + done.stderr


def test_show_public_reads_either_half_and_never_prints_the_private_one(tmp_path: Path) -> None:
    syncctl("key", "generate", "--output", ".", cwd=tmp_path)
    shown = [
        syncctl("key", "show-public", "--key", f"vsql-sync-signing.{half}", "--output", "json", cwd=tmp_path)
        for half in ("key", "pub")
    ]
    found = [json.loads(one.stdout) for one in shown]
    assert (
        found[0]["public_key"] == found[1]["public_key"] == (tmp_path / "vsql-sync-signing.pub").read_text()
    )
    assert found[0]["fingerprint"].startswith("SHA256:")
    assert all("PRIVATE" not in one.stdout for one in shown)
    table = syncctl("key", "show-public", "--key", "vsql-sync-signing.key", cwd=tmp_path).stdout
    assert found[0]["fingerprint"] in table
    assert "BEGIN PUBLIC KEY" in table


def test_show_public_takes_the_configured_key_or_says_that_none_is(tmp_path: Path) -> None:
    config = write_config(tmp_path, "host=127.0.0.1 port=1 dbname=d user=u")
    without = syncctl("key", "show-public", cwd=tmp_path, config=config)
    assert without.returncode == 3
    assert "audit.signing_key_path is not set" in without.stderr
    syncctl("key", "generate", "--output", ".", cwd=tmp_path)
    config.write_text(config.read_text() + '[audit]\nsigning_key_path = "vsql-sync-signing.key"\n')
    shown = syncctl("key", "show-public", cwd=tmp_path, config=config)
    assert shown.returncode == 0, shown.stderr
    assert fingerprint(load_public_key(tmp_path / "vsql-sync-signing.pub")) in shown.stdout


def test_show_public_of_a_file_that_holds_no_key_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a key")
    done = syncctl("key", "show-public", "--key", "notes.txt", cwd=tmp_path)
    assert done.returncode == 6
    assert "notes.txt holds no private key in PEM form" in done.stderr


def test_inventory_lists_every_key_with_its_strength_and_the_keks_that_are_gone(node: NodeOnDisk) -> None:
    node.add_dek("dek-new", "vsql-sync-kek/1", "active")
    node.add_dek("dek-old", "vsql-sync-kek/0", "retired")
    found = json.loads(node.key("inventory", "--output", "json").stdout)
    assert [(d["dek_id"], d["state"], d["tuples"], d["strength_bits"]) for d in found["deks"]] == [
        ("dek-new", "active", 12, 256),
        ("dek-old", "retired", 12, 256),
    ]
    assert [(k["kek_id"], k["strength_bits"], k["state"]) for k in found["keks"]] == [
        ("vsql-sync-kek/1", 256, "active"),
        ("vsql-sync-kek/0", None, "not found"),
    ]
    signing = [(s["node_name"], s["fingerprint"], s["strength_bits"]) for s in found["signing_keys"]]
    assert signing == [("node-a", fingerprint(node.public_key), 128)]
    table = node.key("inventory").stdout
    for text in (
        "dek-new",
        "dek-old",
        "2.0 KiB",
        "vsql-sync-kek/1",
        "not found",
        fingerprint(node.public_key),
    ):
        assert text in table


def test_inventory_shows_the_newest_keys_first_and_says_how_many_there_are(node: NodeOnDisk) -> None:
    for number in range(5):
        node.add_dek(f"dek-{number}", "vsql-sync-kek/1", "retired")
    node.add_dek("dek-active", "vsql-sync-kek/1", "active")
    found: dict[str, Any] = json.loads(node.key("inventory", "--limit", "2", "--output", "json").stdout)
    assert [d["dek_id"] for d in found["deks"]] == ["dek-active", "dek-4"]
    assert found["deks_total"] == 6
    assert len(json.loads(node.key("inventory", "--limit", "0", "--output", "json").stdout)["deks"]) == 6


def test_inventory_without_the_kms_still_lists_what_the_database_knows(node: NodeOnDisk) -> None:
    node.add_dek("dek-new", "vsql-sync-kek/1", "active")
    node.kek.unlink()
    done = node.key("inventory")
    assert done.returncode == 0, done.stderr
    assert "dek-new" in done.stdout
    assert f"the KMS does not answer: cannot read KEK file {node.kek}" in done.stdout


def answer(node: NodeOnDisk, chain: str, *, ok: bool, message: str) -> threading.Thread:
    """Answer the next command for a stream as its worker does."""

    def work() -> None:
        with connect(node.conn.info.dsn, application_name="worker", password=node.conn.info.password) as conn:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                for command in commands.pending(conn, chain, "producer"):
                    assert command.verb == "rotate-dek"
                    commands.finish(conn, command.id, chain, "out", ok, message)
                    return
                time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_rotate_dek_asks_every_running_stream_and_shows_the_answers(node: NodeOnDisk) -> None:
    node.add_stream(CHAIN)
    node.add_stream("other.node-a")
    node.add_stream("stopped.node-a", desired="stopped")
    workers = [answer(node, chain, ok=True, message="rotated") for chain in (CHAIN, "other.node-a")]
    done = node.key("rotate-dek", "--reason", "drill", "--output", "json")
    for worker in workers:
        worker.join()
    assert done.returncode == 0, done.stderr
    assert [(a["stream"], a["done"]) for a in json.loads(done.stdout)] == [
        ("other.node-a", True),
        (CHAIN, True),
    ]
    row = node.conn.execute("SELECT role, chain, verb, reason FROM vsql_sync.commands").fetchall()
    assert row == [("producer", None, "rotate-dek", "drill")]


def test_rotate_dek_of_one_stream_leaves_the_others_alone(node: NodeOnDisk) -> None:
    node.add_stream(CHAIN)
    node.add_stream("other.node-a")
    worker = answer(node, CHAIN, ok=False, message="the KMS refuses")
    done = node.key("rotate-dek", "--stream", CHAIN)
    worker.join()
    assert done.returncode == 4
    assert "the KMS refuses" in done.stdout
    assert "not every stream rotated its key" in done.stderr
    assert commands.pending(node.conn, "other.node-a", "producer") == []


def test_rotate_dek_names_the_streams_that_do_not_answer(node: NodeOnDisk) -> None:
    node.add_stream(CHAIN)
    done = node.key("rotate-dek", "--timeout", "0.2")
    assert done.returncode == 7
    assert f"no answer within 0.2 s from {CHAIN}" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "none of this node's streams is started"),
        (("--stream", CHAIN), f"stream {CHAIN} is stopped"),
        (("--stream", "nope"), f"this node writes no stream 'nope'\nhint: its streams: {CHAIN}"),
    ],
)
def test_rotate_dek_refuses_when_nothing_would_rotate(
    node: NodeOnDisk, words: tuple[str, ...], says: str
) -> None:
    node.add_stream(CHAIN, desired="stopped")
    done = node.key("rotate-dek", *words)
    assert done.returncode == 4
    assert says in done.stderr
    assert node.conn.execute("SELECT count(*) FROM vsql_sync.commands").fetchone() == (0,)


def test_the_inventory_warns_of_a_kek_weaker_than_the_keys_it_wraps(node: NodeOnDisk, tmp_path: Path) -> None:
    with vault_server(tmp_path) as vault:
        vault.new_key("weak", "rsa-2048")
        vault.new_key("strong")
        before = node.config.read_text().partition("[encryption.kms.file]")[0]
        section = f'[encryption.kms.vault]\naddress = "{vault.address}"\ntoken = "{ROOT_TOKEN}"\n'
        for name, bits in (("weak", 112), ("strong", 256)):
            kms = f'[encryption.kms]\nprovider = "vault"\nkek_id = "transit/{name}"\n'
            node.config.write_text(before + kms + section)
            listed = json.loads(node.key("inventory", "--output", "json").stdout)
            assert [(one["kek_id"], one["strength_bits"]) for one in listed["keks"]] == [
                (f"transit/{name}/1", bits)
            ]
            text = node.key("inventory").stdout
            warning = f"warning: KEK transit/{name}/1 has {bits} bits of strength"
            assert (warning in text) == (name == "weak")
            assert len(listed["kek_warnings"]) == (name == "weak")
            assert ROOT_TOKEN not in text
