"""The whole path with the KEK in a key service: A seals, B opens, and the KEK is rotated in between.

The same test for each provider that something real on this machine stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.moto_server import ENVIRONMENT, REGION, aws_kms, moto_server, new_kek
from tests.nodes import Node, TwoNodes
from tests.softhsm import make_token
from tests.stack import Stack
from tests.vault_server import ROOT_TOKEN, vault_server

pytestmark = pytest.mark.topology

KEK = "kek.key"  # as TwoNodes names it
TABLE = "CREATE TABLE cards (id bigint PRIMARY KEY, pan text);"


@dataclass(frozen=True)
class Service:
    """A key service with one KEK."""

    provider: str
    config: str
    """Of [encryption.kms]."""
    rotate: Callable[[Node], object]
    make: Callable[[Node], object] = lambda _: None
    """Make the first version, where that takes a configured node."""


def _aws(folder: Path, closing: ExitStack) -> Service:
    address = closing.enter_context(moto_server(folder))
    kms = aws_kms(address)
    new_kek(kms, "payments", 1)
    uri = f"aws-kms://alias/payments?region={REGION}&endpoint={address}"
    return Service("aws-kms", f'uri = "{uri}"', lambda _: new_kek(kms, "payments", 2))


def _vault(folder: Path, closing: ExitStack) -> Service:
    vault = closing.enter_context(vault_server(folder))
    vault.new_key("payments")
    config = (
        'provider = "vault"\nkek_id = "transit/payments"\n[encryption.kms.vault]\n'
        f'address = "{vault.address}"\ntoken = "{ROOT_TOKEN}"'
    )
    return Service("vault", config, lambda _: vault.ask("POST", "transit/keys/payments/rotate", {}))


def _pkcs11(folder: Path, _: ExitStack) -> Service:
    token = make_token(folder)
    config = (
        f'provider = "pkcs11"\nkek_id = "payments"\n[encryption.kms.pkcs11]\nmodule = "{token.module}"\n'
        f'token_label = "{token.label}"\nkey_label = "payments"\npin = "{token.pin.get_secret_value()}"'
    )

    def next_version(node: Node) -> None:
        node.ctl("key", "generate", "--kek-pkcs11")

    return Service("pkcs11", config, next_version, next_version)


def _file(folder: Path, _: ExitStack) -> Service:
    return Service(
        "file", "", lambda node: node.ctl("key", "generate", "--kek", str(folder / KEK), "--rotate")
    )


@pytest.fixture(params=[_aws, _vault, _pkcs11, _file], ids=["aws-kms", "vault", "pkcs11", "file"])
def service(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    monkeypatch.delenv("SOFTHSM2_CONF", raising=False)  # given back after the test
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
    pair.a.write_config(tmp_path / KEK)
    service.make(pair.a)
    pair.create(["cards(*)"])
    try:
        pair.start()
        pair.a.execute("INSERT INTO cards SELECT n, 'pan-' || n FROM generate_series(1, 500) n")
        pair.wait_in_step()
        service.rotate(pair.a)
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
