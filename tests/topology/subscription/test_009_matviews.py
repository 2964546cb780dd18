"""Refreshing a materialized view sends nothing, also when its name or its oid could be a table's."""

from __future__ import annotations

import pytest

from tests.pairs import Pairs
from tests.topology.subscription.scenes import commit, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = "CREATE TABLE sold (id int PRIMARY KEY, region text, amount int)"
VIEW = "CREATE MATERIALIZED VIEW per_region AS SELECT region, sum(amount) AS amount FROM sold GROUP BY region"


def test_a_refresh_sends_nothing_and_publishing_a_view_is_refused(pairs: Pairs) -> None:
    pair = pairs(SCHEMA, version=17)
    pair.a.execute(
        f"INSERT INTO sold VALUES (1, 'eu', 10); {VIEW}; CREATE UNIQUE INDEX ON per_region (region)"
    )
    pair.create(["*"])
    pair.start()
    pair.wait_in_step()
    assert pair.tables() == [("public", "sold")]
    before = pair.audited_rows()
    commit(pair, "INSERT INTO sold VALUES (2, 'us', 20); REFRESH MATERIALIZED VIEW per_region")
    pair.a.query("REFRESH MATERIALIZED VIEW CONCURRENTLY per_region")
    commit(pair, "INSERT INTO sold VALUES (3, 'us', 30)")
    pair.a.query("REFRESH MATERIALIZED VIEW CONCURRENTLY per_region")
    commit(
        pair, f"DROP MATERIALIZED VIEW per_region; {VIEW} WITH NO DATA; REFRESH MATERIALIZED VIEW per_region"
    )
    assert pair.audited_rows() - before == 2
    assert len(same(pair, "sold")) == 3
    assert pair.b.query("SELECT to_regclass('per_region')") == [(None,)]
    refused = pair.a.ctl("publication", "create", "views", "--table", "per_region", check=False)
    assert refused.returncode != 0
    assert "materialized view" in refused.stderr
    pair.stop()
