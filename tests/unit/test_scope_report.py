"""The signed scope report: what it says, that it says no more, and that every alteration of it is found."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stack.state import REPOSITORY
from vsql_shared.audit.entries import EPOCH_OPENED, REPLICATION_BATCH, AuditEntry, canonical_json
from vsql_shared.audit.merkle import batch_root
from vsql_shared.audit.scope_history import StreamHistory, sha256_hex
from vsql_shared.audit.scope_report import (
    ClearedColumn,
    Facts,
    PciColumn,
    Stream,
    TableFacts,
    build,
    sign,
    to_text,
    verify,
)
from vsql_shared.changes import PartitionRoot
from vsql_shared.crypto.signing import Signer, public_pem
from vsql_shared.errors import ChainError, DecodeError, SignatureError

PAGE = REPOSITORY / "docs" / "operations" / "scope-report.md"
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))), "node-a")
CHAIN = "analytics_replica.node-a"
COLUMNS = ("id", "merchant_id", "amount_cents", "currency", "status", "created_at", "updated_at")
SECRET = ("pan_encrypted", "cvv_hash", "cardholder_name", "expiry_encrypted")
SCOPE = canonical_json({"format": 1, "publication": "analytics_replica", "tables": []})


def _seen(*columns: str, table: str = "public.payments") -> str:
    return canonical_json({"tables": [{"table": table, "columns": list(columns), "identity": "d"}]})


def _entry(event: str, sequence: int, epoch: int, **fields: Any) -> AuditEntry:
    return AuditEntry(
        cluster="c",
        chain=CHAIN,
        epoch=epoch,
        incarnation=bytes(16),
        sequence=sequence,
        event_id=bytes(16),
        event_type=event,
        event_timestamp=0,
        source_node_id="node-a",
        prev_event_hash=bytes(32),
        signer_node_id="node-a",
        **{"batch_lsn_start": 0x1000, "batch_lsn_end": 0x1000, **fields},
    )


def _opened(sequence: int, epoch: int, scope: str | None = SCOPE) -> AuditEntry:
    detail = {} if scope is None else {"scope": sha256_hex(scope)}
    return _entry(EPOCH_OPENED, sequence, epoch, detail=canonical_json(detail))


def _batch(
    sequence: int,
    epoch: int,
    number: int,
    described: str = "",
    table: str = "public.payments",
    pci: tuple[str, ...] = (),
) -> AuditEntry:
    part = PartitionRoot("c.t", 0, 0, 0, 1, 2, bytes(32))
    return _entry(
        REPLICATION_BATCH,
        sequence,
        epoch,
        batch=number,
        batch_lsn_start=0x1000 * number,
        batch_lsn_end=0x1000 * (number + 1),
        tables_affected=(table,),
        contains_pci=bool(pci),
        pci_columns=pci,
        row_count=2,
        record_count=2,
        partitions=(part,),
        merkle_root=batch_root([part.sub_root]),
        detail=canonical_json({"described": sha256_hex(described)} if described else {}),
    )


def _history(*entries: AuditEntry, texts: dict[tuple[int, int], str] | None = None) -> StreamHistory:
    history = StreamHistory(CHAIN, texts or {}, {sha256_hex(SCOPE): SCOPE})
    for entry in entries:
        history.take(AuditEntry.decode(entry.encode()))
    history.finish()
    return history


def _quiet() -> StreamHistory:
    """One epoch, one table, nothing left out was seen."""
    text = _seen(*COLUMNS)
    return _history(_opened(1, 1), _batch(2, 1, 1, text), _batch(3, 1, 2), texts={(1, 1): text})


def _facts(history: StreamHistory | None = None, **changes: Any) -> Facts:
    table = TableFacts(
        "public.payments",
        ("id", "merchant_id", *SECRET, *COLUMNS[2:]),
        COLUMNS,
        (
            PciColumn("pan_encrypted", "cardholder", "marked"),
            PciColumn("cvv_hash", "authentication", "looks like a card verification code"),
            PciColumn("cardholder_name", "cardholder", "marked"),
            PciColumn("expiry_encrypted", "cardholder", "looks like a card's expiry date"),
        ),
        (ClearedColumn("status", "a PIN", "état: a text", "alice", datetime(2026, 2, 1, tzinfo=UTC)),),
    )
    streams = () if history is None else (Stream(history, "ab" * 32),)
    facts = Facts(
        "payments-eu", "node-a", "analytics_replica", exclude_pci=True, message_prefixes=(),
        tables=(table,), streams=streams, reader_roles=("postgres",), reader_slots=("vsql_0123",),
    )  # fmt: skip
    return replace(facts, **changes)


def _report(history: StreamHistory | None = None, **changes: Any) -> dict[str, Any]:
    return sign(build(_facts(history, **changes), "2026-02-17T06:00:00Z"), SIGNER)


def _bytes(report: dict[str, Any]) -> bytes:
    return to_text(report).encode()


def test_a_table_that_another_node_writes_too_has_a_report_there() -> None:
    (said,) = [text for text in _report(other_writers=("node-b",))["not_claimed"] if "node-b" in text]
    assert "there is a report for that node" in said
    assert "node-b" not in str(_report())


def test_the_shape_of_the_specification_is_in_it() -> None:
    report = verify(_bytes(_report(_quiet())), SIGNER.public_key)
    (table,) = report["tables"]
    shape = {
        "table",
        "total_columns",
        "replicated_columns",
        "excluded_pci_columns",
        "subscriber_can_contain_pci",
    }
    assert {name: value for name, value in table.items() if name in shape} == {
        "table": "public.payments",
        "total_columns": 11,
        "replicated_columns": 7,
        "excluded_pci_columns": list(SECRET),
        "subscriber_can_contain_pci": False,
    }
    assert report["report_type"] == "pci_scope_reduction"
    assert report["signature"].startswith("ed25519:")
    (seen,) = table["observed"]
    assert (seen["lsn_from"], seen["lsn_to"]) == ("0/1000", "0/3000")
    (stream,) = report["streams"]
    assert (stream["lsn_from"], stream["lsn_to"], stream["rows"]) == ("0/1000", "0/3000", 4)


HISTORIES: dict[str, tuple[Callable[[], StreamHistory | None], str, bool]] = {
    "nothing sent": (lambda: None, "nothing has been sent yet", False),
    "nothing seen": (_quiet, "none was seen on the streams, from 0/1000 to 0/3000", False),
    "seen": (
        lambda: _history(
            _opened(1, 1),
            _batch(2, 1, 1, _seen(*COLUMNS, "cvv_hash")),
            texts={(1, 1): _seen(*COLUMNS, "cvv_hash")},
        ),
        "or were seen on a stream: public.payments.cvv_hash",
        True,
    ),
    "written down and perhaps sent": (
        lambda: _history(_opened(1, 1), texts={(1, 1): _seen("id", "pan_encrypted")}),
        "or were seen on a stream: public.payments.pan_encrypted",
        True,
    ),
    "nothing in what was written down and perhaps sent": (
        lambda: _history(_opened(1, 1), texts={(1, 1): _seen("id")}),
        "no batch has a manifest yet, so that records of it may have left or not",
        False,
    ),
    "not observed": (
        lambda: _history(_opened(1, 1, None), _batch(2, 1, 1), _batch(3, 1, 2)),
        "2 batches were sent by a version that wrote down nothing",
        True,
    ),
    "described in an epoch that ended": (
        lambda: _history(
            _opened(1, 1), _batch(2, 1, 1, _seen("id")), _opened(3, 2), _batch(4, 2, 2),
            texts={(1, 1): _seen("id")},
        ),
        "1 batches were sent",
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HISTORIES)
def test_what_was_seen_decides_and_not_only_what_is_published(case: str) -> None:
    make, said, possible = HISTORIES[case]
    report = _report(make())
    assert said in report["conclusion"]
    assert report["tables"][0]["subscriber_can_contain_pci"] is possible


def test_a_batch_that_describes_a_table_anew_may_hold_rows_under_the_former_description() -> None:
    first, second = _seen("id", "code"), _seen("id")
    texts = {(1, 1): first, (1, 3): second}
    history = _history(
        _opened(1, 1), _batch(2, 1, 1, first), _batch(3, 1, 2), _batch(4, 1, 3, second), _batch(5, 1, 4),
        texts=texts,
    )  # fmt: skip
    found = {one.columns: (one.lsn_from, one.lsn_to) for one in history.observed.values()}
    assert found == {("id", "code"): (0x1000, 0x4000), ("id",): (0x3000, 0x5000)}


def test_what_manifests_name_as_pci_data_is_known_without_a_mark() -> None:
    text = _seen("id", "code")
    history = _history(
        _opened(1, 1), _batch(2, 1, 1, text, pci=("public.payments.code",)), texts={(1, 1): text}
    )
    assert history.pci_columns == {"public.payments.code"}


def test_epochs_that_signed_no_scope_are_not_said_to_have_signed_one() -> None:
    text = _seen("id")
    old = _history(_opened(1, 1, None), _opened(2, 2), _batch(3, 2, 1, text), texts={(2, 1): text})
    for history, but in ((old, True), (_quiet(), False)):
        first = _report(history)["how_checked"][0]
        assert ("but for those under a scope of `sha256` null" in first) is but


def test_it_draws_no_conclusion_about_anybodys_scope() -> None:
    for make, *_ in HISTORIES.values():
        text = to_text(_report(make(), message_prefixes=("app",))).lower()
        for word in ("complian", "out of scope", "outside cde", "outside of the cde", "scoped out", "certif"):
            assert word not in text
        assert "the entity confirms its scope" in text


@pytest.mark.parametrize("lost", ["deleted", "changed"])
@pytest.mark.parametrize("what", ["scope", "described"])
def test_a_text_that_is_not_what_was_signed_makes_no_report(what: str, lost: str) -> None:
    text = _seen(*COLUMNS)
    texts, scopes = {(1, 1): text}, {sha256_hex(SCOPE): SCOPE}
    if what == "scope":
        scopes = {} if lost == "deleted" else {sha256_hex(SCOPE): SCOPE.replace("analytics", "other")}
    else:
        texts = {} if lost == "deleted" else {(1, 1): text.replace("status", "pan")}
    history = StreamHistory(CHAIN, texts, scopes)
    entries = [_opened(1, 1), _batch(2, 1, 1, text)]
    if what == "described":
        history.take(entries.pop(0))
    with pytest.raises(ChainError, match="it was changed or deleted"):
        history.take(entries[0])


def _alterations() -> Iterator[tuple[str, bytes]]:
    """Every value of the report changed, every member left out or added, one by one."""
    report = _report(_quiet())
    for path in _paths(report):
        if path[:1] == ["signature"]:
            continue
        for how in ("changed", "left out"):
            other = copy.deepcopy(report)
            place: Any = other
            for step in path[:-1]:
                place = place[step]
            if how == "left out":
                del place[path[-1]]
            else:
                place[path[-1]] = _another(place[path[-1]])
            yield f"{how}: {path}", _bytes(other)
    yield "a member more", _bytes({**report, "note": ""})
    yield "a table more", _bytes({**report, "tables": report["tables"] * 2})


def _paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, one in members:
        yield [*before, name]
        yield from _paths(one, (*before, name))


def _another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return f"{value}x" if isinstance(value, str) else "x"


def _refused(text: bytes) -> bool:
    try:
        verify(text, SIGNER.public_key)
    except (SignatureError, DecodeError):
        return True
    return False


def test_every_alteration_is_found() -> None:
    found = 0
    for what, text in _alterations():
        assert _refused(text), what
        found += 1
    assert found > 100


@settings(deadline=None)  # a whole report is made, signed and verified each time
@given(st.randoms(use_true_random=False))
def test_the_order_of_members_and_indentation_mean_nothing(random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            names = list(value)
            random.shuffle(names)
            return {name: shuffled(value[name]) for name in names}
        return [shuffled(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(shuffled(_report(_quiet())), ensure_ascii=random.random() < 0.5)
    assert verify(text.encode(), SIGNER.public_key)["node"] == "node-a"


OTHER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(32)), "node-a")
UNREADABLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "no JSON": lambda text: text[:-4],
    "a list": lambda _: b"[]",
    "another format": lambda text: text.replace(b"vsql-sync-scope-report", b"vsql-sync-audit-export", 1),
    "another version": lambda text: text.replace(b'"version": 1', b'"version": 2', 1),
    "a member twice": lambda text: text.replace(b'"version": 1', b'"version": 1, "version": 1', 1),
    "a fraction": lambda text: text.replace(b'"version": 1', b'"version": 1.0', 1),
    "no number": lambda text: text.replace(b'"version": 1', b'"version": NaN', 1),
    "a signature of another kind": lambda text: text.replace(b'"ed25519:', b'"rsa:', 1),
    "half a character": lambda text: text.replace(b"postgres", b"\\ud800", 1),
    "no base64": lambda text: text.replace(b'"ed25519:', b'"ed25519:!', 1),
    "not UTF-8": lambda text: text.replace(b"postgres", b"\xff", 1),
    "without end": lambda _: b"[" * 100_000,
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_report_is_refused_as_such(case: str) -> None:
    with pytest.raises(DecodeError):
        verify(UNREADABLE[case](_bytes(_report(_quiet()))), SIGNER.public_key)


def test_a_report_of_another_key_or_of_none_is_refused() -> None:
    report = build(_facts(_quiet()), "2026-02-17T06:00:00Z")
    with pytest.raises(SignatureError, match="names signer"):
        verify(_bytes(sign(report, OTHER)), SIGNER.public_key)
    with pytest.raises(SignatureError, match="is not signed"):
        verify(_bytes(sign(report, None)), SIGNER.public_key)
    claimed = {**sign(report, OTHER), "signer": sign(report, SIGNER)["signer"]}
    with pytest.raises(SignatureError, match="it was altered"):
        verify(_bytes(claimed), SIGNER.public_key)


def _block(language: str) -> str:
    """The one block of that language in the page."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


def test_the_documented_example_is_what_this_program_makes() -> None:
    assert _block("json") == to_text(_report(_quiet())), "docs/operations/scope-report.md is behind"


def test_the_documented_program_verifies_it_and_finds_an_alteration(tmp_path: Path) -> None:
    program, key, file = tmp_path / "verify.py", tmp_path / "node-a.pub", tmp_path / "scope.json"
    program.write_text(_block("python"))
    key.write_text(public_pem(SIGNER.public_key))
    assert _block("pem") == key.read_text()

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(program), str(file), str(key)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    file.write_text(_block("json"))
    assert run().stdout == "the report of node node-a verifies\n"
    file.write_text(_block("json").replace("état", "etat"))
    assert run().returncode != 0


def test_whoever_verifies_off_line_is_told_what_was_cleared_by_whom_and_why(tmp_path: Path) -> None:
    """The conclusion does not count those columns: the reader judges the reasons."""
    key, file = tmp_path / "node-a.pub", tmp_path / "scope.json"
    key.write_text(public_pem(SIGNER.public_key))
    command = [sys.executable, "-m", "vsql_ctl", "publication", "scope-report", "--verify", str(file)]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--key", str(key)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=tmp_path,
        )

    file.write_text(_block("json"))
    done = run()
    assert done.returncode == 0, done.stderr
    said = "public.payments.status looks like a PIN; alice at 2026-02-01T00:00:00+00:00: état: a text"
    assert said in done.stdout
    assert re.search(r"^readers +roles postgres; slots vsql_0123$", done.stdout, re.MULTILINE)
    file.write_text(_block("json")[:100])
    done = run()
    assert (done.returncode, done.stdout) == (8, "")
    assert "no JSON, or not all of it (line " in done.stderr
