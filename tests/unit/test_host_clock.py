"""What programs that keep a host's clock print becomes a value; nothing passes for synchronised by luck."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.clocks import host
from vsql_shared.clocks.host import HostClock, parse_chrony, parse_timedatectl, parse_timesync
from vsql_shared.clocks.host_read import (
    read_host_clock,
    require_database_near,
    require_synchronised,
)
from vsql_shared.errors import DatabaseError, DecodeError, RefusedError

CHRONY = """Reference ID    : A9FEA97B (169.254.169.123)
Stratum         : 4
Ref time (UTC)  : Tue Feb 17 10:21:05 2026
System time     : 0.000021461 seconds slow of NTP time
Last offset     : -0.000005411 seconds
RMS offset      : 0.000014120 seconds
Frequency       : 11.527 ppm slow
Residual freq   : -0.001 ppm
Skew            : 0.045 ppm
Root delay      : 0.000438612 seconds
Root dispersion : 0.000247182 seconds
Update interval : 16.1 seconds
Leap status     : Normal
"""
TIMESYNC = """LinkNTPServers=
FallbackNTPServers=0.debian.pool.ntp.org 1.debian.pool.ntp.org
ServerName=0.debian.pool.ntp.org
ServerAddress=192.0.2.10
RootDistanceMaxUSec=5s
PollIntervalUSec=34min 8s
NTPMessage={ Leap=0, Version=4, Mode=4, Stratum=2, Precision=-23, RootDelay=15.808ms, \
RootDispersion=1.281ms, Reference=C0000201, OriginateTimestamp=Tue 2026-02-17 10:21:05 UTC, Ignored=no, \
PacketCount=12, Jitter=2.115ms }
Frequency=-412305
"""
SHOW = "Timezone=Etc/UTC\nLocalRTC=no\nCanNTP=yes\nNTP=yes\nNTPSynchronized=yes\n"


def test_chrony_that_follows_a_source() -> None:
    found = parse_chrony(CHRONY)
    assert found == HostClock("chrony", True, 488, "")
    assert parse_chrony(CHRONY.replace("Normal", "Insert second")).synchronised


NOT_FOLLOWED = {
    "it says so": ("Normal", "Not synchronised"),
    "no source yet": ("A9FEA97B (169.254.169.123)", "00000000 ()"),
    "its own clock as a source": ("A9FEA97B (169.254.169.123)", "7F7F0101 ()"),
    "stratum of nobody": ("Stratum         : 4", "Stratum         : 16"),
    "stratum zero": ("Stratum         : 4", "Stratum         : 0"),
    "a word of a later version": ("Normal", "Perhaps"),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_chrony_that_follows_none(name: str) -> None:
    found = parse_chrony(CHRONY.replace(*NOT_FOLLOWED[name]))
    assert not found.synchronised
    assert found.why


def test_systemd_s_daemon() -> None:
    assert parse_timesync(TIMESYNC) == HostClock("systemd-timesyncd", True, None, "")
    for was, becomes in (
        ("Leap=0", "Leap=3"), ("Stratum=2", "Stratum=0"), ("Stratum=2", "Stratum=16"),
        ("Ignored=no", "Ignored=yes"),
        ("NTPMessage", "Message"), ("Ignored=no, ", ""),
    ):  # fmt: skip
        assert not parse_timesync(TIMESYNC.replace(was, becomes)).synchronised
    assert parse_timedatectl(SHOW).synchronised
    assert not parse_timedatectl(SHOW.replace("Synchronized=yes", "Synchronized=no")).synchronised


@pytest.mark.parametrize("parse", [parse_chrony, parse_timesync, parse_timedatectl])
@pytest.mark.parametrize(
    "text", ["", "506 Cannot talk to daemon\n", "Failed to connect to bus\n", ":\n=\n", "\0"]
)
def test_anything_else_is_not_their_output(parse: object, text: str) -> None:
    assert callable(parse)
    with pytest.raises(DecodeError):
        parse(text)


@given(
    st.one_of(
        st.text(max_size=300),
        st.lists(st.sampled_from((CHRONY + TIMESYNC + SHOW).splitlines()), max_size=30).map("\n".join),
        st.tuples(st.sampled_from([CHRONY, TIMESYNC, SHOW]), st.integers(0, 600), st.text(max_size=5)).map(
            lambda one: one[0][: one[1]] + one[2] + one[0][one[1] :]
        ),
    )
)
def test_whatever_is_printed_becomes_a_value_or_our_error(text: str) -> None:
    for parse in (parse_chrony, parse_timesync, parse_timedatectl):
        try:
            found = parse(text)
        except DecodeError:
            continue
        assert bool(found.why) is not found.synchronised
        assert found.error_us is None or found.error_us >= 0


def test_the_kernel_s_word() -> None:
    assert host.of_kernel(0, 0x2001, 500).synchronised
    assert host.of_kernel(0, 0x2001, 500).error_us == 500
    for returned, status in ((5, 0x40), (0, 0x40), (5, 0), (-1, 0)):
        assert not host.of_kernel(returned, status, 16_000_000).synchronised


def test_chrony_is_believed_before_the_kernel_and_anybody_else_beside_it() -> None:
    kernel, idle = (
        host.of_kernel(0, 0, 5),
        HostClock("systemd-timesyncd", False, None, "no server has answered"),
    )
    chrony = parse_chrony(CHRONY.replace("Normal", "Not synchronised"))
    assert host.best([chrony, kernel]) is chrony
    assert host.best([idle, kernel]) is kernel
    assert host.best([idle]) is idle
    assert host.best([]) is None


def test_this_host_is_asked_without_harm() -> None:
    found = read_host_clock()
    assert found is None or found.source in ("chrony", "systemd-timesyncd", "timedatectl", "kernel")


def test_a_service_that_needs_a_kept_clock_says_what_it_found() -> None:
    require_synchronised(1000, HostClock("chrony", True, 999_999, ""))
    with pytest.raises(RefusedError, match=r"require_ntp = true, and nothing on this host"):
        require_synchronised(1000, None)
    with pytest.raises(RefusedError, match=r"not synchronised \(chrony: it follows no other clock\)"):
        require_synchronised(1000, HostClock("chrony", False, None, "it follows no other clock"))
    with pytest.raises(RefusedError, match=r"may be wrong by 1\.5 s"):
        require_synchronised(1000, HostClock("kernel", True, 1_500_000, ""))


@pytest.mark.parametrize(("ahead_ms", "took_ms", "refused"), [
    (0, 0, False), (1000, 0, False), (-1000, 0, False), (1001, 0, True), (-1001, 0, True),
    (1500, 600, False), (1700, 600, True), (-1500, 600, True),
])  # fmt: skip
def test_a_database_with_another_clock_is_found_and_a_slow_one_is_not_blamed(
    ahead_ms: int, took_ms: int, refused: bool
) -> None:
    host_us = 1_760_000_000_000_000
    database_us = host_us + ahead_ms * 1000
    if not refused:
        require_database_near(1000, host_us, database_us, took_ms * 1000)
        return
    with pytest.raises(DatabaseError, match="clock of this node's database"):
        require_database_near(1000, host_us, database_us, took_ms * 1000)
