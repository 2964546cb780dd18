"""Secrets of the configuration: read from one source, given to the client library, and never shown."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from vsql_shared.config import ConnectionString, Settings, mask_conninfo, masked, parse_settings, to_toml
from vsql_shared.errors import ConfigError

SECRET = "hunter2-marker"

BASE = """
[cluster]
name = "c"
node_id = 1
node_name = "a"
[server]
mode = "dev"
"""


def _parse(connection: str, rest: str = "") -> Settings:
    return parse_settings(f'{BASE}[connection]\ndatabase = "d"\n{connection}\n{rest}', source=None, env={})


ALL_SECRETS = f"""
[kafka.security]
protocol = "SASL_SSL"
username = "u"
password = "{SECRET}"
[kafka.client_options]
"some.future.secret" = "{SECRET}"
[encryption.kms.pkcs11]
pin = "{SECRET}"
[[peers]]
node_id = 2
node_name = "b"
connection = "host=b password={SECRET} dbname=x"
[[peers]]
node_id = 3
node_name = "c"
connection = "postgresql://u:{SECRET}@b/x?sslpassword={SECRET}"
"""


def test_no_secret_stands_in_any_form_the_settings_are_shown_in() -> None:
    settings = _parse(f'password = "{SECRET}"', ALL_SECRETS)
    shown = [
        repr(settings),
        str(settings),
        f"{settings}",
        repr(settings.connection),
        repr(settings.peers),
        str(settings.peers[0].connection),
        repr(settings.kafka),
        settings.model_dump_json(),
        str(masked(settings)),
        to_toml(masked(settings)),
        str(settings.model_dump()),
    ]
    without_options = [text.replace(f"'some.future.secret': '{SECRET}'", "") for text in shown]
    without_options = [text.replace(f'"some.future.secret":"{SECRET}"', "") for text in without_options]
    assert [text for text in without_options if SECRET in text] == []
    assert SECRET not in to_toml(masked(settings))
    assert "host=b" in to_toml(masked(settings))


COMMANDS_OF_SECRETS = f"""
[kafka.security]
protocol = "SASL_SSL"
username = "u"
password_command = "/usr/bin/curl -H X-Vault-Token:{SECRET} https://vault/v1/x"
[encryption.kms.pkcs11]
pin_command = "TOKEN={SECRET}"
[encryption.kms.vault]
token_command = "'{SECRET} x' y"
secret_id_command = "vault-secret"
"""


def test_of_a_command_that_prints_a_secret_the_program_is_shown_only() -> None:
    shown = to_toml(masked(_parse(f'password_command = "cat {SECRET}"', COMMANDS_OF_SECRETS)))
    assert SECRET not in shown
    commands = [line for line in shown.splitlines() if "_command = " in line]
    assert commands == [
        'password_command = "cat ********"',
        'password_command = "/usr/bin/curl ********"',
        'pin_command = "********"',
        'token_command = "******** ********"',
        'secret_id_command = "vault-secret"',
    ]


MISTAKES = {
    "list": f'password = ["{SECRET}"]',
    "misspelt": f'pasword = "{SECRET}"',
    "two sources": f'password = "{SECRET}"\npassword_command = "echo {SECRET}"',
    "table": f'password = {{ a = "{SECRET}" }}',
    "NUL": f'password = "{SECRET}\\u0000"',
    "pin": f'[encryption.kms.pkcs11]\npin = ["{SECRET}"]',
    "peer": f'[[peers]]\nnode_id = 2\nnode_name = "b"\nconnection = ["password={SECRET}"]',
    "option": f'[kafka.client_options]\n"sasl.password" = "{SECRET}"',
    "option type": f'[kafka.client_options]\n"a.secret" = ["{SECRET}"]',
    "peers as text": f'[pci]\ncolumns = "{SECRET}"',
    "syntax": f"password = {SECRET}",
    "unterminated": f'password = "{SECRET}',
}


@pytest.mark.parametrize("text", MISTAKES.values(), ids=MISTAKES.keys())
def test_an_error_about_a_secret_does_not_hold_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _parse(text)
    assert SECRET not in str(caught.value)
    # --debug prints the chain of exceptions, too
    chain = "".join(traceback.format_exception(caught.value))
    assert SECRET not in chain.replace(text, "")


def test_a_section_written_as_text_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(f'connection = "password={SECRET}"\n{BASE}', source=None, env={})
    assert SECRET not in str(caught.value)
    assert "connection: must be a section" in str(caught.value)


def test_a_secret_variable_is_not_repeated() -> None:
    env = {
        "VSQL_SYNC__CONNECTION__PASWORD": SECRET,
        "VSQL_SYNC__PEERS": SECRET,
        "VSQL_SYNC__CONNECTION": SECRET,
    }
    with pytest.raises(ConfigError) as caught:
        parse_settings(BASE + '[connection]\ndatabase = "d"', source=None, env=env)
    assert SECRET not in str(caught.value)


def test_the_connection_string_is_what_libpq_reads_back() -> None:
    password = 'it\'s a \\ "very" = odd one'
    env = {"VSQL_SYNC__CONNECTION__PASSWORD": password, "VSQL_SYNC__CONNECTION__CONSUMER_USER": "c' user"}
    settings = parse_settings(
        BASE + '[connection]\ndatabase = "my db"\nhost = "/run/pg"\nsslmode = "require"', source=None, env=env
    )
    found = conninfo_to_dict(settings.connection.conninfo("consumer", application_name="x y"))
    assert found == {
        "host": "/run/pg",
        "port": "5432",
        "dbname": "my db",
        "user": "c' user",
        "password": password,
        "sslmode": "require",
        "connect_timeout": "10",
        "application_name": "x y",
    }
    assert conninfo_to_dict(settings.connection.conninfo("producer"))["user"] == "vsql_sync"


def test_without_a_password_libpq_is_left_to_find_one() -> None:
    assert "password" not in conninfo_to_dict(_parse("").connection.conninfo())


def test_a_password_file_is_read_when_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "pw"
    settings = _parse(f'password_file = "{path}"')
    for content, expected in ((b"one\n", "one"), (b"t w o\r\n", "t w o"), ("drei-ü".encode(), "drei-ü")):
        path.write_bytes(content)
        assert conninfo_to_dict(settings.connection.conninfo())["password"] == expected


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"\xff\xfe", b"a\0b", b"x" * 70_000])
def test_a_password_file_of_the_wrong_kind_is_refused_without_showing_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "pw"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"connection\.password_file: does not give one line"):
        _parse(f'password_file = "{path}"').connection.conninfo()


def test_a_password_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"connection\.password_file: cannot read .*pw: No such file"):
        _parse(f'password_file = "{tmp_path}/pw"').connection.conninfo()


def test_a_password_command_gives_the_password() -> None:
    settings = _parse(f'password_command = "{sys.executable} -c \'print(\\"from command\\")\'"')
    assert conninfo_to_dict(settings.connection.conninfo())["password"] == "from command"


COMMANDS = {
    "fails": (f"{sys.executable} -c 'import sys; print(\\\"{SECRET}\\\"); sys.exit(7)'", "exit code 7"),
    "missing": (f"/no/such/program {SECRET}", "cannot be run"),
    "unclosed": (f"echo '{SECRET}", "cannot be run"),
    "empty": ("", "cannot be run"),
    "silent": ("true", "does not give one line"),
}


@pytest.mark.parametrize(("command", "words"), COMMANDS.values(), ids=COMMANDS.keys())
def test_a_password_command_that_fails_says_how_and_shows_nothing(command: str, words: str) -> None:
    settings = _parse(f'password_command = "{command}"')
    with pytest.raises(ConfigError, match=words) as caught:
        settings.connection.conninfo()
    assert SECRET not in str(caught.value)


def test_the_pin_comes_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "pin").write_text("1234\n")
    settings = _parse("", f'[encryption.kms.pkcs11]\npin_file = "{tmp_path}/pin"')
    pin = settings.encryption.kms.pkcs11.read_pin()
    assert pin is not None
    assert pin.get_secret_value() == "1234"


MASKED = {
    "plain": ("host=b dbname=x", "host=b dbname=x"),
    "bare": (f"host=b password={SECRET} user=u", "host=b password=******** user=u"),
    "spaces": (f"password = {SECRET}", "password=********"),
    "quoted": (f"password='{SECRET} \\' x' host=b", "password=******** host=b"),
    "escaped": (f"password={SECRET}\\ tail host=b", "password=******** host=b"),
    "key password": (f"sslpassword={SECRET}", "sslpassword=********"),
    "unclosed": (f"password='{SECRET}", "********"),
    "garbage": (SECRET, "********"),
    "uri": (f"postgresql://u:{SECRET}@h:5432/d", "postgresql://u:********@h:5432/d"),
    "uri without": ("postgresql://h/d?sslmode=require", "postgresql://h/d?sslmode=require"),
    "uri query": (f"postgres://h/d?password={SECRET}", "postgres://h/d?password=********"),
    "uri slash": (f"postgresql://u:a/{SECRET}@h/d", "********"),
    "uri hash": (f"postgresql://u:a#{SECRET}@h/d", "********"),
    "uri odd query": (f"postgresql://h/d?{SECRET}", "********"),
    "empty": ("", ""),
}


@pytest.mark.parametrize(("text", "shown"), MASKED.values(), ids=MASKED.keys())
def test_connection_strings_are_shown_without_their_passwords(text: str, shown: str) -> None:
    assert mask_conninfo(text) == shown
    assert str(ConnectionString(text)) == shown
    assert SECRET not in repr(ConnectionString(text))


def test_a_kafka_client_gets_what_it_needs_and_our_settings_win() -> None:
    settings = _parse("", ALL_SECRETS)
    for role in ("producer", "consumer", "admin"):
        config = settings.kafka.client_config(role, settings.limits)
        assert config["allow.auto.create.topics"] is False, "a deleted topic must not come back by itself"
        assert config["security.protocol"] == "SASL_SSL"
        assert config["sasl.password"] == SECRET
        assert config["ssl.endpoint.identification.algorithm"] == "https"
    producer = settings.kafka.client_config("producer", settings.limits)
    assert (producer["acks"], producer["enable.idempotence"]) == ("all", True)
    assert producer["message.max.bytes"] == 1_000_000
    consumer = settings.kafka.client_config("consumer", settings.limits)
    assert consumer["enable.auto.commit"] is False
    assert consumer["auto.offset.reset"] == "error"
    assert "acks" not in consumer
