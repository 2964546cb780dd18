"""`syncctl audit archive` against a real object store that locks, and the trail after it was pruned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.audit_example import run_example
from tests.audit_history import CHAIN, CLUSTER, A, B, History, acknowledged, ordinary, signer, trust
from tests.audit_segments import base, note
from tests.conftest import NewDatabase
from tests.moto_server import ENVIRONMENT, REGION, moto_server, s3_bucket
from tests.services.test_audit_proofs import Logs
from tests.services.test_audit_trail import TABLE, as_attacker, check, store
from tests.stack.ports import release_port, reserve_port
from vsql_shared.audit import cosigned
from vsql_shared.audit.base import Base
from vsql_shared.audit.bases import said_base
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.entries import TRAIL_PRUNED, canonical_json
from vsql_shared.audit.pruning import delete, require_prunable
from vsql_shared.audit.store import load_head, remember_head
from vsql_shared.errors import DatabaseError, RefusedError, SignatureError, VsqlSyncError
from vsql_shared.pg import nodes, roles, signers
from vsql_shared.pg.connect import Connection, connect, errors

LOG = Log(CLUSTER, CHAIN)
SIZES = (4, 6, 9, 11)
"""Heads of the ordinary history that B has cosigned."""
NAMES = ["000000000001-000000000006", "000000000007-000000000011"]
"""Its segments, of at most seven entries."""


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_server(tmp_path_factory.mktemp("moto")) as address:
        yield address


class Archive(Logs):
    """Two nodes, of which A has a bucket that locks."""

    address = ""
    bucket = ""
    more = ""
    s3: Any = None

    def config(self, node: str) -> Path:
        path = super().config(node)
        text = path.read_text().replace("[audit]\n", "[audit]\nonline_months = 0\n")
        if "[audit]" not in text:
            text += "[audit]\nonline_months = 0\n"
        path.write_text(
            f'{text}[audit.archive]\nbucket = "{self.bucket}"\nregion = "{REGION}"\n'
            f'endpoint = "{self.address}"\nsegment_entries = 7\n{self.more}'
        )
        return path

    def archive(self, *arguments: str, node: str = "node-a") -> tuple[int, Any, str]:
        code, out, err = self.syncctl(node, "audit", "archive", "--output", "json", *arguments)
        return code, json.loads(out) if out else None, err

    def verify_archive(self) -> tuple[int, list[str]]:
        """Exit code of --verify, and what is bad."""
        code, found, _ = self.archive("--verify")
        return code, [one["what"] for one in found["problems"]]

    def keys(self) -> list[str]:
        listed = self.s3.list_object_versions(Bucket=self.bucket).get("Versions", ())
        return sorted(one["Key"] for one in listed)

    def download(self) -> Path:
        """What an auditor is given: every object of the bucket as a file."""
        folder = self.file("downloaded")
        for key in self.keys():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        return folder

    def check_folder(self, folder: Path, *arguments: str) -> tuple[int, Any, str]:
        """Off-line, with public keys alone."""
        key, other = self.key_files("node-a")[1], self.key_files("node-b")[1]
        given = ["--verify", "--from", str(folder), "--key", str(key), "--cosigner", f"node-b={other}"]
        return self.archive(*given, *arguments)


@pytest.fixture
def logs(
    tmp_path: Path,
    new_schema: NewDatabase,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moto: str,
) -> Iterator[Archive]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    made = Archive(tmp_path, new_schema("node_a"), new_schema("node_b"), capsys)
    made.address, made.bucket = moto, tmp_path.name.replace("_", "-").lower()[-60:].strip("-")
    made.s3 = s3_bucket(moto, made.bucket)
    conn = made.conns["node-a"]
    source = ordinary()
    store(conn, source)
    for size in SIZES:
        cosigned.remember(conn, LOG, note(source, size))
    remember_head(made.conns["node-b"], CHAIN, source.head, None)
    yield made
    made.close()


def test_due_entries_go_into_locked_segments_that_end_where_somebody_cosigned(logs: Archive) -> None:
    code, shown, _ = logs.archive("--dry-run")
    assert (code, logs.keys()) == (0, [])
    due = [{"first": 1, "last": 6}, {"first": 7, "last": 11}]
    assert shown == [{"chain": CHAIN, "archived": 0, "due": due, "waiting": 0}]
    # What is not archived is listed as such, and called ok by nobody.
    code, shown, _ = logs.syncctl("node-a", "audit", "archive", "--verify")
    assert (code, "ok:" in shown) == (0, False)
    assert shown.splitlines()[-1].split() == [CHAIN, "0", "0", "0", "-"]


def archived(logs: Archive) -> list[dict[str, Any]]:
    """Archive what is due."""
    code, done, err = logs.archive()
    assert code == 0, err
    found: list[dict[str, Any]] = done
    return found


def test_a_segment_is_locked_for_its_time_and_noted_once_it_was_read_back(logs: Archive) -> None:
    done = archived(logs)
    assert [(one["first"], one["last"]) for one in done] == [(1, 6), (7, 11)]
    keys = [f"vsql-sync-audit/{CLUSTER}/{CHAIN}/{name}.jsonl" for name in NAMES]
    assert logs.keys() == keys
    year = datetime.now(UTC) + timedelta(days=365)
    for key, one in zip(keys, done, strict=True):
        lock = logs.s3.head_object(Bucket=logs.bucket, Key=key)  # moto answers no GetObjectRetention
        assert lock["ObjectLockMode"] == "COMPLIANCE"
        assert abs(lock["ObjectLockRetainUntilDate"] - year) < timedelta(days=2)
        assert datetime.fromisoformat(one["retain_until"]) == lock["ObjectLockRetainUntilDate"]
    lines = logs.conns["node-a"].execute(
        "SELECT target_id FROM vsql_sync.audit_log WHERE action = 'audit.archive' ORDER BY id"
    )
    assert [row[0] for row in lines] == keys
    assert logs.archive()[1] == []
    assert logs.verify_archive() == (0, [])


NAMES = ["000000000001-000000000006", "000000000007-000000000011"]


def test_the_documented_program_verifies_a_segment(logs: Archive) -> None:
    archived(logs)
    for path in sorted(logs.download().rglob("*.jsonl")):
        done = run_example(path, A)
        last = int(path.stem[-12:])
        said = f"{CHAIN}: verified up to {last}\n{CHAIN}: in a checkpoint of {last} entries\n"
        assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_downloaded_segments_verify_off_line_with_public_keys_alone(logs: Archive) -> None:
    archived(logs)
    folder = logs.download()
    code, found, err = logs.check_folder(folder)
    assert code == 0, err
    assert found == {
        "ok": True,
        "chains": [
            {"chain": CHAIN, "segments": 2, "expired": 0, "after": 0, "last": 11, "cosigned": ["node-b"]}
        ],
        "problems": [],
    }
    stranger = logs.key_files("node-b", "x")[1]
    code, found, _ = logs.archive(
        "--verify", "--from", str(folder), "--key", str(logs.key_files("node-a")[1]),
        "--cosigner", f"node-b={stranger}",
    )  # fmt: skip
    assert (code, "not cosigned" in found["problems"][0]["what"]) == (9, True)
    code, found, _ = logs.archive("--verify", "--from", str(folder), "--key", str(stranger))
    assert (code, found["chains"][0]["segments"]) == (9, 0)
    # Each is named by its place below the folder: chains' segments have the same names.
    assert found["problems"][0]["what"].startswith(f"vsql-sync-audit/{CLUSTER}/{CHAIN}/{NAMES[0]}.jsonl: ")


def test_downloaded_segments_verify_behind_a_base_once_the_first_is_deleted(logs: Archive) -> None:
    archived(logs)
    folder = logs.download()
    _first(folder).unlink()
    assert logs.check_folder(folder)[0] == 9
    held = logs.file("base.json")
    held.write_text(base(ordinary(), 6).encode() + "\n")
    code, found, err = logs.check_folder(folder, "--after", str(held))
    assert (code, found["problems"]) == (0, []), err
    assert [(one["segments"], one["after"], one["last"]) for one in found["chains"]] == [(1, 6, 11)]
    code, out, _ = logs.syncctl("node-a", "audit", "archive", "--verify", "--after", str(held))
    assert (code, out) == (2, "")


def _first(folder: Path) -> Path:
    return min(folder.rglob("*.jsonl"))


def _last(folder: Path) -> Path:
    return max(folder.rglob("*.jsonl"))


def _cut(folder: Path) -> None:
    path = _first(folder)
    path.write_bytes(path.read_bytes()[:-200])


def _altered(folder: Path) -> None:
    path = _first(folder)
    path.write_bytes(path.read_bytes().replace(b'"row_count": 2', b'"row_count": 1', 1))


def _swapped(folder: Path) -> None:
    one, other = _first(folder), _last(folder)
    left, right = one.read_bytes(), other.read_bytes()
    one.write_bytes(right)
    other.write_bytes(left)


def _renamed(folder: Path) -> None:
    """An older, shorter segment in the place of the whole one."""
    path = _first(folder)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:5], *lines[-2:]]))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (_cut, "000000000006.jsonl"),
    "altered": (_altered, "000000000006.jsonl"),
    "swapped": (_swapped, "000000000006.jsonl"),
    "an older version": (_renamed, "000000000006.jsonl"),
    "the first one missing": (lambda folder: _first(folder).unlink(), "a segment is missing: 1 is due"),
    "emptied": (lambda folder: _last(folder).write_bytes(b""), "000000000011.jsonl"),
    "another name": (lambda folder: _last(folder).rename(_last(folder).with_name("x.jsonl")), "x.jsonl"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_was_done_to_downloaded_segments_is_named(logs: Archive, case: str) -> None:
    archived(logs)
    folder = logs.download()
    change, named = FOLDERS[case]
    change(folder)
    code, found, err = logs.check_folder(folder)
    assert code == 9, err
    assert named in found["problems"][0]["what"]


def put(logs: Archive, key: str, body: bytes) -> str:
    """As whoever has the account: another version, unlocked or locked; its id."""
    done = logs.s3.put_object(Bucket=logs.bucket, Key=key, Body=body, ChecksumAlgorithm="SHA256")
    return str(done["VersionId"])


def _body(logs: Archive, number: int) -> bytes:
    raw: bytes = logs.s3.get_object(Bucket=logs.bucket, Key=logs.keys()[number])["Body"].read()
    return raw


def altered(conn: Connection, table: str, statement: str, *values: object) -> None:
    """As whoever owns the database, past the append-only rules of a table."""
    with conn.transaction():
        for rule in ("no_update", "no_delete"):
            conn.execute(f"ALTER TABLE vsql_sync.{table} DISABLE RULE {rule}".encode())
        assert conn.execute(statement.encode(), values).rowcount > 0
        for rule in ("no_update", "no_delete"):
            conn.execute(f"ALTER TABLE vsql_sync.{table} ENABLE ALWAYS RULE {rule}".encode())


SEGMENTS = "audit_segments"


def _laid_over(logs: Archive) -> None:
    put(logs, logs.keys()[0], b"nothing")


def _laid_over_and_noted(body: Callable[[bytes], bytes]) -> Callable[[Archive], None]:
    """Another version, and the database altered to say that it was always that one."""

    def change(logs: Archive) -> None:
        made = put(logs, logs.keys()[0], body(_body(logs, 0)))
        statement = "UPDATE vsql_sync.audit_segments SET object_version = %s WHERE first_sequence = 1"
        altered(logs.conns["node-a"], SEGMENTS, statement, made)

    return change


def _added(logs: Archive) -> None:
    put(logs, logs.keys()[0].replace("000000000006", "000000000005"), b"x")


def _deleted(logs: Archive) -> None:
    logs.s3.delete_object(Bucket=logs.bucket, Key=logs.keys()[0])


def _unnoted(logs: Archive) -> None:
    statement = "DELETE FROM vsql_sync.audit_segments WHERE first_sequence = 1"
    altered(logs.conns["node-a"], SEGMENTS, statement)


def _gone(logs: Archive) -> None:
    """The service lost the object: the row names a version that is not there."""
    altered(
        logs.conns["node-a"],
        SEGMENTS,
        "UPDATE vsql_sync.audit_segments SET object_version ="
        " '00000000-0000-0000-0000-000000000000' WHERE first_sequence = 7",
    )


def _shorter(logs: Archive) -> None:
    """A lock that ends too early, set before anything could stop it (moto allows what S3 refuses)."""
    logs.s3.put_object_retention(
        Bucket=logs.bucket,
        Key=logs.keys()[1],
        Retention={"Mode": "COMPLIANCE", "RetainUntilDate": datetime(2020, 1, 1, tzinfo=UTC)},
    )


BUCKETS: dict[str, tuple[Callable[[Archive], object], str]] = {
    "another version laid over": (_laid_over, "another version lies over"),
    "deleted": (_deleted, "a mark of its deletion lies over"),
    "one added": (_added, "this node has not noted it"),
    "a row deleted": (_unnoted, "a segment is missing: 1 is due"),
    "the object lost": (_gone, "is missing: it is not in bucket"),
    "its lock shortened": (_shorter, "before"),
    "cut, and noted": (_laid_over_and_noted(lambda raw: raw[:-90]), "cut in the middle of a line"),
    "altered, and noted": (
        _laid_over_and_noted(lambda raw: raw.replace(b'"row_count": 2', b'"row_count": 1', 1)),
        "is not what was signed",
    ),
    "copied without its lock, and noted": (_laid_over_and_noted(lambda raw: raw), "not locked as it must be"),
}


@pytest.mark.parametrize("case", BUCKETS)
def test_what_was_done_to_the_bucket_is_named(logs: Archive, case: str) -> None:
    archived(logs)
    change, named = BUCKETS[case]
    change(logs)
    code, problems = logs.verify_archive()
    assert (code, named in problems[0]) == (9, True), problems


def test_what_lies_beside_the_segments_hides_no_damage_to_them(logs: Archive) -> None:
    archived(logs)
    _shorter(logs)
    _added(logs)
    code, found, _ = logs.archive("--verify")
    problems = [one["what"] for one in found["problems"]]
    assert (code, len(problems)) == (9, 2), problems
    assert "before" in problems[0]
    assert "this node has not noted it" in problems[1]
    assert [(one["segments"], one["last"]) for one in found["chains"]] == [(1, 6)]


def test_an_object_that_a_crash_left_without_its_row_is_taken_if_it_verifies(logs: Archive) -> None:
    archived(logs)
    conn = logs.conns["node-a"]
    kept = conn.execute("SELECT object_version, sha256 FROM vsql_sync.audit_segments ORDER BY 1").fetchall()
    altered(conn, SEGMENTS, "DELETE FROM vsql_sync.audit_segments")
    assert len(archived(logs)) == 2
    again = conn.execute("SELECT object_version, sha256 FROM vsql_sync.audit_segments ORDER BY 1").fetchall()
    assert again == kept
    assert logs.verify_archive() == (0, [])


def test_what_a_crash_left_is_taken_though_more_is_due_by_then(logs: Archive) -> None:
    """Alone, the later run would cut 7-13, and leave 7-11 in the bucket for a year."""
    archived(logs)
    conn = logs.conns["node-a"]
    altered(conn, SEGMENTS, "DELETE FROM vsql_sync.audit_segments WHERE first_sequence = 7")
    more = History(head=ordinary().head)
    more.open()
    more.batch()
    store(conn, more)
    whole = ordinary()
    whole.open()
    whole.batch()
    whole.entries[11:], whole.head = more.entries, more.head
    cosigned.remember(conn, LOG, note(whole, 13))
    # Nor does junk in a longer place keep it from being taken.
    put(logs, logs.keys()[1].replace("000000000011", "000000000012"), b"{}\n")
    assert [(one["first"], one["last"]) for one in archived(logs)] == [(7, 11), (12, 13)]
    code, problems = logs.verify_archive()
    assert (code, len(problems), "000000000012.jsonl is in the archive" in problems[0]) == (9, 1, True)


def test_a_segment_of_a_history_this_node_does_not_have_is_not_taken(logs: Archive) -> None:
    """After a restore the same writer goes on otherwise; what it archived before is of another history."""
    archived(logs)
    conn = logs.conns["node-a"]
    altered(conn, SEGMENTS, "DELETE FROM vsql_sync.audit_segments")
    as_attacker(conn, f"DELETE FROM {TABLE}")
    conn.execute("DELETE FROM vsql_sync.chain_heads")
    conn.execute("DELETE FROM vsql_sync.audit_cosigned")
    other = _other()
    for _ in range(6):
        other.batch(7)
    store(conn, other)
    assert archived(logs) == []
    assert conn.execute("SELECT count(*) FROM vsql_sync.audit_segments").fetchall() == [(0,)]


def test_another_object_that_stands_in_the_way_is_named_and_noted_nowhere(
    logs: Archive,
) -> None:
    put(logs, f"vsql-sync-audit/{CLUSTER}/{CHAIN}/{NAMES[0]}.jsonl", b"{}\n")
    code, _, err = logs.archive()
    assert (code, f"{NAMES[0]}.jsonl" in err) == (9, True)
    assert logs.conns["node-a"].execute("SELECT count(*) FROM vsql_sync.audit_segments").fetchall() == [(0,)]


def test_a_bucket_without_locks_is_refused_before_anything_is_put_there(logs: Archive) -> None:
    s3_bucket(logs.address, f"{logs.bucket[:50]}-open", locks=False)
    logs.bucket = f"{logs.bucket[:50]}-open"
    code, _, err = logs.archive()
    assert (code, "locks no objects" in err, logs.keys()) == (4, True, [])


def test_a_store_that_is_away_or_unknown_says_so_and_nothing_changes(logs: Archive) -> None:
    port = reserve_port()
    try:
        logs.address, logs.more = f"http://127.0.0.1:{port}", "attempts = 1\n"
        code, _, err = logs.archive()
        assert (code, "no connection to the object store" in err) == (7, True)
    finally:
        release_port(port)
    assert check(logs.conns["node-a"]).ok


def test_nothing_is_archived_that_nobody_cosigned_until_a_checkpoint_is_given_by_hand(logs: Archive) -> None:
    conn = logs.conns["node-a"]
    conn.execute("DELETE FROM vsql_sync.audit_cosigned")
    code, shown, _ = logs.archive("--dry-run")
    assert (code, shown[0]["due"], shown[0]["waiting"]) == (0, [], 11)
    alone = logs.make("node-b", "b", "checkpoint", "--chain", CHAIN)
    code, done, err = logs.archive("--cosigned", str(alone))
    assert (code, [(one["first"], one["last"]) for one in done]) == (0, [(1, 11)]), err
    unsigned = logs.make("node-a", "a", "checkpoint", "--chain", CHAIN)
    code, _, err = logs.archive("--cosigned", str(unsigned))
    assert (code, "cosigned by 0" in err) == (4, True)


def test_a_trail_that_was_altered_is_not_archived(logs: Archive) -> None:
    as_attacker(
        logs.conns["node-a"],
        f"UPDATE {TABLE} SET document = (SELECT document FROM {TABLE} WHERE sequence = 4) WHERE sequence = 3",
    )
    code, _, err = logs.archive()
    assert (code, logs.keys()) == (9, []), err


def test_what_is_wrong_with_one_chain_keeps_no_other_from_being_archived(logs: Archive) -> None:
    conn = logs.conns["node-a"]
    other = History("zones.node-a")
    other.open()
    other.batch()
    store(conn, other)
    cosigned.remember(conn, Log(CLUSTER, other.chain), note(other, 2))
    as_attacker(
        conn,
        f"UPDATE {TABLE} SET document = (SELECT document FROM {TABLE} WHERE sequence = 4) WHERE sequence = 3",
    )
    code, done, err = logs.archive()
    assert (code, [(one["chain"], one["last"]) for one in done]) == (9, [("zones.node-a", 2)]), err
    assert f"{CHAIN}: " in err


def test_two_at_once_are_one(logs: Archive) -> None:
    conn = logs.conns["node-a"]
    conn.execute("SELECT pg_advisory_lock(%s)", (0x76_73_71_6C_61_72_63_68,))
    code, _, err = logs.archive()
    assert (code, "another process archives or prunes" in err) == (4, True)


# The rows leave. What the producer says is said here by the test's own writer, with A's key.


def say(more: History, made: Base) -> None:
    """What its producer does with an order to prune the chain."""
    said = canonical_json(made.detail())
    more.add(event_type=TRAIL_PRUNED, batch_lsn_start=9, batch_lsn_end=9, detail=said)


def note_base(conn: Connection, made: Base) -> None:
    conn.execute(
        "INSERT INTO vsql_sync.audit_bases (chain, size, base) VALUES (%s, %s, %s)",
        (CHAIN, made.head.sequence, made.encode()),
    )


@pytest.fixture
def pruned(logs: Archive) -> tuple[Archive, History]:
    """The first six entries are archived and pruned; the chain goes on behind them."""
    archived(logs)
    conn = logs.conns["node-a"]
    source = ordinary()
    made = base(source, 6)
    more = History(head=source.head)
    more.open()
    say(more, made)
    more.batch()
    store(conn, more)
    remember_head(logs.conns["node-b"], CHAIN, more.head, None)
    assert said_base(conn, trust(A), LOG) == made
    assert delete(conn, made, LOG) == (6, 0)
    return logs, more


def test_a_pruned_chain_verifies_from_its_base_and_its_proofs_go_on(pruned: tuple[Archive, History]) -> None:
    logs, more = pruned
    conn = logs.conns["node-a"]
    report = check(conn)
    assert report.ok, report.problems
    assert report.warnings == ()
    assert [(one.chain, one.pruned, one.entries) for one in report.chains] == [(CHAIN, 6, 8)]
    code, shown, _ = logs.syncctl("node-a", "audit", "verify")
    assert (code, f"chain {CHAIN} begins behind entry 6" in shown) == (0, True)
    assert "ok: every entry that is not pruned is signed" in shown
    assert load_head(conn, CHAIN) == more.head
    head = logs.make("node-a", "head", "checkpoint", "--chain", CHAIN)
    proof = logs.make("node-a", "proof", "prove", f"{CHAIN}/9")
    assert logs.offline(proof)[0] == 0
    old = logs.file("old")
    old.write_text(note(ordinary(), 9))
    prefix = logs.make("node-a", "prefix", "prove-prefix", old, head)
    assert logs.offline(prefix, "--old", old)[0] == 0
    same = logs.make("node-a", "same", "checkpoint", "--chain", CHAIN, "--size", "6")
    assert logs.offline(same)[0] == 0
    for words in (("prove", f"{CHAIN}/3"), ("checkpoint", "--chain", CHAIN, "--size", "4")):
        code, _, err = logs.syncctl("node-a", "audit", *words)
        assert (code, "in the archive only" in err) == (4, True)
    report_file = logs.file("report.json")
    code, _, err = logs.syncctl("node-a", "audit", "export", "--proofs", "--output", str(report_file))
    assert code == 0, err
    done = run_example(report_file, A)
    assert done.stdout == f"{CHAIN}: verified up to 14\n{CHAIN}: in a checkpoint of 14 entries\n", done.stderr
    assert f"chain {CHAIN} begins at entry 7" in err


def test_the_peer_s_side_is_compared_from_the_base_on(pruned: tuple[Archive, History]) -> None:
    logs, more = pruned
    acks = acknowledged(ordinary())
    acks.acknowledge(more.entries[-1])
    store(logs.conns["node-b"], acks)
    peer = ("--peer-connection", logs.infos["node-b"])
    code, found = logs.verify("node-a", *peer)
    assert (code, found["problems"]) == (0, [])
    assert [(one["compared"], one["under_way"]) for one in found["comparisons"]] == [(4, 0)]
    code, found = logs.verify("node-b", "--peer-connection", logs.infos["node-a"])
    assert (code, found["problems"]) == (0, [])


def test_signed_acts_below_the_base_are_kept_and_verified(logs: Archive) -> None:
    """The operator's note of the history is entry 8: with it, the first nine go."""
    archived(logs)
    conn = logs.conns["node-a"]
    altered(conn, SEGMENTS, "UPDATE vsql_sync.audit_segments SET last_sequence = 9 WHERE first_sequence = 7")
    source = ordinary()
    made = base(source, 9)
    more = History(head=source.head)
    more.open()
    say(more, made)
    store(conn, more)
    assert delete(conn, made, LOG)[0] == 9
    kept = conn.execute("SELECT sequence, event_type, document FROM vsql_sync.audit_kept").fetchall()
    assert kept == [(8, "operator_action", source.entries[7].encoded)]
    assert check(conn).ok
    for statement, what in (
        ("UPDATE vsql_sync.audit_kept SET event_type = 'key_rotated'", "not what its row says"),
        (
            "UPDATE vsql_sync.audit_kept SET document = set_byte(document, 150, get_byte(document, 150) # 1)",
            "",
        ),
    ):
        with conn.transaction():
            conn.execute("ALTER TABLE vsql_sync.audit_kept DISABLE RULE no_update")
            conn.execute(statement.encode())
            conn.execute("ALTER TABLE vsql_sync.audit_kept ENABLE ALWAYS RULE no_update")
        found = check(conn).problems
        assert found[0].sequence == 8
        assert "kept beside the trail" in found[0].what
        assert what in found[0].what
    # With all it is held against, as if it had never been.
    altered(conn, "audit_kept", "DELETE FROM vsql_sync.audit_kept")
    assert "0 entries are kept beside the trail, not the 1" in check(conn).problems[0].what


def _as_owner(conn: Connection, statement: str) -> None:
    altered(conn, "audit_bases", statement)


def _cut_further(conn: Connection) -> None:
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence <= 9")
    note_base(conn, base(ordinary(), 9))


def _rowless(conn: Connection) -> None:
    altered(conn, SEGMENTS, "DELETE FROM vsql_sync.audit_segments")


def test_rows_of_segments_that_are_gone_hide_nothing_that_was_pruned(pruned: tuple[Archive, History]) -> None:
    logs = pruned[0]
    assert logs.verify_archive() == (0, [])
    _rowless(logs.conns["node-a"])
    code, problems = logs.verify_archive()
    assert code == 9
    assert "was pruned up to 6, the archive has 0 entries" in problems[0]
    code, found = logs.verify("node-a")
    assert (code, [one["sequence"] for one in found["problems"]]) == (9, [6])
    assert "noted cover 0" in found["problems"][0]["what"]
    code, _, err = logs.archive("--verify", "--chain", "typo.node-a")
    assert (code, "has no chain 'typo.node-a'" in err) == (4, True)


def test_entries_go_while_others_read_and_write_and_no_others_go(pruned: tuple[Archive, History]) -> None:
    logs, more = pruned
    conn = logs.conns["node-a"]
    with connect(logs.infos["node-a"], application_name="test") as other:
        say(more, base(ordinary(), 11))
        more.batch()
        store(conn, _tail(more, 2))
        with other.transaction():
            other.execute(f"SELECT count(*) FROM {TABLE}")
            other.execute(f"LOCK TABLE {TABLE} IN ROW EXCLUSIVE MODE")  # as whoever writes holds
            assert delete(conn, base(ordinary(), 11), LOG) == (5, 0)
    assert check(conn).ok
    assert check(conn).warnings == ()
    # Whoever owns the table deletes nothing above the base, nor in a partition.
    assert conn.execute(f"DELETE FROM {TABLE}").rowcount == 0
    conn.execute(
        "CREATE OR REPLACE RULE no_delete AS ON DELETE TO vsql_sync.vsql_sync_audit WHERE false"
        " DO INSTEAD NOTHING"
    )
    assert "is not append-only any more" in check(conn).warnings[0]


def _tail(history: History, count: int) -> History:
    """Its last entries, as a history to store."""
    made = History(head=history.head)
    made.entries = history.entries[-count:]
    return made


STRANGER = signer("node-x")


def _hidden(logs: Archive) -> None:
    """A rewrites its history, and says that it pruned more than B has ever seen."""
    conn = logs.conns["node-a"]
    as_attacker(conn, f"DELETE FROM {TABLE}")
    conn.execute("DELETE FROM vsql_sync.chain_heads")
    other = _other()
    for _ in range(8):
        other.batch(7)
    more = History(head=other.head)
    more.open()
    say(more, base(other, 14, STRANGER, A))
    for one in (other, more):
        store(conn, one)
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence <= 14")


def _another_tree(logs: Archive) -> None:
    """The entries are those B saw; what A signs of their tree is of others."""
    conn = logs.conns["node-a"]
    source, other = ordinary(), _other()
    forged = replace(base(source, 6, STRANGER, A), note=base(other, 6, STRANGER, A).note)
    forged = replace(forged, head=replace(forged.head, tree=base(other, 6).head.tree))
    more = History(head=source.head)
    more.open()
    say(more, forged)
    store(conn, more)
    as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence <= 6")


HIDDEN: dict[str, tuple[Callable[[Archive], None], str]] = {
    "another history, pruned beyond what the target saw": (_hidden, "as if it was pruned there"),
    "another tree below the base": (_another_tree, "split view"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_source_hides_no_history_from_its_target_behind_a_base_of_its_making(
    logs: Archive, case: str
) -> None:
    nodes.pin(logs.conns["node-a"], "node-x", STRANGER.public_key)  # whom only A knows
    store(logs.conns["node-b"], acknowledged(ordinary()))
    change, named = HIDDEN[case]
    change(logs)
    code, found = logs.verify("node-b", "--peer-connection", logs.infos["node-a"])
    assert code == 9
    assert any(named in one["what"] for one in found["problems"]), found["problems"]
    assert any("nobody this node knows has cosigned" in one for one in found["warnings"])


FORGERIES: dict[str, tuple[Callable[[Connection], object], str]] = {
    "the base deleted": (
        lambda conn: _as_owner(conn, "DELETE FROM vsql_sync.audit_bases"),
        "missing: sequence 1 is not there",
    ),
    "one entry more cut off": (
        lambda conn: as_attacker(conn, f"DELETE FROM {TABLE} WHERE sequence = 7"),
        "missing: sequence 1 is not there",
    ),
    "cut to a base the chain does not say": (_cut_further, "no entry of it says that it was pruned up to 9"),
    "another head in the base": (
        lambda conn: _as_owner(
            conn, "UPDATE vsql_sync.audit_bases SET base = replace(base, '\"batch\":5', '\"batch\":4')"
        ),
        "batch number",
    ),
    "another tree in the base": (
        lambda conn: _as_owner(
            conn,
            "UPDATE vsql_sync.audit_bases SET base ="
            " regexp_replace(base, '\"tree\":\\[\"[0-9a-f]{64}', '\"tree\":[\"' || repeat('00', 32))",
        ),
        "the checkpoint of its base",
    ),
    "a base that is none": (
        lambda conn: _as_owner(conn, "UPDATE vsql_sync.audit_bases SET base = '{}'"),
        "no base of a chain",
    ),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_what_was_done_to_a_pruned_chain_is_named(pruned: tuple[Archive, History], case: str) -> None:
    conn = pruned[0].conns["node-a"]
    change, named = FORGERIES[case]
    change(conn)
    report = check(conn)
    assert not report.ok
    assert named in report.problems[0].what


def stream(conn: Connection, acked: int) -> None:
    """A stream at A, one target of which has acknowledged so much."""
    conn.execute(
        "INSERT INTO vsql_sync.streams (chain, direction, kind, publication, origin, target, slot_name,"
        " origin_name) VALUES (%s, 'out', 'live', 'orders', 'node-a', '*', 's', 'o')",
        (CHAIN,),
    )
    conn.execute(
        "INSERT INTO vsql_sync.stream_targets (chain, target, acked_sequence) VALUES (%s, 'node-b', %s)",
        (CHAIN, acked),
    )


def prune(logs: Archive, *arguments: str) -> tuple[int, Any, str]:
    code, out, err = logs.syncctl("node-a", "audit", "prune", "--output", "json", *arguments)
    return code, json.loads(out) if out else None, err


def test_prune_says_what_is_in_the_way_of_more(logs: Archive) -> None:
    conn = logs.conns["node-a"]
    stream(conn, 11)
    assert prune(logs, "--dry-run")[1][0]["why"] == "entries from 1 on are not archived"
    archived(logs)
    code, found, err = prune(logs, "--dry-run")
    assert code == 0, err
    assert [(one["pruned"], one["why"]) for one in found] == [(6, "its last epoch begins there")]
    shown = logs.syncctl("node-a", "audit", "prune", "--dry-run")[1]
    assert "may be pruned up to" in shown
    code, _, err = prune(logs, "--chain", "other.node-a")
    assert (code, "no live stream" in err) == (4, True)


def _further(logs: Archive) -> None:
    """An epoch and a batch behind the ordinary history: what its writer starts from."""
    more = History(head=ordinary().head)
    more.open()
    more.batch()
    store(logs.conns["node-a"], more)


def test_prune_is_refused_while_a_target_is_behind_or_does_not_hold(logs: Archive) -> None:
    archived(logs)
    _further(logs)
    conn = logs.conns["node-a"]
    stream(conn, 11)
    assert prune(logs, "--dry-run")[1][0]["pruned"] == 11
    conn.execute("UPDATE vsql_sync.stream_targets SET acked_sequence = 8")
    row = prune(logs, "--dry-run")[1][0]
    assert (row["pruned"], row["why"]) == (6, "target node-b has acknowledged up to 8")
    conn.execute("UPDATE vsql_sync.stream_targets SET mismatch = 'x'")
    assert prune(logs, "--dry-run")[1][0]["pruned"] == 0
    conn.execute("DELETE FROM vsql_sync.stream_targets")
    assert "no target" in prune(logs, "--dry-run")[1][0]["why"]


def test_without_its_producer_nothing_is_removed_and_the_order_stands(logs: Archive) -> None:
    archived(logs)
    _further(logs)
    conn = logs.conns["node-a"]
    stream(conn, 11)
    code, _, err = prune(logs, "--timeout", "0.3")
    assert (code, "no row was removed" in err) == (7, True)
    assert check(conn).ok
    assert [verb for (verb,) in conn.execute("SELECT verb FROM vsql_sync.commands")] == ["prune-chain"]


# What lies over an archived version does not take it away: that one is locked, and was read.
PRUNED: dict[str, tuple[int, int]] = dict.fromkeys(BUCKETS, (9, 0)) | {
    "another version laid over": (7, 1),
    "deleted": (7, 1),
    "one added": (7, 1),
    "a row deleted": (0, 0),
    "its lock shortened": (4, 0),
    "copied without its lock, and noted": (4, 0),
}
"""Exit code, and orders given: 7 means that nobody obeys the one that was."""


@pytest.mark.parametrize("case", BUCKETS)
def test_prune_is_refused_where_the_archive_is_not_what_it_was(logs: Archive, case: str) -> None:
    archived(logs)
    _further(logs)
    conn = logs.conns["node-a"]
    stream(conn, 11)
    BUCKETS[case][0](logs)
    code, _, err = prune(logs, "--timeout", "0.3")
    orders = conn.execute("SELECT count(*) FROM vsql_sync.commands").fetchall()[0][0]
    assert (code, orders) == PRUNED[case], err


@pytest.mark.parametrize("case", BUCKETS)
def test_what_was_ordered_and_not_deleted_yet_is_deleted_only_if_the_archive_still_is_what_it_was(
    logs: Archive, case: str
) -> None:
    """The producer obeyed after the command had given up; the archive changed before the next one."""
    archived(logs)
    more = History(head=ordinary().head)
    more.open()
    say(more, base(ordinary(), 11))
    more.batch()
    conn = logs.conns["node-a"]
    store(conn, more)
    stream(conn, 14)
    assert said_base(conn, trust(A), LOG) == base(ordinary(), 11)
    BUCKETS[case][0](logs)
    code, _, err = prune(logs, "--timeout", "0.3")
    orders = conn.execute("SELECT verb FROM vsql_sync.commands").fetchall()
    expected = (PRUNED | {"a row deleted": (9, 0)})[case]
    assert (code, orders) == (expected[0], [("prune-topic",)] * expected[1]), err
    assert conn.execute(f"SELECT min(sequence) FROM {TABLE}").fetchall() == [(1,)]


def test_the_writer_holds_an_order_against_its_own_tables(logs: Archive) -> None:
    archived(logs)
    _further(logs)
    conn = logs.conns["node-a"]
    stream(conn, 11)
    source = ordinary()
    mine = base(source, 6)
    for size in (6, 11):
        require_prunable(conn, LOG, base(source, size), 0)
    cases: dict[str, Any] = {
        "not cosigned": (base(source, 6, A), SignatureError, "not cosigned"),
        "not archived": (base(source, 5), RefusedError, "segments cover 0 of 5"),
        "another history": (base(_other(), 6), RefusedError, "is not the one of the base"),
        "other tables": (replace(mine, tables=("public.orders", "public.x")), RefusedError, "other tables"),
        "no tables": (replace(mine, tables=()), RefusedError, "other tables"),
    } | {
        f"another {name}": (
            replace(mine, head=replace(mine.head, **{name: value})),
            RefusedError,
            "is not the one of the base",
        )
        for name, value in dict[str, Any](
            {
                "epoch": 7,
                "incarnation": bytes(16),
                "entry_hash": bytes(32),
                "batch": 4,
                "lsn_end": 351,
                "unfinished_from": 0,
                "event_timestamp": 1,
                "system_identifier": "1",
                "timeline": 2,
            }
        ).items()
    }
    for made, error, named in cases.values():
        with pytest.raises(error, match=named):
            require_prunable(conn, LOG, made, 0)
    with pytest.raises(RefusedError, match="younger than 1200 months"):
        require_prunable(conn, LOG, mine, 1200)
    with pytest.raises(RefusedError, match="no live stream's"):
        require_prunable(conn, Log(CLUSTER, f"{CHAIN}.copy.node-b"), mine, 0)
    conn.execute("UPDATE vsql_sync.stream_targets SET acked_sequence = 5")
    with pytest.raises(RefusedError, match="cannot be pruned up to 6"):
        require_prunable(conn, LOG, mine, 0)
    conn.execute("UPDATE vsql_sync.stream_targets SET acked_sequence = 11")
    require_prunable(conn, LOG, base(source, 11), 0)
    note_base(conn, replace(base(source, 11), tables=()))
    with pytest.raises(RefusedError, match="another base of 11 entries"):
        require_prunable(conn, LOG, base(source, 11), 0)
    require_prunable(conn, LOG, mine, 0)
    signers.revoke(conn, B.fingerprint, "stolen")  # a thief would cosign whatever he is asked to
    with pytest.raises(SignatureError, match="not cosigned"):
        require_prunable(conn, LOG, mine, 0)


def _other() -> History:
    """The same shape with other batches."""
    made = History()
    made.open()
    for _ in range(5):
        made.batch(7)
    made.batch(7)
    return made


def test_rows_are_deleted_only_below_a_base_whose_segments_are_noted(logs: Archive) -> None:
    archived(logs)
    conn = logs.conns["node-a"]
    made = base(ordinary(), 6)
    with pytest.raises(VsqlSyncError, match="no signed entry says so"):
        delete(conn, made, LOG)
    note_base(conn, made)
    # A sum that is right covers nothing: 1-3, and 2-4 (so 5 and 6 lie in none).
    altered(
        conn,
        SEGMENTS,
        "UPDATE vsql_sync.audit_segments SET first_sequence = CASE first_sequence WHEN 1 THEN 1 ELSE 2 END,"
        " last_sequence = CASE first_sequence WHEN 1 THEN 3 ELSE 4 END",
    )
    summed = "SELECT sum(last_sequence - first_sequence + 1) FROM vsql_sync.audit_segments"
    assert conn.execute(summed).fetchall() == [(6,)]
    with pytest.raises(VsqlSyncError, match="cover 0 of 6 entries"):
        delete(conn, made, LOG)
    altered(conn, SEGMENTS, "DELETE FROM vsql_sync.audit_segments")
    with pytest.raises(VsqlSyncError, match="cover 0 of 6 entries"):
        delete(conn, made, LOG)
    assert check(conn).ok
    assert check(conn).warnings == ()


def test_a_row_that_overlaps_or_leaves_a_gap_is_refused_and_stops_no_pruning(logs: Archive) -> None:
    archived(logs)
    _further(logs)
    conn, made = logs.conns["node-a"], base(ordinary(), 11)
    roles.create(conn)
    user = f"t_{conn.info.dbname}_segments"
    conn.execute(f'CREATE ROLE "{user}" LOGIN IN ROLE {roles.OPERATOR}'.encode())
    try:
        with _as(logs, user) as operator:
            for place in (
                (1, 3),
                (1, 20),
                (4, 8),
                (6, 6),
                (7, 11),
                (9, 9),
                (11, 14),
                (13, 14),
                (0, 0),
                (-5, 0),
            ):
                with pytest.raises(DatabaseError, match="does not adjoin"), errors("noting a segment"):
                    operator.execute(_SAME_SEGMENT, place)
            operator.execute(_SAME_SEGMENT, (12, 14))
    finally:
        conn.execute(f'DROP ROLE "{user}"'.encode())
    note_base(conn, made)
    assert delete(conn, made, LOG)[0] == 11


_SAME_SEGMENT = """
INSERT INTO vsql_sync.audit_segments (chain, first_sequence, last_sequence, bucket, object_key,
    object_version, sha256, bytes, retain_until, head, note)
SELECT chain, %s, %s, bucket, object_key, object_version, sha256, bytes, retain_until, head, note
FROM vsql_sync.audit_segments WHERE first_sequence = 7"""


def test_a_segment_whose_row_was_lost_is_noted_again_between_the_others(logs: Archive) -> None:
    archived(logs)
    conn = logs.conns["node-a"]
    altered(conn, SEGMENTS, "DELETE FROM vsql_sync.audit_segments WHERE first_sequence = 1")
    conn.execute(_SAME_SEGMENT, (1, 6))
    covered = conn.execute("SELECT vsql_sync.archived_entries(%s, 11)", (CHAIN,)).fetchall()
    assert covered == [(11,)]


def test_an_operator_archives_and_only_an_administrator_prunes(logs: Archive) -> None:
    conn = logs.conns["node-a"]
    roles.create(conn)
    users = {role: f"t_{conn.info.dbname}_{role}" for role in (roles.OPERATOR, roles.ADMIN, roles.PRODUCER)}
    for role, user in users.items():
        conn.execute(f'CREATE ROLE "{user}" LOGIN IN ROLE {role}'.encode())
    try:
        logs.user = users[roles.OPERATOR]
        assert len(archived(logs)) == 2
        assert logs.verify_archive() == (0, [])
        _further(logs)
        stream(conn, 11)
        made = base(ordinary(), 11)
        with _as(logs, users[roles.PRODUCER]) as producer:  # it holds the order, and notes the base
            require_prunable(producer, LOG, made, 0)
            note_base(producer, made)
            with pytest.raises(DatabaseError, match="permission denied"):
                delete(producer, made, LOG)
        with _as(logs, users[roles.OPERATOR]) as operator:
            with pytest.raises(DatabaseError, match="permission denied"):
                delete(operator, made, LOG)
            with pytest.raises(DatabaseError, match="permission denied"), errors("trying"):
                note_base(operator, replace(made, head=replace(made.head, sequence=10)))
        with _as(logs, users[roles.ADMIN]) as admin:
            assert delete(admin, made, LOG) == (11, 0)
    finally:
        for user in users.values():
            conn.execute(f'DROP ROLE "{user}"'.encode())


def _as(logs: Archive, user: str) -> Connection:
    return connect(f"{logs.infos['node-a']} user={user}", application_name="test")
