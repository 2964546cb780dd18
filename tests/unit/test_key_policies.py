"""When a data key's life ends by policy alone: per session, per batch, hourly, daily."""

from __future__ import annotations

import pytest

from vsql_producers.keys import ended


@pytest.mark.parametrize(
    ("rotation", "age", "reason"),
    [
        ("per-session", 10**9, None),
        ("per-batch", 10**9, None),  # ended by the batch, not by its age
        ("hourly", 3_599.9, None),
        ("hourly", 3_600, "hour"),
        ("daily", 86_399.9, None),
        ("daily", 86_400, "day"),
        ("daily", 3_600, None),
    ],
)
def test_a_data_key_seals_for_at_most_the_time_its_policy_gives(
    rotation: str, age: float, reason: str | None
) -> None:
    assert ended(rotation, age) == reason
