"""syncctl as a process: help, errors, exit codes, pipes, configuration commands, completion."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil
import pytest

from vsql_ctl.cli import COMMANDS, EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, cli, command_named

SECRET = "hunter2-marker"

GOOD = f"""
[cluster]
name = "c"
node_id = 1
node_name = "a"
[connection]
database = "d"
password = "{SECRET}"
[server]
mode = "dev"
[encryption.kms.file]
path = "kek"
[[peers]]
node_id = 2
node_name = "b"
connection = "host=b password={SECRET}"
"""


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VSQL_SYNC")}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **more}


def _syncctl(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vsql_ctl", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=cwd,
        env=_environment(**env),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a good configuration and its key."""
    (tmp_path / "vsql-sync.toml").touch(0o600)
    (tmp_path / "vsql-sync.toml").write_text(GOOD)
    (tmp_path / "kek").touch(0o600)
    return tmp_path


def test_help_loads_no_client_library(tmp_path: Path) -> None:
    code = (
        "import sys; from vsql_ctl.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([m for m in ('psycopg', 'confluent_kafka', 'pydantic', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=_environment(),
    )
    assert done.stdout.splitlines()[-2:] == ["0", "[]"]
    assert "Commands:" in done.stdout


def test_every_listed_command_is_there_and_has_an_example() -> None:
    context = click.Context(cli)
    names = cli.list_commands(context)
    assert {"config", "daemon", "run", "completion"} <= set(names) <= set(COMMANDS)
    silent = []
    for name in names:
        command = command_named(name)
        assert command is not None, f"commands/{COMMANDS[name].module}.py has no click command named {name}"
        found = [command, *command.commands.values()] if isinstance(command, click.Group) else [command]
        silent += [f"{name} {each.name}" for each in found if "xample" not in (each.epilog or "")]
    assert silent == []


def test_a_module_that_is_not_there_is_a_command_that_does_not_exist(tmp_path: Path) -> None:
    done = _syncctl("nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: No such command 'nonsense'.", "hint: see `syncctl --help`"]
    assert command_named("nonsense") is None


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    done = _syncctl("--version", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("syncctl ")


def test_a_good_configuration_is_said_to_be_valid_and_where_it_was_found(folder: Path) -> None:
    done = _syncctl("config", "check", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder}/vsql-sync.toml: valid (dev mode)" in done.stdout
    assert "warning: audit.signing_key_path: no signing key" in done.stdout


def test_what_is_not_built_is_a_note_and_no_error(folder: Path) -> None:
    done = _syncctl("config", "check", "--output", "json", cwd=folder, VSQL_SYNC__CRYPTAPLY__ENABLED="true")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["valid"] is True
    assert found["not_built"] == ["cryptaply.enabled = true: not built yet; use false"]


def test_a_bad_configuration_is_one_error_and_exit_code_3(folder: Path) -> None:
    (folder / "bad.toml").write_text(
        GOOD.replace("node_id = 1", "node_id = 5000").replace("[server]", "[sever]")
    )
    for words in (("--config", "bad.toml", "config", "check"), ("config", "check", "--config=bad.toml")):
        done = _syncctl(*words, cwd=folder)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith(f"error: {folder}/bad.toml: ")
        assert "cluster.node_id = 5000: must be at most 1023" in done.stderr
        assert 'sever: unknown key; did you mean "server"?' in done.stderr
        assert "Traceback" not in done.stderr


def test_an_error_is_json_when_json_was_asked_for(folder: Path) -> None:
    done = _syncctl("--config", "none.toml", "config", "check", "--output", "json", cwd=folder)
    error = json.loads(done.stderr)["error"]
    assert done.returncode == error["exit_code"] == 3
    assert error["type"] == "ConfigError"
    assert "none.toml" in error["message"]
    usage = _syncctl("config", "check", "--output=json", "--nonsense", cwd=folder)
    assert json.loads(usage.stderr)["error"]["exit_code"] == usage.returncode == 2


def test_no_secret_is_shown_by_any_command(folder: Path) -> None:
    for words in (
        ("config", "show"),
        ("config", "show", "--output", "json"),
        ("config", "check"),
        ("config", "apply", "--dry-run"),
        ("--debug", "config", "apply", "--dry-run"),
        ("daemon", "status"),
    ):
        done = _syncctl(*words, cwd=folder, VSQL_SYNC__KAFKA__SECURITY__PASSWORD=SECRET)
        assert SECRET not in done.stdout + done.stderr, words
    shown = json.loads(_syncctl("config", "show", "--output", "json", cwd=folder).stdout)
    assert shown["connection"]["password"] == "********"
    assert shown["peers"][0]["connection"] == "host=b password=********"


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vsql_ctl", "config", "show"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=_environment(PYTHONUNBUFFERED="1"),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), said) == (EXIT_BROKEN_PIPE, b"")


def test_an_interrupt_is_quiet(folder: Path) -> None:
    (folder / "pw.sh").write_text("#!/bin/sh\necho asked > asked\nexec sleep 30\n")
    (folder / "pw.sh").chmod(0o700)
    code = (
        "import os, signal, sys, threading, time\n"
        "from vsql_ctl import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background ignores it
        "def interrupt():\n"
        "    while not os.path.exists('asked'): time.sleep(0.02)\n"
        "    os.kill(os.getpid(), 2)\n"
        "threading.Thread(target=interrupt, daemon=True).start()\n"
        "def work():\n"
        "    from vsql_shared.config import load_settings\n"
        "    load_settings().connection.conninfo()\n"
        "    return 0\n"
        "cli.exit_with(work)\n"
    )
    text = GOOD.replace(f'password = "{SECRET}"', f'password_command = "{folder}/pw.sh"')
    (folder / "vsql-sync.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
        env=_environment(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_INTERRUPTED, "", "")


def test_a_defect_is_one_line_and_a_traceback_only_on_demand(tmp_path: Path) -> None:
    code = (
        "import sys; from vsql_ctl import cli\n"
        f"sys.exit(cli.guarded(lambda: int('{SECRET}'), as_json=False, debug=len(sys.argv) > 1))"
    )
    run = [sys.executable, "-c", code]
    plain = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path, env=_environment())
    assert plain.returncode == 70
    assert plain.stderr.splitlines() == [
        "error: unexpected ValueError",
        "hint: this is a defect; rerun with --debug and report it",
    ]
    debug = subprocess.run(
        [*run, "x"], capture_output=True, text=True, check=False, cwd=tmp_path, env=_environment()
    )
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_syncctl(tmp_path: Path, shell: str) -> None:
    done = _syncctl("completion", shell, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"_SYNCCTL_COMPLETE={shell}_complete" in done.stdout


def test_completion_offers_commands_and_options(tmp_path: Path) -> None:
    found = _syncctl(
        cwd=tmp_path, _SYNCCTL_COMPLETE="bash_complete", COMP_WORDS="syncctl con", COMP_CWORD="1"
    )
    assert "plain,config" in found.stdout
    found = _syncctl(
        cwd=tmp_path, _SYNCCTL_COMPLETE="bash_complete", COMP_WORDS="syncctl config check --o", COMP_CWORD="3"
    )
    assert "plain,--output" in found.stdout


def test_a_question_needs_somebody_to_answer() -> None:
    code = (
        "import sys; from vsql_ctl import cli, context\n"
        "def work():\n"
        "    context.confirm('Destroy it?', yes=len(sys.argv) > 1)\n"
        "    print('done')\n"
        "    return 0\n"
        "cli.exit_with(work)\n"
    )
    run = [sys.executable, "-c", code]
    quiet = subprocess.run(
        run, capture_output=True, text=True, check=False, env=_environment(), stdin=subprocess.DEVNULL
    )
    assert (quiet.returncode, quiet.stdout) == (2, "")
    assert "hint: give --yes to agree" in quiet.stderr
    agreed = subprocess.run(
        [*run, "--yes"],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
        stdin=subprocess.DEVNULL,
    )
    assert (agreed.returncode, agreed.stdout) == (0, "done\n")
    for answer, code_expected in ((b"n\n", 2), (b"y\n", 0)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            run, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()
        )
        os.write(ours, answer)
        out, err = process.communicate(timeout=30)
        os.close(ours)
        os.close(theirs)
        assert process.returncode == code_expected, err
        assert (out == b"done\n") == (code_expected == 0)


def test_run_refuses_a_service_that_is_none_and_a_missing_configuration(tmp_path: Path) -> None:
    assert _syncctl("run", "observer", cwd=tmp_path).returncode == 2
    missing = _syncctl("run", "producer", cwd=tmp_path)
    assert missing.returncode == 3
    assert "no configuration found" in missing.stderr


def test_run_becomes_the_service(folder: Path) -> None:
    """One process id, whose program is first syncctl and then the service, with the configuration's path."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vsql_ctl", "run", "producer"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=_environment(),
    )
    seen: list[str] = []
    with contextlib.suppress(psutil.Error):
        while "vsql_producers" not in seen and process.poll() is None:
            seen = psutil.Process(process.pid).cmdline()
            time.sleep(0.0005)
    process.terminate()
    process.wait(30)
    assert seen[-4:] == ["-m", "vsql_producers", "--config", f"{folder}/vsql-sync.toml"]


def test_every_command_can_be_reached() -> None:
    folder = Path(importlib.import_module("vsql_ctl.commands").__path__[0])
    written: list[click.Command] = []
    for name in sorted({path.stem for path in folder.glob("*.py")} - {"__init__"}):
        parts = vars(importlib.import_module(f"vsql_ctl.commands.{name}")).values()
        written += [part for part in parts if isinstance(part, click.Command)]
    reached = [command for name in COMMANDS if (command := command_named(name)) is not None]
    for command in reached:  # grows while it is walked: groups add what is below them
        reached += command.commands.values() if isinstance(command, click.Group) else []
    assert [command.name for command in written if command not in reached] == []


def test_signals_reach_exit_codes_that_shells_know() -> None:
    assert EXIT_INTERRUPTED == 128 + signal.SIGINT
    assert EXIT_BROKEN_PIPE == 128 + signal.SIGPIPE
