"""A stream that stands still on purpose: what it says of itself."""

from __future__ import annotations

import time

from tests.nodes import Node


def stands(node: Node, chain: str, *words: str, timeout: float = 40) -> str:
    """Wait until a node's worker says, as the last error of its stream, something with all these words."""
    deadline = time.monotonic() + timeout
    said = ""
    while time.monotonic() < deadline:
        rows = node.query(
            "SELECT detail ->> 'last_error' FROM vsql_sync.stream_status WHERE chain = %s", chain
        )
        said = str(rows[0][0]) if rows else ""
        if all(word in said for word in words):
            return said
        time.sleep(0.1)
    raise AssertionError(f"{chain} on {node.name} says {said!r}, expected {words}")
