"""The whole path as production has it: prod mode, keys in a token, passwords, users with few rights.

Two databases of one server with SCRAM; the services log in as members of vsql_sync_producer and
vsql_sync_consumer and never learn the superuser's password. Only syncctl uses the superuser's here.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.nodes import PUBLICATION, Node, TwoNodes
from tests.softhsm import SoftToken, make_token
from tests.stack import PostgresServer, Stack

pytestmark = pytest.mark.topology

TABLES = """
CREATE TABLE accounts (id int PRIMARY KEY, owner text, balance numeric);
CREATE TABLE moves (id bigint PRIMARY KEY, account int, amount numeric, note text, made timestamptz);
CREATE TABLE secrets (id int PRIMARY KEY, pan text);
INSERT INTO secrets VALUES (1, '4000001234567899');
"""
USERS = {"producer": "app_producer", "consumer": "app_consumer"}
PASSWORDS = {"producer": "pr0ducer's \\ word", "consumer": "c0nsumer word"}


class ProdNode(Node):
    """A node in prod mode: TLS files, a signing key, the KEK in a token, a user for each service."""

    def write_prod_config(self, token: SoftToken) -> None:
        """Write vsql-sync.toml without any password: the environment brings the one that is needed."""
        parts = conninfo_to_dict(self.conninfo)
        pin = self.folder / "token.pin"
        pin.touch(mode=0o600)
        pin.write_text(token.pin.get_secret_value() + "\n")
        self.config.write_text(
            f"""[cluster]
name = "{self.cluster}"
node_id = {self.number}
node_name = "{self.name}"
[connection]
host = "{parts["host"]}"
port = {parts["port"]}
database = "{parts["dbname"]}"
user = "{parts["user"]}"
producer_user = "{USERS["producer"]}"
consumer_user = "{USERS["consumer"]}"
[server]
mode = "prod"
state_dir = "{self.folder / (self.name + "-state")}"
[server.tls]
cert_path = "{self.folder / "tls.crt"}"
key_path = "{self.folder / "tls.key"}"
[kafka]
bootstrap_servers = "{self.kafka}"
[encryption.kms]
provider = "pkcs11"
kek_id = "prod-kek"
[encryption.kms.pkcs11]
module = "{token.module}"
token_label = "{token.label}"
key_label = "prod-kek"
pin_file = "{pin}"
[audit]
signing_key_path = "{self.keys / "vsql-sync-signing.key"}"
[metrics]
producer_addr = "127.0.0.1:0"
consumer_addr = "127.0.0.1:0"
"""
        )


@dataclass
class Prod:
    """A pair of nodes in prod mode on one server."""

    server: PostgresServer
    pair: TwoNodes

    def start(self) -> None:
        """Start producer and consumer, each with its own password and no other."""
        for node, role in ((self.pair.a, "producer"), (self.pair.b, "consumer")):
            env = {"PGPASSFILE": "/dev/null", "VSQL_SYNC__CONNECTION__PASSWORD": PASSWORDS[role]}
            node.start(role, env)

    def connect(self, role: str, node: Node) -> psycopg.Connection[tuple[Any, ...]]:
        """A session as a service's user, with the service's password."""
        conninfo = make_conninfo(node.conninfo, user=USERS[role], password=PASSWORDS[role])
        return psycopg.connect(conninfo, autocommit=True)


@pytest.fixture(scope="module", params=[18, 15], ids=lambda version: f"pg{version}")
def prod(
    request: pytest.FixtureRequest, stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prod]:
    """Server, token, certificate, users, both nodes prepared as an operator would; services running."""
    folder = tmp_path_factory.mktemp("prod")
    token = make_token(folder)
    make_certificate(folder)
    server = stack.own_postgres(request.param, auth="scram")
    with ExitStack() as closing:
        closing.callback(server.remove)
        monkeypatch = closing.enter_context(pytest.MonkeyPatch.context())
        prepared = _prepare(stack, server, token, folder, monkeypatch)
        closing.callback(prepared.pair.stop)
        prepared.start()
        prepared.pair.wait_in_step()
        yield prepared


def _prepare(
    stack: Stack, server: PostgresServer, token: SoftToken, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Prod:
    with psycopg.connect(server.conninfo(), autocommit=True) as admin:
        for name in ("source", "target"):
            admin.execute(f"CREATE DATABASE {name}")
    pgpass = folder / "pgpass"
    pgpass.touch(mode=0o600)
    pgpass.write_text(f"*:*:*:postgres:{server.password}\n")
    monkeypatch.setenv("PGPASSFILE", str(pgpass))
    conninfos = (server.conninfo("source"), server.conninfo("target"))
    pair = TwoNodes(stack, folder, TABLES, conninfos=conninfos)
    nodes = [
        ProdNode(folder, pair.cluster, node.number, node.name, node.conninfo, node.kafka)
        for node in (pair.a, pair.b)
    ]
    pair.a, pair.b = nodes
    for node in nodes:
        node.write_prod_config(token)
        node.ctl("key", "generate", "--output", str(node.keys))
    pair.a.ctl("key", "generate", "--kek-pkcs11")
    for node in (pair.a, pair.b):
        node.ctl("node", "init")
    with psycopg.connect(server.conninfo(), autocommit=True) as admin:
        for role, user in USERS.items():
            attribute = "REPLICATION" if role == "producer" else ""
            create = f"CREATE ROLE {user} LOGIN {attribute} PASSWORD {{}} IN ROLE vsql_sync_{role}"
            admin.execute(sql.SQL(create).format(sql.Literal(PASSWORDS[role])))
    pair.a.execute("INSERT INTO accounts SELECT g, 'owner ' || g, 100 FROM generate_series(1, 500) g")
    tables = ("--table", "accounts(*)", "--table", "moves(*)")
    pair.a.ctl("publication", "create", PUBLICATION, *tables)
    peer = ("--peer-node-id", "2", "--peer-name", "node-b", "--peer-connection", pair.b.conninfo)
    pair.a.ctl("node", "add-peer", *peer, "--mode", "uni-directional", "--yes")
    for node in (pair.a, pair.b):
        node.ctl("start")
    return Prod(server, pair)


def make_certificate(folder: Path) -> None:
    """A self-signed certificate and its key, as tls.crt and tls.key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = folder / "tls.key"
    private.touch(mode=0o600)
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


CHANGES = (
    "INSERT INTO moves SELECT g, g % 500, g / 7., repeat('n', g % 50), now() FROM generate_series(1, 3000) g",
    "UPDATE accounts SET balance = balance - 1 WHERE id % 3 = 0; DELETE FROM moves WHERE id % 5 = 0",
    "UPDATE accounts SET id = id + 1000 WHERE id <= 20; INSERT INTO accounts VALUES (9999, NULL, NULL)",
    "DELETE FROM accounts WHERE id = 9999; TRUNCATE moves; INSERT INTO moves VALUES (1, 1, 1, 'last', now())",
)


@pytest.mark.timeout(300)
def test_prod_mode_runs_end_to_end_with_users_that_may_only_what_they_need(prod: Prod) -> None:
    pair = prod.pair
    copied = pair.b.query(
        "SELECT row_count FROM vsql_sync.vsql_sync_audit WHERE event_type = 'batch_applied'"
    )
    assert sum(row[0] for row in copied) >= 500, "what was there was copied"
    for change in CHANGES:
        pair.a.execute(change)
    pair.wait_in_step()
    assert pair.differences() == []
    _services_have_no_rights_beyond_their_work(prod)
    for node in (pair.a, pair.b):
        assert "ok: every entry is signed, linked and unaltered" in node.ctl("audit", "verify").stdout
    assert pair.a.query("SELECT bool_and(signature IS NOT NULL) FROM vsql_sync.vsql_sync_audit") == [(True,)]


def _services_have_no_rights_beyond_their_work(prod: Prod) -> None:
    """Who is connected for the services, and what these users are."""
    seen = prod.pair.a.query(
        "SELECT DISTINCT a.usename, r.rolsuper, r.rolbypassrls, r.rolcreaterole, r.rolcreatedb"
        " FROM pg_stat_activity a JOIN pg_roles r ON r.rolname = a.usename"
        " WHERE a.application_name LIKE 'vsql-sync %%' ORDER BY 1"
    )
    assert seen == [(user, False, False, False, False) for user in sorted(USERS.values())]
    memberships = prod.pair.a.query(
        "SELECT m.rolname, g.rolname FROM pg_auth_members JOIN pg_roles m ON m.oid = member"
        " JOIN pg_roles g ON g.oid = roleid WHERE m.rolname = ANY(%s) ORDER BY 1",
        list(USERS.values()),
    )
    assert memberships == [
        (user, f"vsql_sync_{role}") for role, user in sorted(USERS.items(), key=lambda x: x[1])
    ]


FORBIDDEN = {
    "producer": (
        "SELECT * FROM public.secrets",
        "INSERT INTO public.accounts VALUES (7000)",
        "DELETE FROM public.moves",
        "SET session_replication_role = replica",
        "INSERT INTO vsql_sync.signers VALUES ('f', 'x', repeat('x', 32)::bytea)",
        "DELETE FROM vsql_sync.deks",
        "SELECT pg_read_file('/etc/passwd')",
        "CREATE TABLE public.mine (x int)",
    ),
    "consumer": (
        "SELECT * FROM public.secrets",
        "INSERT INTO public.secrets VALUES (2, 'x')",
        "UPDATE public.secrets SET pan = 'x'",
        "DELETE FROM public.secrets",
        "TRUNCATE public.secrets",
        "INSERT INTO vsql_sync.signers VALUES ('f', 'x', repeat('x', 32)::bytea)",
        "INSERT INTO vsql_sync.decisions (chain, kind, reason) VALUES ('pub.node-a', 'skip-batch', 'mine')",
        "DROP TABLE public.accounts",
        "COPY public.accounts TO PROGRAM 'true'",
    ),
}


@pytest.mark.timeout(300)
def test_an_operator_without_superuser_sees_pauses_and_verifies(
    prod: Prod, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = prod.pair
    with psycopg.connect(prod.server.conninfo(), autocommit=True) as admin:
        admin.execute("CREATE ROLE olga LOGIN PASSWORD 'o' IN ROLE vsql_sync_operator")
    monkeypatch.setenv("VSQL_SYNC__CONNECTION__USER", "olga")
    monkeypatch.setenv("VSQL_SYNC__CONNECTION__PASSWORD", "o")
    monkeypatch.setenv("PGPASSFILE", "/dev/null")
    pair.a.ctl("pause", "--reason", "maintenance")
    _wait_for_state(pair.a, "paused")
    pair.a.ctl("resume")
    _wait_for_state(pair.a, "running")
    for command in (["key", "inventory"], ["publication", "list"], ["node", "status"], ["audit", "list"]):
        pair.a.ctl(*command)
    assert "ok: every entry" in pair.b.ctl("audit", "verify").stdout
    refused = pair.a.ctl("publication", "create", "mine", "--table", "secrets(*)", check=False)
    assert refused.returncode != 0
    assert "permission denied" in refused.stderr


def _wait_for_state(node: Node, state: str) -> None:
    deadline = time.monotonic() + 30
    streams: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        streams = node.ctl_json("status")["streams"]
        if [one["state"] for one in streams if one["chain"] == "pub.node-a"] == [state]:
            return
        time.sleep(0.3)
    pytest.fail(f"not {state}: {streams}")


@pytest.mark.timeout(300)
def test_a_service_s_user_can_neither_read_nor_write_what_is_not_its_work(prod: Prod) -> None:
    for role, node in (("producer", prod.pair.a), ("consumer", prod.pair.b)):
        with prod.connect(role, node) as session:
            assert session.execute("SELECT count(*) > 0 FROM public.accounts").fetchall() == [(True,)]
            for statement in FORBIDDEN[role]:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.execute(statement.encode())
