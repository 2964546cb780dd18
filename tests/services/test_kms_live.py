"""KEKs in the clouds themselves, where credentials are given; Azure and Google have no emulator.

    VSQL_SYNC_TEST_AZURE_KEK=my-vault/keys/my-key        and what azure-identity reads
    VSQL_SYNC_TEST_GCP_KEK=projects/…/cryptoKeys/my-key  and Application Default Credentials
    VSQL_SYNC_TEST_AWS_KEK=alias/my-key                  and AWS's own environment

The identity needs the rights of producer and consumer in docs/operations/keys.md, and that to list versions.
Nothing is made or destroyed there.
"""

from __future__ import annotations

import os

import pytest

from tests.kek_contract import keeps_its_promises
from vsql_shared.config.encryption import KmsSettings
from vsql_shared.kms import open_provider

PLACES = {
    "azure-kv": ("VSQL_SYNC_TEST_AZURE_KEK", False),
    "gcp-kms": ("VSQL_SYNC_TEST_GCP_KEK", True),
    "aws-kms": ("VSQL_SYNC_TEST_AWS_KEK", True),
}


@pytest.mark.parametrize(("provider", "place"), PLACES.items(), ids=PLACES.keys())
def test_the_service_itself_wraps_and_unwraps(provider: str, place: tuple[str, bool]) -> None:
    variable, binds_context = place
    kek_id = os.environ.get(variable)
    if not kek_id:
        pytest.skip(f"NOT RUN AGAINST THE LIVE SERVICE {provider}: set {variable} and its credentials")
    settings = KmsSettings.model_validate({"provider": provider, "kek_id": kek_id})
    producer, consumer = open_provider(settings), open_provider(settings)
    strength = producer.strength_bits
    keeps_its_promises(producer, consumer, binds_context=binds_context, strength_bits=strength)
