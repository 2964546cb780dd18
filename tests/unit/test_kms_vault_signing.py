"""What is asked of Vault for signatures and its answers, as values; and which key a node signs by."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from vsql_shared.config.governance import AuditSettings
from vsql_shared.errors import ConfigError, DecodeError, KeyUnavailableError
from vsql_shared.kms.transit import TransitKey, split_key
from vsql_shared.kms.vault_signing import parse_public_key, parse_signature, sign_request

PUBLIC = bytes(range(32))
SIGNATURE = bytes(range(64))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def described(**other: object) -> dict[str, Any]:
    """The answer for a key that was rotated once."""
    keys = {"1": {"public_key": text(PUBLIC)}, "2": {"public_key": text(bytes(32))}}
    return {"data": {"type": "ed25519", "derived": False, "keys": keys} | other}


def signed(text_of_it: object) -> dict[str, Any]:
    return {"data": {"signature": text_of_it}}


def test_the_whole_message_goes_to_the_one_version() -> None:
    request = sign_request("https://v:8200", TransitKey("team/transit", "node-a"), b"message")
    body = {"input": "bWVzc2FnZQ==", "key_version": 1}
    assert request == ("POST", "https://v:8200/v1/team/transit/sign/node-a", body)


def test_the_public_key_is_that_of_version_1_whatever_was_rotated() -> None:
    assert parse_public_key(described()) == PUBLIC


UNFIT: dict[str, tuple[dict[str, object], str]] = {
    "another kind": ({"type": "ecdsa-p256"}, "type 'ecdsa-p256' makes no Ed25519 signatures"),
    "a KEK": ({"type": "aes256-gcm96"}, "type 'aes256-gcm96' makes no Ed25519 signatures"),
    "derived": ({"derived": True}, "is derived"),
    "version 1 is archived": ({"keys": {"2": {"public_key": text(PUBLIC)}}}, "archived or gone"),
}


@pytest.mark.parametrize(("other", "words"), UNFIT.values(), ids=UNFIT.keys())
def test_a_key_that_cannot_be_the_nodes_signing_key_is_refused(other: dict[str, object], words: str) -> None:
    with pytest.raises(KeyUnavailableError, match=words) as refused:
        parse_public_key(described(**other))
    assert refused.value.hint


@pytest.mark.parametrize(
    "keys",
    [None, 5, [], {"1": 5}, {"1": {}}, {"1": {"public_key": text(PUBLIC[1:])}}, {"1": {"public_key": "ä"}}],
)
def test_an_answer_without_a_public_key_of_32_bytes_is_none(keys: object) -> None:
    with pytest.raises(DecodeError):
        parse_public_key(described(keys=keys))


def test_a_signature_by_version_1_is_taken() -> None:
    assert parse_signature(signed(f"vault:v1:{text(SIGNATURE)}")) == SIGNATURE


@pytest.mark.parametrize("version", [0, 2, 11])
def test_a_signature_by_another_version_is_refused_though_it_may_be_a_good_one(version: int) -> None:
    with pytest.raises(KeyUnavailableError, match=f"signed by version {version} .* expected version 1"):
        parse_signature(signed(f"vault:v{version}:{text(SIGNATURE)}"))


BAD = [None, 5, "", "vault:v1:", text(SIGNATURE), f"vault:v1:{text(SIGNATURE[1:])}", "vault:v1:A"]


@pytest.mark.parametrize("found", [*BAD, f"vault:v1:{text(SIGNATURE)}\n", f"vault:vx:{text(SIGNATURE)}"])
def test_what_is_no_signature_is_refused(found: object) -> None:
    with pytest.raises(DecodeError):
        parse_signature(signed(found))


@pytest.mark.parametrize("label", ["transit/", "/key", "transit/../key", "a b", "k?x", ""])
def test_a_label_that_leads_to_another_path_is_refused_by_its_settings_name(label: str) -> None:
    with pytest.raises(ConfigError, match=r"audit\.signing_key_label = .* names no transit key"):
        split_key("audit.signing_key_label", label)


@pytest.mark.parametrize("provider", ["aws-kms", "azure-kv", "gcp-kms", "file"])
def test_a_service_that_signs_nothing_for_us_is_refused_by_name(provider: str) -> None:
    with pytest.raises(ValueError, match=f'signing keys in "{provider}" are not built'):
        AuditSettings.model_validate({"signing_key_label": "k", "signing_key_provider": provider})


def test_a_label_means_the_token_unless_something_else_is_said() -> None:
    assert AuditSettings.model_validate({"signing_key_label": "k"}).signing_key_provider == "pkcs11"
    with pytest.raises(ValueError, match="signing_key_provider"):
        AuditSettings.model_validate({"signing_key_provider": "elsewhere"})
