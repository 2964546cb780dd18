"""Reading the audit topic that fails as nobody expects is begun anew, and takes nothing else with it.

With a reader, a database and Kafka: tests/services/test_audit_watch.py.
"""

from __future__ import annotations

from typing import NoReturn

import psycopg
import pytest

from tests.audit_history import trust
from vsql_shared.errors import BrokerError, DatabaseError
from vsql_shared.service.auditor import TopicTurns

AGAIN = 5.0
"""Seconds until it is tried again."""


def test_what_nobody_expects_is_said_and_tried_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[float] = []
    now = 0.0

    def failing() -> NoReturn:
        tried.append(now)
        raise KeyError("x")

    topic = TopicTurns(failing)
    for now in (1.0, 2.0, 1.0 + AGAIN - 0.1, 1.0 + AGAIN, 2.0 + AGAIN, 1.0 + 2 * AGAIN):
        assert topic.turn(trust(), now) == []
    assert tried == [1.0, 1.0 + AGAIN, 1.0 + 2 * AGAIN]
    assert caplog.text.count("begun anew") == 3
    topic.close()


@pytest.mark.parametrize(
    "error", [DatabaseError("gone"), BrokerError("gone"), psycopg.OperationalError("gone"), SystemExit(1)]
)
def test_errors_of_the_database_and_ours_are_the_services(error: BaseException) -> None:
    def failing() -> NoReturn:
        raise error

    with pytest.raises(type(error)):
        TopicTurns(failing).turn(trust(), 1.0)
