"""Rule 14 of docs/design/0005: what is acknowledged is flushed, whatever a role or a trigger sets."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import NewDatabase
from tests.services.apply_pair import Pair
from vsql_shared import lsn

DDL = "CREATE TABLE public.t (id int PRIMARY KEY, v text)"
TRIGGER = """
CREATE FUNCTION public.quiet() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN PERFORM set_config('synchronous_commit', 'off', false); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER quiet AFTER INSERT ON public.t DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION public.quiet();
ALTER TABLE public.t ENABLE ALWAYS TRIGGER quiet;
"""
SETTINGS = {
    "the database's default": "ALTER DATABASE {database} SET synchronous_commit = off",
    "the role's default": "ALTER ROLE {role} IN DATABASE {database} SET synchronous_commit = off",
    "a trigger of the table": TRIGGER,
}


@pytest.fixture
def pair(new_database: NewDatabase) -> Iterator[Pair]:
    made = Pair(new_database("a"), new_database("b"))
    yield made
    made.close()


@pytest.mark.parametrize("where", SETTINGS)
def test_an_applied_commit_is_flushed_when_it_can_be_acknowledged(pair: Pair, where: str) -> None:
    pair.tables(DDL)
    info = psycopg.conninfo.conninfo_to_dict(pair.conninfo)
    database, role = info["dbname"], info["user"]
    statement = SETTINGS[where].replace("{database}", str(database)).replace("{role}", str(role))
    pair.target.execute(statement.encode())
    applier = pair.current()
    for number in range(20):
        pair.do(f"INSERT INTO public.t VALUES ({number}, 'x')")
        batches = pair.source.batches()
        applier.apply(batches)
        at = applier.finish(batches[-1].lsn_end, batches[-1].transactions[-1].commit_time, lambda _: None)
        row = pair.target.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None
        assert 0 < at <= lsn.parse(row[0])
    pair.equal("public.t")
