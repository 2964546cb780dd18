"""`make demo`: two databases, Kafka and both services on this machine; real data moves, sealed and verified.

Everything it starts it stops, and its folder is removed. About two minutes once things are fetched.
`--seconds` is how long the workload runs; `--keep` leaves the servers running until Enter is pressed.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from tests.nodes import Node, TwoNodes
from tests.stack import Stack
from tests.streams import Record, copy_topics, read_topics
from vsql_shared.wire import pack

SCHEMA = """
CREATE TABLE merchants (id int PRIMARY KEY, name text NOT NULL, city text);
CREATE TABLE customers (id bigint PRIMARY KEY, name text NOT NULL, email text, pan text NOT NULL);
CREATE TABLE payments (id bigint PRIMARY KEY, customer_id bigint NOT NULL, merchant_id int NOT NULL,
    amount_cents bigint NOT NULL, currency char(3) NOT NULL, status text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(), note text);
CREATE TABLE refunds (payment_id bigint PRIMARY KEY, amount_cents bigint NOT NULL, reason jsonb);
CREATE TABLE ledger (account text, entry bigint, amount numeric(14,2) NOT NULL, PRIMARY KEY (account, entry));
"""
TABLES = ["merchants(*)", "customers(*)", "payments(*)", "refunds(*)", "ledger(*)"]
_BOLD, _GREEN, _RED, _OFF = (
    ("\033[1m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("",) * 4
)


def say(text: str = "") -> None:
    """One line for the person at the terminal."""
    print(text, flush=True)


def title(number: int, text: str) -> None:
    """Headline of a step."""
    say(f"\n{_BOLD}{number}. {text}{_OFF}")


def check(ok: bool, text: str) -> None:
    """A claim and whether it holds; the demo fails at the first that does not."""
    say(f"   {_GREEN}ok{_OFF}  {text}" if ok else f"   {_RED}NOT OK{_OFF}  {text}")
    if not ok:
        raise SystemExit(1)


def echo(node: str, args: Sequence[str]) -> None:
    """Show a command as a user would type it, without passwords."""
    shown = ["…" if "password" in arg else arg for arg in args]
    say(f"   {node}$ syncctl {shlex.join(shown)}")


class Workload(threading.Thread):
    """A small payment system on node A: mixed transactions of inserts, updates and deletes."""

    def __init__(self, conninfo: str, seconds: float, marker: str) -> None:
        super().__init__(daemon=True)
        self.conninfo, self.seconds, self.marker = conninfo, seconds, marker
        self.changes = self.transactions = 0
        self.error: BaseException | None = None
        self._random = random.Random(1)

    def run(self) -> None:
        """Write until the time is over."""
        try:
            with psycopg.connect(self.conninfo, autocommit=True) as connection:
                end = time.monotonic() + self.seconds
                while time.monotonic() < end:
                    self._transaction(connection)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            self.error = error

    def _transaction(self, connection: psycopg.Connection) -> None:
        first, count = 10_000 + self.transactions * 100, self._random.randrange(1, 60)
        victim = max(first - 100 * self._random.randrange(1, 50), 0)
        with connection.transaction():
            connection.execute(
                "INSERT INTO payments (id, customer_id, merchant_id, amount_cents, currency, status, note)"
                " SELECT %s + g, 1 + g %% 2000, 1 + g %% 50, 100 * g, 'EUR', 'authorised', %s || g"
                " FROM generate_series(0, %s - 1) g",
                (first, self.marker, count),
            )
            changed = connection.execute(
                "UPDATE payments SET status = 'captured' WHERE id BETWEEN %s AND %s", (victim, victim + 20)
            ).rowcount
            if self.transactions % 5 == 0:
                changed += connection.execute(
                    "DELETE FROM payments WHERE id BETWEEN %s AND %s", (victim + 30, victim + 35)
                ).rowcount
            changed += connection.execute(
                "INSERT INTO ledger VALUES ('cash', %s, %s)", (first, count * 1.25)
            ).rowcount
        self.changes += count + changed
        self.transactions += 1


def fill(node: Node, marker: str) -> None:
    """Rows that are there before replication begins."""
    node.execute(
        f"""
        INSERT INTO merchants SELECT g, 'merchant ' || g, 'city ' || g FROM generate_series(1, 50) g;
        INSERT INTO customers SELECT g, '{marker}' || g, 'c' || g || '@example.org',
            '4111' || lpad(g::text, 12, '0') FROM generate_series(1, 2000) g;
        """
    )


def live(pair: TwoNodes, workload: Workload) -> None:
    """Start the workload and show, once a second, what both sides have."""
    workload.start()
    written = 0
    while workload.is_alive():
        time.sleep(1)
        rows = pair.b.query("SELECT count(*) FROM payments")[0][0]
        lag = pair.b.query(
            "SELECT detail->>'lag_seconds', detail->>'lag_batches' FROM vsql_sync.stream_status"
            " WHERE direction = 'in' AND chain = %s",
            pair.chain,
        )
        seconds, batches = lag[0] if lag else ("?", "?")
        say(
            f"   A: {workload.changes:7d} changes (+{workload.changes - written:5d}/s)"
            f" in {workload.transactions:5d} transactions   B: {rows:6d} payments  "
            f" lag {seconds} s, {batches} batches"
        )
        written = workload.changes
    workload.join()
    if workload.error:
        raise workload.error


def show_record(records: list[Record]) -> None:
    """One data record: what is clear, and what is not."""
    record = next(r for r in records if r.topic.endswith(".payments") and r.value)
    assert record.value is not None
    header, offset = pack.decode_header(record.value)
    tuples = pack.decode_tuples(record.value, offset, pack.header_digest(record.value[:offset]))
    say(
        f"   topic {record.topic}  partition {record.partition}  offset {record.offset}"
        f"  {len(record.value)} bytes"
    )
    say(
        f"   clear: origin {header.origin}, table {header.table}, epoch {header.epoch}, batch {header.batch},"
    )
    say(f"          key {header.dek_id}, {len(tuples)} tuples")
    say(f"   tuple 0: nonce {tuples[0].nonce.hex()}")
    cipher = tuples[0].ciphertext.hex()
    for start in range(0, min(len(cipher), 192), 64):
        say(f"            {'ciphertext ' if not start else '           '}{cipher[start : start + 64]}")


def search_files(folder: Path, needles: list[bytes]) -> tuple[int, int]:
    """(bytes searched, occurrences) of the needles in all files under a folder."""
    size = found = 0
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            size += len(data)
            found += sum(data.count(needle) for needle in needles)
    return size, found


def tamper(stack: Stack, pair: TwoNodes) -> None:
    """Stop B, write at A, copy the stream to another broker with one bit changed, and let B read that."""
    pair.b.stop("consumer")
    pair.a.execute("INSERT INTO merchants SELECT g, 'late', 'x' FROM generate_series(1000, 1100) g")
    deadline = time.monotonic() + 30
    while pair.heads()[0] <= pair.heads()[1] and time.monotonic() < deadline:
        time.sleep(0.2)
    other = stack.own_kafka()
    changed: list[Record] = []

    def change(records: list[Record]) -> list[Record]:
        last = [r for r in records if r.topic.endswith(".merchants")][-1]
        assert last.value is not None
        changed.append(last)
        return [r.flip(len(last.value) - 20) if r is last else r for r in records]

    copy_topics(pair.a.kafka, other.bootstrap_servers, pair.cluster, change)
    say(f"   one bit of {changed[0].topic} offset {changed[0].offset} is changed in a copy on another broker")
    before = pair.b.query("SELECT count(*) FROM merchants")[0][0]
    true_config = pair.b.config.read_text()
    pair.b.config.write_text(true_config.replace(pair.b.kafka, other.bootstrap_servers))
    pair.b.start("consumer")
    error = ""
    deadline = time.monotonic() + 60
    while not error and time.monotonic() < deadline:
        time.sleep(0.3)
        rows = pair.b.query(
            "SELECT detail->'refused'->>'error' FROM vsql_sync.stream_status"
            " WHERE state = 'refused' AND chain = %s",
            pair.chain,
        )
        error = (rows[0][0] or "") if rows else ""
    pair.b.stop("consumer")
    pair.b.config.write_text(true_config)
    after = pair.b.query("SELECT count(*) FROM merchants")[0][0]
    say(f"   consumer says: {error}")
    check(bool(error) and str(changed[0].offset) in error, "the altered record is refused, and named")
    check(before == after, "nothing of that batch was applied")
    pair.b.start("consumer")
    pair.wait_in_step()
    check(
        pair.b.query("SELECT count(*) FROM merchants")[0][0] == before + 101,
        "from the true broker it goes on",
    )


def main() -> int:
    """Run the demo; 0 when every claim held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    started = time.monotonic()
    marker = f"MARKER{secrets.token_hex(8)}-"
    with Stack() as stack, tempfile.TemporaryDirectory(prefix="vsql-demo-") as name:
        run(stack, Path(name), marker, args.seconds)
        say(f"\nAll of it in {time.monotonic() - started:.0f} s.")
        if args.keep:
            input("Servers and services are still running; press Enter to stop them. ")
    say("Everything was stopped and removed. To go on:")
    say("   README.md                          put it between two databases of your own")
    say("   docs/operations/configuration.md   every key of vsql-sync.toml")
    say("   make stack-up                      leave Kafka and four PostgreSQLs running to play with")
    say("   make test                          all tests, on real servers")
    return 0


def run(stack: Stack, folder: Path, marker: str, seconds: float) -> None:
    """The steps, in the order of the data path."""
    title(1, "Two PostgreSQL 18 servers and a Kafka broker")
    servers = [stack.own_postgres(18) for _ in range(2)]
    kafka = stack.own_kafka()
    for server, label in zip(servers, "AB", strict=True):
        say(f"   PostgreSQL of node {label}: {server.conninfo('postgres')}")
    say(f"   Kafka: {kafka.bootstrap_servers}")
    title(2, "A payments schema on both; rows only on A")
    pair = TwoNodes(
        stack,
        folder,
        SCHEMA,
        kafka=kafka.bootstrap_servers,
        conninfos=(servers[0].conninfo("postgres"), servers[1].conninfo("postgres")),
        echo=echo,
    )
    fill(pair.a, marker)
    title(3, "Set up: keys, nodes, publication, peer")
    pair.create(TABLES, publication_args=["--pci-column", "customers.pan"])
    title(4, "Start the producer of A and the consumer of B; the rows of A are copied, sealed")
    pair.start()
    pair.wait_in_step()
    copied = pair.b.query("SELECT count(*) FROM customers")[0][0]
    check(copied == 2000, f"first copy: {copied} customers on B")
    title(5, f"A writes for {seconds:.0f} s, B follows")
    workload = Workload(pair.a.conninfo, seconds, marker)
    live(pair, workload)
    pair.wait_in_step()
    differences = pair.differences()
    check(not differences, "every table is equal, row by row" if not differences else differences[0])
    say(f"   A's chain holds {pair.audited_rows()} changes; the workload made {workload.changes}")
    title(6, "What lies in Kafka")
    show_record(read_topics(kafka.bootstrap_servers, pair.cluster))
    if kafka.log_dir is not None:
        size, found = search_files(
            kafka.log_dir, [marker.encode(), b"@example.org", b"authorised", b"4111000"]
        )
        check(
            size > 0 and found == 0, f"none of the values is in the broker's files ({size:,} bytes searched)"
        )
    title(7, "Both sides prove what they did")
    for node in (pair.a, pair.b):
        for line in node.ctl("audit", "verify").stdout.splitlines():
            say(f"      {line}")
    title(8, "One bit is changed on the way")
    tamper(stack, pair)
    title(9, "Status")
    for node in (pair.a, pair.b):
        for line in node.ctl("status").stdout.splitlines():
            say(f"      {line}")
    pair.stop()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
