"""Requests to Vault's transit engine and its answers, as values."""

from __future__ import annotations

from typing import Any

import pytest

from vsql_shared.errors import ConfigError, DecodeError, KeyUnavailableError
from vsql_shared.kms.transit import TransitKey, key_request
from vsql_shared.kms.vault import (
    decrypt_request,
    encrypt_request,
    parse_ciphertext,
    parse_encrypted,
    parse_key,
    parse_plaintext,
    split_kek_id,
)

ADDRESS = "https://vault.example:8200"
KEK = TransitKey("transit", "kek")


def test_requests_are_those_of_the_transit_engine() -> None:
    assert key_request(ADDRESS, KEK) == ("GET", f"{ADDRESS}/v1/transit/keys/kek", None)
    body = {"plaintext": "c2VjcmV0", "associated_data": "YWFk"}
    assert encrypt_request(ADDRESS, TransitKey("a/b", "kek"), b"secret", b"aad") == (
        "POST", f"{ADDRESS}/v1/a/b/encrypt/kek", body,
    )  # fmt: skip
    assert decrypt_request(ADDRESS, KEK, "vault:v1:AAAA", None).body == {"ciphertext": "vault:v1:AAAA"}


def described(**other: object) -> dict[str, Any]:
    keys = {"1": 1, "2": 2, "10": 3}
    data = {"type": "aes256-gcm96", "derived": False, "keys": keys, "min_decryption_version": 1}
    return {"data": data | other}


def test_the_newest_version_wraps_and_those_above_the_minimum_unwrap() -> None:
    assert parse_key(described()).versions == (1, 2, 10)
    assert parse_key(described(min_decryption_version=2)).versions == (2, 10)


TYPES = {
    "aes256-gcm96": (256, True),
    "chacha20-poly1305": (256, True),
    "aes128-gcm96": (128, True),
    "rsa-2048": (112, False),
    "rsa-3072": (128, False),
    "rsa-4096": (128, False),
}


@pytest.mark.parametrize(("kind", "said"), TYPES.items())
def test_a_type_says_its_strength_and_whether_it_binds_the_context(kind: str, said: tuple[int, bool]) -> None:
    key = parse_key(described(type=kind, keys={"1": {"public_key": "…"}}))
    assert (key.strength_bits, key.binds_context) == said


CANNOT_WRAP: dict[str, tuple[dict[str, Any], str]] = {
    "signing key": (described(type="ed25519"), "type 'ed25519' cannot wrap"),
    "derived": (described(derived=True), "derived"),
    "nothing left": (described(min_decryption_version=11), "no version left"),
}


@pytest.mark.parametrize(("body", "words"), CANNOT_WRAP.values(), ids=CANNOT_WRAP.keys())
def test_a_key_that_cannot_wrap_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(KeyUnavailableError, match=words):
        parse_key(body)


@pytest.mark.parametrize(
    "body",
    [{}, {"data": 1}, described(keys=None), described(keys={"x": 1}), described(min_decryption_version="1")],
)
def test_an_answer_that_describes_no_key_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        parse_key(body)


def test_a_wrapping_names_its_version() -> None:
    assert parse_ciphertext("vault:v3:AAAA+/==") == (b"vault:v3:AAAA+/==", 3)
    assert parse_encrypted({"data": {"ciphertext": "vault:v3:AAAA", "key_version": 3}}) == (
        b"vault:v3:AAAA",
        3,
    )


@pytest.mark.parametrize(
    "text", [None, 5, "", "vault:v1:", "vault:vx:AA", "v1:AA", "vault:v9999999999:A", "vault:v1:A\n"]
)
def test_what_is_no_wrapping_is_refused(text: object) -> None:
    with pytest.raises(DecodeError):
        parse_ciphertext(text)
    with pytest.raises(DecodeError):
        parse_encrypted({"data": {"ciphertext": text}})


def test_an_unwrapped_key_is_base64() -> None:
    assert parse_plaintext({"data": {"plaintext": "c2VjcmV0"}}) == b"secret"
    for bad in ({}, {"data": None}, {"data": {"plaintext": "c2Vj_"}}, {"data": {"plaintext": 1}}):
        with pytest.raises(DecodeError):
            parse_plaintext(bad)


def test_a_kek_id_is_mount_and_key() -> None:
    assert split_kek_id("kek") == ("transit", "kek")
    assert split_kek_id("team/transit/my-kek.1") == ("team/transit", "my-kek.1")


@pytest.mark.parametrize(
    "kek_id", ["", "transit/", "/kek", "transit/../kek", "transit/..", "a b", "k?x", "transit//k"]
)
def test_a_kek_id_that_leads_to_another_path_is_refused(kek_id: str) -> None:
    with pytest.raises(ConfigError, match="names no transit key"):
        split_kek_id(kek_id)
