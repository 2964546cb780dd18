"""P11: a stream that stands still while WAL advances is noticed; an idle or a paused one never is."""

from __future__ import annotations

from vsql_producers.stall import Marks, Stall


def test_the_time_counts_from_the_first_wal_after_the_last_progress() -> None:
    stall = Stall()
    assert stall.look(0, 100, Marks(90)) == 0
    assert stall.look(10, 100, Marks(90)) == 0
    assert stall.look(20, 200, Marks(90)) == 0
    assert stall.look(50, 300, Marks(90)) == 30
    assert stall.look(51, 300, Marks(200)) == 0


def test_an_idle_database_never_raises_an_alarm() -> None:
    stall = Stall()
    assert [stall.look(now, 100, Marks(50)) for now in range(0, 3600, 60)] == [0] * 60
    assert stall.look(3601, 101, Marks(50)) == 0, "however long it was idle before"


def test_a_stream_that_confirms_others_wal_moves() -> None:
    stall = Stall()
    assert [stall.look(now, now * 10, Marks(now * 10 - 5)) for now in range(1, 100)] == [0] * 99


def test_fragments_of_a_large_transaction_are_progress_and_sending_them_again_is_not() -> None:
    stall = Stall()
    assert stall.look(0, 100, Marks(50, (50, 0))) == 0
    assert [stall.look(now, 100 + now, Marks(50, (50, now))) for now in (10, 20, 30)] == [0, 0, 0]
    # A new epoch begins the transaction anew, and comes no further than the one before.
    assert [stall.look(now, 100 + now, Marks(50, (50, now - 39))) for now in (40, 50, 60)] == [0, 10, 20]
    assert stall.look(70, 170, Marks(50, (50, 31))) == 0


def test_a_stream_that_cannot_be_opened_makes_no_progress() -> None:
    stall = Stall()
    assert stall.look(0, 100, None) == 0
    assert stall.look(5, 200, None) == 0
    assert stall.look(40, 300, None) == 35
    # What an attempt before it had done already does not count again.
    stall.look(41, 300, Marks(250))
    stall.look(42, 400, None)
    assert stall.look(80, 500, Marks(250)) == 38


def test_a_pause_ends_the_counting() -> None:
    stall = Stall()
    stall.look(0, 100, Marks(50))
    stall.look(1, 200, Marks(50))
    stall.rest()
    assert stall.look(100, 300, Marks(50)) == 0
    assert stall.look(101, 400, Marks(50)) == 0
    assert stall.look(131, 400, Marks(50)) == 30
