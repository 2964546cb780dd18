"""The whole path with the KEK in a key service: A seals, B opens, and the KEK is rotated in between.

Each provider that a real service on this machine stands for; a PKCS#11 token has its own, in test_prod_mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.moto_server import ENVIRONMENT, REGION, aws_kms, moto_server, new_kek
from tests.nodes import TwoNodes
from tests.stack import Stack
from tests.vault_server import ROOT_TOKEN, vault_server

pytestmark = pytest.mark.topology

TABLE = "CREATE TABLE cards (id bigint PRIMARY KEY, pan text);"


@dataclass(frozen=True)
class Service:
    """A key service with one KEK."""

    provider: str
    config: str
    """Of [encryption.kms]."""
    rotate: Callable[[], object]


def _aws(folder: Path, closing: ExitStack) -> Service:
    address = closing.enter_context(moto_server(folder))
    kms = aws_kms(address)
    new_kek(kms, "payments", 1)
    uri = f"aws-kms://alias/payments?region={REGION}&endpoint={address}"
    return Service("aws-kms", f'uri = "{uri}"', lambda: new_kek(kms, "payments", 2))


def _vault(folder: Path, closing: ExitStack) -> Service:
    vault = closing.enter_context(vault_server(folder))
    vault.new_key("payments")
    config = (
        'provider = "vault"\nkek_id = "transit/payments"\n[encryption.kms.vault]\n'
        f'address = "{vault.address}"\ntoken = "{ROOT_TOKEN}"'
    )
    return Service("vault", config, lambda: vault.ask("POST", "transit/keys/payments/rotate", {}))


@pytest.fixture(params=[_aws, _vault], ids=["aws-kms", "vault"])
def service(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as closing:
        yield request.param(tmp_path, closing)


@pytest.mark.timeout(240)
def test_what_a_seals_b_opens_across_a_rotation_of_the_kek(
    service: Service, stack: Stack, tmp_path: Path
) -> None:
    pair = TwoNodes(stack, tmp_path, TABLE)
    pair.a.kms = pair.b.kms = service.config
    pair.create(["cards(*)"])
    try:
        pair.start()
        pair.a.execute("INSERT INTO cards SELECT n, 'pan-' || n FROM generate_series(1, 500) n")
        pair.wait_in_step()
        service.rotate()
        pair.a.ctl("key", "rotate-dek", "--reason", "the KEK has a new version")
        pair.a.execute("INSERT INTO cards SELECT n, 'pan-' || n FROM generate_series(501, 1000) n")
        pair.wait_in_step()
        assert pair.differences() == []
        assert pair.b.query("SELECT count(*) FROM cards") == [(1000,)]

        keks = pair.a.query("SELECT DISTINCT kms_provider, kek_id FROM vsql_sync.deks")
        assert {provider for provider, _ in keks} == {service.provider}
        assert len(keks) == 2
        listed = pair.a.ctl_json("key", "inventory")
        assert (listed["kek_problem"], listed["kek_warnings"]) == ("", [])
        states = {(one["kek_id"], one["state"]) for one in listed["keks"]}
        assert {kek_id for kek_id, _ in states} == {kek_id for _, kek_id in keks}
        assert sorted(state for _, state in states) == ["active", "retiring"]
        pair.stop()
    finally:
        pair.end()
