"""A KEK's address in one line: what it stands for, and that nothing in it is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_core import PydanticCustomError

from vsql_shared.config import Settings, not_built, parse_settings
from vsql_shared.config.kms_uri import kms_uri_keys
from vsql_shared.errors import ConfigError

MINIMAL = """
[cluster]
name = "c"
node_id = 1
node_name = "a"
[connection]
database = "d"
[server]
mode = "dev"
[encryption.kms]
"""
ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
GCP = "projects/p/locations/europe-west1/keyRings/r/cryptoKeys/k"


def parse(text: str) -> Settings:
    return parse_settings(MINIMAL + text, source=None, env={})


MEANT: dict[str, tuple[str, dict[str, object]]] = {
    "aws alias": ("aws-kms://alias/kek", {"provider": "aws-kms", "kek_id": "alias/kek"}),
    "aws alias, third slash": ("aws-kms:///alias/kek", {"provider": "aws-kms", "kek_id": "alias/kek"}),
    "aws arn": (f"aws-kms://{ARN}", {"provider": "aws-kms", "kek_id": ARN}),
    "aws region": (
        "aws-kms://alias/kek?region=eu-west-1&profile=prod",
        {"provider": "aws-kms", "kek_id": "alias/kek", "aws": {"region": "eu-west-1", "profile": "prod"}},
    ),
    "azure": (
        "azure-kv://vault/keys/vsql-sync-kek",
        {"provider": "azure-kv", "kek_id": "vault/keys/vsql-sync-kek"},
    ),
    "gcp": (f"gcp-kms://{GCP}", {"provider": "gcp-kms", "kek_id": GCP}),
    "vault": (
        "vault://vault.example:8200/secure/transit/kek?namespace=payments",
        {
            "provider": "vault",
            "kek_id": "secure/transit/kek",
            "vault": {"address": "https://vault.example:8200", "namespace": "payments"},
        },
    ),
    "pkcs11": (
        "pkcs11:token=The%20Token;object=kek;type=secret-key?module-path=/lib/p.so&pin-source=file:/etc/pin",
        {
            "provider": "pkcs11",
            "pkcs11": {
                "token_label": "The Token",
                "key_label": "kek",
                "module": "/lib/p.so",
                "pin_file": "/etc/pin",
            },
        },
    ),
    "pkcs11, pin-source as in RFC 7512, 3": (
        "pkcs11:object=k?pin-source=file:///etc/token_pin",
        {"provider": "pkcs11", "pkcs11": {"key_label": "k", "pin_file": "/etc/token_pin"}},
    ),
    "file": ("file:/etc/kek", {"provider": "file", "file": {"path": "/etc/kek"}}),
    "file, three slashes": ("file:///etc/kek", {"provider": "file", "file": {"path": "/etc/kek"}}),
}


@pytest.mark.parametrize(("uri", "keys"), MEANT.values(), ids=MEANT.keys())
def test_an_address_stands_for_these_keys(uri: str, keys: dict[str, object]) -> None:
    assert kms_uri_keys(uri) == keys


REFUSED = {
    "no scheme": ("alias/kek", "begins with one of file, pkcs11, aws-kms"),
    "unknown scheme": ("awskms://alias/kek", "begins with one of"),
    "no key": ("aws-kms://", "after two slashes"),
    "one slash": ("aws-kms:/alias/kek", "after two slashes"),
    "user": ("vault://u:p@h/transit/k", "without user or password"),
    "space": ("azure-kv://vault/keys/a b", "no space"),
    "fragment": ("azure-kv://vault/keys/a#b", "no space and no #"),
    "broken escape": ("azure-kv://vault/keys/a%2", "two hexadecimal digits"),
    "not UTF-8": ("azure-kv://vault/keys/a%FF", "UTF-8"),
    "query twice": ("aws-kms://alias/k?region=a&region=b", '"region" twice'),
    "unknown query": ("aws-kms://alias/k?regoin=a", '"regoin", which is not one of'),
    "query without value": ("aws-kms://alias/k?region=", 'write "region=value"'),
    "azure takes none": ("azure-kv://v/keys/k?x=1", "not one of: none"),
    "vault without mount": ("vault://h:8200/k", "address, mount, key"),
    "pin in the address": ("pkcs11:object=k?pin-value=1234", "no PIN stands in an address"),
    "pin by command": ("pkcs11:object=k?pin-source=|cat /etc/pin".replace(" ", "%20"), "pin_command"),
    "pkcs11 attribute that narrows": ("pkcs11:object=k;slot-id=3", '"slot-id", which is not one of'),
    "pkcs11 id": ("pkcs11:object=k;id=%01", '"id", which is not one of'),
    "pkcs11 type": ("pkcs11:object=k;type=private", 'of type "secret-key"'),
    "pkcs11 twice": ("pkcs11:object=k;object=l", '"object" twice'),
    "file at a host": ("file://host/kek", 'as "file:/path"'),
    "nothing": ("file:", 'as "file:/path"'),
}


@pytest.mark.parametrize(("uri", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_refused_and_not_passed_over(uri: str, words: str) -> None:
    with pytest.raises(PydanticCustomError) as refused:
        kms_uri_keys(uri)
    assert words in str(refused.value)
    assert "1234" not in str(refused.value)


def test_an_address_in_the_configuration_chooses_provider_key_and_section() -> None:
    kms = parse('uri = "vault://vault.example:8200/transit/kek"').encryption.kms
    assert (kms.provider, kms.kek_id, kms.vault.address) == (
        "vault",
        "transit/kek",
        "https://vault.example:8200",
    )
    token = parse(
        'uri = "vault://v:8200/transit/k"\n[encryption.kms.vault]\ntoken_file = "/t"'
    ).encryption.kms.vault
    assert (token.address, token.token_file) == ("https://v:8200", Path("/t"))


def test_an_address_and_a_key_that_contradict_one_another_are_refused() -> None:
    same = 'provider = "aws-kms"\nkek_id = "alias/k"\nuri = "aws-kms://alias/k"'
    assert parse(same).encryption.kms.provider == "aws-kms"
    for key, text in {
        "provider": 'provider = "file"\nuri = "aws-kms://alias/k"',
        "kek_id": 'kek_id = "alias/l"\nuri = "aws-kms://alias/k"',
        "aws.region": 'uri = "aws-kms://alias/k?region=a"\n[encryption.kms.aws]\nregion = "b"',
    }.items():
        with pytest.raises(ConfigError, match=f"uri and {key} say different things"):
            parse(text)


def test_a_pin_in_an_address_is_in_no_message() -> None:
    with pytest.raises(ConfigError, match="no PIN stands in an address") as refused:
        parse('uri = "pkcs11:token=t;object=k?pin-value=s3cret"')
    assert "s3cret" not in str(refused.value)


WRONG_SECTIONS = {
    "vault over http": ('[encryption.kms.vault]\naddress = "http://vault:8200"', "plain http only to this"),
    "vault with a user": ('[encryption.kms.vault]\naddress = "https://u:p@v"', "no user, no query"),
    "vault without address": ('provider = "vault"', 'provider "vault" needs address'),
    "two tokens": ('[encryption.kms.vault]\ntoken = "a"\ntoken_file = "b"', "give only one of token"),
    "approle without role": ('[encryption.kms.vault]\nauth = "approle"', "needs role_id"),
    "a header in the namespace": (
        '[encryption.kms.vault]\nnamespace = "a\\nX-Vault-Token: t"',
        "encryption.kms.vault.namespace",
    ),
    "a mount that leaves its place": (
        '[encryption.kms.vault]\nauth_mount = "../sys"',
        "encryption.kms.vault.auth_mount",
    ),
    "aws endpoint over http": ('[encryption.kms.aws]\nendpoint = "http://kms.example"', "plain http only"),
    "no attempt": ("attempts = 0", "encryption.kms.attempts = 0: must be at least 1"),
}


@pytest.mark.parametrize(("text", "words"), WRONG_SECTIONS.values(), ids=WRONG_SECTIONS.keys())
def test_a_token_goes_nowhere_without_tls(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert words in str(refused.value)


def test_plain_http_is_for_a_server_on_this_machine() -> None:
    for address in ("http://127.0.0.1:8200", "http://[::1]:8200", "http://localhost:8200"):
        kms = parse(f'[encryption.kms.vault]\naddress = "{address}/"').encryption.kms
        assert kms.vault.address == address


@pytest.mark.parametrize("provider", ["aws-kms", "azure-kv", "gcp-kms"])
def test_every_provider_the_configuration_knows_is_built(provider: str) -> None:
    assert not_built(parse(f'provider = "{provider}"')) == []
