"""Which Java runs Kafka: the system's if it is new enough, else the runtime from the cache."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.stack.fetch import java_runtime

OLDEST_JAVA = 17
"""Kafka 4 brokers need Java 17."""


@functools.cache
def find_java() -> Path:
    """Return the `java` program to use: JAVA_HOME's, the path's, or a downloaded one."""
    candidates = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(Path(home) / "bin" / "java")
    if found := shutil.which("java"):
        candidates.append(Path(found))
    for candidate in candidates:
        if candidate.is_file() and java_version(candidate) >= OLDEST_JAVA:
            return candidate
    return java_runtime()


def java_version(java: Path) -> int:
    """Return the major version a `java` program reports, 0 when it does not run."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return 0
    match = re.search(r'version "(\d+)', done.stderr + done.stdout)
    return int(match.group(1)) if match else 0
