"""What `syncctl audit verify` found, as text and as JSON. It does not look for anything itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vsql_ctl.output import render_table

if TYPE_CHECKING:
    from vsql_shared.audit.compare import Comparison
    from vsql_shared.audit.verify import ChainReport, Problem, Report


@dataclass
class Findings:
    """Everything `audit verify` looked at."""

    node: str
    reports: dict[str, Report]
    comparisons: list[Comparison] = field(default_factory=list)
    found: list[Problem] = field(default_factory=list)
    entries: tuple[int, int] | None = None
    """First and last of the entries that were looked at, where only a part of a chain was asked for."""

    @property
    def problems(self) -> list[Problem]:
        """All that is wrong, this node's own trail first."""
        own = [one for report in self.reports.values() for one in report.problems]
        compared = [one.problem for one in self.comparisons if one.problem]
        return [*own, *compared, *self.found]

    @property
    def warnings(self) -> list[str]:
        """What is odd and proves nothing."""
        return [f"node {name}: {text}" for name, report in self.reports.items() for text in report.warnings]

    def bad_chains(self) -> set[str]:
        """Chains whose entries are not to be believed."""
        return {one.chain for report in self.reports.values() for one in report.problems}


def words(problem: Problem) -> str:
    """One finding as a sentence."""
    which = f", entry {problem.sequence}" if problem.sequence is not None else ""
    name = f" (event_id {problem.event_id})" if problem.event_id else ""
    return f"chain {problem.chain or '(none)'}{which}{name}: {problem.what}"


def _time(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else datetime.fromtimestamp(microseconds // 1_000_000, UTC)


def _chain_row(node: str, one: ChainReport) -> dict[str, Any]:
    return {
        "node": node,
        "chain": one.chain,
        "ok": one.problem is None,
        "pruned": one.pruned,
        "entries": one.entries,
        "batches": one.batches,
        "tuples": one.tuples,
        "abandoned_tuples": one.abandoned_tuples,
        "epoch": one.epoch,
        "last_sequence": one.sequence,
        "last_hash": one.entry_hash,
        "first_time": _time(one.first_time),
        "last_time": _time(one.last_time),
    }


def as_json(findings: Findings) -> dict[str, Any]:
    """For programs; documented in docs/operations/audit.md."""
    return {
        "ok": not findings.problems,
        "node": findings.node,
        "range": findings.entries,
        "chains": [
            _chain_row(node, one) for node, report in findings.reports.items() for one in report.chains
        ],
        "comparisons": findings.comparisons,
        "problems": findings.problems,
        "warnings": findings.warnings,
    }


def _passed_over(one: Comparison) -> str:
    if not one.passed_over:
        return ""
    return (
        f"; {one.passed_over} changes skipped or parked by operators, {one.replayed} of them replayed since"
    )


def as_text(findings: Findings) -> str:
    """For people."""
    rows = [_chain_row(node, one) for node, report in findings.reports.items() for one in report.chains]
    shown = ("node", "chain", "entries", "batches", "tuples", "first_time", "last_time", "ok")
    parts = [render_table(shown, [[row[name] for name in shown] for row in rows]) if rows else "no chains"]
    for one in findings.comparisons:
        state = "differ" if one.problem else "equal"
        parts.append(
            f"roots of {one.chain} and of target {one.target}: {state} in {one.compared} batches compared, "
            f"{one.under_way} not acknowledged yet{_passed_over(one)}"
        )
    pruned = [
        f"{row['node']}: chain {row['chain']} begins behind entry {row['pruned']}, where it says it was"
        f" pruned; the archive below is not read here (`syncctl audit archive --verify` on {row['node']})"
        for row in rows
        if row["pruned"] and row["ok"]  # a bad one may have been cut there
    ]
    parts += pruned
    parts += [f"bad: {words(problem)}" for problem in findings.problems]
    parts += [f"warning: {warning}" for warning in findings.warnings]
    if findings.entries is not None:
        first, last = findings.entries
        if not findings.problems:
            parts.append(f"ok: entries {first} to {last} are signed, linked and unaltered")
        parts.append("nothing is said of entries before and behind these, nor of the end of the chain")
    elif not findings.problems:
        which = "every entry that is not pruned" if pruned else "every entry"
        parts.append(f"ok: {which} is signed, linked and unaltered")
    return "\n".join(parts)
