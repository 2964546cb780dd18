"""What `pip install vsql-sync` installs: our five uniquely named packages, their data, one command."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack.state import REPOSITORY

PACKAGES = {"vsql_producers", "vsql_consumers", "vsql_schemas", "vsql_shared", "vsql_ctl"}
SOURCE_ROOTS = ("producers", "consumers", "schemas", "shared")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from this checkout with the build backend that is installed."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run([*command, str(REPOSITORY)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def _metadata(wheel: zipfile.ZipFile, file: str) -> str:
    (name,) = (name for name in wheel.namelist() if name.endswith(f".dist-info/{file}"))
    return wheel.read(name).decode()


def test_the_wheel_holds_only_our_uniquely_named_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    information = {name for name in top if name.endswith(".dist-info")}
    assert len(information) == 1
    assert top - information == PACKAGES


def test_every_data_file_beside_the_code_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(REPOSITORY / root).as_posix()
        for root in SOURCE_ROOTS
        for package in PACKAGES
        for path in (REPOSITORY / root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in expected} >= {".py", ".sql", ".avsc"}
    assert expected - set(wheel.namelist()) == set()


def test_no_python_file_lies_beside_the_packages() -> None:
    loose = [path for root in SOURCE_ROOTS for path in (REPOSITORY / root).glob("*.py")]
    assert loose == []


def test_the_distribution_says_its_name_licence_and_oldest_python(wheel: zipfile.ZipFile) -> None:
    lines = _metadata(wheel, "METADATA").splitlines()
    assert "Name: vsql-sync" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines
    assert "Apache License" in _metadata(wheel, "licenses/LICENSE")


def test_the_wheel_brings_the_syncctl_command(wheel: zipfile.ZipFile) -> None:
    assert "syncctl = vsql_ctl.cli:main" in _metadata(wheel, "entry_points.txt").splitlines()
