"""A pair of nodes for all tests of one file, and how their rows are compared.

The tests of a file share one pair, whose stream runs, so that each costs no more than its own changes: every
test has tables of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.nodes import TwoNodes
from tests.stack import Stack

Rows = list[tuple[Any, ...]]


@contextmanager
def running(
    stack: Stack,
    folder: Path,
    schema: str,
    tables: Sequence[str],
    *,
    source: str = "",
    target: str = "",
    versions: tuple[int, int] = (18, 18),
    publication_args: Sequence[str] = (),
    config: str = "",
    conninfos: tuple[str, str] | None = None,
    kafka: str | None = None,
) -> Iterator[TwoNodes]:
    """Nodes whose first copy is done. `source` and `target`: what one of them has beside `schema`."""
    pair = TwoNodes(
        stack,
        folder,
        schema,
        version=versions[0],
        target_version=versions[1],
        config=config,
        conninfos=conninfos,
        kafka=kafka,
    )
    try:
        for node, script in ((pair.a, source), (pair.b, target)):
            if script:
                node.execute(script)
        pair.create(tables, publication_args=publication_args)
        pair.start()
        pair.wait_in_step(timeout=100)
        yield pair
        pair.stop()
    finally:
        pair.end()


def commit(pair: TwoNodes, *scripts: str, timeout: float = 150) -> None:
    """Run each script as one transaction of the source, and wait until the target has them."""
    for script in scripts:
        pair.a.execute(script)
    pair.wait_in_step(timeout=timeout)


def rows(pair: TwoNodes, query: str) -> tuple[Rows, Rows]:
    """What a query gives at the source and at the target, each in its own order of text."""
    source, target = (sorted(node.query(query), key=repr) for node in (pair.a, pair.b))
    return source, target


def same(pair: TwoNodes, *tables: str) -> Rows:
    """Require that tables are equal, column by column of the source's; the rows of the last one."""
    found: Rows = []
    for table in tables:
        names = pair.a.query(
            "SELECT quote_ident(attname) FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
            " AND NOT attisdropped ORDER BY attnum",
            table,
        )
        columns = ", ".join(f"{name}::text" for (name,) in names)
        found, target = rows(pair, f"SELECT {columns} FROM {table}")
        assert target == found, table
    return found


def anomalies(pair: TwoNodes, table: str) -> dict[str, int]:
    """Counts of what did not fit the target's rows, by kind."""
    schema, _, name = table.rpartition(".")
    found = pair.b.query(
        "SELECT kind, count FROM vsql_sync.anomalies WHERE table_schema = %s AND table_name = %s",
        schema or "public",
        name,
    )
    return dict(found)
