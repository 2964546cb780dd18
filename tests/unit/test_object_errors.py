"""What an object store answers becomes one error of ours, by who must act."""

from __future__ import annotations

from typing import Any

import pytest
from botocore import exceptions as boto

from vsql_shared.errors import StoreError, TransientError, VsqlSyncError
from vsql_shared.objects.s3 import s3_error

CODES: dict[str, tuple[int, type[VsqlSyncError], str]] = {
    "ConditionalRequestConflict": (409, TransientError, "try again"),
    "SlowDown": (503, TransientError, "try again"),
    "AccessDenied": (403, StoreError, "grant what"),
    # HEAD has no body, so that its code is the status: also of what is not there, without ListBucket.
    "403": (403, StoreError, "s3:ListBucket"),
    "RequestTimeTooSkewed": (403, StoreError, "clock"),
}


@pytest.mark.parametrize("code", CODES)
def test_what_the_store_refuses_says_who_must_act(code: str) -> None:
    status, kind, hint = CODES[code]
    answer: Any = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    made = s3_error(boto.ClientError(answer, "PutObject"), "storing k")
    assert type(made) is kind
    assert (code in made.message, hint in made.hint) == (True, True)
