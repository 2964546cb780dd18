"""A node's signing key in a real PKCS#11 token (SoftHSM 2)."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pkcs11
import pytest
from pkcs11 import Attribute, ObjectClass

from tests.services.test_kms_key_command import syncctl, write_config
from tests.signing_contract import NODE, keeps_its_promises, trust
from tests.softhsm import SoftToken, make_token
from vsql_shared.audit.dsse import AUDIT_ENTRY, open_document, sign_document
from vsql_shared.errors import KeyUnavailableError
from vsql_shared.kms.pkcs11_signing import TokenSigner, generate_signing_key

_numbers = count()


@pytest.fixture(scope="module")
def shared_token(tmp_path_factory: pytest.TempPathFactory) -> SoftToken:
    return make_token(tmp_path_factory.mktemp("softhsm-signing"), label="signing-tests")


@pytest.fixture
def token(shared_token: SoftToken) -> SoftToken:
    """The token with nobody logged in."""
    pkcs11.lib(str(shared_token.module)).reinitialize()
    return shared_token


@pytest.fixture
def label() -> str:
    return f"signer-{next(_numbers)}"


def signer_of(token: SoftToken, label: str) -> TokenSigner:
    return TokenSigner(token.module, token.label, label, token.pin, NODE)


def test_a_document_signed_in_the_token_is_one_signed_by_any_ed25519_key(
    token: SoftToken, label: str
) -> None:
    public = generate_signing_key(token.module, token.label, label, token.pin)
    keeps_its_promises(signer_of(token, label), public, largest=900_000)


def test_a_made_signing_key_cannot_leave_the_token(token: SoftToken, label: str) -> None:
    generate_signing_key(token.module, token.label, label, token.pin)
    opened = pkcs11.lib(str(token.module)).get_token(token_label=token.label)
    with opened.open(user_pin=token.pin.get_secret_value()) as session:
        key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label=label)
        assert (key[Attribute.EXTRACTABLE], key[Attribute.SENSITIVE]) == (False, True)
        with pytest.raises(pkcs11.PKCS11Error):
            _ = key[Attribute.VALUE]


def test_a_label_that_is_taken_is_not_overwritten(token: SoftToken, label: str) -> None:
    public = generate_signing_key(token.module, token.label, label, token.pin)
    with pytest.raises(KeyUnavailableError, match="holds a key"):
        generate_signing_key(token.module, token.label, label, token.pin)
    assert signer_of(token, label).public_key == public


# The library's own search object complains when it is dropped after the session went away.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_session_that_was_lost_is_opened_again(token: SoftToken, label: str) -> None:
    public = generate_signing_key(token.module, token.label, label, token.pin)
    signer = signer_of(token, label)
    pkcs11.lib(str(token.module)).reinitialize()
    document = sign_document(signer, AUDIT_ENTRY, b"after the HSM was restarted")
    assert open_document(trust(public), NODE, document, AUDIT_ENTRY)


def test_a_key_that_is_not_there_is_said_so(token: SoftToken, label: str) -> None:
    with pytest.raises(KeyUnavailableError, match=f"signing with '{label}'"):
        signer_of(token, label)


def test_the_commands_make_and_show_the_key_in_the_token_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOFTHSM2_CONF", raising=False)  # given back after the test
    token = make_token(tmp_path, label="of-the-command")
    kms = (
        f'[encryption.kms]\nprovider = "pkcs11"\nkek_id = "k"\n[encryption.kms.pkcs11]\n'
        f'module = "{token.module}"\ntoken_label = "{token.label}"\nkey_label = "kek"\n'
        f'pin = "{token.pin.get_secret_value()}"\n[audit]\nsigning_key_label = "node-a-1"\n'
    )
    config = write_config(tmp_path, "host=127.0.0.1 port=1 dbname=d user=u", kms)
    made = syncctl("key", "generate", "--signing-pkcs11", cwd=tmp_path, config=config)
    assert made.returncode == 0, made.stderr
    shown = syncctl("key", "show-public", cwd=tmp_path, config=config)
    assert shown.returncode == 0, shown.stderr
    name = next(word for word in shown.stdout.split() if word.startswith("SHA256:"))
    assert name in made.stdout
    assert "BEGIN PUBLIC KEY" in shown.stdout
    assert token.pin.get_secret_value() not in made.stdout + shown.stdout
    again = syncctl("key", "generate", "--signing-pkcs11", cwd=tmp_path, config=config)
    assert "holds a key" in again.stderr
    config.write_text(config.read_text() + 'signing_key_path = "x.key"\n')
    both = syncctl("key", "show-public", cwd=tmp_path, config=config)
    assert both.returncode == 3
    assert "a node has one signing key" in both.stderr
