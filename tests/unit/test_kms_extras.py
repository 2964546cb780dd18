"""A provider whose client library is not installed says which extra to install; the others do not need it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# For each provider: its extra, what is missing without that, and what the configuration must say.
EXTRAS = {
    "pkcs11": ("pkcs11", ["pkcs11"], {"pkcs11": {"module": "/m.so", "token_label": "t", "key_label": "k"}}),
    "aws-kms": ("aws", ["boto3", "botocore"], {"kek_id": "alias/k"}),
    "azure-kv": ("azure", ["azure"], {"kek_id": "vault/keys/k"}),
    "gcp-kms": ("gcp", ["google"], {"kek_id": "projects/p/locations/l/keyRings/r/cryptoKeys/k"}),
}


def opened(provider: str, section: dict[str, object], missing: list[str]) -> str:
    """What opening the provider says in an interpreter that has none of `missing`."""
    program = f"""
import sys
sys.modules.update({{name: None for name in {missing!r}}})
from vsql_shared.config.encryption import KmsSettings
from vsql_shared.kms import open_provider
try:
    open_provider(KmsSettings.model_validate({{"provider": {provider!r}, **{section!r}}}))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(("provider", "extra"), EXTRAS.items(), ids=EXTRAS.keys())
def test_a_missing_library_is_one_error_that_names_the_extra(
    provider: str, extra: tuple[str, list[str], dict[str, object]]
) -> None:
    name, missing, section = extra
    said = opened(provider, section, missing)
    assert said.startswith("KeyUnavailableError this KMS provider needs the library")
    assert f"pip install 'vsql-sync[{name}]'" in said
    assert said.count("\n") == 1


def test_vault_needs_no_library() -> None:
    every = [library for _, missing, _ in EXTRAS.values() for library in missing] + ["requests"]
    vault = {"address": "http://127.0.0.1:1", "token": "t"}
    said = opened("vault", {"vault": vault, "attempts": 1}, every)
    assert said.startswith("TransientError Vault cannot be used now: no connection (ConnectionRefusedError)")


def test_a_signing_key_in_a_token_names_the_extra_too() -> None:
    program = """
import sys
sys.modules["pkcs11"] = None
from vsql_shared.config import Settings
from vsql_shared.kms import open_signer
token = {"module": "/m.so", "token_label": "t"}
given = {
    "cluster": {"name": "c", "node_id": 1, "node_name": "a"}, "connection": {"database": "d"},
    "server": {"mode": "dev"}, "encryption": {"kms": {"pkcs11": token}}, "audit": {"signing_key_label": "k"},
}
try:
    open_signer(Settings.model_validate(given))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("KeyUnavailableError this KMS provider needs the library 'pkcs11'")
    assert "pip install 'vsql-sync[pkcs11]'" in done.stdout
