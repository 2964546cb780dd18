"""What providers of KEKs share: retries, strength, context, and the answers of a service, as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.crypto.dek import key_context
from vsql_shared.errors import DecodeError, KeyUnavailableError
from vsql_shared.kms import azure_kv, gcp_kms, vault, vault_signing
from vsql_shared.kms.base import LONGEST_PAUSE, KekVersion, Retries, context_names, rsa_strength, weakness
from vsql_shared.kms.https import Answer, refusal_text


def test_pauses_double_follow_the_service_s_wish_and_end_somewhere() -> None:
    retries = Retries(attempts=8, pause=0.2)
    assert [retries.pause_after(n) for n in (1, 2, 3, 4)] == [0.2, 0.4, 0.8, 1.6]
    assert retries.pause_after(1, asked=3.0) == 3.0
    assert retries.pause_after(4, asked=0.1) == 1.6
    assert retries.pause_after(1, asked=86_400.0) == retries.pause_after(30) == LONGEST_PAUSE


@pytest.mark.parametrize(
    ("modulus", "strength"), [(2048, 112), (3072, 128), (4096, 128), (7680, 192), (15360, 256)]
)
def test_an_rsa_key_s_strength_is_nist_s_and_never_more(modulus: int, strength: int) -> None:
    assert rsa_strength(modulus) == strength


def test_a_kek_weaker_than_aes_256_is_accepted_and_said() -> None:
    assert weakness(KekVersion("k/1", 256, active=True)) == ""
    said = weakness(KekVersion("vault/keys/k/v1", 112, active=False))
    assert said.startswith("KEK vault/keys/k/v1 has 112 bits of strength")


def test_an_rsa_key_of_less_than_2048_bits_is_refused() -> None:
    with pytest.raises(KeyUnavailableError, match="RSA key of 2047 bits"):
        rsa_strength(2047)


@given(st.lists(st.text(max_size=40), min_size=3, max_size=3))
def test_the_names_of_a_context_come_back(names: list[str]) -> None:
    assert list(context_names(key_context(*names))) == names


def test_a_context_that_is_no_three_names_is_refused() -> None:
    good = key_context("cluster", "pub.node-a", "dek-1")
    for bad in (b"", good[:-1], good + b"\0", good + b"\0\1x", good[:9], b"\0\1\xff" * 3):
        with pytest.raises(KeyUnavailableError, match="context"):
            context_names(bad)


@given(st.binary(max_size=64))
def test_any_bytes_for_a_context_are_three_names_or_our_error(data: bytes) -> None:
    try:
        names = context_names(data)
    except KeyUnavailableError:
        return
    assert key_context(*names) == data


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "a schema registry": ({"error_code": 50003, "message": "the leader is away"}, " (the leader is away)"),
    "Azure": (
        {
            "error": {
                "code": "Forbidden",
                "message": "Caller is not authorized",
                "innererror": {"code": "ForbiddenByRbac"},
            }
        },
        " (Forbidden: ForbiddenByRbac: Caller is not authorized)",
    ),
    "Google": (
        {"error": {"code": 403, "message": "Permission denied", "status": "PERMISSION_DENIED"}},
        " (PERMISSION_DENIED: Permission denied)",
    ),
    "Vault": ({"errors": ["1 error occurred:\n\t* permission denied\n\n"]}, "permission denied"),
    "nothing known": ({"message": "x"}, ""),
    "another kind of error": ({"error": "x", "errors": 5}, ""),
    "parts of another kind": ({"error": {"code": [], "message": None, "innererror": 3}}, ""),
}


@pytest.mark.parametrize(("body", "shown"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_a_service_says_of_its_refusal_is_shown(body: dict[str, object], shown: str) -> None:
    found = refusal_text(Answer(403, body))
    assert shown in found if shown else found == ""
    assert found.isprintable()


def test_a_long_text_of_a_service_is_cut() -> None:
    assert len(refusal_text(Answer(400, {"errors": ["x" * 10_000]}))) < 250


_AZURE = azure_kv.split_kek_id("myvault/keys/k")
_KID = "https://myvault.vault.azure.net/keys/k/1"
PARSERS: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, Any]]] = {
    "Azure's key": (
        lambda body: azure_kv.parse_key(_AZURE, body),
        {"key": {"kid": _KID, "kty": "RSA", "n": "AQAB"}, "attributes": {"enabled": True}},
    ),
    "Azure's versions": (
        lambda body: azure_kv.parse_versions(_AZURE, body),
        {"value": [{"kid": _KID, "attributes": {"enabled": True}}], "nextLink": _KID},
    ),
    "Azure's result": (lambda body: azure_kv.parse_result(_AZURE, "1", body), {"kid": _KID, "value": "AQAB"}),
    "Google's key": (
        gcp_kms.parse_key,
        {
            "purpose": "ENCRYPT_DECRYPT",
            "primary": {"name": "n", "state": "ENABLED", "algorithm": gcp_kms.ALGORITHM},
        },
    ),
    "Google's versions": (
        gcp_kms.parse_versions,
        {"cryptoKeyVersions": [{"name": "n", "state": "ENABLED"}], "nextPageToken": "t"},
    ),
    "Google's wrapping": (
        gcp_kms.parse_encrypted,
        {
            "name": "n",
            "ciphertext": "AQAB",
            "ciphertextCrc32c": "1",
            "verifiedPlaintextCrc32c": True,
            "verifiedAdditionalAuthenticatedDataCrc32c": True,
        },
    ),
    "Google's plaintext": (gcp_kms.parse_decrypted, {"plaintext": "AQAB", "plaintextCrc32c": "1"}),
    "Vault's key": (
        vault.parse_key,
        {"data": {"type": "rsa-2048", "min_decryption_version": 1, "derived": False, "keys": {"1": 5}}},
    ),
    "Vault's wrapping": (vault.parse_encrypted, {"data": {"ciphertext": "vault:v1:AQAB"}}),
    "Vault's plaintext": (vault.parse_plaintext, {"data": {"plaintext": "AQAB"}}),
    "Vault's signing key": (
        vault_signing.parse_public_key,
        {"data": {"type": "ed25519", "derived": False, "keys": {"1": {"public_key": "A" * 42 + "A="}}}},
    ),
    "Vault's signature": (
        vault_signing.parse_signature,
        {"data": {"signature": "vault:v1:" + "A" * 85 + "A=="}},
    ),
}
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(["https://[x", "https://[::1]evil/", "rsa-99999", "\ud800", "kein \u00e4", "9" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def _places(value: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every value of an answer, by the steps to it."""
    inside: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    return [at, *(place for key, one in inside for place in _places(one, (*at, key)))]


def _with(value: Any, at: tuple[str | int, ...], other: object) -> Any:
    """The answer with another value in one place."""
    if not at:
        return other
    made: Any = dict(value) if isinstance(value, dict) else list(value)
    made[at[0]] = _with(value[at[0]], at[1:], other)
    return made


@pytest.mark.parametrize(("parse", "good"), PARSERS.values(), ids=PARSERS.keys())
@given(data=st.data())
def test_an_answer_with_anything_in_the_place_of_a_value_is_read_or_our_error(
    parse: Callable[[dict[str, Any]], object], good: dict[str, Any], data: st.DataObject
) -> None:
    """Who sits before the service sends what he likes; a worker must not end on it."""
    at = data.draw(st.sampled_from(_places(good)[1:]))
    try:
        parse(_with(good, at, data.draw(_JSON)))
    except (DecodeError, KeyUnavailableError):
        return


@pytest.mark.parametrize(
    ("status", "said", "is_final"),
    [
        (500, ["1 error occurred:\n\t* failed to RSA decrypt the ciphertext: decryption error\n\n"], True),
        (500, ["internal error"], False),
        (500, [], False),
        (503, ["Vault is sealed"], False),
        (400, ["invalid ciphertext: unable to decrypt"], False),
    ],
)
def test_only_vaults_word_that_a_ciphertext_does_not_open_is_no_failure_to_wait_for(
    status: int, said: list[str], is_final: bool
) -> None:
    assert vault.does_not_decrypt(Answer(status, {"errors": said})) == is_final


@pytest.mark.parametrize(
    ("status", "said", "is_final"),
    [
        (500, "requested version for signing is less than the minimum encryption key version", True),
        (500, "JSON string value exceeds allowed length", True),
        (500, "internal error", False),
        (503, "Vault is sealed", False),
        (400, "requested version for signing is less than the minimum encryption key version", False),
    ],
)
def test_only_vaults_word_that_it_never_signs_this_is_no_failure_to_wait_for(
    status: int, said: str, is_final: bool
) -> None:
    answer = Answer(status, {"errors": [f"1 error occurred:\n\t* {said}\n\n"]})
    assert vault_signing.may_not_sign(answer) == is_final
