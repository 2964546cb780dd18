"""A real Vault or OpenBao on this machine, in its dev mode: memory only, root token known, transit mounted.

The program is VSQL_SYNC_TEST_VAULT, or `bao` or `vault` on the PATH; docs/design/0014 says how to build one.
Without it the tests that ask are skipped and say so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.moto_server import answers
from tests.stack.ports import release_port, reserve_port
from tests.stack.processes import kill_tree, spawn
from tests.waiting import until

ROOT_TOKEN = "root-of-a-test"
_START_SECONDS = 60.0


class VaultServer:
    """A running server, and the key administrator's hands."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self._log = address, log

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Any call of the API, with the root token."""
        request = urllib.request.Request(  # noqa: S310  # an address on this machine
            f"{self.address}/v1/{path}",
            None if body is None else json.dumps(body).encode(),
            {"X-Vault-Token": ROOT_TOKEN},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  # this machine too
            found: dict[str, Any] = json.loads(answer.read() or b"{}")
        return found

    def new_key(self, name: str, kind: str = "aes256-gcm96", **more: Any) -> None:
        """A transit key."""
        self.ask("POST", f"transit/keys/{name}", {"type": kind, **more})

    def seal(self) -> None:
        """Have it forget its keys: it answers 503 to everything until `unseal`."""
        self.ask("PUT", "sys/seal")

    def unseal(self) -> None:
        """As the operators do who hold the shares; dev mode prints its only one when it starts."""
        found = re.search(r"Unseal Key: (\S+)", self._log.read_text())
        assert found is not None, self._log.read_text()
        assert self.ask("PUT", "sys/unseal", {"key": found[1]})["sealed"] is False

    def token_with(self, policy: str, *rules: tuple[str, str]) -> str:
        """A token that may do just this: (path, capability) each."""
        text = "\n".join(f'path "{path}" {{ capabilities = ["{can}"] }}' for path, can in rules)
        self.ask("PUT", f"sys/policies/acl/{policy}", {"policy": text})
        made = self.ask("POST", "auth/token/create", {"policies": [policy], "no_default_policy": True})
        return str(made["auth"]["client_token"])


def vault_binary() -> str:
    """The server's program; without one the test is skipped."""
    named = os.environ.get("VSQL_SYNC_TEST_VAULT")
    found = named or shutil.which("bao") or shutil.which("vault")
    if not found:
        pytest.skip(
            "SKIPPED FOR WANT OF A VAULT: put `bao` (OpenBao) or `vault` on the PATH, or name it by"
            " VSQL_SYNC_TEST_VAULT; docs/design/0014 says how to build one"
        )
    return found


@contextmanager
def vault_server(folder: Path) -> Iterator[VaultServer]:
    """A server with the transit engine; it ends with the block."""
    program, port = vault_binary(), reserve_port()
    command = [
        program, "server", "-dev", f"-dev-root-token-id={ROOT_TOKEN}", "-dev-no-store-token",
        f"-dev-listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    log = folder / "vault.log"
    process = spawn(command, log=log, env={"HOME": str(folder)})
    server = VaultServer(f"http://127.0.0.1:{port}", log)
    try:
        until(lambda: answers(port, "/v1/sys/health"), _START_SECONDS, log.read_text)
        server.ask("POST", "sys/mounts/transit", {"type": "transit"})
        yield server
    finally:
        kill_tree(process)
        release_port(port)
