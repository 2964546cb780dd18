"""Requests to Azure Key Vault and its answers, with the examples Microsoft publishes (API version 7.4).

Examples: learn.microsoft.com/rest/api/keyvault/keys, "wrap Key", "unwrap Key", "Get Key Versions".
"""

from __future__ import annotations

import base64
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from vsql_shared.errors import ConfigError, DecodeError, KeyUnavailableError
from vsql_shared.kms.azure_kv import (
    AES_WRAP,
    RSA_OAEP,
    announced_place,
    key_request,
    parse_key,
    parse_result,
    parse_versions,
    split_kek_id,
    unwrap_request,
    versions_request,
    wrap_request,
)

VERSION = "0698c2156c1a4e1da5b6bab6f6422fd6"
KEY = f"https://myvault.vault.azure.net/keys/sdktestkey/{VERSION}"
VALUE = "ovQIlbB0DgWhZA7sgkPxbg9H-Ly-VlNGPSgGrrZvlIo"
PLACE = split_kek_id("myvault/keys/sdktestkey")
LISTED = split_kek_id("myvault/keys/listkeyversionstest")
SECRET = base64.urlsafe_b64decode(VALUE + "=")
LIST: dict[str, Any] = {
    "value": [
        {
            "kid": "https://myvault.vault.azure.net/keys/listkeyversionstest/7c9dc6775d0e4177827c4f98f482fc12",
            "attributes": {
                "enabled": True,
                "created": 1493937851,
                "updated": 1493937851,
                "recoveryLevel": "Recoverable+Purgeable",
            },
        }
    ],
    "nextLink": "https://myvault.vault.azure.net:443/keys/listkeyversionstest/versions?api-version=7.2"
    "&$skiptoken=eyJOZXh0TWFya2VyIjoiMiExMzYh&maxresults=1",
}


def described(**key: object) -> dict[str, Any]:
    return {"key": {"kid": KEY, **key}, "attributes": {"enabled": True}}


def modulus(bits: int) -> str:
    number = rsa.generate_private_key(65537, bits).public_key().public_numbers().n
    return base64.urlsafe_b64encode(number.to_bytes(bits // 8, "big")).decode().rstrip("=")


def test_wrap_and_unwrap_are_asked_as_published() -> None:
    assert len(SECRET) == 32
    for request, verb in (
        (wrap_request(PLACE, VERSION, "RSA1_5", SECRET), "wrapkey"),
        (unwrap_request(PLACE, VERSION, "RSA1_5", SECRET), "unwrapkey"),
    ):
        assert request.method == "POST"
        # The published address has two slashes before `keys`, which mean one.
        assert request.url == f"{KEY}/{verb}?api-version=7.4"
        assert request.body == {"alg": "RSA1_5", "value": VALUE}


def test_a_key_and_its_versions_are_asked_as_published() -> None:
    base = "https://myvault.vault.azure.net/keys/listkeyversionstest"
    assert versions_request(LISTED) == ("GET", f"{base}/versions?api-version=7.4", None)
    assert key_request(LISTED) == ("GET", f"{base}?api-version=7.4", None)
    assert key_request(LISTED, "7c9d").url == f"{base}/7c9d?api-version=7.4"


def test_the_published_answer_gives_the_key_back() -> None:
    assert parse_result(PLACE, VERSION, {"kid": KEY, "value": VALUE}) == SECRET


def test_the_published_list_gives_the_version_and_the_next_page_of_the_same_vault() -> None:
    names, following = parse_versions(LISTED, LIST)
    assert names == ["7c9dc6775d0e4177827c4f98f482fc12"]
    assert following == ("GET", LIST["nextLink"], None)
    disabled = {"value": [LIST["value"][0] | {"attributes": {"enabled": False}}], "nextLink": None}
    assert parse_versions(LISTED, disabled) == ([], None)


@pytest.mark.parametrize(
    "link",
    [
        "https://evil.example/keys/listkeyversionstest/versions",
        "http://myvault.vault.azure.net/keys",
        "https://myvault.vault.azure.net@evil.example/",
        "https://myvault.vault.azure.net:8443/",
        "https://[myvault.vault.azure.net/",
        "https://myvault.vault.azure.net/keys/\u00e4",
        "https://myvault.vault.azure.net/keys/k HTTP/1.1\r\nX: y",
        5,
    ],
)
def test_a_next_page_elsewhere_never_gets_our_token(link: object) -> None:
    with pytest.raises(DecodeError, match="at another place"):
        parse_versions(LISTED, LIST | {"nextLink": link})


@pytest.mark.parametrize(("bits", "strength"), [(2048, 112), (3072, 128), (4096, 128)])
def test_an_rsa_key_wraps_by_oaep_with_sha_256_and_says_how_weak_it_is(bits: int, strength: int) -> None:
    for kind in ("RSA", "RSA-HSM"):
        key = parse_key(PLACE, described(kty=kind, n=modulus(bits), e="AQAB"))
        assert key == (VERSION, RSA_OAEP, strength, True)


def test_an_aes_key_of_a_managed_hsm_wraps_by_aes() -> None:
    assert parse_key(PLACE, described(kty="oct-HSM")) == (VERSION, AES_WRAP, 256, True)


def test_a_key_that_cannot_wrap_is_refused() -> None:
    with pytest.raises(KeyUnavailableError, match="type 'EC-HSM' cannot wrap"):
        parse_key(PLACE, described(kty="EC-HSM", crv="P-256"))
    with pytest.raises(KeyUnavailableError, match="cannot wrap"):
        parse_key(PLACE, described(kty=["RSA"]))


MALFORMED: dict[str, dict[str, Any]] = {
    "empty": {},
    "no value": {"kid": KEY},
    "no kid": {"value": VALUE},
    "padding": {"kid": KEY, "value": VALUE + "="},
    "one character": {"kid": KEY, "value": "a"},
    "another version": {"kid": KEY[:-1] + "7", "value": VALUE},
    "another key": {"kid": KEY.replace("sdktestkey", "other"), "value": VALUE},
    "another vault": {"kid": KEY.replace("myvault", "yours"), "value": VALUE},
    "a number": {"kid": KEY, "value": 5},
    "brackets": {"kid": "https://[myvault/keys", "value": VALUE},
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_an_answer_that_is_not_ours_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        parse_result(PLACE, VERSION, body)


@pytest.mark.parametrize(
    "body",
    [{}, {"key": 1}, {"key": {}, "attributes": {}}, described(kty="RSA"), described(kty="RSA", n="!")],
)
def test_a_description_that_is_none_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        parse_key(PLACE, body)


PLACES = {
    "vault/keys/vsql-sync-kek": ("vault.vault.azure.net", "https://vault.azure.net/.default"),
    "Vlt.vault.azure.cn/keys/k": ("vlt.vault.azure.cn", "https://vault.azure.cn/.default"),
    "hsm.managedhsm.azure.net/keys/k": ("hsm.managedhsm.azure.net", "https://managedhsm.azure.net/.default"),
}


@pytest.mark.parametrize(("kek_id", "place"), PLACES.items())
def test_a_kek_id_names_vault_key_and_what_the_token_is_for(kek_id: str, place: tuple[str, str]) -> None:
    found = split_kek_id(kek_id)
    assert (found.host, found.scope) == place
    assert found.key == kek_id.rpartition("/")[2]


@pytest.mark.parametrize(
    "kek_id",
    [
        "k",
        "vault/keys/",
        "vault/secrets/k",
        "vault/keys/k/v1",
        "a.evil.example/keys/k",
        "vault/keys/k?x",
        "v@x/keys/k",
    ],
)
def test_a_kek_id_that_leads_elsewhere_is_refused(kek_id: str) -> None:
    with pytest.raises(ConfigError, match="names no key of Azure Key Vault"):
        split_kek_id(kek_id)


def test_an_announcement_names_any_key_of_the_configured_vault() -> None:
    former = split_kek_id("myvault/keys/former-kek")
    assert announced_place(f"myvault/keys/former-kek/{VERSION}", PLACE.host) == (former, VERSION)


@pytest.mark.parametrize(
    "kek_id",
    [
        "",
        "test-kek/1",
        "myvault/keys/sdktestkey",
        f"yours/keys/sdktestkey/{VERSION}",
        f"myvault.vault.azure.cn/keys/sdktestkey/{VERSION}",
        f"evil.example/keys/sdktestkey/{VERSION}",
        "myvault/keys/sdktestkey/../other",
    ],
)
def test_an_announcement_never_sends_the_token_to_another_vault(kek_id: str) -> None:
    with pytest.raises(KeyUnavailableError, match="no version of a key in myvault"):
        announced_place(kek_id, PLACE.host)
