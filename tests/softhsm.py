"""A PKCS#11 token in software: SoftHSM 2 in a folder of its own, for tests of everything that needs an HSM.

Needs Debian's `softhsm2` (or the like); as root it installs the package, otherwise the test that asks is
skipped and says so. Rules: one folder of tokens per process, because the library reads its configuration
once; `environment` is what a child process needs to see the same tokens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from pydantic import SecretStr

_MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
)
_INSTALL_SECONDS = 240


@dataclass(frozen=True)
class SoftToken:
    """An initialized token with its user PIN."""

    module: Path
    label: str
    pin: SecretStr
    environment: dict[str, str]


def make_token(folder: Path, label: str = "vsql-sync-test", pin: str = "4321-user") -> SoftToken:
    """Initialize a token in `folder`, and let this process's PKCS#11 library see it."""
    module = _module()
    configuration = folder / "softhsm2.conf"
    (folder / "tokens").mkdir(exist_ok=True)
    configuration.write_text(
        f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    os.environ["SOFTHSM2_CONF"] = str(configuration)
    command = [
        "softhsm2-util",
        "--init-token",
        "--free",
        "--label",
        label,
        "--pin",
        pin,
        "--so-pin",
        "87654321",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return SoftToken(module, label, SecretStr(pin), {"SOFTHSM2_CONF": str(configuration)})


@cache
def _module() -> Path:
    found = _find()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        _install()
        found = _find()
    if found is None:
        pytest.skip("SKIPPED FOR WANT OF AN HSM: install SoftHSM 2 (Debian: apt-get install softhsm2)")
    return found


def _find() -> Path | None:
    named = os.environ.get("SOFTHSM2_MODULE")
    places = [Path(place) for place in ([named] if named else _MODULES)]
    return next((place for place in places if place.is_file() and shutil.which("softhsm2-util")), None)


def _install() -> None:
    quiet = {"DEBIAN_FRONTEND": "noninteractive", **os.environ}
    for step in (["update"], ["install", "--yes", "--no-install-recommends", "softhsm2"]):
        subprocess.run(
            ["apt-get", "-q", *step], env=quiet, capture_output=True, timeout=_INSTALL_SECONDS, check=False
        )
