"""[kafka.schema_registry] as operators write it, and the text that is registered."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fastavro
import pytest

from tests.unit.test_config import MINIMAL, PROD, parse
from vsql_shared.config import advice, check_files, masked
from vsql_shared.config.schema_registry import SchemaRegistrySettings
from vsql_shared.errors import ConfigError
from vsql_shared.kafka.schema_registry import SchemaRegistry, pack_schema

SECRET = "hunter2-marker"
URL = 'url = "https://registry:8081/apis/ccompat/v7/"'


def registry(text: str) -> SchemaRegistrySettings:
    return parse(f"{MINIMAL}\n[kafka.schema_registry]\n{text}\n").kafka.schema_registry


def test_the_registered_text_never_changes_while_its_format_is_in_use() -> None:
    # Another text, be it in a doc string, is another version and id in every registry; one that may only be
    # read refuses it. A changed format gets a schema that can read this one's (docs/design/0021).
    digest = hashlib.sha256(pack_schema().encode()).hexdigest()
    assert digest == "cb8e1fd47b3654b0d46f6f0648437a8bcfdf60e7c5ad0e80fc538803b16d9b7c"
    assert "\n" not in pack_schema()
    parsed = fastavro.parse_schema(json.loads(pack_schema()))
    assert isinstance(parsed, dict)
    assert parsed["name"] == SchemaRegistrySettings().subject == "vsql_sync.v1.Pack"


def test_without_an_address_there_is_no_registry() -> None:
    assert parse(MINIMAL).kafka.schema_registry.url is None
    assert registry('subject = "x"').url is None


GOOD = {
    "an address": URL,
    "plain http without credentials": 'url = "http://registry:8081"',
    "credentials on this machine": f'url = "http://127.0.0.1:8081"\nusername = "u"\npassword = "{SECRET}"',
    "a user with a file": f'{URL}\nusername = "u"\npassword_file = "pw"',
    "a token by command": f'{URL}\ntoken_command = "cat token"',
    "a subject in a context": f'{URL}\nsubject = ":.payments:vsql_sync.v1.Pack"',
    "a client certificate": f'{URL}\ncert_path = "c.crt"\nkey_path = "c.key"',
}
BAD = {
    'url = "registry:8081"': "https://host:port",
    'url = "ftp://registry"': "https://host:port",
    'url = "https://"': "https://host:port",
    'url = "https://registry:0"': "https://host:port",
    'url = "https://registry:x"': "https://host:port",
    f'url = "https://u:{SECRET}@registry"': "credentials have keys of their own",
    'url = "https://registry?x=1"': "credentials have keys of their own",
    # Misspelt, with a credential in it.
    f'url = "user:{SECRET}@registry:8081"': "https://host:port",
    f'url = "https:/user:{SECRET}@registry"': "https://host:port",
    f'url = "//u:{SECRET}@registry"': "https://host:port",
    f'url = "https//u:{SECRET}@registry"': "https://host:port",
    f'url = "https//registry?apikey={SECRET}"': "https://host:port",
    f'url = "https://registry/#{SECRET}"': "credentials have keys of their own",
    f'url = "https//registry?apikey={SECRET}@x-{SECRET}"': "https://host:port",
    # What no library asks: it would end the process, each time it is started.
    'url = "https://registry..example"': "https://host:port",
    f'url = "https://{"x" * 64}.example"': "https://host:port",
    'url = "http://host/é"': "in ASCII, without blanks",
    'url = "https://hóst"': "in ASCII, without blanks",
    'url = "http://host/a b"': "in ASCII, without blanks",
    'url = "http://host/a\\tb"': "in ASCII, without blanks",
    'url = "http://ho<st"': "in ASCII, without blanks",
    f'{URL}\nsubject = "a/b"': "subject",
    f'{URL}\nsubject = ""': "subject",
    f'{URL}\nusername = "u"': "given together",
    f'{URL}\npassword = "{SECRET}"': "given together",
    f'{URL}\nusername = "u"\npassword = "{SECRET}"\npassword_file = "f"': "give only one of password",
    f'{URL}\ntoken = "{SECRET}"\ntoken_file = "f"': "give only one of token",
    f'{URL}\nusername = "u"\npassword = "{SECRET}"\ntoken = "{SECRET}"': "not both",
    f'{URL}\ncert_path = "c.crt"': "given together",
    f'url = "http://registry:8081"\ntoken = "{SECRET}"': "would cross the network in clear",
    'url = "http://registry"\nusername = "u"\npassword_command = "x"': "would cross the network in clear",
    f'{URL}\ntimeout = "10ms"': "timeout",
    f'{URL}\ntimeout = "1d"': "timeout",
    f'{URL}\nusername = "a:b"\npassword = "{SECRET}"': "username",
    'url = "http://registry:8081"\ncert_path = "c.crt"\nkey_path = "c.key"': "over https alone",
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_accepted(name: str) -> None:
    found = registry(GOOD[name])
    assert found.url is not None
    assert not found.url.endswith("/")
    assert SECRET not in repr(found) + str(masked(parse(f"{MINIMAL}\n[kafka.schema_registry]\n{GOOD[name]}")))


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused_names_the_key_and_no_secret(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        registry(text)
    assert "kafka.schema_registry" in str(refused.value)
    assert BAD[text] in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_token_that_is_none_is_refused_before_anybody_is_asked() -> None:
    for token in ("a b", "a\\r\\nX: y", "ü"):
        with pytest.raises(ConfigError, match=r"kafka\.schema_registry\.token: is no bearer token"):
            SchemaRegistry(registry(f'url = "http://127.0.0.1:1"\ntoken = "{token}"'))


def test_plain_http_across_a_network_is_warned_of_in_prod() -> None:
    said = advice(parse(f'{PROD}\n[kafka.schema_registry]\nurl = "http://registry:8081"\n'))
    assert [one for one in said if one.startswith("kafka.schema_registry.url: plain HTTP")]
    assert not [one for one in advice(parse(f"{PROD}\n[kafka.schema_registry]\n{URL}")) if "registry" in one]


def test_its_files_must_be_there_and_secrets_for_their_owner_alone(tmp_path: Path) -> None:
    text = f'{URL}\nusername = "u"\npassword_file = "{tmp_path / "pw"}"\nca_path = "{tmp_path / "ca"}"'
    kek = tmp_path / "kek"
    kek.touch(0o600)
    settings = parse(f'{MINIMAL}\n[encryption.kms.file]\npath = "{kek}"\n[kafka.schema_registry]\n{text}\n')
    with pytest.raises(ConfigError) as refused:
        check_files(settings)
    assert "kafka.schema_registry.password_file" in str(refused.value)
    assert "kafka.schema_registry.ca_path" in str(refused.value)
    (tmp_path / "ca").touch()
    (tmp_path / "pw").touch()
    (tmp_path / "pw").chmod(0o644)
    assert any("kafka.schema_registry.password_file" in warning for warning in check_files(settings))
