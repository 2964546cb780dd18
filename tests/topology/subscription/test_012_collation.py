"""Rows are found by the target's collations, which may call different strings equal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.topology.subscription.scenes import anomalies, commit, running, same

pytestmark = [pytest.mark.topology, pytest.mark.timeout(300)]

SCHEMA = """
CREATE COLLATION caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TABLE folded (k text COLLATE caseless PRIMARY KEY, v text);
CREATE TABLE folded_full (k text COLLATE caseless, n int); ALTER TABLE folded_full REPLICA IDENTITY FULL;
CREATE TABLE folded_unique (id int PRIMARY KEY, k varchar(9) COLLATE caseless UNIQUE);
"""
SOURCE = """
CREATE TABLE strict_here (k text COLLATE "C" PRIMARY KEY, v text);
CREATE TABLE strict_full (k text COLLATE "C", v text); ALTER TABLE strict_full REPLICA IDENTITY FULL;
INSERT INTO folded VALUES ('Copied', 'a'), ('other', 'b');
"""
TARGET = """
CREATE TABLE strict_here (k text COLLATE caseless PRIMARY KEY, v text COLLATE caseless);
CREATE TABLE strict_full (k text COLLATE caseless, v text COLLATE "POSIX");
"""
TABLES = ("folded", "folded_full", "folded_unique", "strict_here", "strict_full")


@pytest.fixture(scope="module")
def pair(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    folder = tmp_path_factory.mktemp("collation")
    with running(stack, folder, SCHEMA, TABLES, source=SOURCE, target=TARGET, versions=(18, 16)) as made:
        yield made


def test_a_key_that_changes_its_spelling_only_is_changed(pair: TwoNodes) -> None:
    commit(
        pair,
        "UPDATE folded SET k = 'COPIED' WHERE k = 'copied'; UPDATE folded SET v = 'set' WHERE k = 'OTHER'",
        "UPDATE folded SET k = 'x' WHERE k = 'other'; INSERT INTO folded VALUES ('OTHER', 'new');"
        " DELETE FROM folded WHERE k = 'X'; INSERT INTO folded VALUES ('X', 'newer')",
        "INSERT INTO folded VALUES ('y', '1'); UPDATE folded SET k = 'Y' WHERE k = 'y';"
        " DELETE FROM folded WHERE k = 'y'",
    )
    assert same(pair, "folded") == [("COPIED", "a"), ("OTHER", "new"), ("X", "newer")]
    assert anomalies(pair, "folded") == {}


def test_of_rows_that_are_equal_by_collation_the_one_that_is_spelled_so_is_meant(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO folded_full VALUES ('a', 1), ('A', 1), ('A', 1), (NULL, 1)",
        "UPDATE folded_full SET n = 2 WHERE k COLLATE \"C\" = 'a'",
        "DELETE FROM folded_full WHERE ctid ="
        " (SELECT max(ctid) FROM folded_full WHERE k COLLATE \"C\" = 'A')",
        "UPDATE folded_full SET k = 'a' WHERE k IS NULL",
    )
    assert same(pair, "folded_full") == [("A", "1"), ("a", "1"), ("a", "2")]
    assert anomalies(pair, "folded_full") == {}


def test_unique_values_are_swapped_by_spelling(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO folded_unique VALUES (1, 'one'), (2, 'two')",
        "UPDATE folded_unique SET k = upper(k); UPDATE folded_unique SET k = '-' WHERE id = 1;"
        " UPDATE folded_unique SET k = 'One' WHERE id = 2; UPDATE folded_unique SET k = 'Two' WHERE id = 1",
    )
    assert same(pair, "folded_unique") == [("1", "Two"), ("2", "One")]


def test_a_target_that_calls_two_of_the_sources_keys_equal_keeps_one_and_says_so(pair: TwoNodes) -> None:
    commit(
        pair, "INSERT INTO strict_here VALUES ('k', 'small'), ('l', 'l')", "UPDATE strict_here SET v = 'L'"
    )
    assert len(same(pair, "strict_here")) == 2
    commit(pair, "INSERT INTO strict_here VALUES ('K', 'large')")
    assert pair.b.query("SELECT k, v FROM strict_here WHERE k = 'k'") == [("K", "large")]
    assert anomalies(pair, "strict_here") == {"insert_exists": 1}


def test_without_a_key_the_collation_of_the_target_does_not_mix_rows(pair: TwoNodes) -> None:
    commit(
        pair,
        "INSERT INTO strict_full VALUES ('k', 'a'), ('K', 'a'), ('k', 'A')",
        "DELETE FROM strict_full WHERE k = 'K'; UPDATE strict_full SET v = 'b' WHERE v = 'A'",
    )
    assert same(pair, "strict_full") == [("k", "a"), ("k", "b")]
    assert anomalies(pair, "strict_full") == {}
