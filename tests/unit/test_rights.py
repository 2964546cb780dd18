"""The table of rights in Kafka: the documentation has it, it covers every name, and it is not too wide."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.certificates import Authority
from tests.stack.state import REPOSITORY
from vsql_shared import names, tls
from vsql_shared.config.kafka import KafkaSecurity
from vsql_shared.errors import ConfigError, UserError
from vsql_shared.kafka.rights import (
    RECOVERY,
    RIGHTS,
    Acl,
    Service,
    StreamName,
    acls,
    check_principal,
    commands,
    table_rows,
)
from vsql_shared.pg.roles import ORIGIN_FUNCTIONS

PRINCIPALS: dict[Service, str] = {"producer": "User:p", "consumer": "User:c"}
LIVE = [StreamName("out", "pub", "node-a"), StreamName("in", "pub", "node-b")]
_NAMES = st.text(st.characters(exclude_characters=".\0", exclude_categories=["Cs"]), min_size=1, max_size=63)


def _allowed(found: list[Acl], principal: str, kind: str, name: str) -> set[str]:
    """Operations a principal has on one name, as Kafka decides it."""
    return {
        operation
        for acl in found
        if (acl.principal, acl.kind) == (principal, kind)
        and (name.startswith(acl.name) if acl.prefixed else name == acl.name)
        for operation in acl.operations
    }


def test_the_documents_tables_are_the_rights_that_are_printed() -> None:
    text = (REPOSITORY / "docs" / "operations" / "privileges.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| producer | ", "| consumer | "))]
    assert rows == table_rows((*RIGHTS, *RECOVERY))


def test_the_document_names_every_function_that_is_granted() -> None:
    text = (REPOSITORY / "docs" / "operations" / "privileges.md").read_text()
    row = next(line for line in text.splitlines() if "`EXECUTE` on" in line)
    named = set(row.partition("`EXECUTE` on ")[2].split("`")[1::2])
    full = {name if name.startswith("pg_") else f"pg_replication_origin{name}" for name in named}
    assert full == {function.partition("(")[0] for function in ORIGIN_FUNCTIONS}


@given(cluster=_NAMES, publication=_NAMES, origin=_NAMES, node=_NAMES, schema=_NAMES, table=_NAMES)
def test_every_topic_and_group_of_a_stream_is_covered_whatever_the_names_are(
    cluster: str, publication: str, origin: str, node: str, schema: str, table: str
) -> None:
    streams = [StreamName("out", publication, origin), StreamName("in", publication, origin)]
    found = acls(cluster, node, streams, PRINCIPALS)
    live, copy = names.live_chain(publication, origin), names.copy_chain(publication, origin, node)
    for chain in (live, copy):
        topic = names.data_topic(cluster, chain, schema, table)
        assert {"Create", "Write", "Delete"} <= _allowed(found, "User:p", "topic", topic)
        assert _allowed(found, "User:c", "topic", topic) == {"Describe", "Read"}
        assert _allowed(found, "User:p", "group", names.group_id(cluster, chain, "producer")) == {"Describe"}
        assert "Read" in _allowed(found, "User:c", "group", names.group_id(cluster, chain, node))
        acks = names.group_id(cluster, names.ack_chain(chain, node), node)
        assert "Describe" in _allowed(found, "User:c", "group", acks)


def test_a_principal_reads_and_writes_only_what_its_service_does() -> None:
    found = acls("c", "node-a", LIVE, PRINCIPALS)
    mine, theirs = "c.pub.node-a.public.t", "c.pub.node-b.public.t"
    assert "Read" not in _allowed(found, "User:p", "topic", mine)
    assert not _allowed(found, "User:p", "topic", theirs)
    assert not _allowed(found, "User:c", "topic", mine)
    assert _allowed(found, "User:c", "topic", theirs) == {"Describe", "Read"}
    assert "Write" not in _allowed(found, "User:c", "topic", "c.keys")
    assert "Read" not in _allowed(found, "User:p", "topic", "c.keys")
    for principal in PRINCIPALS.values():
        assert "Delete" not in _allowed(found, principal, "topic", "c.audit")
        assert not _allowed(found, principal, "topic", "c2.pub.node-a.public.t")
        assert not _allowed(found, principal, "topic", "c.pub.node-a2.public.t")


def test_recovery_adds_reading_what_the_producer_wrote_and_nothing_else() -> None:
    usual, more = (set(acls("c", "node-a", LIVE, PRINCIPALS, recovery=r)) for r in (False, True))
    changed = sorted((acl.principal, acl.name) for acl in more - usual)
    assert changed == [("User:p", "c.keys"), ("User:p", "c.pub.node-a.")]


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_node_that_only_sends_or_only_receives_needs_one_principal(direction: str) -> None:
    stream = StreamName(direction, "pub", "node-a")
    principals: dict[Service, str] = {"producer" if direction == "out" else "consumer": "User:one"}
    assert {acl.principal for acl in acls("c", "node-b", [stream], principals)} == {"User:one"}


def test_commands_are_words_a_shell_does_not_take_apart() -> None:
    lines = commands(acls("c", "n", LIVE, {**PRINCIPALS, "producer": "User:CN=a b,O=$x"}), "k1:9092,k2:9092")
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["kafka-acls.sh", "--bootstrap-server", "k1:9092,k2:9092"]
        assert words[words.index("--allow-principal") + 1] in ("User:CN=a b,O=$x", "User:c")
    assert any(line.endswith("--topic c.pub.node-a. --resource-pattern-type prefixed") for line in lines)


@pytest.mark.parametrize(
    "given", ["User:*", "User: *", "*", "", "producer", "User:", "User:a\nb", ":x", "User:\x00"]
)
def test_what_is_not_one_principal_is_granted_nothing(given: str) -> None:
    """Kafka takes User:* for everybody."""
    assert check_principal("User:CN=*.db, O=a b") == "User:CN=*.db, O=a b"
    with pytest.raises(UserError, match="is not one principal"):
        check_principal(given)


def test_the_principal_is_the_user_or_the_certificate_s_subject(tmp_path: Path) -> None:
    issued = Authority.make("ours").issue(tmp_path / "client", "sync a")
    paths = {"cert_path": issued.certificate, "key_path": issued.key}
    assert KafkaSecurity(protocol="SSL", **paths).principal() == "User:CN=sync a"
    scram = KafkaSecurity(protocol="SASL_SSL", username="u", password=SecretStr("p"))
    assert scram.principal() == "User:u"
    assert KafkaSecurity().principal() is None
    assert KafkaSecurity(protocol="SSL").principal() is None


@pytest.mark.parametrize(("content", "words"), [(None, "cannot read"), ("no certificate", "PEM form")])
def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "client.crt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as refused:
        KafkaSecurity(protocol="SSL", cert_path=path, key_path=path).principal()
    assert str(path) in refused.value.message


def test_our_own_certificate_that_ended_is_said_before_anybody_is_asked(tmp_path: Path) -> None:
    issued = Authority.make("ours").issue(tmp_path / "client", "late", expired=True)
    found = tls.refusal("nowhere.invalid", 1, tls.Means(None, issued.certificate, issued.key))
    assert found is not None
    assert re.search(r"this side's certificate .*client.crt expired at \d{4}-", found.text)
    assert found.hint == "renew it"


def test_an_encrypted_key_of_ours_is_said_and_nobody_is_asked_for_its_passphrase(tmp_path: Path) -> None:
    """OpenSSL would ask at the terminal, where a service has none and syncctl would seem to hang."""
    issued = Authority.make("ours").issue(tmp_path / "client", "sync")
    key = serialization.load_pem_private_key(issued.key.read_bytes(), None)
    issued.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    found = tls.refusal("127.0.0.1", 1, tls.Means(None, issued.certificate, issued.key))
    assert found is not None
    assert "files of this side cannot be used" in found.text
