"""docs/pci-dss.md names a test or says that there is none, names what is left, and concludes nothing.

That the tests exist is checked by tests/docs_check.py, for every page.
"""

from __future__ import annotations

import re

from tests.docs_check import named_files
from tests.stack.state import REPOSITORY
from vsql_shared.audit.evidence import NOT_CLAIMED

TEXT = (REPOSITORY / "docs" / "pci-dss.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| \d", line)
]


def test_every_requirement_has_a_control_a_test_or_none_and_a_gap() -> None:
    assert len(ROWS) >= 30
    for requirement, control, tests, gap in ROWS:
        assert control, requirement
        assert named_files(tests) or tests == "no test", requirement
        assert gap, requirement


def test_requirements_stand_in_the_order_of_the_standard_and_once() -> None:
    firsts = [tuple(map(int, re.findall(r"\d+", re.split(r"[ ,]", row[0])[0]))) for row in ROWS]
    assert firsts == sorted(set(firsts))


def test_what_the_specification_maps_is_on_the_page() -> None:
    listed = " ".join(row[0] for row in ROWS)
    for number in ("3.5.1", "3.6.1", "3.7.1", "7.2.1", "10.2.1", "10.3.2", "10.5.1", "10.7.2", "12.10.2"):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", listed), number


def test_the_page_and_the_bundle_draw_no_conclusion() -> None:
    for text in (TEXT, *NOT_CLAIMED):
        assert "compliant" not in text.lower()
        assert "out of scope" not in text.lower()
        assert "outside the cde" not in text.lower()
