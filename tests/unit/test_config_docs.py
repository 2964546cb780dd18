"""The operators' pages say what the program does: every key, every exit code, every metric."""

from __future__ import annotations

import re
from pathlib import Path

from tests.config_reference import PAGE, page_with, reference
from vsql_ctl.cli import EXIT_BROKEN_PIPE, EXIT_DEFECT, EXIT_INTERRUPTED
from vsql_shared.errors import VsqlSyncError
from vsql_shared.observe.metrics import REGISTRY, Stage, StreamState, Verdict

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations"


def _classes(root: type[VsqlSyncError]) -> list[type[VsqlSyncError]]:
    return [root, *(each for child in root.__subclasses__() for each in _classes(child))]


def test_the_page_of_the_configuration_lists_what_the_models_say() -> None:
    assert PAGE.read_text() == page_with(reference()), "run `python -m tests.config_reference`"


def test_the_page_of_exit_codes_has_every_error_class_at_its_code() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", (OPERATIONS / "exit-codes.md").read_text(), re.MULTILINE)
    listed = {name.strip(): int(code) for code, names in rows for name in names.split(",")}
    ours = [kind for kind in _classes(VsqlSyncError) if kind.__module__ == "vsql_shared.errors"]
    assert {kind.__name__: kind.exit_code for kind in ours} == {
        name: code
        for name, code in listed.items()
        if name.endswith(("Error", "Fault")) and name != "UsageError"
    }
    assert {EXIT_DEFECT, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE} <= {int(code) for code, _ in rows}


def test_the_page_of_metrics_has_every_metric_and_no_other() -> None:
    text = (OPERATIONS / "metrics.md").read_text()
    listed = {
        name.removesuffix("_total") for name in re.findall(r"^\| `(vsql_sync_\w+)`", text, re.MULTILINE)
    }
    assert listed == {family.name for family in REGISTRY.collect()}
    for word in (*Stage, *StreamState, *Verdict):
        assert word.value in text
