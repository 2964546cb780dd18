"""A connection that one side believes to be alive: nobody gives up, and no human hand is needed."""

from __future__ import annotations

import time

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.chaos.proxy import Proxy
from tests.pairs import Pairs
from tests.stack.ports import release_port, reserve_port

CONFIG = "[limits]\nbatch_linger_ms = 1\nretry_backoff_max_ms = 1000\ncommand_poll_ms = 200\n"


@pytest.mark.parametrize("killed", [False, True], ids=["cut off", "killed"])
@pytest.mark.timeout(180)
def test_a_service_waits_for_the_lock_the_server_still_holds_for_its_last_session(
    pairs: Pairs, killed: bool
) -> None:
    pair = pairs("CREATE TABLE t (id int PRIMARY KEY)", config=CONFIG)
    pair.a.service_port = reserve_port()
    proxy = Proxy(pair.a.service_port, int(conninfo_to_dict(pair.a.conninfo)["port"] or 0))
    try:
        pair.create(["t(*)"], copy=False)
        pair.a.start_daemon()
        pair.b.start("consumer")
        pair.a.execute("INSERT INTO t VALUES (1)")
        pair.wait_in_step()
        proxy.half_open("server")
        if killed:
            pair.a.processes("producer")[0].kill()
        time.sleep(4)  # long enough for whoever gives up
        proxy.heal()
        pair.a.execute("INSERT INTO t VALUES (2)")
        pair.wait_in_step()
        assert pair.differences() == []
    finally:
        pair.end()
        proxy.close()
        release_port(pair.a.service_port)
