"""AWS KMS and S3 on this machine: moto's server as a process of its own, asked through AWS's own client.

moto is no proof of everything: it goes on decrypting under keys that are disabled or scheduled for deletion,
and asks nobody for permission. What depends on those is not tested here.
"""

from __future__ import annotations

import http.client
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

from tests.stack.ports import release_port, reserve_port
from tests.stack.processes import kill_tree, spawn
from tests.waiting import until

REGION = "eu-west-1"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
_START_SECONDS = 60.0


@contextmanager
def moto_server(folder: Path) -> Iterator[str]:
    """Address of a running server; it ends with the block."""
    port = reserve_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = spawn(command, log=folder / "moto.log")
    try:
        until(lambda: answers(port, "/moto-api/"), _START_SECONDS, (folder / "moto.log").read_text)
        yield address
    finally:
        kill_tree(process)
        release_port(port)


def answers(port: int, path: str) -> bool:
    """Whether a server on this machine answers this request with anything."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status > 0
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def aws_kms(address: str) -> Any:
    """AWS's own client: the key administrator's hands."""
    return boto3.session.Session().client("kms", region_name=REGION, endpoint_url=address)


def s3_bucket(address: str, name: str, *, locks: bool = True) -> Any:
    """AWS's own client of S3, with a new bucket whose objects can be locked."""
    s3 = boto3.session.Session().client("s3", region_name=REGION, endpoint_url=address)
    s3.create_bucket(
        Bucket=name,
        ObjectLockEnabledForBucket=locks,
        CreateBucketConfiguration={"LocationConstraint": REGION},
    )
    return s3


def new_kek(kms: Any, alias: str, version: int) -> str:
    """A key with `alias/<alias>/<version>`, which `alias/<alias>` points at from now on; its ARN."""
    made = kms.create_key(Description="KEK of a test")["KeyMetadata"]
    kms.create_alias(AliasName=f"alias/{alias}/{version}", TargetKeyId=made["KeyId"])
    if version == 1:
        kms.create_alias(AliasName=f"alias/{alias}", TargetKeyId=made["KeyId"])
    else:
        kms.update_alias(AliasName=f"alias/{alias}", TargetKeyId=made["KeyId"])
    return str(made["Arn"])


def key_id(arn: str) -> str:
    """The id in a key's ARN: moto takes no ARN where a key is disabled, enabled or deleted."""
    return arn.rpartition("/")[2]
