"""When a KEK version counts as gone: not while a key service could give it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vsql_shared.errors import DecodeError, KeyUnavailableError
from vsql_shared.kms.azure_kv import deleted_request, split_kek_id
from vsql_shared.kms.file import FileKek, destroy_version, generate_kek_file, rotate_kek_file
from vsql_shared.kms.gcp_kms import parse_state
from vsql_shared.kms.vault import parse_least_available


@pytest.fixture
def kek(tmp_path: Path) -> Path:
    path = tmp_path / "kek"
    generate_kek_file(path, "my-kek")
    rotate_kek_file(path)
    return path


def test_a_version_is_gone_when_its_line_is(kek: Path) -> None:
    provider = FileKek(kek)
    assert provider.remains("my-kek/1")
    destroy_version(kek, "my-kek/1")
    assert not provider.remains("my-kek/1")
    destroy_version(kek, "my-kek/1")  # given again after a crash


def test_a_version_of_another_kek_is_neither_destroyed_nor_gone(kek: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="other/1 is no version of my-kek"):
        destroy_version(kek, "other/1")
    with pytest.raises(KeyUnavailableError, match="other/1 is no version of my-kek"):
        FileKek(kek).remains("other/1")


@pytest.mark.parametrize("state", ["ENABLED", "DISABLED", "DESTROY_SCHEDULED", "DESTROYED"])
def test_google_s_word_for_a_version_is_taken_as_it_is(state: str) -> None:
    assert parse_state({"name": "n", "state": state}) == state


def test_vault_s_archived_versions_are_available_until_they_are_trimmed() -> None:
    key: dict[str, Any] = {"type": "aes256-gcm96", "keys": {"3": 1}, "min_decryption_version": 3}
    assert parse_least_available({"data": key | {"min_available_version": 0}}) == 0
    assert parse_least_available({"data": key | {"min_available_version": 2}}) == 2
    assert parse_least_available({"data": key}) == 0


def test_an_answer_that_says_nothing_is_no_end_of_a_version() -> None:
    for body in ({}, {"data": 1}, {"data": {"min_available_version": "9"}}):
        with pytest.raises(DecodeError):
            parse_least_available(body)
    for state in ({}, {"state": 1}):
        with pytest.raises(DecodeError):
            parse_state(state)


def test_azure_s_deleted_keys_are_looked_for_in_the_same_vault() -> None:
    asked = deleted_request(split_kek_id("myvault/keys/kek"))
    assert asked == ("GET", "https://myvault.vault.azure.net/deletedkeys/kek?api-version=7.4", None)
