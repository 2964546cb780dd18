"""Downloaded segments verify off-line from the first entry on, or behind a base the auditor holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.audit_history import CHAIN, A, B, History, ordinary, signer
from tests.audit_segments import base, encoded, segment
from vsql_ctl.archive_check import Problems, Rows, verify_folder
from vsql_shared.audit.base import Base
from vsql_shared.audit.segment import Place
from vsql_shared.crypto.signing import public_pem
from vsql_shared.errors import UserError

HISTORY = ordinary()
SIZE = len(HISTORY.entries)
PLACES = (Place(1, 6), Place(7, 9), Place(10, SIZE))
BASE = base(HISTORY, 6)


class Downloaded:
    """What an auditor has: a folder of segments, public keys, and bases."""

    def __init__(self, folder: Path) -> None:
        self.segments, self._folder = folder / "segments", folder
        self.segments.mkdir()
        self.a, self.b = self.key("a", A.public_key), self.key("b", B.public_key)

    def key(self, name: str, public: bytes) -> Path:
        path = self._folder / f"{name}.pub"
        path.write_text(public_pem(public))
        return path

    def put(self, *places: Place, history: History = HISTORY) -> None:
        for place in places:
            (self.segments / place.name).write_bytes(encoded(segment(history, *place)))

    def base(self, text: str, name: str = "base.json") -> Path:
        path = self._folder / name
        path.write_text(text)
        return path

    def check(self, *after: Path) -> tuple[Rows, Problems]:
        return verify_folder(self.segments, (self.a,), (f"node-b={self.b}",), after)


@pytest.fixture
def given(tmp_path: Path) -> Downloaded:
    return Downloaded(tmp_path)


def row(segments: int, after: int, last: int) -> dict[str, object]:
    cosigned = ["node-b"] if segments else []
    return {
        "chain": CHAIN,
        "segments": segments,
        "expired": 0,
        "after": after,
        "last": last,
        "cosigned": cosigned,
    }


def test_all_segments_verify_from_the_first_entry_on(given: Downloaded) -> None:
    given.put(*PLACES)
    assert given.check() == ([row(3, 0, SIZE)], [])


def test_segments_behind_those_that_were_deleted_verify_behind_a_base(given: Downloaded) -> None:
    given.put(*PLACES[1:])
    rows, problems = given.check()
    assert rows == [row(0, 0, 0)]
    assert "a segment is missing: 1 is due, this one begins at 7" in problems[0]["what"]
    # As a program that takes it out of a file prints it: with the end of a line.
    assert given.check(given.base(BASE.encode() + "\n")) == ([row(2, 6, SIZE)], [])


def test_what_lies_before_the_base_is_not_looked_at(given: Downloaded) -> None:
    given.put(*PLACES)
    (given.segments / PLACES[0].name).write_bytes(encoded(segment(HISTORY, *PLACES[0]))[:-500])
    assert given.check(given.base(BASE.encode())) == ([row(2, 6, SIZE)], [])
    assert given.check()[0] == [row(0, 0, 0)]


def test_behind_a_base_a_missing_segment_is_named(given: Downloaded) -> None:
    given.put(PLACES[2])
    rows, problems = given.check(given.base(BASE.encode()))
    assert rows == [row(0, 6, 6)]
    assert "7 is due, this one begins at 10" in problems[0]["what"]


def _rewritten() -> History:
    """The same shape with other batches, by the chain's writer."""
    made = History()
    made.open()
    for _ in range(SIZE - 1):
        made.batch(7)
    return made


STRANGER = signer("node-a", "stranger")
# What is done to the base → what is said.
BASES: dict[str, tuple[Callable[[], Base], str]] = {
    "by a stranger": (lambda: base(HISTORY, 6, B, STRANGER), "is not signed by node node-a"),
    "nobody cosigned": (lambda: base(HISTORY, 6, A), "is not cosigned"),
    "another hash": (
        lambda: replace(BASE, head=replace(BASE.head, entry_hash=bytes(32))),
        "000000000009.jsonl",
    ),
    "another tree": (
        lambda: replace(BASE, head=replace(BASE.head, tree=base(_rewritten(), 6).head.tree)),
        "the checkpoint of its base is of 6 entries",
    ),
    "another size": (
        lambda: replace(BASE, head=replace(BASE.head, sequence=3)),
        "the checkpoint of its base is of 6 entries",
    ),
    "of another history of the writer's": (lambda: base(_rewritten(), 6), "000000000009.jsonl"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_does_not_hold_is_named_and_nothing_is_verified_behind_it(
    given: Downloaded, case: str
) -> None:
    made, said = BASES[case]
    given.put(*PLACES[1:])
    rows, problems = given.check(given.base(made().encode()))
    assert rows[0]["segments"] == 0
    assert [one["chain"] for one in problems] == [CHAIN]
    assert said in problems[0]["what"]


def test_a_base_is_one_of_a_chain_that_is_there_and_of_each_only_one(given: Downloaded) -> None:
    given.put(*PLACES)
    elsewhere = History(chain="other.node-a")
    elsewhere.open()
    for text, said in (
        ("{}", "no base of a chain"),
        ("nonsense", "not JSON"),
        (json.dumps(BASE.detail(), indent=1), "not in its one encoding"),
        (base(elsewhere, 1).encode(), "is of chain other.node-a, of which there is no segment"),
    ):
        with pytest.raises(UserError, match=said):
            given.check(given.base(text))
    both = given.base(BASE.encode()), given.base(base(HISTORY, 9).encode(), "later.json")
    with pytest.raises(UserError, match="give one of them"):
        given.check(*both)
