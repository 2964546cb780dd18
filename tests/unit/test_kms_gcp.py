"""Requests to Google Cloud KMS and its answers, with the fields of its published REST reference (v1).

cloud.google.com/kms/docs/reference/rest/v1/projects.locations.keyRings.cryptoKeys/encrypt and …/decrypt. The
checksums are those of RFC 3720, appendix B.4.
"""

from __future__ import annotations

import base64
from typing import Any

import pytest

from vsql_shared.errors import ConfigError, DecodeError, KeyUnavailableError
from vsql_shared.kms.gcp_kms import (
    ALGORITHM,
    check_kek_id,
    crc32c,
    decrypt_request,
    encrypt_request,
    key_request,
    own_version,
    parse_decrypted,
    parse_encrypted,
    parse_key,
    parse_versions,
    version_number,
    versions_request,
)

KEY = "projects/my-project/locations/us-east1/keyRings/my-ring/cryptoKeys/my-key"
SECRET = bytes(range(32))
AAD = bytes(32)
BASE = f"https://cloudkms.googleapis.com/v1/{KEY}"
WRAPPED = b"\xff" * 32

CHECKSUMS = {
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    b"123456789": 0xE3069283,
    b"": 0,
}


@pytest.mark.parametrize(("data", "checksum"), CHECKSUMS.items())
def test_the_checksum_is_that_of_rfc_3720(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_encrypt_and_decrypt_are_asked_with_the_published_fields() -> None:
    wrap, unwrap = encrypt_request(KEY, SECRET, AAD), decrypt_request(KEY, WRAPPED, AAD)
    assert (wrap.method, wrap.url) == ("POST", f"{BASE}:encrypt")
    assert (unwrap.method, unwrap.url) == ("POST", f"{BASE}:decrypt")
    context = {"additionalAuthenticatedData": b64(AAD), "additionalAuthenticatedDataCrc32c": str(0x8A9136AA)}
    assert wrap.body == {"plaintext": b64(SECRET), "plaintextCrc32c": str(0x46DD794E)} | context
    assert unwrap.body == {"ciphertext": b64(WRAPPED), "ciphertextCrc32c": str(0x62A8AB43)} | context


def test_a_key_and_its_versions_are_asked() -> None:
    assert key_request(KEY) == ("GET", BASE, None)
    page = f"{BASE}/cryptoKeyVersions?pageSize=100&filter=state%3DENABLED"
    assert versions_request(KEY) == ("GET", page, None)
    assert versions_request(KEY, "a+b/c=").url == f"{page}&pageToken=a%2Bb%2Fc%3D"
    with pytest.raises(DecodeError, match="page token"):
        versions_request(KEY, "x&filter=")


def encrypted(**other: object) -> dict[str, Any]:
    return {
        "name": f"{KEY}/cryptoKeyVersions/1",
        "ciphertext": b64(WRAPPED),
        "ciphertextCrc32c": str(0x62A8AB43),
        "verifiedPlaintextCrc32c": True,
        "verifiedAdditionalAuthenticatedDataCrc32c": True,
        "protectionLevel": "SOFTWARE",
        **other,
    }


def test_a_wrapping_comes_with_the_version_that_made_it() -> None:
    assert parse_encrypted(encrypted()) == (WRAPPED, f"{KEY}/cryptoKeyVersions/1")


DAMAGED: dict[str, dict[str, object]] = {
    "the service got another key": {"verifiedPlaintextCrc32c": False},
    "the service got another context": {"verifiedAdditionalAuthenticatedDataCrc32c": None},
    "the wrapping was damaged": {"ciphertext": b64(b"\xfe" + WRAPPED[1:])},
    "another checksum": {"ciphertextCrc32c": "5"},
    "no checksum": {"ciphertextCrc32c": None},
    "no base64": {"ciphertext": "%%%"},
    "a number": {"ciphertext": 5},
    "no version": {"name": KEY},
    "no name": {"name": None},
}


@pytest.mark.parametrize("other", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_wrapping_damaged_on_the_way_is_found_before_it_is_needed(other: dict[str, object]) -> None:
    with pytest.raises(DecodeError):
        parse_encrypted(encrypted(**other))


def test_an_unwrapped_key_is_checked_too() -> None:
    assert parse_decrypted({"plaintext": b64(SECRET), "plaintextCrc32c": str(0x46DD794E)}) == SECRET
    for bad in ({}, {"plaintext": b64(SECRET)}, {"plaintext": b64(AAD), "plaintextCrc32c": str(0x46DD794E)}):
        with pytest.raises(DecodeError):
            parse_decrypted(bad)


def key(**primary: object) -> dict[str, Any]:
    name = f"{KEY}/cryptoKeyVersions/3"
    return {
        "name": KEY,
        "purpose": "ENCRYPT_DECRYPT",
        "primary": {"name": name, "state": "ENABLED", "algorithm": ALGORITHM, **primary},
    }


def test_the_primary_version_wraps() -> None:
    assert parse_key(key()) == f"{KEY}/cryptoKeyVersions/3"


CANNOT_WRAP: dict[str, tuple[dict[str, Any], str]] = {
    "purpose": ({"purpose": "ASYMMETRIC_SIGN"}, "purpose is 'ASYMMETRIC_SIGN'"),
    "no primary": ({"purpose": "ENCRYPT_DECRYPT"}, "no primary version"),
    "destroyed": (key(state="DESTROY_SCHEDULED"), "primary version is DESTROY_SCHEDULED"),
}


@pytest.mark.parametrize(("body", "words"), CANNOT_WRAP.values(), ids=CANNOT_WRAP.keys())
def test_a_key_that_cannot_wrap_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(KeyUnavailableError, match=words):
        parse_key(body)


def test_only_enabled_versions_unwrap() -> None:
    states = {"1": "DESTROYED", "2": "ENABLED", "10": "ENABLED", "11": "DISABLED"}
    listed = [{"name": f"{KEY}/cryptoKeyVersions/{n}", "state": state} for n, state in states.items()]
    names, token = parse_versions({"cryptoKeyVersions": listed, "nextPageToken": "t", "totalSize": 4})
    assert ([version_number(name) for name in names], token) == ([2, 10], "t")
    assert parse_versions({}) == ([], "")
    for bad in ({"cryptoKeyVersions": 1}, {"cryptoKeyVersions": [{"state": "ENABLED"}]}):
        with pytest.raises(DecodeError):
            parse_versions(bad)


@pytest.mark.parametrize(
    "kek_id",
    ["my-key", f"{KEY}/cryptoKeyVersions/1", f"/{KEY}", f"{KEY}:encrypt?", KEY.replace("my-ring", "a/b")],
)
def test_a_kek_id_that_names_no_key_is_refused(kek_id: str) -> None:
    assert check_kek_id(KEY) == KEY
    with pytest.raises(ConfigError, match="names no key of Google Cloud KMS"):
        check_kek_id(kek_id)


@pytest.mark.parametrize(
    "name", [f"{KEY}2/cryptoKeyVersions/1", KEY.replace("my-ring", "other") + "/cryptoKeyVersions/1", KEY, ""]
)
def test_a_version_of_another_key_never_stands_in_an_announcement(name: str) -> None:
    """Targets refuse it, long after: what it sealed would be lost to them."""
    assert own_version(KEY, f"{KEY}/cryptoKeyVersions/7") == f"{KEY}/cryptoKeyVersions/7"
    with pytest.raises(KeyUnavailableError, match="asked for projects/"):
        own_version(KEY, name)
