"""Fuzz every parser, guided by coverage: `make fuzz`, `make fuzz SECONDS=3600`, `make fuzz PARSERS=pack`.

Not here: the parsers and their rules (parsers.py). Each runs in a process of its own, because libFuzzer,
under atheris, ends the process it runs in. Inputs that reached something new are kept in .fuzz/<parser> and
begun with the next time. What fails is printed, and kept in .fuzz/faults:
`python -m tests.fuzz --repeat PARSER FILE`.

Where atheris cannot be installed nothing is fuzzed, which is said, and is no failure: the same parsers are
mutated by hypothesis in tests/unit/test_parser_mutations.py (docs/design/0010).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KEPT = Path(__file__).resolve().parents[2] / ".fuzz"
# Bytes; seconds for one input; MB of a whole process with its instrumented modules.
MAX_INPUT, MAX_SECONDS, MAX_MEMORY = 1 << 14, 10, 768
_START_SECONDS = 60
"""What a process may take to import and instrument before its time begins."""


def main(arguments: Sequence[str]) -> int:
    """Run the parsers one after the other; the number of those with a fault."""
    given = _arguments(arguments)
    if given.one:
        _fuzz(given.one)
    if importlib.util.find_spec("atheris") is None:
        print(_not_here(), file=sys.stderr, flush=True)
        return 0
    from tests.fuzz.parsers import PARSERS

    if given.repeat:
        name, file = given.repeat
        PARSERS[name].run(Path(file).read_bytes())
        return 0
    wanted = given.parser or list(PARSERS)
    unknown = sorted(set(wanted) - set(PARSERS))
    if unknown:
        print(f"no parser {', '.join(unknown)}; there are {', '.join(PARSERS)}", file=sys.stderr)
        return 2
    seconds = max(1, round(given.seconds / len(wanted)))
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        return sum(pool.map(lambda name: _run(name, seconds), wanted))


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the parsers.")
    parser.add_argument("parser", nargs="*", help="only these")
    parser.add_argument("--seconds", type=float, default=60, help="for all of them together")
    parser.add_argument(
        "--repeat", nargs=2, metavar=("PARSER", "FILE"), help="run one input, without atheris"
    )
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _not_here() -> str:
    bar = "!" * 100
    return (
        f"{bar}\nNOT FUZZED: atheris is not installed in {sys.prefix}. It has wheels for CPython 3.11 to"
        f" 3.14 on Linux x86_64,\nthis is {platform.python_implementation()} {platform.python_version()} on"
        f" {platform.system()} {platform.machine()}; where it should be here: pip install -e '.[fuzz]'.\n"
        f"The parsers are still mutated by hypothesis (tests/unit/test_parser_mutations.py).\n{bar}"
    )


def _run(name: str, seconds: int) -> bool:
    """Fuzz one parser in a process; whether it has a fault."""
    from tests.fuzz.parsers import PARSERS

    corpus, faults = KEPT / name, KEPT / "faults"
    for folder in (corpus, faults):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(PARSERS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    started = time.monotonic()
    command = [
        sys.executable, "-m", "tests.fuzz", "--one", name, str(corpus), f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT}", f"-timeout={MAX_SECONDS}", f"-rss_limit_mb={MAX_MEMORY}",
        f"-artifact_prefix={faults}/{name}-", "-print_final_stats=1",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + _START_SECONDS + 10 * MAX_SECONDS,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            check=False,
        )
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, said = -1, f"it did not end\n{(error.stderr or b'')[-2000:]!r}"
    _tell(name, code, said, time.monotonic() - started)
    return code != 0


def _tell(name: str, code: int, said: str, took: float) -> None:
    figures = [line for line in said.splitlines() if "DONE" in line or "number_of_executed_units" in line]
    runs = next((line.split()[-1] for line in figures if "executed" in line), "?")
    done = next((line for line in figures if "DONE" in line), "")
    words = done.split()
    covered = words[words.index("cov:") + 1] if "cov:" in words else "?"
    print(f"fuzz {name:13} {runs:>8} runs, {covered:>5} branches, {took:4.0f} s", flush=True)
    if code != 0:
        print(f"FAULT in parser {name} (exit {code}):\n{_without_start(said)}", file=sys.stderr, flush=True)


def _without_start(said: str) -> str:
    return "\n".join(line for line in said.splitlines() if not line.startswith("INFO:"))[-6000:]


def _fuzz(arguments: Sequence[str]) -> None:
    """In a process of its own: instrument our packages, then have libFuzzer run; does not return."""
    import atheris

    with atheris.instrument_imports(include=["vsql_shared", "vsql_producers", "vsql_consumers"]):
        from tests.fuzz.parsers import PARSERS, check

    name, *options = arguments
    parser = PARSERS[name]
    for seed in parser.seeds():
        parser.run(seed)

    def one(data: bytes) -> None:
        check(parser, data)

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
