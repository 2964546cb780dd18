"""Worker processes that will not end or cannot start harm no other stream; none outlives its service.

Each test starts a service of its own, as a process: what is forked must not have the threads of a test run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import until
from vsql_shared.errors import EnvironmentFault
from vsql_shared.service.workers import pause_after

# What the nursery imports. Its worker does what its stream is called.
WORKER = """
import os, pathlib, signal, sys, time
IMPORTED_IN = os.getpid()

def run(argv):
    name = argv[argv.index("--chain") + 1]
    if name == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    state = {"pid": os.getpid(), "ppid": os.getppid(), "argv": argv, "imported_in": IMPORTED_IN,
             "slot": os.environ.get("SLOT"), "open": [os.readlink(f"/proc/self/fd/{n}") for n in
             os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{n}")],
             "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
             "random": __import__("random").random()}
    new = pathlib.Path(__file__).with_name(f"new-{os.getpid()}")
    new.write_text(__import__("json").dumps(state))
    new.rename(new.with_name(name + ".json"))
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from vsql_shared.observe import shared_metrics
        slot = shared_metrics.current_slot()
        pathlib.Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"gauge_livesum_{slot}.db").touch()
    if name.startswith("exit "):
        return int(name[5:])
    if name == "raises":
        raise ValueError
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    from vsql_shared.observe.process import die_with_parent
    die_with_parent(signal.SIGTERM if name != "stubborn" else signal.SIGKILL, int(argv[-1]))
    time.sleep(60)
"""

SERVICE = """
import json, os, signal, sys, threading, time
from vsql_shared.service.nursery import NurseryGoneError, begin
begun = begin("a_package", ("a_worker",), sys.argv[1:])
if isinstance(begun, list):
    import a_worker
    sys.exit(a_worker.run(begun))
from vsql_shared.service.workers import Workers
workers = Workers(begun, None, 0.1, 1.0, stop_timeout=0.5)

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

def codes(*names):
    handles = [begun.start(name, ["--chain", name], {"SLOT": name}) for name in names]
    until(lambda: all(handle.poll() is not None for handle in handles))
    return [handle.returncode for handle in handles]

def there(name):
    return os.path.exists(os.path.join(os.environ["PYTHONPATH"].split(":")[0], name + ".json"))

"""

# A nursery's module that leaves it no process to start.
LIMITED = """
import os, resource
if os.getuid() == 0:  # whom no limit holds
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
"""


class Service:
    """A service that runs a few lines; what it printed last as JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "a_worker.py").write_text(WORKER)
        self.process: subprocess.Popen[str] | None = None

    def begin(self, lines: str) -> psutil.Process:
        """Start it."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVICE + textwrap.dedent(lines), "--config", "a.toml"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), *sys.path])},
            stdout=subprocess.PIPE,
            text=True,
        )
        return psutil.Process(self.process.pid)

    def run(self, lines: str) -> Any:
        """Run it to its end."""
        self.begin(lines)
        assert self.process is not None
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return json.loads(out.splitlines()[-1])

    def worker(self, name: str) -> dict[str, Any]:
        """What a worker found about itself."""
        path = self.folder / f"{name}.json"
        until(path.exists)
        return dict(json.loads(path.read_text()))

    def end(self) -> None:
        """Whatever a test left."""
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    yield made
    made.end()


@pytest.mark.parametrize("again", [False, True], ids=["not wanted any more", "wanted again"])
def test_a_worker_that_does_not_end_is_killed(service: Service, again: bool) -> None:
    ended = service.run(f"""
        workers.sync(["stubborn"])
        until(lambda: there("stubborn"))
        workers.sync([])
        ended = []
        until(lambda: ended.extend(workers.sync(["stubborn"] if {again} else [])) or ended)
        workers.stop()
        print(json.dumps(ended))
    """)
    assert ended == ["stubborn"]


def test_a_worker_that_cannot_be_started_leaves_the_others_alone(service: Service) -> None:
    running = service.run("""
        too_long = "x" * 200_000
        for _ in range(2):
            workers.sync([too_long, "one"])
        found = workers.running()
        workers.stop()
        print(json.dumps([found[too_long], found["one"]]))
    """)
    assert running == [False, True]


def test_a_fork_the_system_refuses_is_told_each_time(service: Service) -> None:
    (service.folder / "limited.py").write_text(LIMITED)
    found = service.run("""
        workers.stop()
        begun = begin("a_package", ("limited",), [])
        if isinstance(begun, list):
            os._exit(7)
        found = [codes("one"), codes("one")]
        begun.close()
        print(json.dumps(found))
    """)
    assert found == [[os.EX_OSERR], [os.EX_OSERR]]


def test_a_service_that_may_not_fork_says_what_to_look_at(tmp_path: Path) -> None:
    lines = """
        import sys
        from vsql_shared.service.main import service_main
        import limited
        sys.exit(service_main("producer", "a_package", print, []))
    """
    (tmp_path / "limited.py").write_text(LIMITED)
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == EnvironmentFault.exit_code
    assert "no process that starts workers can be had: Resource temporarily unavailable" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_exit_codes_and_signals_are_told_as_they_were(service: Service) -> None:
    codes = service.run("""
        found = codes("exit 0", "exit 4", "raises", "killed")
        workers.stop()
        print(json.dumps(found))
    """)
    assert codes == [0, 4, 1, -signal.SIGKILL]


def test_a_signal_that_follows_the_start_at_once_is_not_lost(service: Service) -> None:
    codes = service.run("""
        begun.start("exit 0", ["--chain", "exit 0"], {})
        handles = [begun.start("waits", ["--chain", "waits"], {}) for _ in range(20)]
        for handle in handles:
            handle.send_signal(signal.SIGTERM)
        until(lambda: all(handle.poll() is not None for handle in handles))
        workers.stop()
        print(json.dumps([handle.returncode for handle in handles]))
    """)
    assert codes == [-signal.SIGTERM] * 20


def test_workers_share_the_imports_and_nothing_else(service: Service) -> None:
    service.run("""
        workers.sync(["one", "two#3"])
        until(lambda: there("one") and there("two"))
        workers.stop()
        print(0)
    """)
    one, two = service.worker("one"), service.worker("two")
    assert one["imported_in"] == two["imported_in"] == one["ppid"] == two["ppid"] != one["pid"]
    assert one["argv"] == ["--chain", "one", "--service-pid", str(one["ppid"])]
    assert two["argv"] == ["--chain", "two", "--member", "--service-pid", str(two["ppid"])]
    assert one["random"] != two["random"]
    for worker in (one, two):
        assert worker["mask"] == []
        assert [name for name in worker["open"] if name.startswith("socket:")] == []
        assert len([name for name in worker["open"] if name.startswith("pipe:")]) <= 3, "standard streams"


def test_a_worker_has_the_environment_of_its_own_order(service: Service) -> None:
    service.run("""
        codes("exit 0", "exit 4")
        workers.stop()
        print(0)
    """)
    assert (service.worker("exit 0")["slot"], service.worker("exit 4")["slot"]) == ("exit 0", "exit 4")


def test_the_nursery_has_one_thread_and_each_process_its_own_command_line(service: Service) -> None:
    top = service.begin('workers.sync(["one"])\ntime.sleep(60)')
    pid = service.worker("one")["pid"]
    (nursery,) = top.children()
    assert nursery.num_threads() == 1
    assert nursery.cmdline() == [sys.executable, "-m", "a_package", "--config", "a.toml", "(nursery)"]
    assert psutil.Process(pid).cmdline()[:5] == [sys.executable, "-m", "a_package", "--chain", "one"]


@pytest.mark.parametrize(
    "modules",
    [["vsql_producers.worker"], ["vsql_consumers.worker", "vsql_consumers.member"]],
    ids=lambda m: m[0],
)
def test_what_a_nursery_imports_begins_no_thread_opens_nothing_and_loads_no_driver_of_a_token(
    service: Service, modules: list[str]
) -> None:
    lines = f"""
        workers.stop()
        begun = begin("a_package", {modules!r}, [])
        if isinstance(begun, list):
            os._exit(0)
        assert codes("one") == [0]
        print("ready", flush=True)
        time.sleep(60)
    """
    top = service.begin(lines)
    assert service.process is not None
    assert service.process.stdout is not None
    assert service.process.stdout.readline() == "ready\n"
    (nursery,) = top.children()
    assert nursery.num_threads() == 1
    folder = Path(f"/proc/{nursery.pid}/fd")
    opened = [str(path.readlink()) for path in folder.iterdir() if int(path.name) > 2]
    assert sorted(place.partition(":")[0] for place in opened) == ["pipe", "pipe", "socket"]
    assert [
        name for name in ("pkcs11", "softhsm") if name in Path(f"/proc/{nursery.pid}/maps").read_text()
    ] == []


@pytest.mark.parametrize("victim", ["service", "nursery", "service beside a stopped nursery"])
def test_nothing_outlives_a_service_whose_part_is_killed(service: Service, victim: str) -> None:
    lines = """
        workers.sync(["one", "stubborn"])
        try:
            while True:
                time.sleep(0.1)
                workers.sync(["one", "stubborn"])
        except NurseryGoneError:
            print(json.dumps(workers.stop()))
    """
    top = service.begin(lines)
    started = [psutil.Process(service.worker(name)["pid"]) for name in ("one", "stubborn")]
    (nursery,) = top.children()
    if victim.endswith("stopped nursery"):
        nursery.suspend()
    (nursery if victim == "nursery" else top).kill()
    assert service.process is not None
    out, _ = service.process.communicate(timeout=20)
    assert out.strip() == ("false" if victim == "nursery" else ""), "its workers were not stopped by it"
    gone, left = psutil.wait_procs([nursery, *started], timeout=10)
    assert (len(gone), left) == (3, [])


def test_a_stop_whose_orders_are_not_taken_at_first_is_still_in_order(service: Service) -> None:
    stopped = service.run("""
        workers.sync(["one"])
        until(lambda: there("one"))
        os.kill(begun.pid, signal.SIGSTOP)
        try:
            while True:
                begun.order({"signal": 0, "number": 0})
        except BlockingIOError:
            threading.Timer(0.2, os.kill, (begun.pid, signal.SIGCONT)).start()
        print(json.dumps(workers.stop()))
    """)
    assert stopped is True


def test_a_dead_nursery_is_noticed_without_a_worker(service: Service) -> None:
    noticed = service.run("""
        os.kill(begun.pid, signal.SIGKILL)
        os.waitid(os.P_PID, begun.pid, os.WEXITED | os.WNOWAIT)
        try:
            workers.look()
            noticed = False
        except NurseryGoneError:
            noticed = True
        workers.stop()
        print(json.dumps(noticed))
    """)
    assert noticed is True


def test_a_worker_that_starts_again_at_once_keeps_its_present_values(service: Service) -> None:
    """`exit 0` starts again in the very turn that sees its end: what goes is of the one that ended."""
    found = service.run("""
        from vsql_shared.observe import shared_metrics
        place = shared_metrics.begin() / f"gauge_livesum_{shared_metrics.file_name_of('exit 0')}.db"
        workers.sync(["exit 0"])
        until(lambda: not workers.running()["exit 0"])
        first = place.stat().st_ino
        place.with_name("kept").hardlink_to(place)
        found = [workers.sync(["exit 0"])]
        until(lambda: not workers.running()["exit 0"])
        found += [place.exists() and place.stat().st_ino != first, workers.sync([]), place.exists()]
        workers.stop()
        print(json.dumps(found))
    """)
    assert found == [["exit 0"], True, ["exit 0"], False]


def test_a_signal_to_the_whole_group_stops_in_order(service: Service) -> None:
    lines = """
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        workers.sync(["one"])
        asked.wait(30)
        print(json.dumps(workers.stop()))
    """
    code = f"import os; os.setsid(); exec({SERVICE + textwrap.dedent(lines)!r})"
    service.process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(service.folder), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )
    service.worker("one")
    os.killpg(service.process.pid, signal.SIGTERM)
    assert service.process.communicate(timeout=20)[0].strip() == "true"


def test_the_pause_between_starts_doubles_up_to_its_bound_for_ever() -> None:
    assert [pause_after(failures, 0.1, 1.0) for failures in (1, 2, 3, 4, 5)] == [0.1, 0.2, 0.4, 0.8, 1.0]
    assert pause_after(1_000_000, 0.1, 60.0) == 60.0
