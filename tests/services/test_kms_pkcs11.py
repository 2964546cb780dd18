"""KEKs in a real PKCS#11 token (SoftHSM 2)."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import get_args

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass
from pkcs11.types import Session
from pydantic import SecretStr

from tests.softhsm import SoftToken, make_token
from vsql_shared.config.encryption import FileKmsSettings, KmsProvider, KmsSettings, Pkcs11Settings
from vsql_shared.crypto.announce import announce, unwrap
from vsql_shared.crypto.dek import KeyLimits, SealingKey
from vsql_shared.errors import ConfigError, KeyUnavailableError
from vsql_shared.kms import PROVIDERS, generate_token_kek, open_provider
from vsql_shared.kms.base import AES_GCM, AES_KWP, KekProvider
from vsql_shared.kms.file import FileKek
from vsql_shared.kms.pkcs11 import Pkcs11Kek, generate_kek

SECRET = bytes(range(32))
CONTEXT = b"cluster chain dek"
BOTH = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
WRAPPING = MechanismFlag.WRAP | MechanismFlag.UNWRAP
_numbers = count()


@pytest.fixture(scope="session")
def shared_token(tmp_path_factory: pytest.TempPathFactory) -> SoftToken:
    return make_token(tmp_path_factory.mktemp("softhsm"))


@pytest.fixture
def token(shared_token: SoftToken) -> SoftToken:
    """The token with nobody logged in: login belongs to the process, so an earlier test's would count."""
    pkcs11.lib(str(shared_token.module)).reinitialize()
    return shared_token


@pytest.fixture
def label() -> str:
    """A key label of this test's own."""
    return f"kek-{next(_numbers)}"


@pytest.fixture
def session(token: SoftToken) -> Iterator[Session]:
    """The security officer's view: makes and destroys keys that are not ours to make."""
    found = pkcs11.lib(str(token.module)).get_token(token_label=token.label)
    with found.open(rw=True, user_pin=token.pin.get_secret_value()) as opened:
        yield opened


def provider(token: SoftToken, label: str, algorithm: str | None = None, **options: float) -> Pkcs11Kek:
    return Pkcs11Kek(
        token.module, token.label, label, token.pin, kek_id="shared-kek", algorithm=algorithm, pause=0.01,
        attempts=int(options.get("attempts", 4)),
    )  # fmt: skip


def import_aes(session: Session, label: str, value: bytes, key_id: bytes) -> None:
    session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.AES,
            Attribute.TOKEN: True,
            Attribute.LABEL: label,
            Attribute.ID: key_id,
            Attribute.VALUE: value,
            Attribute.ENCRYPT: True,
            Attribute.DECRYPT: True,
            Attribute.WRAP: True,
            Attribute.UNWRAP: True,
        }
    )


@pytest.mark.parametrize("algorithm", [None, AES_GCM, AES_KWP])
def test_a_data_key_wrapped_in_the_token_comes_back(
    token: SoftToken, label: str, algorithm: str | None
) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    kek = provider(token, label, algorithm)
    wrapped = kek.wrap(SECRET, CONTEXT)
    assert wrapped.algorithm == (algorithm or AES_GCM)
    assert wrapped.kek_id == kek.kek_id == "shared-kek/0001"
    assert SECRET not in wrapped.data
    assert kek.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET
    assert isinstance(kek, KekProvider)
    kek.close()


def test_a_made_kek_cannot_leave_the_token(token: SoftToken, label: str, session: Session) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    key = session.get_key(object_class=ObjectClass.SECRET_KEY, label=label)
    assert (key[Attribute.EXTRACTABLE], key[Attribute.SENSITIVE], key[Attribute.PRIVATE]) == (
        False,
        True,
        True,
    )
    with pytest.raises(pkcs11.AttributeSensitive):
        _ = key[Attribute.VALUE]


def test_every_flipped_bit_of_a_wrapping_is_refused(token: SoftToken, label: str) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    for algorithm in (AES_GCM, AES_KWP):
        kek = provider(token, label, algorithm)
        wrapped = kek.wrap(SECRET, CONTEXT)
        for bit in range(0, len(wrapped.data) * 8, 5):
            altered = bytearray(wrapped.data)
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises(KeyUnavailableError, match=r"unwrapping a data key under shared-kek/0001"):
                kek.unwrap(bytes(altered), algorithm, CONTEXT, wrapped.kek_id)
        assert kek.unwrap(wrapped.data, algorithm, CONTEXT, wrapped.kek_id) == SECRET


def test_a_wrapping_moved_to_another_context_does_not_open(token: SoftToken, label: str) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    kek = provider(token, label)
    wrapped = kek.wrap(SECRET, CONTEXT)
    with pytest.raises(KeyUnavailableError, match="another chain's"):
        kek.unwrap(wrapped.data, AES_GCM, b"another chain", wrapped.kek_id)


@pytest.mark.parametrize("data", [b"", bytes(27)])
def test_a_wrapping_too_short_for_nonce_and_tag_is_refused(token: SoftToken, label: str, data: bytes) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    with pytest.raises(KeyUnavailableError, match="too short"):
        provider(token, label).unwrap(data, AES_GCM, CONTEXT, "shared-kek/0001")


def test_token_and_file_with_the_same_kek_open_each_others_wrappings(
    token: SoftToken, label: str, session: Session, tmp_path: Path
) -> None:
    value = bytes(range(100, 132))
    import_aes(session, label, value, b"\x00\x01")
    path = tmp_path / "kek"
    path.write_text(f"vsql-sync-kek-file 1 aes-256 shared-kek\n1 {base64.b64encode(value).decode()}\n")
    path.chmod(0o600)
    file = FileKek(path, "shared-kek")
    for algorithm in (AES_GCM, AES_KWP):
        hsm = provider(token, label, algorithm)
        by_token = hsm.wrap(SECRET, CONTEXT)
        assert file.unwrap(by_token.data, algorithm, CONTEXT, by_token.kek_id) == SECRET
    by_file = file.wrap(SECRET, CONTEXT)
    assert provider(token, label).unwrap(by_file.data, AES_GCM, CONTEXT, "shared-kek/0001") == SECRET


def test_a_new_version_wraps_at_once_and_the_old_one_goes_on_unwrapping(token: SoftToken, label: str) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    kek = provider(token, label)
    old = kek.wrap(SECRET, CONTEXT)
    assert generate_kek(token.module, token.label, label, token.pin) == "0002"
    new = kek.wrap(SECRET, CONTEXT)
    assert (old.kek_id, new.kek_id) == ("shared-kek/0001", "shared-kek/0002")
    assert kek.unwrap(old.data, old.algorithm, CONTEXT, old.kek_id) == SECRET
    assert kek.unwrap(new.data, new.algorithm, CONTEXT, new.kek_id) == SECRET
    with pytest.raises(KeyUnavailableError):
        kek.unwrap(old.data, old.algorithm, CONTEXT, new.kek_id)
    assert [(v.kek_id, v.active) for v in kek.versions()] == [
        ("shared-kek/0001", False),
        ("shared-kek/0002", True),
    ]


def test_destroying_a_version_shreds_what_it_wrapped(token: SoftToken, label: str, session: Session) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    kek = provider(token, label)
    old = kek.wrap(SECRET, CONTEXT)
    generate_kek(token.module, token.label, label, token.pin)
    session.get_key(object_class=ObjectClass.SECRET_KEY, label=label, id=b"\x00\x01").destroy()
    with pytest.raises(KeyUnavailableError, match="does not hold KEK shared-kek/0001"):
        kek.unwrap(old.data, old.algorithm, CONTEXT, old.kek_id)


# The library's own search object complains when it is dropped after the session went away.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("algorithm", [AES_GCM, AES_KWP])
def test_a_lost_session_is_opened_again(token: SoftToken, label: str, algorithm: str) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    kek = provider(token, label, algorithm)
    wrapped = kek.wrap(SECRET, CONTEXT)
    pkcs11.lib(str(token.module)).reinitialize()  # as if the HSM's service had been restarted
    assert kek.unwrap(wrapped.data, algorithm, CONTEXT, wrapped.kek_id) == SECRET
    pkcs11.lib(str(token.module)).reinitialize()
    assert kek.wrap(SECRET, CONTEXT).kek_id == wrapped.kek_id


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_closing_one_provider_logs_no_other_out_for_good(token: SoftToken, label: str) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    one, other = provider(token, label), provider(token, label)
    wrapped = one.wrap(SECRET, CONTEXT)
    one.close()
    assert other.unwrap(wrapped.data, AES_GCM, CONTEXT, wrapped.kek_id) == SECRET
    assert one.unwrap(wrapped.data, AES_GCM, CONTEXT, wrapped.kek_id) == SECRET


def test_reopening_ends_after_the_allowed_attempts(token: SoftToken, label: str) -> None:
    """Without login the KEK is seen (it is public), but no session key can be made: every attempt fails."""
    found = pkcs11.lib(str(token.module)).get_token(token_label=token.label)
    with found.open(rw=True, user_pin=token.pin.get_secret_value()) as session:
        session.generate_key(
            KeyType.AES, 256, id=b"\x01", label=label, store=True, capabilities=WRAPPING,
            template={Attribute.PRIVATE: False},
        )  # fmt: skip
    kek = Pkcs11Kek(
        token.module, token.label, label, None, kek_id="k", algorithm=AES_KWP, attempts=3, pause=0.001
    )
    with pytest.raises(KeyUnavailableError, match="UserNotLoggedIn"):
        kek.wrap(SECRET, CONTEXT)
    with pytest.raises(KeyUnavailableError, match="no attempt was allowed"):
        Pkcs11Kek(token.module, token.label, label, None, kek_id="k", attempts=0)


def test_a_kek_destroyed_while_in_use_is_said_to_be_gone(
    token: SoftToken, label: str, session: Session
) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    kek = provider(token, label)
    wrapped = kek.wrap(SECRET, CONTEXT)
    session.get_key(object_class=ObjectClass.SECRET_KEY, label=label).destroy()
    with pytest.raises(KeyUnavailableError, match="does not hold KEK"):
        kek.unwrap(wrapped.data, AES_GCM, CONTEXT, wrapped.kek_id)
    with pytest.raises(KeyUnavailableError, match="holds no key"):
        kek.wrap(SECRET, CONTEXT)


def test_a_wrong_pin_is_said_and_tried_once_only(token: SoftToken, label: str) -> None:
    wrong = SecretStr("0000-wrong")
    with pytest.raises(KeyUnavailableError, match="refuses the PIN") as refused:
        Pkcs11Kek(token.module, token.label, label, wrong, kek_id="k")
    assert "lock" in refused.value.hint
    assert "0000-wrong" not in str(refused.value)
    with pytest.raises(KeyUnavailableError, match="refuses the PIN"):
        generate_kek(token.module, token.label, label, SecretStr("1"))  # shorter than any PIN


def test_a_refused_pin_is_not_tried_again_by_a_stream_that_tries_again(token: SoftToken, label: str) -> None:
    """Every 30 s: a token locks after a few. The token itself takes the PIN by then, so it was not asked."""
    generate_kek(token.module, token.label, label, token.pin)
    found = pkcs11.lib(str(token.module)).get_token(token_label=token.label)
    wrong = SecretStr("5678-later")
    for words in ("refuses the PIN", "not tried again"):
        with pytest.raises(KeyUnavailableError, match=words) as refused:
            Pkcs11Kek(token.module, token.label, label, wrong, kek_id="k")
        assert "5678" not in str(refused.value)
    with found.open(rw=True, user_pin=token.pin.get_secret_value()) as session:
        session.set_pin(token.pin.get_secret_value(), wrong.get_secret_value())
    try:
        with pytest.raises(KeyUnavailableError, match="not tried again"):
            Pkcs11Kek(token.module, token.label, label, wrong, kek_id="k")
    finally:
        with found.open(rw=True, user_pin=wrong.get_secret_value()) as session:
            session.set_pin(wrong.get_secret_value(), token.pin.get_secret_value())
    Pkcs11Kek(token.module, token.label, label, token.pin, kek_id="k").close()


def test_a_missing_kek_is_said_with_the_command_that_makes_it(token: SoftToken, label: str) -> None:
    with pytest.raises(KeyUnavailableError, match=f"holds no key '{label}'") as refused:
        provider(token, label)
    assert "syncctl key generate --kek-pkcs11" in refused.value.hint
    with pytest.raises(KeyUnavailableError, match="no PIN is set"):
        Pkcs11Kek(token.module, token.label, label, None, kek_id="k")


def test_a_missing_token_names_those_that_are_there(token: SoftToken, label: str) -> None:
    with pytest.raises(KeyUnavailableError, match=f"no token 'other' .*'{token.label}'"):
        Pkcs11Kek(token.module, "other", label, token.pin, kek_id="k")


def test_a_token_that_appears_after_the_module_was_loaded_is_found(token: SoftToken, label: str) -> None:
    before = {found.label for found in pkcs11.lib(str(token.module)).get_tokens()}
    late = make_token(Path(token.environment["SOFTHSM2_CONF"]).parent, "plugged-in-late")
    assert late.label not in before
    generate_kek(late.module, late.label, label, late.pin)
    kek = provider(late, label)
    wrapped = kek.wrap(SECRET, CONTEXT)
    assert kek.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET


def test_a_missing_module_or_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="does not exist"):
        Pkcs11Kek(tmp_path / "none.so", "t", "k", None, kek_id="k")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(KeyUnavailableError, match="cannot be loaded"):
        Pkcs11Kek(tmp_path / "text.so", "t", "k", None, kek_id="k")


@pytest.mark.parametrize(("kind", "bits"), [(KeyType.AES, 128), (KeyType.GENERIC_SECRET, 256)])
def test_a_key_that_is_no_aes_256_is_no_kek(
    token: SoftToken, label: str, session: Session, kind: KeyType, bits: int
) -> None:
    if kind is KeyType.AES:
        session.generate_key(kind, bits, label=label, store=True, capabilities=BOTH)
    else:
        session.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: kind,
                Attribute.TOKEN: True,
                Attribute.LABEL: label,
                Attribute.VALUE: bytes(bits // 8),
            }
        )
    with pytest.raises(KeyUnavailableError, match="no AES-256 key"):
        provider(token, label)


def test_two_versions_with_one_id_are_refused(token: SoftToken, label: str, session: Session) -> None:
    for value in (bytes(32), bytes(range(32))):
        import_aes(session, label, value, b"\x07")
    with pytest.raises(KeyUnavailableError, match="same CKA_ID"):
        provider(token, label)


def test_a_kek_that_may_only_wrap_is_used_by_key_wrap(token: SoftToken, label: str, session: Session) -> None:
    session.generate_key(KeyType.AES, 256, id=b"\x01", label=label, store=True, capabilities=WRAPPING)
    kek = provider(token, label)
    wrapped = kek.wrap(SECRET, CONTEXT)
    assert wrapped.algorithm == AES_KWP
    assert kek.unwrap(wrapped.data, AES_KWP, CONTEXT, wrapped.kek_id) == SECRET
    with pytest.raises(KeyUnavailableError, match="CKA_DECRYPT is false"):
        kek.unwrap(bytes(60), AES_GCM, CONTEXT, wrapped.kek_id)


def test_a_kek_that_may_neither_wrap_nor_unwrap_says_which_attribute(
    token: SoftToken, label: str, session: Session
) -> None:
    session.generate_key(
        KeyType.AES, 256, id=b"\x01", label=label, store=True, capabilities=MechanismFlag.DECRYPT
    )
    kek = provider(token, label)
    with pytest.raises(KeyUnavailableError, match="CKA_WRAP is false"):
        kek.wrap(SECRET, CONTEXT)
    with pytest.raises(KeyUnavailableError, match="CKA_UNWRAP is false"):
        kek.unwrap(bytes(40), AES_KWP, CONTEXT, kek.kek_id)


def test_an_unknown_wrapping_algorithm_is_refused(token: SoftToken, label: str) -> None:
    generate_kek(token.module, token.label, label, token.pin)
    with pytest.raises(KeyUnavailableError, match="'ROT13' is unknown"):
        provider(token, label).unwrap(bytes(60), "ROT13", CONTEXT, "shared-kek/0001")


def settings_of(token: SoftToken, label: str, **more: object) -> KmsSettings:
    section = {"module": token.module, "token_label": token.label, "key_label": label, **more}
    return KmsSettings(provider="pkcs11", pkcs11=Pkcs11Settings.model_validate(section))


def test_two_nodes_exchange_a_data_key_through_the_token(
    token: SoftToken, label: str, tmp_path: Path
) -> None:
    pin_file = tmp_path / "pin"
    pin_file.write_text(token.pin.get_secret_value() + "\n")
    settings = settings_of(token, label, pin_file=pin_file)
    assert generate_token_kek(settings) == "vsql-sync-kek/0001"
    producer, consumer = open_provider(settings), open_provider(settings)
    key = SealingKey.generate("cluster", "pub.node-a", 0, KeyLimits())
    said = announce(key, "cluster", "pub.node-a", "node-a", 1, producer)
    assert (said.kms_provider, said.kek_id) == ("pkcs11", "vsql-sync-kek/0001")
    assert unwrap(said, consumer).commitment == key.commitment
    producer.close()
    consumer.close()


def test_the_registry_opens_every_provider_the_configuration_knows(tmp_path: Path) -> None:
    assert set(PROVIDERS) == set(get_args(KmsProvider))
    with pytest.raises(ConfigError, match=r"encryption\.kms\.file\.path is not set"):
        open_provider(KmsSettings())
    with pytest.raises(ConfigError, match="does not say where the key is"):
        generate_token_kek(KmsSettings())
    with pytest.raises(KeyUnavailableError, match="cannot read"):
        open_provider(KmsSettings(file=FileKmsSettings(path=tmp_path / "none")))
