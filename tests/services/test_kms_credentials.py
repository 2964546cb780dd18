"""What the clouds' own credential libraries make of credentials that are wrong, or that lead nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.stack.ports import release_port, reserve_port
from vsql_shared.errors import KeyUnavailableError, TransientError
from vsql_shared.kms.base import Retries
from vsql_shared.kms.gcp_kms import GcpKek

KEK = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
PEM = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@pytest.mark.parametrize("content", ["", "{}", '{"type": "service_account", "private_key": "s3cret"}'])
def test_a_file_that_holds_no_google_credentials_is_said_without_its_content(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gcp.json"
    file.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with pytest.raises(KeyUnavailableError, match="no credentials for Google Cloud KMS") as refused:
        GcpKek(KEK)
    assert "GOOGLE_APPLICATION_CREDENTIALS" in refused.value.hint
    assert "s3cret" not in str(refused.value)


def test_a_login_that_cannot_be_reached_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = reserve_port()
    private = rsa.generate_private_key(65537, 2048).private_bytes(*PEM).decode()
    account = {
        "type": "service_account",
        "client_email": "node@p.iam.gserviceaccount.com",
        "private_key_id": "1",
        "private_key": private,
        "token_uri": f"https://127.0.0.1:{port}/token",
    }
    file = tmp_path / "gcp.json"
    file.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    try:
        with pytest.raises(TransientError, match="no connection to Google for a token") as waiting:
            GcpKek(KEK, retries=Retries(attempts=1, timeout=1.0))
        assert "PRIVATE" not in str(waiting.value)
    finally:
        release_port(port)
