"""Waiting for what a stream says of itself."""

from __future__ import annotations

import time

from tests.nodes import Node

QUICK = "[limits]\nretry_backoff_max_ms = 500\n"
"""What is mended is noticed soon: by default a stream that stands waits for half a minute between looks."""


def says(node: Node, direction: str, words: str, *, kind: str = "live", timeout: float = 60) -> str:
    """Wait until a node's stream reports an error with these words; with no words, until it has none."""
    deadline = time.monotonic() + timeout
    said = ""
    while time.monotonic() < deadline:
        found = node.query(
            "SELECT coalesce(s.detail->>'last_error', ''), s.state FROM vsql_sync.stream_status s"
            " JOIN vsql_sync.streams USING (chain, direction) WHERE direction = %s AND kind = %s",
            direction,
            kind,
        )
        said, state = found[0] if found else ("", "")
        if (words and words in said) or (not words and state == "running"):
            return str(said)
        time.sleep(0.2)
    raise AssertionError(f"{node.name} says {said!r}, expected {words!r}")
