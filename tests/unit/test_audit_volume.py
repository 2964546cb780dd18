"""The audit trail's volume a day: a pace of the last minutes, whenever it is asked for."""

from __future__ import annotations

import pytest

from vsql_producers.volume import SHORTEST_SECONDS, WINDOW_SECONDS, AuditVolume

DAY = 86_400


def run(volume: AuditVolume, start: int, end: int, entries: int, size: int) -> float:
    """Append `entries` of `size` bytes each second and look every two, as a worker does."""
    for second in range(start, end):
        volume.add(entries, entries * size)
        if second % 2:
            volume.per_day(float(second + 1))
    return float(end)


@pytest.mark.parametrize("seconds", [60, 300, 600, 4000])
def test_a_steady_pace_is_scaled_to_a_day(seconds: int) -> None:
    volume = AuditVolume(0.0)
    entries, nbytes = volume.per_day(run(volume, 0, seconds, 16, 700))
    assert entries == pytest.approx(16 * DAY, rel=0.05)
    assert nbytes == pytest.approx(16 * 700 * DAY, rel=0.05)


def test_the_first_entries_are_no_forecast_for_a_day() -> None:
    volume = AuditVolume(0.0)
    volume.add(1, 600)
    assert volume.per_day(0.5) == (round(DAY / SHORTEST_SECONDS), round(600 * DAY / SHORTEST_SECONDS))


def test_what_is_older_than_the_window_does_not_count() -> None:
    volume = AuditVolume(0.0)
    quiet = run(volume, 0, 100, 50, 700)
    quiet = run(volume, int(quiet), int(quiet + WINDOW_SECONDS + 60), 0, 0)
    assert volume.per_day(quiet) == (0, 0)
    assert volume.entries == 5000
