"""Types of users' own, found by their names: their ids differ between the servers, and they are keys too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE EXTENSION hstore;
CREATE TYPE mood AS ENUM ('a', 'b', 'c');
CREATE TYPE simple AS (a float, b mood, c text);
CREATE TYPE nested AS (d simple[], e mood[], f hstore);
CREATE TYPE span AS RANGE (subtype = simple);
CREATE TABLE allowed (n int PRIMARY KEY);
INSERT INTO allowed VALUES (1), (2), (3);
CREATE FUNCTION is_allowed(n int) RETURNS boolean LANGUAGE sql
    AS 'SELECT EXISTS (SELECT FROM public.allowed a WHERE a.n = is_allowed.n)';
CREATE DOMAIN listed AS int CHECK (is_allowed(VALUE));
CREATE DOMAIN twice AS listed CHECK (VALUE <> 2);
CREATE TABLE by_row (k simple PRIMARY KEY, v int);
CREATE TABLE by_rows (k simple[] PRIMARY KEY, v nested);
CREATE TABLE by_moods (k mood[] PRIMARY KEY, v mood);
CREATE TABLE by_span (k span, m int4range, v hstore, PRIMARY KEY (k, m));
CREATE TABLE by_hstore (k hstore PRIMARY KEY, v span[]);
CREATE TABLE by_domain (k twice PRIMARY KEY, v listed[]);
CREATE TABLE keyless (r nested, j json, p point, d twice);
ALTER TABLE keyless REPLICA IDENTITY FULL;
"""
TABLES = ("by_row", "by_rows", "by_moods", "by_span", "by_hstore", "by_domain", "keyless")
FILL = r"""
INSERT INTO by_row VALUES (ROW(0.1, 'a', '"x,y"'), 1), (ROW(0.2, 'b', ''), 2), (ROW(0.3, 'c', NULL), 3);
INSERT INTO by_rows VALUES (ARRAY[ROW(1, 'a', 'x')]::simple[],
     ROW(ARRAY[ROW(1, 'a', 'x'), NULL]::simple[], '{a,NULL,c}', 'k=>NULL')),
    (ARRAY[ROW(2, 'b', '{"\}')]::simple[], ROW('{}', '[5:6]={b,c}', NULL)), ('{}', NULL);
INSERT INTO by_moods VALUES ('{a,b}', 'a'), ('{{a,b},{c,NULL}}', 'b'), ('{}', NULL);
INSERT INTO by_span VALUES ('empty', '[1,5)', 'a=>1'), (span(ROW(1, 'a', ''), ROW(2, 'b', '')), '(,)', '');
INSERT INTO by_hstore VALUES ('a=>1', ARRAY[span(ROW(1, 'a', ''), NULL)]), ('"b c"=>NULL', '{}'), ('', NULL);
INSERT INTO by_domain VALUES (1, '{1,2}'), (3, '{}');
INSERT INTO keyless SELECT v, '{"a" : 1}', '(1,2)', 3 FROM by_rows;
"""
CHANGE = """
UPDATE by_row SET v = v + 10;
DELETE FROM by_row WHERE (k).b = 'b';
UPDATE by_row SET k.c = 'new' WHERE v = 13;
UPDATE by_rows SET v.e = '{c}' WHERE v IS NOT NULL;
DELETE FROM by_rows WHERE k = '{}';
UPDATE by_moods SET v = 'c';
DELETE FROM by_moods WHERE k = '{a,b}';
UPDATE by_moods SET k = k || 'b'::mood WHERE k = '{}';
UPDATE by_span SET v = v || 'z=>9';
DELETE FROM by_span WHERE k = 'empty';
UPDATE by_span SET m = '[2,3)';
UPDATE by_hstore SET v = '{empty}';
DELETE FROM by_hstore WHERE k = 'a=>1';
UPDATE by_hstore SET k = k || 'n=>1' WHERE k = '';
UPDATE by_domain SET v = '{3}' WHERE k = 1;
DELETE FROM by_domain WHERE k = 3;
UPDATE by_domain SET k = 3;
UPDATE keyless SET d = 1 WHERE (r).f IS NULL;
DELETE FROM keyless WHERE r IS NULL;
"""


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("types")
    target = "CREATE TYPE elsewhere AS ENUM ('x'); CREATE TABLE elsewhere_too ();" + SCHEMA
    with running(stack, folder, "", TABLES, source=SCHEMA + FILL, target=target, versions=(15, 18)) as made:
        yield made


def test_users_types_are_copied_inserted_and_changed_by_keys_of_them(pair: TwoNodes) -> None:
    assert all(same(pair, table) for table in TABLES)
    commit(pair, CHANGE)
    changed = {table: same(pair, table) for table in TABLES}
    commit(pair, "DELETE FROM by_row; DELETE FROM by_rows; DELETE FROM by_moods; DELETE FROM by_span;"
                 " DELETE FROM by_hstore; DELETE FROM by_domain; DELETE FROM keyless")  # fmt: skip
    assert all(same(pair, table) == [] for table in TABLES)
    commit(pair, FILL, CHANGE)
    assert {table: same(pair, table) for table in TABLES} == changed
    assert all(changed.values())
    assert all(anomalies(pair, table) == {} for table in TABLES)
