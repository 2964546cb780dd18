"""The configuration as operators meet it: what validates, what is refused and in which words."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.config_reference import meaning
from vsql_shared.changes import TableName
from vsql_shared.config import (
    Settings,
    advice,
    check_files,
    masked,
    not_built,
    parse_settings,
    require_built,
    to_toml,
)
from vsql_shared.config.fields import model_of
from vsql_shared.config.load import load_from
from vsql_shared.config.strategies import strategies_of
from vsql_shared.errors import ConfigError, NotBuiltError

ROOT = Path(__file__).parents[2]

# The product's published sample, every section of it.
FULL_SAMPLE = """
[cluster]
name      = "my-cluster"
node_id   = 1
node_name = "node-a-us-east"
[connection]
host     = "localhost"
port     = 5432
database = "vibesql"
user     = "vsql_sync"
[server]
mode        = "prod"
listen_addr = "0.0.0.0:8444"
[server.tls]
cert_path = "/certs/tls.crt"
key_path  = "/certs/tls.key"
[[peers]]
node_id    = 2
node_name  = "node-b-eu-west"
connection = "host=node-b port=5432 dbname=vibesql user=vsql_sync"
mode       = "bidirectional"
[encryption]
enabled   = true
algorithm = "AES-256-GCM"
[encryption.kms]
provider = "azure-kv"
kek_id   = "vault/keys/vsql-sync-kek"
[encryption.dek]
rotation = "per-session"
[conflict]
default_strategy  = "last_write_wins"
pci_write_primary = "node-a-us-east"
pci_write_policy  = "reject"
max_clock_skew_ms = 100
[[conflict.crdt.columns]]
table    = "account_balance"
column   = "balance"
function = "spock_delta_apply_float8"
[consistency]
pci_sync_mode     = "remote_apply"
non_pci_sync_mode = "async"
[audit]
enabled             = true
hash_chain          = true
merkle_roots        = true
signature_algorithm = "ed25519"
signing_key_path    = "/etc/vsql-sync/vsql-sync-signing.key"
audit_table         = "vsql_sync_audit"
[ddl]
enforce_governed_ddl = true
audit_ddl            = true
[cryptaply]
enabled          = false
endpoint         = "https://cryptaply.internal:8443"
report_interval  = "5m"
accept_directives = true
stale_max        = "24h"
[[publications]]
name   = "full_replica"
tables = ["*"]
mode   = "bidirectional"
[[publications]]
name = "analytics_replica"
mode = "uni-directional"
[[publications.tables]]
name        = "payments"
columns     = ["id", "merchant_id", "amount_cents", "currency", "status", "created_at"]
exclude_pci = true
[[publications.tables]]
name    = "merchants"
columns = "all"
[air_gap]
export_dir          = "/var/vsql-sync/exports"
changeset_format    = "vsql-changeset-v1"
max_changeset_size  = "10GB"
"""

MINIMAL = """
[cluster]
name = "c"
node_id = 1
node_name = "a"
[connection]
database = "d"
[server]
mode = "dev"
"""

PROD = MINIMAL.replace(
    'mode = "dev"',
    """mode = "prod"
[server.tls]
cert_path = "/certs/tls.crt"
key_path = "/certs/tls.key"
[audit]
signing_key_path = "/certs/signing.key"
[encryption.kms]
provider = "pkcs11"
[encryption.kms.pkcs11]
module = "/usr/lib/p11.so"
token_label = "t"
key_label = "k"
""",
)


def parse(text: str, env: Mapping[str, str] | None = None) -> Settings:
    return parse_settings(text, source=None, env=env or {})


def refused(text: str, env: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, env)
    return str(caught.value)


def test_the_whole_published_sample_validates() -> None:
    settings = parse(FULL_SAMPLE)
    assert settings.is_prod
    assert settings.publications[1].tables[0].columns == [
        "id",
        "merchant_id",
        "amount_cents",
        "currency",
        "status",
        "created_at",
    ]
    assert settings.publications[1].tables[1].columns is None
    assert settings.publications[0].tables[0].name == "*"
    assert settings.air_gap.max_changeset_size == 10_000_000_000
    assert settings.cryptaply.stale_max == timedelta(hours=24)


def test_what_the_sample_asks_for_and_is_not_built_stops_a_service_and_is_named() -> None:
    settings = parse(FULL_SAMPLE)
    with pytest.raises(NotBuiltError) as caught:
        require_built(settings)
    for key in (
        'peers[0].mode = "bidirectional"',
        'publications[0].mode = "bidirectional"',
        "ddl.enforce_governed_ddl = true",
        "ddl.audit_ddl = true",
    ):
        assert key in str(caught.value)


def test_the_shortest_configuration_is_built() -> None:
    settings = parse(MINIMAL)
    require_built(settings)
    assert (settings.kafka.bootstrap_servers, settings.kafka.partitions) == ("127.0.0.1:9092", 1)
    assert settings.metrics.producer_addr == "127.0.0.1:9464"
    assert settings.metrics.consumer_addr == "127.0.0.1:9465"
    assert settings.limits.batch_max_rows == 5_000
    assert settings.encryption.dek.max_tuples == 2**24


NOT_BUILT = {
    "policy": ('[conflict]\npci_write_policy = "forward"', "conflict.pci_write_policy"),
    "cryptaply": ("[cryptaply]\nenabled = true", "cryptaply.enabled"),
    "ddl": ("[ddl]\naudit_ddl = true", "ddl.audit_ddl"),
    "table": ('[audit]\naudit_table = "other"', "audit.audit_table"),
}


@pytest.mark.parametrize(("text", "key"), NOT_BUILT.values(), ids=NOT_BUILT.keys())
def test_a_control_that_is_not_enforced_is_never_accepted_in_silence(text: str, key: str) -> None:
    (note,) = not_built(parse(MINIMAL + text))
    assert note.startswith(key)
    assert "not built yet; " in note


STRATEGY = """
[conflict]
default_strategy = "node_priority"
[[conflict.tables]]
table    = "sales.Orders"
strategy = "manual"
[[publications]]
name              = "pub"
conflict_strategy = "keep_local"
"""


def test_a_tables_strategy_comes_before_its_publications_and_that_before_the_default() -> None:
    found = strategies_of(parse(MINIMAL + STRATEGY))
    orders, other = TableName("sales", "orders"), TableName("public", "orders")
    assert [found.of("pub", orders), found.of("other", orders)] == ["manual", "manual"]
    assert [found.of("pub", other), found.of("other", other)] == ["keep_local", "node_priority"]


def test_a_default_that_nobody_wrote_says_nothing() -> None:
    table = TableName("public", "t")
    for found in (strategies_of(None), strategies_of(parse(MINIMAL))):
        assert (found.chosen("pub", table), found.of("pub", table)) == (None, "last_write_wins")
    written = strategies_of(parse(MINIMAL + '[conflict]\ndefault_strategy = "last_write_wins"'))
    assert written.chosen("pub", table) == "last_write_wins"


REFUSALS = {
    "encryption off": ("[encryption]\nenabled = false", "encryption.enabled = false: must be true"),
    "audit off": ("[audit]\nenabled = false", "audit.enabled = false: must be true"),
    "no chain": ("[audit]\nhash_chain = false", "audit.hash_chain = false: must be true"),
    "no roots": ("[audit]\nmerkle_roots = false", "what makes a batch exist"),
    "cipher": ('[encryption]\nalgorithm = "none"', 'must be "AES-256-GCM"'),
    "signature": ('[audit]\nsignature_algorithm = "rsa"', 'must be "ed25519"'),
    "unknown section": ("[kafak]\npartitions = 1", 'kafak: unknown key; did you mean "kafka"?'),
    "unknown key": ("[kafka]\npartition = 1", 'kafka.partition: unknown key; did you mean "partitions"?'),
    "far from any key": ("[apply]\nxyzzy = 1", "apply.xyzzy: unknown key; known here: members, on_anomaly"),
    "range": ("[limits]\nbatch_max_rows = 0", "limits.batch_max_rows = 0: must be at least 1"),
    "dek limit": ("[encryption.dek]\nmax_tuples = 16777217", "must be at most 16777216"),
    "dek bytes": ('[encryption.dek]\nmax_bytes = "65GiB"', "must be at most 68719476736"),
    "truth for a number": ("[kafka]\npartitions = true", "kafka.partitions = true: must be a whole number"),
    "fraction": ("[kafka]\npartitions = 1.5", "kafka.partitions = 1.5: must be a whole number"),
    "choice": ('[log]\nlevel = "loud"', 'must be "debug", "info", "warning" or "error"'),
    "duration": ('[kafka]\nretention = "7"', "write a duration with its unit"),
    "duration number": ("[kafka]\nretention = 7", "write a duration with its unit"),
    "long duration": ('[kafka]\nretention = "999999999w"', "at most 100 years"),
    "size": ('[limits]\nbatch_max_bytes = "4 MX"', "write a size in bytes or with a unit"),
    "address": ('[metrics]\nproducer_addr = "9464"', "write an address as host:port"),
    "port": ('[kafka]\nbootstrap_servers = "k:70000"', "write an address as host:port"),
    "broker port 0": ('[kafka]\nbootstrap_servers = ["k:0"]', "a broker's port is 1 to 65535"),
    "section as text": ('kms = 1\n[encryption]\nkms = "file"', "encryption.kms: must be a section"),
    "list": ('[[publications]]\nname = "p"\ntables = "all"', "must be a list in brackets"),
    "columns": ('[[publications]]\nname = "p"\ntables = [{name="t", columns="id"}]', 'write "all" or a list'),
    "no columns": ('[[publications]]\nname = "p"\ntables = [{name="t", columns=[]}]', "no columns"),
    "column twice": ('[[publications]]\nname = "p"\ntables = [{name="t", columns=["a","a"]}]', "named twice"),
    "publication twice": ('[[publications]]\nname = "p"\n[[publications]]\nname = "p"', '"p" is used twice'),
    "table twice": ('[[publications]]\nname = "p"\ntables = ["t", "t"]', "named twice"),
    "peer has our id": (
        '[[peers]]\nnode_id = 1\nnode_name = "b"\nconnection = ""',
        "node_id 1 is used twice",
    ),
    "peer has our name": (
        '[[peers]]\nnode_id = 2\nnode_name = "a"\nconnection = ""',
        'node_name "a" is used twice',
    ),
    "pci twice": (
        '[[pci.columns]]\ntable = "t"\ncolumns = ["a"]\n[[pci.columns]]\ntable = "t"\ncolumns = ["b"]',
        "named twice",
    ),
    "strategy": ('[conflict]\ndefault_strategy = "newest"', "conflict.default_strategy"),
    "strategy twice": (
        '[conflict]\ntables = [{table="t", strategy="manual"}, {table="t", strategy="keep_local"}]',
        "named twice; it has one strategy",
    ),
    "sasl without user": ('[kafka.security]\nprotocol = "SASL_SSL"', "needs username and a password"),
    "half a certificate": ('[kafka.security]\ncert_path = "c"', "given together"),
    "replicas": ("[kafka]\nmin_insync_replicas = 2", "must not exceed replication_factor (1)"),
    "pack in message": ('[limits]\npack_max_bytes = "1MB"', "below message_max_bytes"),
    "back-off": ("[limits]\nretry_backoff_ms = 50000", "must not exceed retry_backoff_max_ms"),
    "pkcs11 incomplete": ('[encryption.kms]\nprovider = "pkcs11"', "needs module"),
    "ours: idempotence": ('[kafka.client_options]\n"enable.idempotence" = false', "always idempotent"),
    "ours: acks": ("[kafka.client_options]\nacks = 0", "acknowledged by all replicas"),
    "ours: tls": (
        '[kafka.client_options]\n"enable.ssl.certificate.verification" = false',
        "always verified",
    ),
    "ours: sasl": ('[kafka.client_options]\n"sasl.password" = "hunter2"', "set it in [kafka.security]"),
    "endpoint": ('[cryptaply]\nendpoint = "http://x"', "cryptaply.endpoint"),
    "NUL": ('[log]\nlevel = "a\\u0000b"', "log.level: holds a NUL character"),
    "home": ('[audit]\nsigning_key_path = "~no-such-user-here/k"', "write the whole path"),
}


@pytest.mark.parametrize(("text", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_each_mistake_is_one_error_that_names_key_and_fix(text: str, words: str) -> None:
    assert words in refused(MINIMAL + text)


NAMES = {
    "node id 0": ("node_id = 1", "node_id = 0", "cluster.node_id = 0: must be at least 1"),
    "node id 1024": ("node_id = 1", "node_id = 1024", "cluster.node_id = 1024: must be at most 1023"),
    "node name case": ('node_name = "a"', 'node_name = "A"', 'cluster.node_name = "A"'),
    "node name digit": ('node_name = "a"', 'node_name = "1a"', "beginning with a letter"),
    "node name long": ('node_name = "a"', f'node_name = "{"a" * 32}"', "1 to 31"),
    "node name newline": ('node_name = "a"', 'node_name = "a\\n"', 'cluster.node_name = "a\\n"'),
    "cluster name": ('name = "c"', 'name = "_c"', 'cluster.name = "_c"'),
    "cluster name long": ('name = "c"', f'name = "{"c" * 64}"', "1 to 63"),
    "missing": ('database = "d"', "", "connection.database: missing; add database = … under [connection]"),
    "mode": ('mode = "dev"', 'mode = "test"', 'server.mode = "test": must be "dev" or "prod"'),
}


@pytest.mark.parametrize(("old", "new", "words"), NAMES.values(), ids=NAMES.keys())
def test_names_and_numbers_have_one_form(old: str, new: str, words: str) -> None:
    assert old in MINIMAL
    assert words in refused(MINIMAL.replace(old, new))


PROD_NEEDS = {
    "certificate": ('cert_path = "/certs/tls.crt"\n', "", "server.tls.cert_path: missing"),
    "tls key": ('key_path = "/certs/tls.key"\n', "", "server.tls.key_path: missing"),
    "signing key": ('signing_key_path = "/certs/signing.key"\n', "", "audit.signing_key_path: missing"),
    "kms": ('provider = "pkcs11"', 'provider = "file"', "encryption.kms.provider"),
}


@pytest.mark.parametrize(("old", "new", "words"), PROD_NEEDS.values(), ids=PROD_NEEDS.keys())
def test_prod_mode_has_no_exceptions(old: str, new: str, words: str) -> None:
    parse(PROD)
    assert old in PROD
    assert words in refused(PROD.replace(old, new))


_FAR = 'bootstrap_servers = "127.0.0.1:9092,kafka1:9092"\n'
_SASL = 'security = { protocol = "SASL_PLAINTEXT", username = "u", password = "p" }'
DOWNGRADED = {
    "Kafka without TLS": ("", "[kafka]\n" + _FAR, 'kafka.security.protocol: "PLAINTEXT" has no TLS'),
    "a password to Kafka in clear": (
        "",
        "[kafka]\n" + _FAR + _SASL,
        '"SASL_PLAINTEXT" has no TLS and kafka1:9092',
    ),
    "a database that may be anybody": ('\nhost = "db1"', "", 'connection.sslmode: "prefer" does not check'),
    "a database whose name is not checked": (
        '\nhost = "db1"\nsslmode = "verify-ca"',
        "",
        'connection.sslmode: "verify-ca" does not check',
    ),
    "one host of several": ('\nhost = "localhost,10.0.0.7"', "", "connection.sslmode"),
}


@pytest.mark.parametrize(("database", "more", "words"), DOWNGRADED.values(), ids=DOWNGRADED.keys())
def test_prod_mode_has_no_way_across_a_network_without_tls(database: str, more: str, words: str) -> None:
    said = refused(PROD.replace('database = "d"', 'database = "d"' + database) + more)
    assert words in said
    assert 'server.mode = "dev"' in said


def test_prod_mode_takes_tls_across_a_network() -> None:
    far = 'database = "d"\nhost = "db1"\nsslmode = "verify-full"'
    settings = parse(
        PROD.replace('database = "d"', far) + "[kafka]\n" + _FAR + 'security = { protocol = "SSL" }'
    )
    assert settings.connection.sslmode == "verify-full"
    assert settings.kafka.security.client_options()["ssl.cipher.suites"] == "ECDHE+AESGCM:ECDHE+CHACHA20"


def test_a_configuration_that_says_no_mode_is_prod() -> None:
    said = refused(MINIMAL.replace('mode = "dev"', ""))
    assert "server.tls.cert_path: missing; prod mode requires it" in said
    assert 'server.mode = "dev"' in said


UNWISE = {
    "dev": (MINIMAL, ['server.mode = "dev"', "audit.signing_key_path"]),
    "one broker": (PROD, ["kafka.min_insync_replicas = 1", 'kafka.security.protocol = "PLAINTEXT"']),
    "loopback": (
        PROD.replace('database = "d"', 'database = "d"\nhost = "::1"')
        + '[kafka]\nreplication_factor = 3\nmin_insync_replicas = 2\nsecurity = { protocol = "SSL" }',
        [],
    ),
}


@pytest.mark.parametrize(("text", "keys"), UNWISE.values(), ids=UNWISE.keys())
def test_what_is_allowed_and_unwise_is_said(text: str, keys: list[str]) -> None:
    assert [line.split(": ")[0] for line in advice(parse(text))] == keys


def test_several_mistakes_are_listed_one_line_each() -> None:
    text = (
        MINIMAL.replace("node_id = 1", "node_id = 0") + "[kafka]\npartitions = 0\nx = 1\n[log]\nlevel = 3\n"
    )
    lines = refused(text).splitlines()
    assert lines[0] == "environment: 4 errors"
    assert [line.split(":")[0].split(" = ")[0].strip() for line in lines[1:]] == [
        "cluster.node_id",
        "kafka.partitions",
        "kafka.x",
        "log.level",
    ]


SYNTAX = {
    "no value": (b"[cluster]\nname =\n", "line 2"),
    "bare word": (b"[log]\n\nlevel = info\n", "line 3"),
    "twice": (b"[log]\n[log]\n", "line 2"),
    "not UTF-8": (b"[log]\nlevel = '\xff'\n", "byte 15 is not UTF-8"),
    "endless number": (b"a = " + b"9" * 10_000, "a number too long"),
    "deep": (b"a = " + b"[" * 100_000, "nested too deep"),
    "deep table": (b"[" + b".".join([b"a"] * 50) + b"]\n", "nested too deep"),
}


@pytest.mark.parametrize(("content", "words"), SYNTAX.values(), ids=SYNTAX.keys())
def test_what_is_not_toml_is_said_with_its_place(content: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_settings(content, source=Path("/etc/x.toml"), env={})


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert parse_settings(b"\xef\xbb\xbf" + MINIMAL.encode(), source=None, env={}).cluster.name == "c"


def test_the_environment_overrides_the_file() -> None:
    env = {
        "VSQL_SYNC__CONNECTION__PORT": "6543",
        "VSQL_SYNC__KAFKA__SECURITY__PROTOCOL": "SSL",
        "VSQL_SYNC__PEERS": '[{"node_id": 2, "node_name": "b", "connection": "host=b"}]',
        "VSQL_SYNC__KAFKA__BOOTSTRAP_SERVERS": "k1:9092, k2:9092",
        "VSQL_SYNC_OTHER": "not ours",
    }
    settings = parse(MINIMAL, env)
    assert settings.connection.port == 6543
    assert settings.kafka.security.protocol == "SSL"
    assert settings.peers[0].node_name == "b"
    assert settings.kafka.bootstrap_servers == "k1:9092,k2:9092"


def test_a_variable_overrides_one_key_of_a_section_and_leaves_the_others() -> None:
    text = (
        MINIMAL
        + """
[kafka]
partitions = 4
[kafka.client_options]
"linger.ms" = 5
"socket.nagle.disable" = true
[[peers]]
node_id = 9
node_name = "from-file"
connection = "host=x"
"""
    )
    env = {
        "VSQL_SYNC__KAFKA__RETENTION": "2d",
        "VSQL_SYNC__KAFKA__CLIENT_OPTIONS__LINGER.MS": "7",
        "VSQL_SYNC__PEERS": '[{"node_id": 2, "node_name": "b", "connection": "host=b"}]',
    }
    settings = parse(text, env)
    assert (settings.kafka.partitions, settings.kafka.retention) == (4, timedelta(days=2))
    assert settings.kafka.client_options == {"linger.ms": "7", "socket.nagle.disable": True}
    assert [peer.node_name for peer in settings.peers] == ["b"], "a list is replaced, not merged"


def test_only_the_environment_that_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSQL_SYNC__CLUSTER__NAME", "from-the-process")
    assert parse(MINIMAL).cluster.name == "c"


def test_no_debugging_of_the_library_shows_a_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYDANTIC_SETTINGS_DEBUG", "1")
    caplog.set_level("DEBUG")
    parse(MINIMAL, {"VSQL_SYNC__CONNECTION__PASSWORD": "marker-of-a-password"})
    assert "marker-of-a-password" not in caplog.text


BAD_VARIABLES = {
    "unknown": ({"VSQL_SYNC__KAFKA__PARTITION": "1"}, 'did you mean "partitions"'),
    "value": (
        {"VSQL_SYNC__KAFKA__PARTITIONS": "x"},
        'kafka.partitions = "x" (set by VSQL_SYNC__KAFKA__PARTITIONS): must be a whole number',
    ),
    "section": ({"VSQL_SYNC__KAFKA": "x"}, "names a section; name a key in it"),
    "list": ({"VSQL_SYNC__PEERS": "node-b"}, "must be a JSON list or object"),
    "NUL in a list": (
        {"VSQL_SYNC__PEERS": '["a\\u0000b"]'},
        "peers[0] (set by VSQL_SYNC__PEERS): holds a NUL character",
    ),
    "too deep": ({"VSQL_SYNC__PEERS": "[" * 20 + "]" * 20}, "tables nested too deep"),
    "unknown section": ({"VSQL_SYNC__KAFAK__PARTITIONS": "1"}, "kafak (set by VSQL_SYNC__KAFAK__PARTITIONS)"),
    "one of a list": ({"VSQL_SYNC__PEERS__NODE_ID": "2"}, "peers (set by VSQL_SYNC__PEERS__NODE_ID)"),
    "null": ({"VSQL_SYNC__PEERS": "null"}, "must be a JSON list or object"),
    "into a value": ({"VSQL_SYNC__CLUSTER__NAME__X": "1"}, "is no section in the file"),
    "empty": ({"VSQL_SYNC__": "1"}, "unknown key"),
}


@pytest.mark.parametrize(("env", "words"), BAD_VARIABLES.values(), ids=BAD_VARIABLES.keys())
def test_a_wrong_variable_is_named(env: dict[str, str], words: str) -> None:
    assert words in refused(MINIMAL, env)


def test_all_wrong_variables_are_listed_with_what_is_wrong_in_the_file() -> None:
    env = {
        "VSQL_SYNC__KAFAK__X": "1",
        "VSQL_SYNC__PEERS": "{",
        "VSQL_SYNC__KAFKA": "1",
        "VSQL_SYNC__LOG__LEVEL": "loud",
    }
    said = refused(MINIMAL + "[limits]\nbatch_max_rows = 0\n", env)
    assert said.splitlines()[0] == "environment: 5 errors"
    assert all(variable in said for variable in env)
    assert "limits.batch_max_rows = 0: must be at least 1" in said


def test_a_section_that_the_file_writes_as_a_value_is_not_hidden_by_a_variable() -> None:
    said = refused("kafka = 1\n" + MINIMAL, {"VSQL_SYNC__KAFKA__PARTITIONS": "2"})
    assert "kafka: must be a section" in said
    assert "kafka (set by VSQL_SYNC__KAFKA__PARTITIONS): is no section in the file" in said


def test_the_first_place_that_has_a_file_counts(tmp_path: Path) -> None:
    (tmp_path / "vsql-sync.toml").write_text(MINIMAL)
    (tmp_path / "other.toml").write_text(MINIMAL.replace('name = "c"', 'name = "other"'))
    (tmp_path / "named.toml").write_text(MINIMAL.replace('name = "c"', 'name = "named"'))
    env = {"VSQL_SYNC_CONFIG": "other.toml"}
    assert load_from("named.toml", env=env, cwd=tmp_path).cluster.name == "named"
    assert load_from(None, env=env, cwd=tmp_path).cluster.name == "other"
    found = load_from(None, env={}, cwd=tmp_path)
    assert (found.cluster.name, found.source) == ("c", tmp_path / "vsql-sync.toml")


def test_a_file_that_is_named_and_missing_is_an_error_that_says_who_named_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config: no file at .*x\.toml"):
        load_from("x.toml", env={}, cwd=tmp_path)
    with pytest.raises(ConfigError, match=r"VSQL_SYNC_CONFIG: no file at"):
        load_from(None, env={"VSQL_SYNC_CONFIG": "x.toml"}, cwd=tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_from(tmp_path, env={}, cwd=tmp_path)


def test_the_environment_alone_can_configure(tmp_path: Path) -> None:
    env = {
        "VSQL_SYNC__CLUSTER__NAME": "c",
        "VSQL_SYNC__CLUSTER__NODE_ID": "7",
        "VSQL_SYNC__CLUSTER__NODE_NAME": "seven",
        "VSQL_SYNC__CONNECTION__DATABASE": "12345",
        "VSQL_SYNC__SERVER__MODE": "dev",
    }
    settings = load_from(None, env=env, cwd=tmp_path)
    assert (settings.source, settings.cluster.node_id, settings.connection.database) == (None, 7, "12345")


def test_relative_paths_are_meant_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "v.toml").write_text(MINIMAL + '[audit]\nsigning_key_path = "keys/k"\n')
    settings = load_from("sub/v.toml", env={}, cwd=tmp_path)
    assert settings.audit.signing_key_path == tmp_path / "sub" / "keys" / "k"


def test_the_state_folder_is_one_per_node(tmp_path: Path) -> None:
    settings = parse(MINIMAL)
    assert settings.state_dir({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "vsql-sync" / "c-a"
    given = parse(MINIMAL + f'state_dir = "{tmp_path}/s"')
    assert given.state_dir({"XDG_STATE_HOME": "/elsewhere"}) == tmp_path / "s"


def test_what_is_shown_is_a_configuration_that_means_the_same() -> None:
    for text in (FULL_SAMPLE, MINIMAL, PROD, (ROOT / "vsql-sync.toml.example").read_text()):
        shown = masked(parse(text))
        assert tomllib.loads(to_toml(shown)) == shown
        assert masked(parse(to_toml(shown))) == shown


def test_the_example_has_every_key_and_the_defaults_it_says() -> None:
    text = (ROOT / "vsql-sync.toml.example").read_text()
    missing = [key for key in _every_key(Settings) if f"{key} " not in text and f"{key}]" not in text]
    secrets = {"password", "pin", "pin_command", "token", "token_command", "secret_id", "secret_id_command"}
    assert set(missing) <= secrets | {"where", "column", "function"}
    settings, shortest = parse(text), parse(MINIMAL)
    for section in ("limits", "metrics", "log", "kafka", "apply", "conflict", "ddl", "cryptaply", "air_gap"):
        assert getattr(settings, section) == getattr(shortest, section), section
    assert not_built(settings) == []


def test_every_key_is_explained() -> None:
    silent = [
        f"{model.__name__}.{name}"
        for model in _models(Settings)
        for name in model.model_fields
        if not meaning(model, name)
    ]
    assert silent == []


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        inner = model_of(field.annotation)
        if inner is not None:
            yield from _models(inner)


def _every_key(model: type[BaseModel]) -> Iterator[str]:
    for each in _models(model):
        yield from (name for name, field in each.model_fields.items() if model_of(field.annotation) is None)


def _with_files(tmp_path: Path, mode: str) -> Settings:
    for name in ("tls.crt", "tls.key", "signing.key", "p11.so"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0o600)
    text = PROD.replace("/certs/", f"{tmp_path}/").replace("/usr/lib/", f"{tmp_path}/")
    return parse(text.replace('mode = "prod"', f'mode = "{mode}"'))


def test_files_that_are_there_and_private_pass(tmp_path: Path) -> None:
    assert check_files(_with_files(tmp_path, "prod")) == []


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    settings = _with_files(tmp_path, "prod")
    (tmp_path / "tls.crt").unlink()
    (tmp_path / "signing.key").unlink()
    (tmp_path / "signing.key").mkdir()
    with pytest.raises(ConfigError) as caught:
        check_files(settings)
    assert f"server.tls.cert_path = {tmp_path}/tls.crt: No such file" in str(caught.value)
    assert f"audit.signing_key_path = {tmp_path}/signing.key: is no file" in str(caught.value)


@pytest.mark.parametrize("mode_bits", [0o604, 0o640, 0o620, 0o644])
def test_a_key_others_can_read_is_an_error_in_prod_and_a_warning_in_dev(
    tmp_path: Path, mode_bits: int
) -> None:
    prod, dev = _with_files(tmp_path, "prod"), _with_files(tmp_path, "dev")
    (tmp_path / "signing.key").chmod(mode_bits)
    (tmp_path / "tls.crt").chmod(0o644)
    with pytest.raises(ConfigError, match=r"audit\.signing_key_path = .*chmod 600"):
        check_files(prod)
    (warning,) = check_files(dev)
    assert "audit.signing_key_path" in warning


def test_a_password_in_an_open_configuration_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "v.toml"
    (tmp_path / "kek").touch(0o600)
    text = MINIMAL.replace('database = "d"', 'database = "d"\npassword = "x"')
    path.write_text(text + '[encryption.kms.file]\npath = "kek"\n')
    path.chmod(0o644)
    (warning,) = check_files(load_from(path, env={}, cwd=tmp_path))
    assert "a password stands in the configuration" in warning
    path.chmod(0o600)
    assert check_files(load_from(path, env={}, cwd=tmp_path)) == []
