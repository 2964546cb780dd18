"""Fixtures every test can use; `tests.stack` says how.

Rules: servers are shared by the session, databases and cluster names belong to one test; a test that is
not marked `unit` by its folder starts servers only when it asks for one. With `pytest -n 3` the workers share
Kafka and the older PostgreSQLs, and the longest tests begin first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import settings
from psycopg.conninfo import conninfo_to_dict

from tests.stack import POSTGRES_VERSIONS, Kafka, Postgres, Stack
from tests.stack.shared import Borrower, SharedServers
from vsql_shared.pg.connect import connect
from vsql_shared.pg.migrate import install

pytest_plugins = ["tests.pairs"]

# How long an example takes says how busy the machine is.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

_FOLDER_MARKS = {"unit": "unit", "services": "services", "topology": "topology", "chaos": "chaos"}


_SCENES = (
    "test_beyond_native.py",
    "test_drift.py",
    "test_extension.py",
    "test_failpoints.py",
    "test_faults.py",
    "test_kafka_rights.py",
    "test_packaging.py",
    "test_partitioned.py",
    "test_prod_mode.py",
    "test_schema_registry.py",
    "test_size.py",
    "test_tampering.py",
)
"""Files whose tests stand on one costly scene (a fixture of their module), or write into one folder."""

_ONE_TOPIC = ("test_audit_watch.py", "test_audit_watch_pruned.py")
"""Files whose tests each make the audit topic of the histories' cluster anew: the run has one Kafka."""

_SHARED = pytest.StashKey[SharedServers]()


class NewDatabase(Protocol):
    """What the `new_database` fixture gives: call it for an empty database's connection string.

    `new_schema` gives the same for databases that have our schema.
    """

    def __call__(self, prefix: str = "test", version: int = 18) -> str: ...


def scene(nodeid: str) -> str:
    """What a test must not be parted from: its file's scene (one for each version), or nothing but itself."""
    file, _, test = nodeid.partition("::")
    if file.endswith(_ONE_TOPIC):
        return "the audit topic of the histories' cluster"
    version = re.search(r"\[pg\d+\]$", test)
    shared = file.endswith(_SCENES) or "/subscription/" in file
    return file + (version[0] if version else "") if shared else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out tests one by one, and those of one scene to one worker.

    `--dist loadgroup` would do the same by a mark, but does nothing under pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByScene(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return scene(nodeid)

    return ByScene(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where the run's servers are."""
    config: pytest.Config = node.config
    if _SHARED not in config.stash:
        config.stash[_SHARED] = SharedServers()
    node.workerinput["shared_servers"] = config.stash[_SHARED].address


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the servers of the run's workers."""
    if _SHARED in config.stash:
        config.stash[_SHARED].close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the folder it lies in; let those of whole streams begin first."""
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if folder in _FOLDER_MARKS:
            item.add_marker(_FOLDER_MARKS[folder])
    # A minute-long test that begins last leaves the other workers idle. Otherwise the random order stays.
    items.sort(key=lambda item: not any(item.get_closest_marker(mark) for mark in ("topology", "chaos")))
    first: dict[str, int] = {}
    for number, item in enumerate(items):
        first.setdefault(scene(item.nodeid), number)
    # A scene's tests tell one story, in the order of their file and of their parameters.
    items.sort(key=lambda item: (first[scene(item.nodeid)], item.location[1] or 0, _parameters(item)))


def _parameters(item: pytest.Item) -> tuple[int, ...]:
    """Which of each parameter's values a test has."""
    spec = getattr(item, "callspec", None)
    return () if spec is None else tuple(spec.indices.values())


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The session's servers, each started when a test first asks for it."""
    address = getattr(request.config, "workerinput", {}).get("shared_servers")
    with Stack(Borrower(address) if address else None) as running:
        _running.append(running)
        yield running
        _running.clear()


_running: list[Stack] = []


@pytest.fixture(scope="module", autouse=True)
def _no_slots_are_left() -> Iterator[None]:
    """A module's databases may stay, the WAL that their slots hold may not."""
    yield
    for running in _running:
        running.drop_idle_slots()


@pytest.fixture(scope="session")
def kafka(stack: Stack) -> Kafka:
    """The session's Kafka."""
    return stack.kafka()


@pytest.fixture(scope="session")
def pg18(stack: Stack) -> Postgres:
    """The session's PostgreSQL 18."""
    return stack.postgres(18)


@pytest.fixture(scope="session", params=POSTGRES_VERSIONS, ids=lambda version: f"pg{version}")
def pg(request: pytest.FixtureRequest, stack: Stack) -> Postgres:
    """The session's PostgreSQL of each version in turn."""
    return stack.postgres(request.param)


@pytest.fixture
def new_database(stack: Stack) -> Iterator[NewDatabase]:
    """Make empty databases; they are dropped, with their slots and sessions, after the test."""
    made: list[str] = []

    def make(prefix: str = "test", version: int = 18) -> str:
        made.append(stack.new_database(version, prefix))
        return made[-1]

    yield make
    for conninfo in made:
        stack.drop_database(conninfo)


@pytest.fixture(scope="session")
def schema_of(stack: Stack) -> Callable[[int], str]:
    """Version → the name of a database that has our schema and nothing else; made once a session."""

    @cache
    def made(version: int) -> str:
        conninfo = stack.new_database(version, "schema")
        with connect(conninfo, application_name="test") as conn:
            install(conn)
        return str(conninfo_to_dict(conninfo)["dbname"])

    return made


@pytest.fixture
def new_schema(stack: Stack, schema_of: Callable[[int], str]) -> Iterator[NewDatabase]:
    """As new_database, with our schema in them: copied, for installing it is most of a short test."""
    made: list[str] = []

    def make(prefix: str = "test", version: int = 18) -> str:
        made.append(stack.new_database(version, prefix, schema_of(version)))
        return made[-1]

    yield make
    for conninfo in made:
        stack.drop_database(conninfo)


@pytest.fixture
def cluster_name(stack: Stack) -> str:
    """A cluster name of this test's own."""
    return stack.new_cluster_name()
