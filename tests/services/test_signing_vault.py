"""A node's signing key in the transit engine of a real Vault or OpenBao."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.busy_service import busy_service
from tests.services.test_kms_key_command import syncctl, write_config
from tests.signing_contract import NODE, keeps_its_promises, trust
from tests.vault_server import ROOT_TOKEN, VaultServer, vault_server
from vsql_shared.audit.dsse import AUDIT_ENTRY, MAX_DOCUMENT_SIZE, open_document, sign_document
from vsql_shared.config import Settings
from vsql_shared.crypto.signing import Signer
from vsql_shared.errors import ConfigError, KeyUnavailableError, SignatureError, TransientError
from vsql_shared.kms import open_signer

_numbers = count()


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultServer]:
    with vault_server(tmp_path_factory.mktemp("vault-signing")) as server:
        yield server


@pytest.fixture
def label() -> str:
    """A transit key's name, of this test's own."""
    return f"signer-{next(_numbers)}"


def opened(
    server: VaultServer, label: str, *, address: str = "", attempts: int = 2, **section: Any
) -> Signer:
    """As the services open it; the KEK is elsewhere."""
    given = {
        "cluster": {"name": "c", "node_id": 1, "node_name": NODE},
        "connection": {"host": "h", "database": "d", "user": "u"},
        "server": {"mode": "dev"},
        "encryption": {
            "kms": {
                "provider": "file",
                "attempts": attempts,
                "retry_pause": "10ms",
                "vault": {"address": address or server.address, "token": ROOT_TOKEN} | section,
            }
        },
        "audit": {"signing_key_label": f"transit/{label}", "signing_key_provider": "vault"},
    }
    signer = open_signer(Settings.model_validate(given))
    assert signer is not None
    return signer


def public_key(server: VaultServer, label: str, version: int = 1) -> bytes:
    """As the key administrator reads it."""
    keys = server.ask("GET", f"transit/keys/{label}")["data"]["keys"]
    return base64.b64decode(keys[str(version)]["public_key"])


def test_a_document_signed_in_vault_is_one_signed_by_any_ed25519_key(vault: VaultServer, label: str) -> None:
    vault.new_key(label, "ed25519")
    keeps_its_promises(opened(vault, label), public_key(vault, label), largest=700_000)


@pytest.mark.parametrize("size", [800_000, MAX_DOCUMENT_SIZE, 5 * 2**20])
def test_a_message_larger_than_the_server_takes_is_refused_and_not_waited_for(
    vault: VaultServer, label: str, size: int
) -> None:
    vault.new_key(label, "ed25519")
    signer = opened(vault, label)
    with pytest.raises(KeyUnavailableError, match=f"signing {size} bytes with transit/{label}: ") as refused:
        signer.sign(bytes(size))
    assert "max_json_string_value_length" in refused.value.hint
    assert "BlockingIOError" not in str(refused.value)
    assert signer.sign(b"the next one")


def test_a_node_needs_no_more_than_the_documentation_says(vault: VaultServer, label: str) -> None:
    vault.new_key(label, "ed25519")
    vault.new_key(f"{label}-other", "ed25519")
    look, sign = (f"transit/keys/{label}", "read"), (f"transit/sign/{label}", "update")
    token = vault.token_with(f"{label}-node", look, sign)
    document = sign_document(opened(vault, label, token=token), AUDIT_ENTRY, b"x")
    assert open_document(trust(public_key(vault, label)), NODE, document, AUDIT_ENTRY) == b"x"
    # Each of the two is needed, no other key can be used, and the refusal names no token.
    with pytest.raises(KeyUnavailableError, match=f"looking up transit/{label}-other: Vault answers 403"):
        opened(vault, f"{label}-other", token=token)
    with pytest.raises(KeyUnavailableError, match=f"looking up transit/{label}: Vault answers 403"):
        opened(vault, label, token=vault.token_with(f"{label}-blind", sign))
    only_looks = vault.token_with(f"{label}-mute", look)
    with pytest.raises(KeyUnavailableError, match=f"signing 1 bytes with transit/{label}: .* 403") as refused:
        opened(vault, label, token=only_looks).sign(b"x")
    assert "docs/operations/keys.md" in refused.value.hint
    assert only_looks not in str(refused.value)


def test_a_key_that_is_rotated_in_the_server_signs_on_as_its_first_version(
    vault: VaultServer, label: str
) -> None:
    vault.new_key(label, "ed25519")
    signer, public = opened(vault, label), public_key(vault, label)
    vault.ask("POST", f"transit/keys/{label}/rotate", {})
    assert public_key(vault, label, 2) != public
    keeps_its_promises(signer, public, largest=5_000)
    keeps_its_promises(opened(vault, label), public, largest=5_000)  # and after a restart


def test_a_version_that_may_not_sign_any_more_is_refused_and_no_other_takes_its_place(
    vault: VaultServer, label: str
) -> None:
    vault.new_key(label, "ed25519")
    signer = opened(vault, label)
    vault.ask("POST", f"transit/keys/{label}/rotate", {})
    vault.ask("POST", f"transit/keys/{label}/config", {"min_encryption_version": 2})
    words = rf"signing 1 bytes with transit/{label}: Vault answers 500 .*less than the minimum"
    with pytest.raises(KeyUnavailableError, match=words) as refused:
        signer.sign(b"x")
    assert "another transit key" in refused.value.hint
    vault.ask("POST", f"transit/keys/{label}/config", {"min_decryption_version": 2})
    with pytest.raises(KeyUnavailableError, match="version 1 of the transit key, which signs, is archived"):
        opened(vault, label)


def test_a_key_made_anew_under_its_name_signs_nothing_for_the_node_that_knew_the_former(
    vault: VaultServer, label: str
) -> None:
    vault.new_key(label, "ed25519")
    signer = opened(vault, label)
    vault.ask("POST", f"transit/keys/{label}/config", {"deletion_allowed": True})
    vault.ask("DELETE", f"transit/keys/{label}")
    with pytest.raises(KeyUnavailableError, match=f"signing 1 bytes with transit/{label}: Vault answers 4"):
        signer.sign(b"x")
    vault.new_key(label, "ed25519")
    with pytest.raises(KeyUnavailableError, match="is not by the key it showed before") as refused:
        signer.sign(b"x")
    assert signer.fingerprint in str(refused.value)


def test_a_server_that_answers_with_another_versions_signature_is_found(
    vault: VaultServer, label: str
) -> None:
    vault.new_key(label, "ed25519")
    vault.ask("POST", f"transit/keys/{label}/rotate", {})
    message = {"input": base64.b64encode(b"x").decode(), "key_version": 2}
    good = vault.ask("POST", f"transit/sign/{label}", message)["data"]["signature"]
    assert good.startswith("vault:v2:")
    relabelled = good.replace("vault:v2:", "vault:v1:")
    for answer, words in ((good, "signed by version 2"), (relabelled, "is not by the key it showed before")):
        body = json.dumps({"data": {"signature": answer}}).encode()
        with busy_service(vault.address, 200, body) as between:
            signer = opened(vault, label, address=between.address)
            between.start_refusing(1)
            with pytest.raises(KeyUnavailableError, match=words):
                signer.sign(b"x")
            assert signer.sign(b"x")


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("aes256-gcm96", {}, "makes no Ed25519 signatures"),
        ("ecdsa-p256", {}, "makes no Ed25519 signatures"),
        ("ed25519", {"derived": True}, "derived"),
    ],
)
def test_a_key_of_another_kind_is_no_signing_key(
    vault: VaultServer, label: str, kind: str, more: dict[str, Any], words: str
) -> None:
    vault.new_key(label, kind, **more)
    with pytest.raises(KeyUnavailableError, match=words):
        opened(vault, label)


def test_a_key_that_is_not_there_is_said_and_never_made(vault: VaultServer, label: str) -> None:
    for _ in range(2):
        with pytest.raises(KeyUnavailableError, match=f"looking up transit/{label}: Vault answers 404") as no:
            opened(vault, label)
        assert "vault write transit/keys/NAME type=ed25519" in no.value.hint
    with pytest.raises(ConfigError, match=r"audit\.signing_key_label = .* names no transit key"):
        opened(vault, "../sys/seal")


def test_a_sealed_server_is_waited_for_and_signs_again_when_it_is_unsealed(tmp_path: Path) -> None:
    with vault_server(tmp_path) as own:
        own.new_key("node-a", "ed25519")
        signer = opened(own, "node-a")
        own.seal()
        with pytest.raises(TransientError, match=r"answers 503 .*sealed.*\(2 attempts\)"):
            signer.sign(b"x")
        with pytest.raises(TransientError, match="answers 503"):
            opened(own, "node-a")
        own.unseal()
        document = sign_document(signer, AUDIT_ENTRY, b"x")
        assert open_document(trust(signer.public_key), NODE, document, AUDIT_ENTRY) == b"x"


def test_throttling_is_waited_out_and_ends_somewhere(vault: VaultServer, label: str) -> None:
    vault.new_key(label, "ed25519")
    body = json.dumps({"errors": ['request path "transit": rate limit quota exceeded']}).encode()
    with busy_service(vault.address, 429, body, {"Retry-After": "1"}) as service:
        signer = opened(vault, label, address=service.address, attempts=3)
        service.start_refusing(1)
        began = time.monotonic()
        assert signer.sign(b"x")
        assert time.monotonic() - began >= 1.0  # the server's wish, not our 10 ms
        assert service.calls == 2
        service.start_refusing(100)
        with pytest.raises(TransientError, match=r"answers 429 \(request path .*\(3 attempts\)"):
            signer.sign(b"x")
        assert service.calls == 3


def test_a_token_that_was_replaced_in_its_file_is_read_again(
    vault: VaultServer, label: str, tmp_path: Path
) -> None:
    vault.new_key(label, "ed25519")
    file = tmp_path / "token"
    rules = ((f"transit/keys/{label}", "read"), (f"transit/sign/{label}", "update"))
    first = vault.token_with(f"{label}-1", *rules)
    file.write_text(f"{first}\n")
    signer = opened(vault, label, token=None, token_file=file)
    vault.ask("POST", "auth/token/revoke", {"token": first})
    with pytest.raises(KeyUnavailableError, match="answers 403"):
        signer.sign(b"x")
    file.write_text(f"{vault.token_with(f'{label}-2', *rules)}\n")
    assert signer.sign(b"x")


def test_what_another_nodes_key_signed_in_the_same_server_is_not_this_nodes(
    vault: VaultServer, label: str
) -> None:
    vault.new_key(label, "ed25519")
    vault.new_key(f"{label}-b", "ed25519")
    document = sign_document(opened(vault, f"{label}-b"), AUDIT_ENTRY, b"x")
    with pytest.raises(SignatureError):
        open_document(trust(public_key(vault, label)), NODE, document, AUDIT_ENTRY)


def test_the_commands_show_the_key_in_vault_and_say_who_makes_it(
    vault: VaultServer, label: str, tmp_path: Path
) -> None:
    vault.new_key(label, "ed25519")
    more = (
        f'[encryption.kms.vault]\naddress = "{vault.address}"\ntoken = "{ROOT_TOKEN}"\n'
        f'[audit]\nsigning_key_label = "transit/{label}"\nsigning_key_provider = "vault"\n'
    )
    config = write_config(tmp_path, "host=127.0.0.1 port=1 dbname=d user=u", more)
    shown = syncctl("key", "show-public", cwd=tmp_path, config=config)
    assert shown.returncode == 0, shown.stderr
    assert opened(vault, label).fingerprint in shown.stdout
    assert f"in Vault: transit/{label}" in shown.stdout
    assert ROOT_TOKEN not in shown.stdout
    made = syncctl("key", "generate", "--signing-pkcs11", cwd=tmp_path, config=config)
    assert made.returncode == 3
    assert "vault write transit/keys/NAME type=ed25519" in made.stderr
    config.write_text(config.read_text().replace('provider = "vault"', 'provider = "aws-kms"'))
    refused = syncctl("key", "show-public", cwd=tmp_path, config=config)
    assert refused.returncode == 3
    assert 'signing keys in "aws-kms" are not built' in refused.stderr
