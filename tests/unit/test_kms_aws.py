"""What the provider for AWS KMS decides without asking AWS: names, context, Regions, errors."""

from __future__ import annotations

import pytest
from botocore import exceptions as boto

from vsql_shared.crypto.dek import key_context
from vsql_shared.errors import ConfigError, KeyUnavailableError, TransientError, VsqlSyncError
from vsql_shared.kms.aws_kms import AwsKek, aws_error, check_kek_id, encryption_context, local_arn
from vsql_shared.kms.base import Retries

KEY = "1234abcd-12ab-34cd-56ef-1234567890ab"
MRK = "mrk-1234abcd12ab34cd56ef1234567890ab"
HOME = "arn:aws:kms:eu-west-1:111122223333"


@pytest.mark.parametrize(
    "kek_id",
    [KEY, MRK, "alias/kek", "alias/team/kek", f"{HOME}:key/{KEY}", f"{HOME}:alias/kek", f"key/{KEY}"],
)
def test_a_key_is_named_in_each_way_aws_has(kek_id: str) -> None:
    assert check_kek_id(kek_id) == kek_id


@pytest.mark.parametrize(
    "kek_id", ["kek", "alias/", "alias/a b", f"{HOME}:secret/x", "arn:aws:s3:::b", KEY + "\n"]
)
def test_what_names_no_key_is_refused(kek_id: str) -> None:
    with pytest.raises(ConfigError, match="names no key of AWS KMS"):
        check_kek_id(kek_id)


def test_the_context_is_three_names_as_aws_logs_them() -> None:
    assert encryption_context(key_context("c", "pub.node-a", "dek-1")) == {
        "vsql-sync:cluster": "c",
        "vsql-sync:chain": "pub.node-a",
        "vsql-sync:dek-id": "dek-1",
    }


def test_a_multi_region_key_is_asked_for_at_home() -> None:
    there = f"arn:aws:kms:us-east-1:111122223333:key/{MRK}"
    assert local_arn(there, "eu-west-1") == f"{HOME}:key/{MRK}"
    assert local_arn(f"{HOME}:key/{KEY}", "eu-west-1") == f"{HOME}:key/{KEY}"
    china = f"arn:aws-cn:kms:cn-north-1:111122223333:key/{MRK}"
    assert local_arn(china, "cn-northwest-1") == china.replace("cn-north-1", "cn-northwest-1")


def test_a_key_of_another_region_is_said_to_be_there() -> None:
    with pytest.raises(KeyUnavailableError, match="in Region eu-west-1, this node uses us-east-1"):
        local_arn(f"{HOME}:key/{KEY}", "us-east-1")


@pytest.mark.parametrize("kek_id", ["", "alias/kek", KEY, f"{HOME}:alias/kek", "test-kek/1"])
def test_an_announcement_names_a_key_and_nothing_else(kek_id: str) -> None:
    with pytest.raises(KeyUnavailableError, match="no ARN of an AWS KMS key"):
        local_arn(kek_id, "eu-west-1")


def refused(code: str, status: int = 400) -> boto.ClientError:
    return boto.ClientError(
        {"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Decrypt"
    )


ERRORS: dict[str, tuple[Exception, type[VsqlSyncError], str]] = {
    "throttled": (refused("ThrottlingException"), TransientError, "busy"),
    "their fault": (refused("Anything", 503), TransientError, "busy"),
    "denied": (refused("AccessDeniedException"), KeyUnavailableError, "keys.md"),
    "scheduled for deletion": (refused("KMSInvalidStateException"), KeyUnavailableError, "deletion"),
    "altered": (refused("InvalidCiphertextException"), KeyUnavailableError, "another chain"),
    "unknown code": (refused("ExpiredTokenException"), KeyUnavailableError, "get-caller-identity"),
    "no Region": (boto.NoRegionError(), ConfigError, "AWS_REGION"),
    "no profile": (boto.ProfileNotFound(profile="x"), ConfigError, "profile"),
    "no credentials": (boto.NoCredentialsError(), KeyUnavailableError, "credentials"),
    "no connection": (
        boto.EndpointConnectionError(endpoint_url="https://x"),
        TransientError,
        "no connection",
    ),
    "timeout": (boto.ReadTimeoutError(endpoint_url="https://x"), TransientError, "no connection"),
    "no trust": (boto.SSLError(endpoint_url="https://x", error="e"), KeyUnavailableError, "AWS_CA_BUNDLE"),
}


@pytest.mark.parametrize(("error", "kind", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_of_aws_becomes_ours_by_who_must_act(
    error: Exception, kind: type[VsqlSyncError], words: str
) -> None:
    ours = aws_error(error, "unwrapping a data key")
    assert type(ours) is kind
    assert words in str(ours)
    assert str(ours).startswith("unwrapping a data key: ")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS"])
def test_an_address_of_the_environment_without_tls_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Data keys cross in clear what is not encrypted; AWS's client would not mind."""
    for name, value in (
        (variable, "http://kms.example.invalid"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "y"),
        ("AWS_CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"http://kms\.example\.invalid, without TLS"):
        AwsKek("alias/kek", region="eu-west-1", retries=Retries(1, 0.0, 1.0))


def test_a_service_s_words_reach_a_terminal_as_text() -> None:
    error = boto.ClientError({"Error": {"Code": "X", "Message": "\x1b[2Jcleared\nsecond line"}}, "Decrypt")
    assert aws_error(error, "unwrapping").message.isprintable()
