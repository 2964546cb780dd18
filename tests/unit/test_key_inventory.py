"""What the inventory says of a KEK version, by what is known of it."""

from __future__ import annotations

import pytest

from vsql_ctl.commands.key_inventory import kek_state
from vsql_shared.kms.base import KekVersion

OLD, NEW = KekVersion("kek/1", 256, active=False), KekVersion("kek/2", 256, active=True)


@pytest.mark.parametrize(
    ("version", "ordered", "asked", "state"),
    [
        (NEW, None, True, "active"),
        (OLD, None, True, "retiring"),
        (OLD, "requested", True, "retiring"),
        (OLD, "scheduled", True, "scheduled for destruction"),
        (None, "destroyed", True, "destroyed"),
        (None, None, True, "not found"),
        (None, None, False, "unknown"),  # a KMS that does not answer has lost nothing
        (None, "destroyed", False, "destroyed"),
    ],
)
def test_a_version_is_missing_only_where_its_kms_said_so(
    version: KekVersion | None, ordered: str | None, asked: bool, state: str
) -> None:
    assert kek_state(version, ordered, asked=asked) == state
