"""KEKs in the transit engine of a real Vault or OpenBao."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.busy_service import busy_service
from tests.kek_contract import CONTEXT, SECRET, keeps_its_promises
from tests.vault_server import ROOT_TOKEN, VaultServer, vault_server
from vsql_shared.config.encryption import KmsSettings
from vsql_shared.errors import KeyUnavailableError, TransientError
from vsql_shared.kms import open_provider
from vsql_shared.kms.base import KekProvider

_numbers = count()


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultServer]:
    with vault_server(tmp_path_factory.mktemp("vault")) as server:
        yield server


@pytest.fixture
def key() -> str:
    """A transit key's name, of this test's own."""
    return f"kek-{next(_numbers)}"


def opened(
    server: VaultServer, key: str, *, address: str = "", attempts: int = 4, **section: Any
) -> KekProvider:
    given = {
        "provider": "vault",
        "kek_id": f"transit/{key}",
        "retry_pause": "10ms",
        "attempts": attempts,
        "vault": {"address": address or server.address, "token": ROOT_TOKEN} | section,
    }
    return open_provider(KmsSettings.model_validate(given))


TYPES = {
    "aes256-gcm96": (True, 256),
    "chacha20-poly1305": (True, 256),
    "aes128-gcm96": (True, 128),
    "rsa-2048": (False, 112),
    "rsa-3072": (False, 128),
}


@pytest.mark.parametrize(("kind", "said"), TYPES.items())
def test_two_nodes_exchange_data_keys_through_transit(
    vault: VaultServer, key: str, kind: str, said: tuple[bool, int]
) -> None:
    vault.new_key(key, kind)
    keeps_its_promises(opened(vault, key), opened(vault, key), binds_context=said[0], strength_bits=said[1])


def test_a_rotation_wraps_at_once_and_older_versions_go_on_unwrapping(vault: VaultServer, key: str) -> None:
    vault.new_key(key)
    kek = opened(vault, key)
    old = kek.wrap(SECRET, CONTEXT)
    vault.ask("POST", f"transit/keys/{key}/rotate", {})
    new = kek.wrap(SECRET, CONTEXT)
    assert (old.kek_id, new.kek_id) == (f"transit/{key}/1", f"transit/{key}/2")
    for wrapped in (old, new):
        assert kek.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET
    assert kek.versions() == [(old.kek_id, 256, False), (new.kek_id, 256, True)]
    with pytest.raises(KeyUnavailableError, match=f"is wrapped under {old.kek_id}, its announcement says"):
        kek.unwrap(old.data, old.algorithm, CONTEXT, new.kek_id)


def test_destroying_a_version_shreds_what_it_wrapped(vault: VaultServer, key: str) -> None:
    vault.new_key(key)
    kek = opened(vault, key)
    old = kek.wrap(SECRET, CONTEXT)
    vault.ask("POST", f"transit/keys/{key}/rotate", {})
    vault.ask(
        "POST", f"transit/keys/{key}/config", {"min_decryption_version": 2, "min_encryption_version": 2}
    )
    assert [version.kek_id for version in kek.versions()] == [f"transit/{key}/2"]
    assert kek.remains(old.kek_id)  # archived: the minimum can be lowered again
    vault.ask("POST", f"transit/keys/{key}/trim", {"min_available_version": 2})
    assert not kek.remains(old.kek_id)
    with pytest.raises(
        KeyUnavailableError, match=f"unwrapping a data key under transit/{key}/1: Vault answers"
    ):
        kek.unwrap(old.data, old.algorithm, CONTEXT, old.kek_id)
    assert [version.kek_id for version in kek.versions()] == [f"transit/{key}/2"]


def test_producer_and_consumer_need_no_more_than_the_documentation_says(vault: VaultServer, key: str) -> None:
    vault.new_key(key)
    look = (f"transit/keys/{key}", "read")
    wraps = vault.token_with(f"{key}-producer", look, (f"transit/encrypt/{key}", "update"))
    unwraps = vault.token_with(f"{key}-consumer", look, (f"transit/decrypt/{key}", "update"))
    producer = opened(vault, key, token=wraps)
    consumer = opened(vault, key, token=unwraps)
    wrapped = producer.wrap(SECRET, CONTEXT)
    assert consumer.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET
    with pytest.raises(KeyUnavailableError, match="answers 403"):
        producer.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id)
    with pytest.raises(KeyUnavailableError, match="answers 403") as refused:
        consumer.wrap(SECRET, CONTEXT)
    assert "docs/operations/keys.md" in refused.value.hint
    assert wraps not in str(refused.value)
    assert unwraps not in str(refused.value)


def test_a_key_that_is_not_there_is_said_and_never_made(vault: VaultServer, key: str) -> None:
    with pytest.raises(KeyUnavailableError, match=f"looking up transit/{key}: Vault answers 404"):
        opened(vault, key)
    with pytest.raises(KeyUnavailableError, match=f"looking up transit/{key}: Vault answers 404"):
        opened(vault, key)


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [("ed25519", {}, "cannot wrap"), ("aes256-gcm96", {"derived": True}, "derived")],
)
def test_a_key_of_another_kind_is_no_kek(
    vault: VaultServer, key: str, kind: str, more: dict[str, Any], words: str
) -> None:
    vault.new_key(key, kind, **more)
    with pytest.raises(KeyUnavailableError, match=words):
        opened(vault, key)


def test_a_token_that_was_replaced_in_its_file_is_read_again(
    vault: VaultServer, key: str, tmp_path: Path
) -> None:
    vault.new_key(key)
    file = tmp_path / "token"
    rules = ((f"transit/keys/{key}", "read"), (f"transit/encrypt/{key}", "update"))
    first = vault.token_with(f"{key}-1", *rules)
    file.write_text(f"{first}\n")
    kek = opened(vault, key, token=None, token_file=file)
    vault.ask("POST", "auth/token/revoke", {"token": first})
    with pytest.raises(KeyUnavailableError, match="answers 403"):
        kek.wrap(SECRET, CONTEXT)
    file.write_text(f"{vault.token_with(f'{key}-2', *rules)}\n")
    assert kek.wrap(SECRET, CONTEXT).kek_id == f"transit/{key}/1"


def test_approle_logs_in_and_logs_in_again(vault: VaultServer, key: str, tmp_path: Path) -> None:
    vault.new_key(key)
    mount = f"roles-{key}"
    vault.ask("POST", f"sys/auth/{mount}", {"type": "approle"})
    vault.token_with(f"{key}-role", (f"transit/keys/{key}", "read"), (f"transit/encrypt/{key}", "update"))
    vault.ask("POST", f"auth/{mount}/role/node", {"token_policies": [f"{key}-role"], "token_num_uses": 3})
    role = vault.ask("GET", f"auth/{mount}/role/node/role-id")["data"]["role_id"]
    secret = tmp_path / "secret"
    secret.write_text(vault.ask("POST", f"auth/{mount}/role/node/secret-id", {})["data"]["secret_id"])
    section = {
        "token": None,
        "auth": "approle",
        "auth_mount": mount,
        "role_id": role,
        "secret_id_file": secret,
    }
    kek = opened(vault, key, **section)
    for _ in range(4):  # more calls than one token lives for
        assert kek.wrap(SECRET, CONTEXT).kek_id == f"transit/{key}/1"
    secret.write_text("wrong")
    with pytest.raises(KeyUnavailableError, match="AppRole login at Vault: it answers 4") as refused:
        opened(vault, key, **section)
    assert "wrong" not in str(refused.value)


def test_throttling_is_waited_out_and_ends_somewhere(vault: VaultServer, key: str) -> None:
    vault.new_key(key)
    body = json.dumps({"errors": ['request path "transit": rate limit quota exceeded']}).encode()
    with busy_service(vault.address, 429, body, {"Retry-After": "1"}) as service:
        kek = opened(vault, key, address=service.address, attempts=3)
        service.start_refusing(1)
        began = time.monotonic()
        assert kek.wrap(SECRET, CONTEXT).kek_id == f"transit/{key}/1"
        assert time.monotonic() - began >= 1.0  # the server's wish, not our 10 ms
        assert service.calls == 3  # the look at the key, twice, and the wrapping
    with busy_service(vault.address, 503, body) as service:
        kek = opened(vault, key, address=service.address, attempts=3)
        service.start_refusing(100)
        with pytest.raises(TransientError, match=r"answers 503 \(request path .*\(3 attempts\)"):
            kek.wrap(SECRET, CONTEXT)
        assert service.calls == 3


def test_a_redirect_never_carries_the_token_away(vault: VaultServer, key: str) -> None:
    vault.new_key(key)
    with busy_service(vault.address, 404) as elsewhere:
        elsewhere.start_refusing(100)
        goal = {"Location": f"{elsewhere.address}/v1/transit/keys/{key}"}
        with busy_service(vault.address, 307, b"", goal) as service:
            service.start_refusing(100)
            with pytest.raises(KeyUnavailableError, match="answers 307"):
                opened(vault, key, address=service.address)
        assert elsewhere.calls == 0


def test_without_a_token_the_sources_are_named(vault: VaultServer, key: str) -> None:
    with pytest.raises(KeyUnavailableError, match="gives no token") as refused:
        opened(vault, key, token=None)
    assert "VSQL_SYNC__ENCRYPTION__KMS__VAULT__TOKEN" in refused.value.hint
