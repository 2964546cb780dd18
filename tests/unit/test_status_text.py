"""What `syncctl status` says of the audit trail, in words and as JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from vsql_ctl.commands.status import Trail, trail_lines, trail_value
from vsql_ctl.output import to_json
from vsql_shared.audit.watch_state import Progress

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
SHOWN = "2026-03-01 12:00:00+00:00"


def _trail(whole_at: datetime | None, begins: dict[str, int]) -> Trail:
    chains = [
        Progress("trail", chain, 40, AT, None if whole_at is None else 40, whole_at)
        for chain in ("p.node-a", "q.node-a")
    ]
    return Trail([*chains, Progress("topic", "", 0, None, 40, AT)], [], begins)


def test_of_a_pruned_chain_it_is_said_where_all_of_it_begins() -> None:
    verified = f"verified up to 40, the newest there was at {SHOWN}"
    assert list(trail_lines(_trail(AT, {"p.node-a": 10}))) == [
        f"audit p.node-a: {verified}; all of it from entry 10 on (the rest was pruned) at {SHOWN}",
        f"audit q.node-a: {verified}; all of it at {SHOWN}",
        f"audit topic: compared, all of it at {SHOWN}",
    ]
    assert list(trail_lines(_trail(None, {"p.node-a": 10})))[:2] == [
        f"audit p.node-a: {verified}; not once all of it from entry 10 on (the rest was pruned)",
        f"audit q.node-a: {verified}; not once all of it",
    ]


def test_the_json_says_of_each_chain_where_it_begins_and_nothing_of_the_topic() -> None:
    shown = json.loads(to_json(trail_value(_trail(AT, {"p.node-a": 10}))))
    assert [(one["chain"], one["begins_at"], one["whole_to"]) for one in shown["chains"]] == [
        ("p.node-a", 10, 40),
        ("q.node-a", 1, 40),
    ]
    assert shown["chains"][0]["whole_at"] == AT.isoformat()
    assert "begins_at" not in shown["topic"]
