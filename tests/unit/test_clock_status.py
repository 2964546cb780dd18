"""What `syncctl status` and the metrics say of clocks."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from vsql_ctl.commands.status import clock_lines
from vsql_shared.observe.metrics import clock_measured, exposition
from vsql_shared.pg.clocks import NodeClock

AT = datetime(2026, 2, 17, 10, 0, tzinfo=UTC)
PEER = NodeClock("node-b", False, "ok", -1_800, 3_100, AT, 4.0, 1, None, None, 0, None, None)
NEAR = "-1.8 ms ± 3.1 ms, 4.0 s ago"
OWN = f"clock: this node's database, against this host: {NEAR}"

SAID = {
    "near": (PEER, "clock: node-b: -1.8 ms ± 3.1 ms, 4.0 s ago"),
    "a warning": (replace(PEER, state="warning"), "CLOCK: node-b: -1.8 ms ± 3.1 ms, 4.0 s ago"),
    "an error": (replace(PEER, state="error"), "CLOCK, far off: node-b: -1.8 ms ± 3.1 ms, 4.0 s ago"),
    "gone": (
        replace(PEER, state="unknown", age_seconds=7200.0, unanswered=12),
        "clock: node-b: -1.8 ms ± 3.1 ms, 2h 0m ago; 12 questions were not answered",
    ),
    "not measured yet": (
        replace(
            PEER, state="unknown", offset_us=None, uncertainty_us=None, measured_at=None, age_seconds=None
        ),
        "clock: node-b: not measured yet",
    ),
    "this node": (
        replace(PEER, node="node-a", local=True, ntp_source="chrony", ntp_synchronised=True),
        f"{OWN}; the host is synchronised (chrony)",
    ),
    "this node, whose clock nobody keeps": (
        replace(PEER, node="node-a", local=True, ntp_source="kernel", ntp_synchronised=False),
        f"{OWN}; the host is NOT synchronised (kernel)",
    ),
    "from the future": (
        replace(PEER, future_waits=3, future_most_us=70_000, future_most_at=AT),
        f"clock: node-b: {NEAR}; 3 changes had to wait for our clock, 70 ms at most, {AT}",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_clock_is_one_line(name: str) -> None:
    clock, line = SAID[name]
    assert list(clock_lines([clock])) == [line]


def test_a_name_from_a_database_cannot_write_on_the_terminal() -> None:
    (line,) = clock_lines([replace(PEER, node="\x1b[2Jx")])
    assert "\x1b" not in line


def test_a_measure_is_four_gauges_of_a_peer() -> None:
    clock_measured("node-b", "node-a", -0.0018, 0.0031, "warning")
    text = exposition().decode()
    for name, value in (("offset_seconds", "-0.0018"), ("uncertainty_seconds", "0.0031"), ("state", "1.0")):
        assert f'vsql_sync_clock_{name}{{node="node-a",peer="node-b"}} {value}' in text
