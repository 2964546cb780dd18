"""Run seeded mixes of faults and keep what became of them: `make test-faults SEED=1 RUNS=100 SECONDS=60`.

Seeds that this commit has been run with, in this length, are not run again: what was broken off goes on with
the next one. `--again` repeats them and writes nothing. Ends with 1 where a run failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack

from tests.chaos import summary
from tests.chaos.scene import Result, Scene
from tests.stack import Stack


def main() -> int:
    """Run what is left to run; the exit code."""
    given = _arguments()
    commit = summary.present_commit()
    seeds = range(given.seed, given.seed + given.runs)
    done = {seed for row in summary.load() if (row.commit, row.seconds) == (commit, given.seconds)
            for seed in row.seeds}  # fmt: skip
    left = [seed for seed in seeds if given.again or seed not in done]
    print(f"commit {commit}: {len(left)} of {len(seeds)} runs of {given.seconds} s are left", flush=True)
    return 1 if sum([bool(result.problem) for result in _runs(left, commit, given)]) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults under a checked load.")
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=60, help="of faults in each run")
    parser.add_argument("--again", action="store_true", help="also what was run before; writes nothing")
    return parser.parse_args()


def _runs(seeds: list[int], commit: str, given: argparse.Namespace) -> list[Result]:
    """Run after run on the same servers; after one that failed, on new ones."""
    results: list[Result] = []
    with ExitStack() as closing:
        stack = closing.enter_context(Stack())
        scene: Scene | None = None
        for seed in seeds:
            scene = scene or closing.enter_context(_scene(stack))
            began = time.monotonic()
            results.append(scene.run(seed, given.seconds))
            _tell(results[-1], time.monotonic() - began)
            if not given.again:
                summary.add(results[-1], commit)
            if results[-1].problem:
                scene.close()
                scene = None
    return results


def _scene(stack: Stack) -> Scene:
    scene = Scene(stack)
    for what in scene.missing:
        print(f"{'!' * 100}\nNOT DONE HERE: {what}\n{'!' * 100}", file=sys.stderr, flush=True)
    return scene


def _tell(result: Result, took: float) -> None:
    faults = sum(result.faults.values())
    print(
        f"seed {result.seed}: {faults} faults, {result.commits} commits, {result.snapshots} snapshots,"
        f" {took:.0f} s: {'FAILED' if result.problem else 'ok'}\n{result.problem}".rstrip(),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
