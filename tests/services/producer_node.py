"""A source node for the producer's tests, made by the product's own functions, and a reader of its topics.

`SourceNode` has a database with schema vsql_sync, keys, a configuration file and a live stream, and starts
workers as processes. `read_stream` takes the topics apart as a consumer must: chain and signatures verified,
packs matched to manifests by (epoch, batch) and offset, roots computed, keys unwrapped, tuples opened.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from psycopg.conninfo import conninfo_to_dict

from tests.nodes import start_service
from tests.stack import Stack
from tests.streams import Record, append, cluster_topics, read_topics
from vsql_shared import names
from vsql_shared.audit import merkle
from vsql_shared.audit.chain import (
    EMPTY_HEAD,
    Accepted,
    ChainHead,
    ChainReader,
    ChainWriter,
    Prepared,
    Void,
    new_incarnation,
)
from vsql_shared.audit.dsse import KEY_ANNOUNCEMENT, document_hash, open_document
from vsql_shared.audit.entries import BATCH_APPLIED, EPOCH_OPENED, REPLICATION_BATCH, AuditEntry
from vsql_shared.audit.rows import parse
from vsql_shared.changes import CHANGE_OPS, Op, PartitionRoot, Relation, TableName, Transaction
from vsql_shared.config import Settings, load_settings
from vsql_shared.crypto.announce import decode_announcement, unwrap
from vsql_shared.crypto.dek import OpeningKey
from vsql_shared.crypto.seal import open_tuples
from vsql_shared.crypto.signing import (
    PinnedKey,
    Signer,
    TrustStore,
    fingerprint,
    generate_signing_key,
    load_public_key,
    load_signer,
)
from vsql_shared.kafka.topics import ensure_topic
from vsql_shared.kms import open_provider
from vsql_shared.kms.file import generate_kek_file
from vsql_shared.pg import migrate, nodes, publications
from vsql_shared.pg.connect import connect
from vsql_shared.pg.publications import PublicationRequest
from vsql_shared.pg.table_spec import TableSpec
from vsql_shared.wire.framing import without_frame
from vsql_shared.wire.pack import decode_header, decode_relation, decode_tuples, header_digest, relation_hash

NODE, PUBLICATION = "node-a", "pub"
CHAIN = names.live_chain(PUBLICATION, NODE)


@dataclass
class Change:
    """One change as it was read back."""

    table: TableName
    relation: Relation
    op: int
    transaction: Transaction
    lsn: int
    plaintext: bytes


@dataclass
class ReadBack:
    """What a chain's topics hold, verified."""

    entries: list[AuditEntry] = field(default_factory=list)
    void: int = 0
    changes: list[Change] = field(default_factory=list)
    dek_ids: list[str] = field(default_factory=list)

    @property
    def manifests(self) -> list[AuditEntry]:
        """Manifests whose changes count: fragments that an epoch abandoned are left out."""
        kept: list[AuditEntry] = []
        for entry in self.entries:
            if entry.event_type == EPOCH_OPENED and entry.ref_sequence:
                kept = [one for one in kept if one.sequence < entry.ref_sequence]
            elif entry.event_type == REPLICATION_BATCH:
                kept.append(entry)
        return kept

    def rows(self, table: str) -> list[tuple[str, tuple[bytes | None, ...]]]:
        """(operation, new column values) of a table's row changes, as bytes."""
        return [
            (chr(change.op), parse_tuple(change.plaintext))
            for change in self.changes
            if change.table.table == table and change.op != Op.TRUNCATE
        ]


def parse_tuple(plaintext: bytes) -> tuple[bytes | None, ...]:
    """Values of the last tuple in a pgoutput row message (the new one; the key of a DELETE)."""
    at = 0
    values: list[bytes | None] = []
    while at < len(plaintext):
        assert plaintext[at : at + 1] in (b"N", b"K", b"O")
        count, at = int.from_bytes(plaintext[at + 1 : at + 3], "big"), at + 3
        values = []
        for _ in range(count):
            kind = plaintext[at : at + 1]
            at += 1
            if kind in (b"n", b"u"):
                values.append(None)
                continue
            size = int.from_bytes(plaintext[at : at + 4], "big")
            values.append(plaintext[at + 4 : at + 4 + size])
            at += 4 + size
    return tuple(values)


class SourceNode:
    """A node with an outgoing live stream."""

    def __init__(
        self,
        stack: Stack,
        folder: Path,
        schema_sql: str,
        tables: Sequence[str],
        *,
        version: int = 18,
        config: str = "",
        kafka: str | None = None,
        conninfo: str | None = None,
        pci_columns: Sequence[tuple[str, str]] = (),
        exclude_pci: bool = False,
    ) -> None:
        self._workers: list[subprocess.Popen[bytes]] = []
        self.folder, self.cluster = folder, stack.new_cluster_name("p")
        self._made = "" if conninfo else stack.new_database(version, "source")
        self.conninfo = conninfo or self._made
        self.kafka = kafka or stack.kafka().bootstrap_servers
        self.chain = CHAIN
        self.slot = names.slot_name(self.cluster, PUBLICATION, NODE)
        self._kek = folder / "kek.key"
        generate_kek_file(self._kek, "test-kek")
        private, public = generate_signing_key(folder)
        self.public_key = load_public_key(public)
        self.config = folder / "node-a.toml"
        self._write_config(private, config)
        self.execute(schema_sql)
        with connect(self.conninfo, application_name="test") as conn:
            migrate.install(conn)
            nodes.register_local(conn, 1, NODE, self.cluster, self.public_key)
            request = PublicationRequest(
                PUBLICATION,
                tuple(TableSpec(TableName("public", table), None, False) for table in tables),
                tuple((TableName("public", table), column) for table, column in pci_columns),
                exclude_pci=exclude_pci,
            )
            publications.create(conn, request)
            conn.execute(
                "INSERT INTO vsql_sync.streams (chain, direction, publication, origin, slot_name, desired)"
                " VALUES (%s, 'out', %s, %s, %s, 'running')",
                (self.chain, PUBLICATION, NODE, self.slot),
            )

    def _write_config(self, signing_key: Path, extra: str) -> None:
        parts = conninfo_to_dict(self.conninfo)
        password = f'password = "{parts["password"]}"' if parts.get("password") else ""
        self.config.write_text(
            f"""
[cluster]
name = "{self.cluster}"
node_id = 1
node_name = "{NODE}"
[connection]
host = "{parts["host"]}"
port = {parts["port"]}
database = "{parts["dbname"]}"
user = "{parts["user"]}"
{password}
[server]
mode = "dev"
[kafka]
bootstrap_servers = "{self.kafka}"
[encryption.kms]
kek_id = "test-kek"
[encryption.kms.file]
path = "{self._kek}"
[audit]
signing_key_path = "{signing_key}"
[metrics]
enabled = false
{extra}
"""
        )

    def connect_to(self, conninfo: str) -> None:
        """From now on the node's database is there: it was promoted, or restored."""
        text = self.config.read_text()
        old, new = conninfo_to_dict(self.conninfo), conninfo_to_dict(conninfo)
        text = text.replace(f"port = {old['port']}\n", f"port = {new['port']}\n")
        self.config.write_text(text.replace(f'"{old["dbname"]}"\n', f'"{new["dbname"]}"\n'))
        self.conninfo = conninfo

    def add_copy(self, target: str = "node-b") -> str:
        """Add the stream of a first copy for a target; returns its chain."""
        chain = names.copy_chain(PUBLICATION, NODE, target)
        slot = names.slot_name(self.cluster, PUBLICATION, NODE, target)
        with psycopg.connect(self.conninfo) as connection:
            connection.execute(
                "INSERT INTO vsql_sync.streams"
                " (chain, direction, kind, publication, origin, target, slot_name, desired)"
                " VALUES (%s, 'out', 'copy', %s, %s, %s, %s, 'running')",
                (chain, PUBLICATION, NODE, target, slot),
            )
            for one in (self.chain, chain):
                connection.execute(
                    "INSERT INTO vsql_sync.stream_targets (chain, target) VALUES (%s, %s)"
                    " ON CONFLICT DO NOTHING",
                    (one, target),
                )
        return chain

    @property
    def settings(self) -> Settings:
        """The node's configuration."""
        return load_settings(self.config)

    def execute(self, statement: str, conninfo: str | None = None) -> None:
        """Run statements in one transaction."""
        with psycopg.connect(conninfo or self.conninfo) as connection:
            connection.execute(statement)

    def query(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Rows of a statement."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            return connection.execute(statement, params or None).fetchall()

    def start(
        self, chain: str | None = None, failpoints: str = "", log: str = "worker"
    ) -> subprocess.Popen[bytes]:
        """Start a worker; `failpoints` as VSQL_SYNC_FAILPOINTS."""
        env = {"VSQL_SYNC_ALLOW_FAILPOINTS": "1", "VSQL_SYNC_FAILPOINTS": failpoints} if failpoints else {}
        words = ["--config", str(self.config), "--chain", chain or self.chain]
        process = start_service("producer", words, log=self.folder / f"{log}.log", env=env)
        self._workers.append(process)
        return process

    def kill_workers(self) -> None:
        """End what a failed test left running."""
        for process in self._workers:
            if process.poll() is None:
                process.kill()
            process.wait(20)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM a worker; it must end by itself and well."""
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, self.log()

    def log(self, name: str = "worker") -> str:
        """The end of a worker's log."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else "(no log)"

    def confirmed(self) -> int:
        """Bytes by which the slot's confirmed position is behind the WAL; negative where it is not."""
        rows = self.query(
            "SELECT confirmed_flush_lsn - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = %s",
            self.slot,
        )
        return int(rows[0][0]) if rows else 0

    def wait_confirmed(self, timeout: float = 60) -> None:
        """Wait until everything committed so far is published, audited and confirmed to the slot."""
        wanted = int(self.query("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")[0][0])
        self.wait(lambda: self.confirmed() >= wanted, timeout, f"slot did not reach {wanted:X}")

    def wait(self, condition: Callable[[], bool], timeout: float = 60, what: str = "") -> None:
        """Wait for a condition; the failure shows the worker's log."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what or 'timeout'}\n{self.log()}"
            time.sleep(0.05)

    def state(self) -> tuple[str, dict[str, Any]]:
        """State and detail of the stream's status row."""
        rows = self.query("SELECT state, detail FROM vsql_sync.stream_status WHERE chain = %s", self.chain)
        return (rows[0][0], rows[0][1]) if rows else ("", {})

    def drop(self, stack: Stack) -> None:
        """Drop the database, with its slot, where the stack made it."""
        if self._made:
            stack.drop_database(self._made)

    def topics(self) -> list[str]:
        """Names of the cluster's topics."""
        return list(cluster_topics(self.kafka, self.cluster))

    def make_topic(self, name: str) -> None:
        """Create one of the cluster's topics in the broker's default shape."""
        topic = NewTopic(f"{self.cluster}.{name}", num_partitions=1, replication_factor=1)
        admin = AdminClient({"bootstrap.servers": self.kafka})
        admin.create_topics([topic])[topic.topic].result(20)

    def cut_off(self) -> None:
        """End every session of a worker at the server; the process is not told before it uses one."""
        self.query(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'vsql-sync%%' AND pid <> %s",
            0,
        )

    def records(self) -> list[Record]:
        """Every record of the cluster's topics."""
        return read_topics(self.kafka, self.cluster)

    def read(self, chain: str | None = None) -> ReadBack:
        """Read the topics back and verify everything a consumer would."""
        return read_stream(self, read_topics(self.kafka, self.cluster), chain or self.chain)


class PeerNode:
    """A target as the source sees it: a pinned key, and signed acknowledgements of a chain's manifests."""

    def __init__(self, source: SourceNode, name: str) -> None:
        self._source, self.name = source, name
        folder = source.folder / name
        folder.mkdir()
        private, public = generate_signing_key(folder)
        self._signer = load_signer(private, name)
        self._writers: dict[str, ChainWriter] = {}
        self._again: dict[str, ChainHead] = {}
        raw = load_public_key(public)
        with psycopg.connect(source.conninfo) as connection:
            connection.execute(
                "INSERT INTO vsql_sync.signers (fingerprint, node_name, public_key) VALUES (%s, %s, %s)",
                (fingerprint(raw), name, raw),
            )

    def sign_with(self, signer: Signer) -> None:
        """Go on in a new epoch under another key."""
        self._signer = signer
        for chain, old in list(self._writers.items()):
            self._again[chain] = old.tip

    @property
    def signer(self) -> Signer:
        """Its key."""
        return self._signer

    def go_on(self, chain: str, signer: Signer, head: ChainHead) -> None:
        """Go on behind a head that was made elsewhere, in a new epoch, under another key."""
        self._signer = signer
        self._again[chain] = head

    def begin_anew(self) -> None:
        """Go on in a new epoch, as after a restart."""
        self.sign_with(self._signer)

    def prepare_next(self, chain: str, signer: Signer) -> bytes:
        """The next entry of the target's chain as another signer would make it; it is not sent."""
        known = self._writers[chain].tip
        writer = ChainWriter(
            signer, self._source.cluster, names.ack_chain(chain, self.name), known, new_incarnation()
        )
        return writer.open_epoch(lsn=1, system_identifier="1", timeline=1, source_node_id=NODE).encoded

    def send(self, *records: tuple[bytes, bytes]) -> None:
        """Append records, each a key and a value, to the audit topic."""
        producer = Producer({"bootstrap.servers": self._source.kafka, "enable.idempotence": True})
        for key, value in records:
            producer.produce(names.audit_topic(self._source.cluster), value, key=key, partition=0)
        assert producer.flush(20) == 0

    def acknowledge(
        self,
        chain: str,
        root: bytes | None = None,
        *,
        event: str = BATCH_APPLIED,
        lose: bool = False,
    ) -> None:
        """Acknowledge every manifest that was not acknowledged yet; `root` replaces the last one's.

        `event`: what is said of each; with `lose` nothing of it is sent.
        """
        writer = self._writers.get(chain)
        made: list[Prepared] = []
        tip = self._again.pop(chain, EMPTY_HEAD)
        if writer is None or tip != EMPTY_HEAD:
            writer = ChainWriter(
                self._signer,
                self._source.cluster,
                names.ack_chain(chain, self.name),
                tip,
                new_incarnation(),
            )
            self._writers[chain] = writer
            made.append(writer.open_epoch(lsn=1, system_identifier="1", timeline=1, source_node_id=NODE))
        rows = self._source.query(
            "SELECT document FROM vsql_sync.vsql_sync_audit WHERE chain = %s"
            " AND event_type = 'replication_batch' AND batch > %s ORDER BY sequence",
            chain,
            writer.tip.batch,
        )
        for place, (document,) in enumerate(rows, 1):
            manifest = parse(bytes(document)).entry
            last = root if root is not None and place == len(rows) else manifest.merkle_root
            made.append(
                writer.prepare(
                    event_type=event,
                    source_node_id=NODE,
                    target_node_id=self.name,
                    batch=manifest.batch,
                    batch_lsn_start=manifest.batch_lsn_start,
                    batch_lsn_end=manifest.batch_lsn_end,
                    row_count=manifest.row_count,
                    merkle_root=last,
                    ref_epoch=manifest.epoch,
                    ref_sequence=manifest.sequence,
                    ref_hash=document_hash(bytes(document)),
                    continues=manifest.continues,
                    verdicts=(("applied", manifest.row_count),),
                )
            )
        if not lose:
            self.send(*((_key(one.entry), one.encoded) for one in made))


def _key(entry: AuditEntry) -> bytes:
    return names.audit_key(entry.chain, entry.epoch, entry.incarnation, entry.sequence)


def read_stream(node: SourceNode, records: list[Record], chain: str) -> ReadBack:
    """Take a chain's records apart; raises or fails on anything that does not verify."""
    trust = TrustStore([PinnedKey(NODE, node.public_key, fingerprint(node.public_key), revoked=False)])
    out = ReadBack()
    reader = ChainReader(node.cluster, chain, NODE, trust)
    for record in records:
        if record.topic == names.audit_topic(node.cluster) and record.value is not None:
            found = reader.accept(record.value, f"{record.offset}")
            if isinstance(found, Accepted):
                out.entries.append(found.entry)
            out.void += isinstance(found, Void)
    keys = _keys(node, records, chain, trust)
    by_partition: dict[str, list[Record]] = {}
    for record in records:
        by_partition.setdefault(record.topic, []).append(record)
    relations: dict[bytes, Relation] = {}
    for manifest in out.manifests:
        out.dek_ids.append(manifest.dek_id)
        out.changes += _open_batch(manifest, by_partition, keys, relations)
    return out


def _keys(node: SourceNode, records: list[Record], chain: str, trust: TrustStore) -> dict[str, OpeningKey]:
    provider = open_provider(node.settings.encryption.kms, strict=False)
    keys: dict[str, OpeningKey] = {}
    for record in records:
        if record.topic == names.keys_topic(node.cluster) and record.value is not None:
            said = decode_announcement(open_document(trust, NODE, record.value, KEY_ANNOUNCEMENT))
            assert record.key == said.dek_id.encode()
            if said.chain == chain:
                keys[said.dek_id] = unwrap(said, provider)
    return keys


def _open_batch(
    manifest: AuditEntry,
    topics: dict[str, list[Record]],
    keys: dict[str, OpeningKey],
    relations: dict[bytes, Relation],
) -> list[Change]:
    found: list[tuple[int, Change]] = []
    sub_roots: list[bytes] = []
    indexes: list[int] = []
    pieces: dict[str, bytes] = {}
    for part in manifest.partitions:
        leaves: list[bytes] = []
        for record in _records_of(manifest, part, topics):
            assert record.value is not None
            pack = without_frame(record.value)
            header, body = decode_header(pack)
            tuples = decode_tuples(pack, body, header_digest(pack[:body]))
            for one, plaintext in zip(tuples, open_tuples(keys[header.dek_id], tuples), strict=True):
                leaves.append(one.leaf)
                indexes.append(one.index)
                if one.op == Op.PIECE:
                    pieces[part.topic] = pieces.get(part.topic, b"") + plaintext
                    continue
                whole = pieces.pop(part.topic, b"") + plaintext
                if one.op == Op.RELATION:
                    assert relation_hash(whole) == header.relation
                    relations[header.relation] = decode_relation(whole)
                    continue
                assert one.op in CHANGE_OPS
                relation = relations[header.relation]
                tx = header.transactions[one.tx]
                found.append((one.index, Change(header.table, relation, one.op, tx, one.lsn, whole)))
        assert len(leaves) == part.records
        assert merkle.root(leaves) == part.sub_root
        sub_roots.append(part.sub_root)
    assert merkle.batch_root(sub_roots) == manifest.merkle_root
    assert sorted(indexes) == list(range(manifest.record_count))
    assert len(found) == manifest.row_count
    return [change for _, change in sorted(found, key=lambda pair: pair[0])]


def _records_of(manifest: AuditEntry, part: PartitionRoot, topics: dict[str, list[Record]]) -> list[Record]:
    chosen = []
    for record in topics[part.topic]:
        if part.first_offset <= record.offset <= part.last_offset and record.value is not None:
            header, _ = decode_header(without_frame(record.value))
            if (header.epoch, header.batch) == (manifest.epoch, manifest.batch):
                chosen.append(record)
    assert len(chosen) == part.packs
    return chosen


def make_shorter(node: SourceNode, topic: str, records: list[Record]) -> None:
    """Delete the topic and make it anew with these records only."""
    admin = AdminClient({"bootstrap.servers": node.kafka})
    admin.delete_topics([topic])[topic].result(20)
    kind = "audit" if topic.endswith(".audit") else "data"
    deadline = time.monotonic() + 20
    while topic in node.topics() and time.monotonic() < deadline:
        time.sleep(0.1)
    ensure_topic(admin, topic, kind, node.settings)  # type: ignore[arg-type]  # one of the kinds
    append(node.kafka, records)
