"""The directory of an evidence bundle while it is made: whole, or not there; and whose rights are in it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.audit_history import A
from vsql_ctl.evidence.access import reaches
from vsql_ctl.evidence.bundle import new_bundle
from vsql_shared.audit import evidence
from vsql_shared.audit.evidence_documents import Keys
from vsql_shared.errors import RefusedError, TransientError, UserError

TIMES = datetime(2026, 1, 31, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)


def made(target: Path) -> None:
    with new_bundle(target) as making:
        making.table("facts/keys.json", "keys", {"keys": []})
        making.missing("ACLs", "nobody answers")
        making.seal("shop", "node-a", TIMES, "vsql-sync 0.1", A)


def test_a_bundle_appears_whole_for_its_owner_only(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    made(target)
    assert {path.name: path.stat().st_mode & 0o777 for path in (target, *target.rglob("*"))} == {
        "bundle": 0o700,
        "facts": 0o700,
        "keys.json": 0o600,
        "manifest.json": 0o600,
    }
    manifest = (target / evidence.MANIFEST).read_bytes()
    keys = Keys(A.public_key)
    found = evidence.verify(manifest, {"facts/keys.json"}, lambda path: (target / path).read_bytes(), keys)
    times = found.manifest["begun_at"], found.manifest["generated_at"]
    assert times == ("2026-01-31T00:00:00Z", "2026-02-01T00:00:00Z")
    assert found.manifest["not_gathered"] == [{"what": "ACLs", "reason": "nobody answers"}]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a defect"), OSError(28, "no space left")])
def test_whatever_ends_it_half_way_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def half() -> None:
        with new_bundle(tmp_path / "bundle") as making:
            making.table("keys.json", "keys", {})
            raise error

    with pytest.raises((KeyboardInterrupt, ValueError, UserError)):
        half()
    assert list(tmp_path.iterdir()) == []


def test_what_appears_in_its_place_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def raced() -> None:
        with new_bundle(target) as making:
            making.table("keys.json", "keys", {})
            target.mkdir()
            (target / "mine").write_text("x")

    with pytest.raises(UserError, match="cannot write"):
        raced()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bundle", "mine"]


@pytest.mark.parametrize("place", ["file", "dangling", "full"])
def test_a_place_that_is_taken_is_refused_before_anything_is_done(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RefusedError):
        made(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def fail(error: Exception) -> None:
    raise error


def test_what_fails_is_noted_with_its_reason_and_a_defect_is_none_of_it(tmp_path: Path) -> None:
    with new_bundle(tmp_path / "bundle") as making:
        with making.trying("rights"):
            fail(TransientError("nobody answers", hint="wait"))
        with pytest.raises(KeyError), making.trying("a defect"):
            fail(KeyError("x"))
        assert making.not_gathered == [("rights", "nobody answers; wait")]


ACL = {"resource": "topic", "pattern": "literal"}


@pytest.mark.parametrize(
    ("changed", "ours"),
    [
        ({"name": "shop.audit"}, True),
        ({"name": "shop2.audit"}, False),
        ({"name": "shop", "pattern": "prefixed"}, True),
        ({"name": "sh", "pattern": "prefixed"}, True),
        ({"name": "shop.orders.", "pattern": "prefixed"}, True),
        ({"name": "shops.", "pattern": "prefixed"}, False),
        ({"name": "*"}, True),
        ({"name": "vsql-sync.shop.orders.node-a.node-b", "resource": "group"}, True),
        ({"name": "vsql-sync.audit-verify", "resource": "group"}, True),
        ({"name": "vsql-sync.other.orders", "resource": "group"}, False),
        ({"name": "kafka-cluster", "resource": "broker"}, True),
    ],
)
def test_rights_that_reach_this_cluster_are_shown_and_no_others(changed: dict[str, str], ours: bool) -> None:
    assert reaches(ACL | changed, "shop") == ours
