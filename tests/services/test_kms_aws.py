"""KEKs in AWS KMS, as moto's server plays it: a real HTTP service, asked through AWS's own client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from tests.busy_service import busy_service
from tests.kek_contract import CONTEXT, SECRET, keeps_its_promises
from tests.moto_server import ENVIRONMENT, REGION, aws_kms, key_id, moto_server, new_kek
from tests.stack.ports import release_port, reserve_port
from vsql_shared.config.encryption import KmsSettings
from vsql_shared.errors import ConfigError, KeyUnavailableError, TransientError
from vsql_shared.kms import open_provider
from vsql_shared.kms.aws_kms import AwsKek
from vsql_shared.kms.base import Retries

_numbers = count()
THROTTLED = json.dumps({"__type": "ThrottlingException", "message": "Rate exceeded"}).encode()


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_server(tmp_path_factory.mktemp("moto")) as address:
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kms(moto: str) -> Any:
    """The key administrator's client."""
    return aws_kms(moto)


@pytest.fixture
def alias() -> str:
    """An alias of this test's own."""
    return f"kek-{next(_numbers)}"


def provider(moto: str, kek_id: str, **more: Any) -> AwsKek:
    return AwsKek(kek_id, region=REGION, endpoint=moto, **more)


def test_two_nodes_exchange_data_keys_through_aws(moto: str, kms: Any, alias: str) -> None:
    arn = new_kek(kms, alias, 1)
    settings = KmsSettings.model_validate({"uri": f"aws-kms://alias/{alias}?region={REGION}&endpoint={moto}"})
    producer, consumer = open_provider(settings), open_provider(settings)
    assert producer.kek_id == arn
    keeps_its_promises(producer, consumer, binds_context=True, strength_bits=256)


def test_a_key_is_found_by_its_id_and_by_its_arn(moto: str, kms: Any, alias: str) -> None:
    arn = new_kek(kms, alias, 1)
    wrapped = provider(moto, arn.rpartition("/")[2]).wrap(SECRET, CONTEXT)
    assert wrapped.kek_id == arn
    found = AwsKek(arn, endpoint=moto)  # the ARN says the Region
    assert found.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET
    assert found.versions() == [(arn, 256, True)]


def test_an_alias_that_moves_is_a_rotation_and_older_keys_go_on_unwrapping(
    moto: str, kms: Any, alias: str
) -> None:
    first = new_kek(kms, alias, 1)
    kek = provider(moto, f"alias/{alias}")
    old = kek.wrap(SECRET, CONTEXT)
    second = new_kek(kms, alias, 2)
    new_kek(kms, f"{alias}-other", 1)  # its alias begins alike, and is another KEK
    new = kek.wrap(SECRET, CONTEXT)
    assert (old.kek_id, new.kek_id) == (first, second)
    for wrapped in (old, new):
        assert kek.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET
    assert kek.versions() == [(first, 256, False), (second, 256, True)]
    kms.disable_key(KeyId=key_id(first))
    assert kek.versions() == [(second, 256, True)]
    # It does not unwrap now; that is not the end of it.
    assert kek.remains(first)
    kms.schedule_key_deletion(KeyId=key_id(first), PendingWindowInDays=7)
    assert kek.remains(first)
    nobody = f"{second.rpartition('/')[0]}/00000000-0000-4000-8000-000000000000"
    assert not kek.remains(nobody)


def test_a_wrapping_of_another_key_does_not_open_under_this_one(moto: str, kms: Any, alias: str) -> None:
    first, second = new_kek(kms, alias, 1), new_kek(kms, f"{alias}-b", 1)
    kek = provider(moto, f"alias/{alias}")
    wrapped = kek.wrap(SECRET, CONTEXT)
    assert wrapped.kek_id == first
    with pytest.raises(KeyUnavailableError, match=r"IncorrectKeyException|AccessDenied|InvalidCiphertext"):
        kek.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, second)


def test_a_key_that_is_not_there_or_not_usable_is_said_at_start(moto: str, kms: Any, alias: str) -> None:
    with pytest.raises(KeyUnavailableError, match=r"looking up key alias/.* refuses with NotFoundException"):
        provider(moto, f"alias/{alias}")
    arn = new_kek(kms, alias, 1)
    kms.disable_key(KeyId=key_id(arn))
    with pytest.raises(KeyUnavailableError, match=f"key {arn} is Disabled"):
        provider(moto, f"alias/{alias}")
    kms.enable_key(KeyId=key_id(arn))
    kms.schedule_key_deletion(KeyId=key_id(arn), PendingWindowInDays=7)
    with pytest.raises(KeyUnavailableError, match=f"key {arn} is PendingDeletion"):
        provider(moto, f"alias/{alias}")


def test_a_key_of_another_kind_is_no_kek(moto: str, kms: Any) -> None:
    key = kms.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["Arn"]
    with pytest.raises(KeyUnavailableError, match="of kind RSA_2048; a KEK is an enabled key of kind SYMM"):
        provider(moto, key)


def test_throttling_is_waited_out(moto: str, kms: Any, alias: str) -> None:
    new_kek(kms, alias, 1)
    kind = {"Content-Type": "application/x-amz-json-1.1"}
    with busy_service(moto, 400, THROTTLED, kind) as service:
        kek = provider(service.address, f"alias/{alias}", retries=Retries(attempts=4))
        service.start_refusing(2)
        wrapped = kek.wrap(SECRET, CONTEXT)
        assert service.calls == 3
        assert kek.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET


def test_throttling_without_end_makes_the_stream_wait_instead(moto: str, kms: Any, alias: str) -> None:
    new_kek(kms, alias, 1)
    kind = {"Content-Type": "application/x-amz-json-1.1"}
    with busy_service(moto, 400, THROTTLED, kind) as service:
        kek = provider(service.address, f"alias/{alias}", retries=Retries(attempts=2))
        service.start_refusing(100)
        with pytest.raises(TransientError, match=r"wrapping a data key: AWS KMS is busy \(ThrottlingExc"):
            kek.wrap(SECRET, CONTEXT)
        assert service.calls == 2


def test_a_service_that_is_away_is_no_destroyed_key(alias: str) -> None:
    port = reserve_port()
    try:
        began = time.monotonic()
        with pytest.raises(TransientError, match="no connection to AWS KMS"):
            provider(f"http://127.0.0.1:{port}", f"alias/{alias}", retries=Retries(attempts=2, timeout=1.0))
        assert time.monotonic() - began < 10
    finally:
        release_port(port)


def test_what_only_the_operator_can_set_is_named(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="region and profile"):
        AwsKek("alias/k", endpoint=moto)
    with pytest.raises(ConfigError, match="profile"):
        AwsKek("alias/k", region=REGION, endpoint=moto, profile="nobody")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(KeyUnavailableError, match="refuses with NoCredentialsError") as refused:
        provider(moto, "alias/k")
    assert "aws sts get-caller-identity" in refused.value.hint


def test_no_credential_is_in_a_message(moto: str, alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI-not-in-messages")
    with pytest.raises(KeyUnavailableError) as refused:
        provider(moto, f"alias/{alias}")
    assert "wJalrXUtnFEMI" not in str(refused.value)
