"""The daemon with real processes: one per node, bounded restarts, a stop that says what it killed.

The supervisor runs any program; most tests give it small ones that end, wait or do not listen. The tests
of `syncctl daemon` run the real services of a node whose database is not there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from vsql_ctl.daemon import launch
from vsql_ctl.daemon import state as disk
from vsql_ctl.daemon.identity import ProcessId
from vsql_ctl.daemon.launch import plan_of, start_in_background
from vsql_ctl.daemon.logfile import RotatingFile, last_lines
from vsql_ctl.daemon.state import DaemonState
from vsql_shared.config import Settings, load_settings
from vsql_shared.errors import EnvironmentFault, RefusedError

# One write, so that two services never share a line.
UP = "import os, signal, sys, time\n{}\nos.write(1, b'up\\n')\nwhile True: time.sleep(0.05)\n"
WAITS = UP.format("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))")
DEAF = UP.format("signal.signal(signal.SIGTERM, signal.SIG_IGN)")

DAEMON = """
import json, pathlib, sys
from vsql_ctl.cli import exit_with
from vsql_ctl.daemon.launch import run_here
from vsql_ctl.daemon.supervisor import Plan
values = json.loads(sys.argv[1])
values["folder"] = pathlib.Path(values["folder"])
exit_with(lambda: run_here(Plan(**values)))
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def _is_gone(pid: int) -> bool:
    """Ended; a container's first process may leave its orphans unreaped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Daemon:
    """A daemon process over programs of the test's choice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, producer: str = WAITS, consumer: str = WAITS, **plan: object) -> subprocess.Popen[str]:
        commands = {
            "producer": [sys.executable, "-c", producer],
            "consumer": [sys.executable, "-c", consumer],
        }
        values = {
            "folder": str(self.folder),
            "source": "test",
            "commands": commands,
            "stop_seconds": 5,
            **plan,
        }
        values.setdefault("backoff_seconds", 0.05)
        self.process = subprocess.Popen(
            [sys.executable, "-c", DAEMON, json.dumps(values)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        return self.process

    def start_and_wait(self, **plan: object) -> None:
        self.start(**plan)  # type: ignore[arg-type]  # the two programs and the rest pass through together
        _until(lambda: all(self.log(name)[-1:] == ["up"] for name in ("producer", "consumer")), "both are up")

    def log(self, service: str) -> list[str]:
        return last_lines(self.folder / f"{service}.log")

    def found(self) -> DaemonState:
        state = disk.read(self.folder)
        assert state is not None
        return state

    def pid(self, service: str) -> int:
        return self.found().services[service].pid or 0

    def stop(self, stop_seconds: float = 5) -> list[str]:
        """Stop it from another process, as `syncctl daemon stop` does."""
        code = (
            "import pathlib, sys; from vsql_ctl.daemon.launch import stop\n"
            "print(*stop(pathlib.Path(sys.argv[1]), float(sys.argv[2]), lambda _: None).killed)"
        )
        assert self.process is not None
        stopper = subprocess.Popen(
            [sys.executable, "-c", code, str(self.folder), str(stop_seconds)],
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        self.process.communicate(timeout=60)
        return stopper.communicate(timeout=60)[0].split()


def _end_what_is_left(folder: Path) -> None:
    left = disk.read(folder)
    if left is not None:
        left.process.send(signal.SIGKILL)
        for service in left.services.values():
            process = service.process()
            if process is not None:
                process.send(signal.SIGKILL)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that is ended after the test, whatever the test left."""
    made = Daemon(tmp_path / "state")
    yield made
    _end_what_is_left(made.folder)
    if made.process is not None:
        made.process.kill()
        made.process.communicate()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A folder with the configuration of a node whose database is not there."""
    (tmp_path / "vsql-sync.toml").write_text(
        '[cluster]\nname = "c"\nnode_id = 1\nnode_name = "a"\n[connection]\ndatabase = "d"\nport = 1\n'
        '[server]\nmode = "dev"\nstate_dir = "state"\nstop_timeout = "20s"\n'
        '[encryption.kms.file]\npath = "kek"\n[kafka]\nbootstrap_servers = "127.0.0.1:1"\n'
        '[metrics]\nproducer_addr = "127.0.0.1:0"\nconsumer_addr = "127.0.0.1:0"\n'
    )
    (tmp_path / "kek").touch(0o600)
    yield tmp_path
    _end_what_is_left(tmp_path / "state")


def _settings(node: Path) -> Settings:
    return load_settings(node / "vsql-sync.toml")


def _syncctl(node: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vsql_ctl", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=node,
        env=_environment(),
    )


def test_a_node_is_started_looked_at_and_stopped(node: Path) -> None:
    started = _syncctl(node, "daemon", "start")
    assert started.returncode == 0, started.stderr
    assert f"logs in {node}/state" in started.stdout
    status = json.loads(_syncctl(node, "daemon", "status", "--output", "json").stdout)
    assert status["running"] is True
    assert status["source"] == f"{node}/vsql-sync.toml"
    assert [service["service"] for service in status["services"]] == ["producer", "consumer"]
    second = _syncctl(node, "daemon", "start")
    assert second.returncode == 4
    assert f"a daemon of this node runs already (process {status['pid']})" in second.stderr
    stopped = _syncctl(node, "daemon", "stop")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == "stopped\n"
    assert "\r" not in stopped.stderr, "no control characters where nobody sees a terminal"
    assert _is_gone(status["pid"])


def test_a_node_without_daemon_says_so(node: Path) -> None:
    status, stop = _syncctl(node, "daemon", "status"), _syncctl(node, "daemon", "stop")
    assert (status.returncode, status.stdout) == (1, "not running\n")
    assert stop.returncode == 4
    assert "hint: start one with `syncctl daemon start`" in stop.stderr


def test_what_is_wrong_with_the_configuration_is_said_before_anything_starts(node: Path) -> None:
    (node / "kek").unlink()
    done = _syncctl(node, "daemon", "start")
    assert done.returncode == 3
    assert "encryption.kms.file.path" in done.stderr
    assert not (node / "state").exists()


def test_a_state_folder_that_cannot_be_made_is_named(node: Path) -> None:
    (node / "state").write_text("a file")
    with pytest.raises(EnvironmentFault, match=r"the state folder .*state cannot be made"):
        start_in_background(_settings(node))


def test_a_daemon_that_cannot_start_says_why_in_its_own_words(node: Path) -> None:
    settings = _settings(node)
    (node / "vsql-sync.toml").write_text("[cluster]\n")
    with pytest.raises(EnvironmentFault, match="the daemon ended with exit code 3") as caught:
        start_in_background(settings)
    assert "cluster.name: missing" in caught.value.message
    assert caught.value.exit_code == 3
    assert launch.look(node / "state") is None


def test_the_plan_names_both_services_and_the_file(node: Path) -> None:
    plan = plan_of(_settings(node), to_files=True)
    assert list(plan.commands) == ["producer", "consumer"]
    for command in plan.commands.values():
        assert command[-2:] == ["--config", str(node / "vsql-sync.toml")]


def test_services_are_stopped_together_and_leave_no_process(daemon: Daemon) -> None:
    daemon.start_and_wait()
    pids = [daemon.pid("producer"), daemon.pid("consumer")]
    assert daemon.stop() == []
    assert all(_is_gone(pid) for pid in pids)
    assert not disk.is_held(daemon.folder)
    assert {each.last_exit for each in daemon.found().services.values()} == {0}


def test_a_second_daemon_of_a_state_folder_is_refused(daemon: Daemon) -> None:
    daemon.start_and_wait()
    first = daemon.found().pid
    second = Daemon(daemon.folder).start()
    _, said = second.communicate(timeout=30)
    assert second.returncode == 4
    assert f"error: a daemon of this node runs already (process {first})" in said
    assert daemon.found().pid == first


def test_a_service_that_is_killed_is_started_again(daemon: Daemon) -> None:
    daemon.start_and_wait()
    first = daemon.pid("producer")
    os.kill(first, signal.SIGKILL)
    _until(lambda: daemon.pid("producer") not in (0, first), "the producer is started again")
    found = daemon.found().services
    assert (found["producer"].restarts, found["producer"].last_exit) == (1, -signal.SIGKILL)
    assert found["consumer"].restarts == 0


def test_the_pause_between_restarts_doubles_up_to_its_bound(daemon: Daemon) -> None:
    daemon.start(producer="raise SystemExit(7)", backoff_seconds=0.1, backoff_max_seconds=0.4)
    log = daemon.folder / "daemon.log"
    _until(lambda: log.exists() and log.read_text().count("producer ended") >= 5, "five ends")
    pauses = [line.rpartition(" in ")[2] for line in log.read_text().splitlines() if "producer ended" in line]
    assert pauses[:5] == ["0.1 s", "0.2 s", "0.4 s", "0.4 s", "0.4 s"]


@pytest.mark.parametrize("code", [2, 3])
def test_a_service_whose_command_is_wrong_is_not_started_again(daemon: Daemon, code: int) -> None:
    daemon.start(producer=f"print('error: key x is wrong'); raise SystemExit({code})")
    _until(lambda: daemon.log("consumer") == ["up"] and daemon.log("producer") != [], "both began")
    _until(lambda: daemon.found().services["producer"].state == "failed", "the producer is given up")
    time.sleep(0.3)
    assert daemon.found().services["producer"].restarts == 0
    assert daemon.found().services["consumer"].state == "running"
    assert daemon.log("producer") == ["error: key x is wrong"]


def test_a_service_that_is_refused_is_started_again(daemon: Daemon) -> None:
    """After a crash the server may hold the lock of the service that died until it notices."""
    daemon.start(producer="raise SystemExit(4)", backoff_seconds=0.1)
    _until(lambda: daemon.log("consumer") == ["up"], "the daemon began")
    _until(lambda: daemon.found().services["producer"].restarts >= 2, "the producer is started again")


def test_when_no_service_is_left_the_daemon_ends_with_their_code(daemon: Daemon) -> None:
    process = daemon.start(producer="raise SystemExit(3)", consumer="raise SystemExit(3)")
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert not disk.is_held(daemon.folder)


def test_a_service_that_does_not_stop_is_killed_with_its_children_and_that_is_said(daemon: Daemon) -> None:
    parent = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {DEAF!r}])\n{DEAF}"
    daemon.start_and_wait(consumer=parent, stop_seconds=1)
    group = daemon.pid("consumer")
    _until(lambda: daemon.log("consumer") == ["up", "up"], "the child is up too")
    (child,) = (process.pid for process in psutil.Process(group).children())
    assert daemon.stop() == ["consumer"]
    _until(lambda: _is_gone(child), "the child is killed")
    assert _is_gone(group)


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is signalled on Linux only")
def test_a_killed_daemon_leaves_no_service_behind_and_its_folder_free(daemon: Daemon) -> None:
    daemon.start_and_wait()
    service = daemon.pid("producer")
    os.kill(daemon.found().pid, signal.SIGKILL)
    _until(lambda: _is_gone(service), "the service ends with its daemon")
    assert launch.look(daemon.folder) is None


def test_a_recycled_process_id_is_not_signalled(tmp_path: Path) -> None:
    """The recorded daemon is gone, another holds the lock, and its id now belongs to somebody else."""
    bystander = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.DEVNULL)
    try:
        disk.write(tmp_path, DaemonState(bystander.pid, "another-boot/1", time.time(), "x"))
        with disk.exclusive(tmp_path), pytest.raises(RefusedError, match="held by another process"):
            launch.stop(tmp_path, 1, lambda _seconds: None)
        assert not ProcessId(bystander.pid, "another-boot/1").send(signal.SIGKILL)
        assert bystander.poll() is None
        real = ProcessId.of(bystander.pid)
        assert real is not None
        assert real.send(signal.SIGKILL)
        assert bystander.wait(10) == -signal.SIGKILL
        assert not real.send(signal.SIGKILL)
        assert not real.is_running()
    finally:
        bystander.kill()
        bystander.wait()


def test_a_daemon_that_does_not_answer_is_killed_with_its_services(daemon: Daemon) -> None:
    daemon.start_and_wait()
    found = daemon.found()
    os.kill(found.pid, signal.SIGSTOP)
    pids = [found.pid, daemon.pid("producer"), daemon.pid("consumer")]
    stopped = launch.stop(daemon.folder, 0.2, lambda _seconds: None, grace_seconds=0.3)
    assert stopped.killed[0] == "daemon"
    assert set(stopped.killed) <= {"daemon", "producer", "consumer"}
    _until(lambda: all(_is_gone(pid) for pid in pids), "killed, or ended with the daemon")


DAMAGED = {
    "empty": "",
    "cut": '{"pid": 12',
    "list": "[]",
    "wrong type": '{"pid": "x", "process_started": "", "since": 0, "source": "", "services": {}}',
    "incomplete": '{"pid": 1}',
    "services": '{"pid": 1, "process_started": "", "since": 0, "source": "", "services": []}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_state_file_is_no_state(tmp_path: Path, content: str) -> None:
    (tmp_path / disk.STATE_NAME).write_text(content)
    assert disk.read(tmp_path) is None


def test_the_state_folder_is_private(daemon: Daemon) -> None:
    daemon.start_and_wait()
    assert daemon.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in daemon.folder.iterdir()} == {0}


def test_in_the_foreground_output_is_passed_on_and_a_signal_ends_all(daemon: Daemon) -> None:
    process = daemon.start(to_files=False)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "producer stopped with exit code 0" in said
    assert not (daemon.folder / "producer.log").exists()


def test_log_files_stay_within_their_bound(daemon: Daemon) -> None:
    daemon.start_and_wait(
        producer="for i in range(4000): print(i, 'x' * 100)\n" + WAITS, log_max_bytes=65_536, log_keep=2
    )
    files = sorted(path.name for path in daemon.folder.glob("producer.log*"))
    assert files == ["producer.log", "producer.log.1", "producer.log.2"]
    assert all((daemon.folder / name).stat().st_size <= 65_536 for name in files)


def test_rotation_keeps_order_and_loses_nothing_that_fits(tmp_path: Path) -> None:
    log = RotatingFile(tmp_path / "a.log", max_bytes=100, keep=3)
    for number in range(30):
        log.write(f"{number:09d}\n".encode())
    log.close()
    names = ("a.log.3", "a.log.2", "a.log.1", "a.log")
    lines = "".join((tmp_path / name).read_text() for name in names if (tmp_path / name).exists())
    assert lines.split() == [f"{number:09d}" for number in range(30)]
    assert last_lines(tmp_path / "none") == []
