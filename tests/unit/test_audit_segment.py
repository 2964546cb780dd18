"""A segment of the archive verifies at its place and nowhere else; whatever is done to it is named."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.audit_history import CHAIN, CLUSTER, A, B, ordinary, signer, trust
from tests.audit_segments import KEYS, base, encoded, head_at, note, segment
from vsql_shared.audit import segment as segments
from vsql_shared.audit.archive import cut
from vsql_shared.audit.chain import EMPTY_HEAD
from vsql_shared.audit.checkpoint import Log
from vsql_shared.audit.segment import Place, Verified, lines, parse_name, verify
from vsql_shared.errors import ChainError, DecodeError, ProtocolError, SignatureError, VerificationError

HISTORY = ordinary()
LOG = Log(CLUSTER, CHAIN)
SIZE = len(HISTORY.entries)
FIRST = Place(1, 6)
Lines = list[dict[str, Any]]


def check(data: bytes, place: Place = FIRST) -> Verified:
    start = head_at(HISTORY, place.first - 1)
    return verify(lines(io.BytesIO(data).read), LOG, place, start, trust(A), KEYS)


@pytest.mark.parametrize("place", [Place(1, 6), Place(1, SIZE), Place(7, 7), Place(7, SIZE)])
def test_a_segment_proves_its_entries_and_gives_the_head_the_next_one_follows(place: Place) -> None:
    found = check(encoded(segment(HISTORY, *place)), place)
    assert found.head == head_at(HISTORY, place.last)
    assert found.entries == place.last - place.first + 1
    assert list(found.kept) == [
        HISTORY.entries[7].entry_hash for number in (8,) if place.first <= number <= place.last
    ]
    assert found.tables == {one for made in HISTORY.entries[place.first - 1 : place.last]
                            for one in made.entry.tables_affected}  # fmt: skip
    assert found.first_time == HISTORY.entries[place.first - 1].entry.event_timestamp
    assert found.last_time == HISTORY.entries[place.last - 1].entry.event_timestamp


def _entry(found: Lines, number: int) -> dict[str, Any]:
    one: dict[str, Any] = found[number]["entry"]
    return one


def _end(found: Lines) -> dict[str, Any]:
    one: dict[str, Any] = found[-1]["end"]["chains"][CHAIN]
    return one


def _moved(found: Lines) -> None:
    found[2], found[3] = found[3], found[2]


def _shortened(found: Lines) -> None:
    """The last entry taken away, and what the end says of it made right."""
    del found[-2]
    _end(found).update(entries=5, last_sequence=5, last_hash=_entry(found, -2)["hash"])
    found[-1]["end"]["entries"] = 5


MANIPULATED: dict[str, Callable[[Lines], object]] = {
    "an entry cut out": lambda found: found.pop(3),
    "two entries swapped": _moved,
    "an entry doubled": lambda found: found.insert(3, found[3]),
    "an entry of another place": lambda found: found.__setitem__(3, segment(HISTORY, 7, 8)[1]),
    "the last entry cut off": _shortened,
    "its end cut off": lambda found: found.pop(),
    "a line behind its end": lambda found: found.append(found[3]),
    "what is beside an entry": lambda found: _entry(found, 3)["entry"].update(row_count=9),
    "the hash beside an entry": lambda found: _entry(found, 3).update(hash="00" * 32),
    "the document": lambda found: _entry(found, 3).update(document=_entry(found, 4)["document"]),
    "no document": lambda found: _entry(found, 3).update(document=None),
    "another tree before": lambda found: _end(found).update(before=["00" * 32]),
    "another first entry": lambda found: _end(found).update(first_sequence=2),
    "another last hash": lambda found: _end(found).update(last_hash="00" * 32),
    "another count": lambda found: found[-1]["end"].update(entries=7),
    "a second chain": lambda found: found[-1]["end"]["chains"].update(other={}),
    "a checkpoint of more entries": lambda found: _end(found).update(checkpoint=note(HISTORY, 7)),
    "a checkpoint nobody cosigned": lambda found: _end(found).update(checkpoint=note(HISTORY, 6, A)),
    "a checkpoint its writer did not sign": lambda found: _end(found).update(checkpoint=note(HISTORY, 6, B)),
    "a checkpoint a stranger signed": lambda found: _end(found).update(
        checkpoint=note(HISTORY, 6, signer("node-a", "x"), B)
    ),
    "no checkpoint": lambda found: _end(found).pop("checkpoint"),
    "another cluster": lambda found: found[0]["header"].update(cluster="other"),
    "another format": lambda found: found[0]["header"].update(format="x"),
    "another version": lambda found: found[0]["header"].update(version=2),
    "no header": lambda found: found.pop(0),
}


@pytest.mark.parametrize("case", MANIPULATED)
def test_a_manipulated_segment_is_refused(case: str) -> None:
    found = copy.deepcopy(segment(HISTORY, 1, 6))
    MANIPULATED[case](found)
    with pytest.raises((DecodeError, ChainError, SignatureError)):
        check(encoded(found))


def test_half_a_character_in_its_checkpoint_is_one_error_of_ours() -> None:
    found = copy.deepcopy(segment(HISTORY, 1, 6))
    _end(found)["checkpoint"] = f"\ud800{note(HISTORY, 6)}"
    with pytest.raises(DecodeError, match="no character"):
        check(b"".join(json.dumps(one).encode() + b"\n" for one in found))


def test_a_segment_is_refused_at_another_place() -> None:
    second = encoded(segment(HISTORY, 7, SIZE))
    for start, place in ((EMPTY_HEAD, Place(1, 6)), (head_at(HISTORY, 5), Place(6, SIZE))):
        with pytest.raises(ChainError, match="is due, there stands entry"):
            verify(lines(io.BytesIO(second).read), LOG, place, start, trust(A), KEYS)
    with pytest.raises(ChainError, match="a segment is missing: 1 is due, this one begins at 7"):
        verify(lines(io.BytesIO(second).read), LOG, Place(7, SIZE), EMPTY_HEAD, trust(A), KEYS)


def test_an_older_and_shorter_segment_under_the_name_of_a_longer_one_is_refused() -> None:
    with pytest.raises(ChainError, match="the segment is cut: it ends at 5, not at 6"):
        check(encoded(segment(HISTORY, 1, 5)))


def test_a_segment_of_a_stranger_is_refused() -> None:
    with pytest.raises(SignatureError):
        verify(lines(io.BytesIO(encoded(segment(HISTORY, 1, 6))).read), LOG, Place(1, 6), EMPTY_HEAD,
               trust(signer("node-a", "x")), KEYS)  # fmt: skip


THREE = segment(HISTORY, 1, 3)
WHOLE = encoded(THREE)


@settings(deadline=None)  # up to three signatures are verified each time
@given(st.binary(max_size=400), st.integers(0, len(WHOLE)))
def test_no_bytes_lead_to_another_error_than_ours(noise: bytes, at: int) -> None:
    data = WHOLE[:at] + noise
    assume(data != WHOLE)
    with pytest.raises((ProtocolError, VerificationError)):
        check(data, Place(1, 3))


MEMBERS = st.sampled_from(["header", "entry", "end", "chain", "chains", CHAIN])
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(MEMBERS, one, max_size=3),
)


@settings(deadline=None)  # as above
@given(VALUES, st.integers(0, 4))
def test_no_json_leads_to_another_error_than_ours(value: Any, number: int) -> None:
    found = list(THREE)
    found[number] = value
    with pytest.raises((ProtocolError, VerificationError)):
        check(b"".join(json.dumps(one).encode() + b"\n" for one in found), Place(1, 3))


def test_lines_are_bounded() -> None:
    data = b"x" * (segments.MAX_LINE + 2)
    with pytest.raises(DecodeError, match="a line of more than"):
        list(lines(io.BytesIO(data).read))
    with pytest.raises(DecodeError, match="cut in the middle of a line"):
        list(lines(io.BytesIO(b'{"header": {}}').read))


NAMES = (
    "",
    "1-2.jsonl",
    "000000000001-000000000000.jsonl",
    "000000000000-000000000001.jsonl",
    "000000000002-000000000001.jsonl",
    "000000000001-000000000002.json",
    "0000000000001-000000000002.jsonl",
    "000000000001-000000000002.jsonl\n",
    "٠" * 12 + "-000000000002.jsonl",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_of_a_segment_is_refused(name: str) -> None:
    with pytest.raises(DecodeError):
        parse_name(name)


@given(st.integers(1, 10**18), st.integers(0, 10**18))
def test_names_come_back_as_the_places_they_are_made_of(first: int, more: int) -> None:
    place = Place(first, first + more)
    assert parse_name(place.name) == place


def test_folders_keep_clusters_and_chains_apart() -> None:
    assert segments.folder("p", Log("shop", "a_b.node-a")) == "p/shop/a_5fb.node-a/"
    assert segments.folder("p", Log("shop", CHAIN)) == "p/shop/orders.node-a/"


@given(st.sets(st.integers(1, 300), max_size=30), st.integers(0, 50), st.integers(1, 60))
def test_segments_lie_side_by_side_end_where_somebody_cosigned_and_are_bounded(
    sizes: set[int], start: int, most: int
) -> None:
    ends = sorted(size for size in sizes if size > start)
    places = cut(start, ends, most)
    due = start + 1
    for place in places:
        assert place.first == due
        assert place.last in sizes
        # Longer than allowed only where nothing was cosigned in between.
        if place.last - place.first + 1 > most:
            assert not [size for size in ends if place.first <= size < place.last]
        due = place.last + 1
    assert (places[-1].last if places else start) == max([start, *ends])


def test_whose_a_segment_is_says_its_beginning() -> None:
    found = [json.dumps(one).encode() for one in segment(HISTORY, 1, 2)]
    assert segments.log_of(found) == LOG
    for wrong in ([], found[1:], found[:1], [found[0], b'{"entry": {"chain": "x"}}'], [b"[]", b"{}"]):
        with pytest.raises(DecodeError):
            segments.log_of(wrong)
    for name, at in (("cluster", 0), ("chain", 1)):
        changed = copy.deepcopy(segment(HISTORY, 1, 2))
        changed[at]["header" if at == 0 else "entry"][name] = "\ud800.node-a"
        with pytest.raises(DecodeError, match="no character"):
            segments.log_of([json.dumps(one).encode() for one in changed])


def test_the_place_of_an_object_is_its_name_s_and_others_have_none() -> None:
    assert segments.place_of(f"p/shop/{CHAIN}/{FIRST.name}") == (FIRST,)
    assert segments.place_of(f"p/shop/{CHAIN}/x.jsonl") == ()


def test_the_base_behind_a_segment_is_what_it_proves() -> None:
    found = check(encoded(segment(HISTORY, 1, 6)))
    assert (found.head, found.note) == (base(HISTORY, 6).head, base(HISTORY, 6).note)
