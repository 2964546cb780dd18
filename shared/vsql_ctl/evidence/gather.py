"""What goes into an evidence bundle, in this order: the one place that names all of it.

Rules: each subject is tried by itself, and what fails is noted with its reason. Nothing is read that holds a
row of a user's table or a secret: configuration is masked as `config show` does it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vsql_ctl.evidence import access, connections, retention
from vsql_ctl.evidence.brokers import Brokers
from vsql_ctl.evidence.bundle import Bundle
from vsql_ctl.evidence.checkpoints import Checkpoints
from vsql_shared.audit import evidence
from vsql_shared.audit import evidence_documents as documents

if TYPE_CHECKING:
    from vsql_shared.config import Settings
    from vsql_shared.crypto.signing import Signer, TrustStore
    from vsql_shared.pg.connect import Connection


def gather(
    conn: Connection,
    settings: Settings,
    signer: Signer | None,
    trust: TrustStore,
    bundle: Bundle,
    *,
    verify: bool,
) -> None:
    """Fill a bundle; `verify`: every entry of the trail, too, which takes its time."""
    kafka = Brokers(settings)
    _scope_reports(conn, signer, trust, bundle)
    if signer is not None:
        Checkpoints(conn, settings, signer, trust, bundle, kafka).gather()
    else:
        bundle.missing("checkpoints", "no signing key is configured (dev mode)")
    if verify:
        _trail(conn, settings, bundle)
    else:
        bundle.missing("verification of every entry of the trail", "left out by --no-trail")
    _keys(conn, settings, bundle)
    _connections(conn, settings, kafka, bundle)
    _retention(conn, settings, kafka, bundle)
    _writers(conn, bundle)
    _access(conn, settings, kafka, bundle)
    _configuration(settings, bundle)


def _scope_reports(conn: Connection, signer: Signer | None, trust: TrustStore, bundle: Bundle) -> None:
    from vsql_shared import names
    from vsql_shared.audit import scope_report as reports
    from vsql_shared.pg import publications, scope_facts

    for publication in publications.everything(conn):
        with bundle.trying(f"scope report of publication {publication.name}"):
            facts = scope_facts.gather(conn, publication.name, trust)
            now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            text = reports.to_text(reports.sign(reports.build(facts, now), signer))
            kind = documents.SCOPE_REPORT if signer is not None else evidence.PLAIN
            path = f"scope/{names.topic_part(publication.name)}.json"
            bundle.add(path, kind, f"what publication {publication.name} leaves out", text)


def _trail(conn: Connection, settings: Settings, bundle: Bundle) -> None:
    from vsql_ctl.audit_report import as_json, words
    from vsql_ctl.commands.audit import verify_own

    with bundle.trying("verification of every entry of the trail"):
        findings, _ = verify_own(conn, settings, None)
        result = _count(len(findings.problems), "problem")
        pruned = sum(one.pruned > 0 for report in findings.reports.values() for one in report.chains)
        about = f"verifying every entry of the trail in this node's database found {result}"
        if pruned:
            chains = "1 chain of it is" if pruned == 1 else f"{pruned} chains of it are"
            about += f"; {chains} pruned: what went before is in the archive, which was not read"
        bundle.table("trail.json", about, as_json(findings))
        if findings.problems:
            bundle.found.append(f"{result} of the trail: {words(findings.problems[0])}")


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _keys(conn: Connection, settings: Settings, bundle: Bundle) -> None:
    from vsql_ctl.commands.key_inventory import collect

    with bundle.trying("inventory of keys"):
        found = collect(conn, settings)
        if found["kek_problem"]:
            bundle.missing("KEK versions, from the key service", found["kek_problem"])
        bundle.table("keys.json", "every key: state, age, use, strength, custodian", found)


def _connections(conn: Connection, settings: Settings, kafka: Brokers, bundle: Bundle) -> None:
    found: dict[str, object] = {}
    with bundle.trying("certificates the configuration names"):
        found["configured_certificates"] = connections.configured(settings)
    with bundle.trying("TLS of the database's server"):
        found["postgresql"] = connections.postgres(settings)
    with bundle.trying("sessions on the database and their TLS"):
        found["postgresql_sessions"] = connections.sessions(conn)
        if not connections.sees_all(conn):
            bundle.missing("sessions of other users", "this user is no member of pg_read_all_stats")
    with bundle.trying("TLS of the Kafka brokers"):
        found["kafka"] = connections.brokers(settings, kafka)
    bundle.table("connections.json", "TLS versions, ciphers and certificates as they were seen", found)


def _retention(conn: Connection, settings: Settings, kafka: Brokers, bundle: Bundle) -> None:
    from vsql_shared import names

    found: dict[str, Any] = {}
    breaks = "what the background verification found is not known"
    archive = "what is archived is not known"
    with bundle.trying("retention of the trail"):
        found["trail"] = retention.trail(conn, settings)
        every = found["trail"]["breaks"]
        archived = _count(len(found["trail"]["archived"]), "segment")
        archive = f"{archived} in the archive, as noted when read back there, not read again now"
        lasting = _count(sum(one.gone_at is None for one in every), "break")
        breaks = f"the background verification finds {lasting} now, and found {len(every)} ever"
        if any(one.gone_at is None for one in every):
            bundle.found.append(breaks)
    topics = found["topics"] = []
    wanted = {names.audit_topic(settings.cluster.name), names.keys_topic(settings.cluster.name)}
    with bundle.trying("names of the cluster's topics"):
        wanted |= retention.topics(settings, kafka)
    for name in sorted(wanted):
        with bundle.trying(f"settings of topic {name}"):
            topics.append(retention.topic(settings, kafka, name))
    about = (
        f"how far back the trail goes, and what decides how long topics and trail stay; {archive}; {breaks}"
    )
    bundle.table("retention.json", about, found)


def _writers(conn: Connection, bundle: Bundle) -> None:
    from vsql_shared.pg import conflicts, many_writers

    with bundle.trying("tables that every node writes, and conflicts"):
        tables = many_writers.shared_tables(conn)
        counted = conflicts.stats(conn, conflicts.Wanted())
        number = sum(one.conflicts for one in counted)
        about = (
            f"{_count(len(tables), 'table')} that this node and another one write: mode, strategy, and"
            f" {_count(number, 'conflict')} this node found, by kind and outcome, without rows; every other"
            " table that is replicated has one writer"
        )
        bundle.table("writers.json", about, {"tables": tables, "conflicts": counted})


def _access(conn: Connection, settings: Settings, kafka: Brokers, bundle: Bundle) -> None:
    found: dict[str, object] = {}
    with bundle.trying("roles and grants of the database"):
        found["postgresql"] = access.roles(conn)
    with bundle.trying("the database server's rules for connections (pg_hba)"):
        found["postgresql_connections"] = access.client_authentication(conn)
    with bundle.trying("ACLs of Kafka"):
        found["kafka_acls"] = access.kafka_acls(settings, kafka)
    about = (
        "roles, members, owners and grants of our schema, of what is published and its schemas, without"
        " default privileges; rules for connections; Kafka's ACLs, which its super.users pass by"
    )
    bundle.table("access.json", about, found)


def _configuration(settings: Settings, bundle: Bundle) -> None:
    from vsql_shared.config.show import masked, to_toml

    about = "this node's configuration with its defaults, secrets masked"
    bundle.add("configuration.toml", evidence.PLAIN, about, to_toml(masked(settings)))
