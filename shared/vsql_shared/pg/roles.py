"""The roles of vsql-sync on a server, and exactly what each may do.

Roles belong to the server: two databases of one server share them, so every statement here may be repeated.
They are groups without login; a service's own user is made a member (`GRANT vsql_sync_producer TO app`), or
the two service roles get a login themselves (`create_logins`). REPLICATION is not inherited by members: the
producer's user needs the attribute itself. What an earlier version gave and a role may not any more is taken
back.

    vsql_sync_producer  REPLICATION; reads published tables; writes its own state and audit entries
    vsql_sync_consumer  writes target tables, replication origins, session_replication_role, TEMP
    vsql_sync_viewer    reads state (no rows of conflicts)
    vsql_sync_operator  viewer; commands, decisions, start and pause; cannot act under another's name
    vsql_sync_admin     operator; everything in schema vsql_sync
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql
from pydantic import SecretStr

from vsql_shared.audit.leaf_slots import SLOTS
from vsql_shared.changes import TableName
from vsql_shared.errors import RefusedError
from vsql_shared.pg.connect import Connection, errors

PRODUCER, CONSUMER = "vsql_sync_producer", "vsql_sync_consumer"
VIEWER, OPERATOR, ADMIN = "vsql_sync_viewer", "vsql_sync_operator", "vsql_sync_admin"
ROLES = (PRODUCER, CONSUMER, VIEWER, OPERATOR, ADMIN)
_MEMBERS = ((VIEWER, OPERATOR), (OPERATOR, ADMIN))

# The consumer's only: whoever sets an origin's progress makes an applier pass over what was not applied. The
# producer writes to this schema alone, whose tables are never sent.
ORIGIN_FUNCTIONS = (
    "pg_replication_origin_advance(text, pg_lsn)",
    "pg_replication_origin_create(text)",
    "pg_replication_origin_drop(text)",
    "pg_replication_origin_oid(text)",
    "pg_replication_origin_progress(text, boolean)",
    "pg_replication_origin_session_is_setup()",
    "pg_replication_origin_session_progress(boolean)",
    "pg_replication_origin_session_reset()",
    "pg_replication_origin_session_setup(text)",
    "pg_replication_origin_xact_reset()",
    "pg_replication_origin_xact_setup(pg_lsn, timestamp with time zone)",
    "pg_show_replication_origin_status()",
)

_NODE_STATE = "UPDATE (last_seen, status, init_state, init_reason, init_changed_at)"
_SERVICE = {
    "vsql_sync_audit": "INSERT",
    "nodes": _NODE_STATE,
    "streams": "UPDATE (state, state_reason, slot_created, confirmed_lsn, slot_from, desired, desired_reason,"
    " pruned_sequence)",
    "stream_status": "INSERT, UPDATE, DELETE",
    "chain_heads": "INSERT, UPDATE",
    "command_results": "INSERT",
    "decisions": "UPDATE (honoured_at)",
    "batch_leaves": "INSERT",
    "leaf_slots": "INSERT, UPDATE, DELETE",
    # Emptied slot by slot.
    **{f"batch_leaves_{slot:02}": "TRUNCATE" for slot in range(SLOTS)},
    "audit_watch": "INSERT, UPDATE",
    "signed_ends": "INSERT",
    "clocks": "INSERT, UPDATE",
}
# Table of vsql_sync → what the role may do beside SELECT on all of them.
WRITES: dict[str, dict[str, str]] = {
    PRODUCER: _SERVICE
    | {
        "stream_targets": "INSERT, UPDATE",
        "deks": "INSERT, UPDATE",
        "dek_wrappings": "INSERT",
        "publication_leaves": "INSERT, UPDATE (root_schema, root_name)",
        "pci_columns": "UPDATE (table_oid, attnum)",
        "scopes": "INSERT",
        "scope_seen": "INSERT",
        "registry_ids": "INSERT, UPDATE (id, answered_at)",
        "audit_cosigned": "INSERT",
        "audit_bases": "INSERT",
        "synchronous_publications": "UPDATE (degraded_at, degraded_reason)",
    },
    CONSUMER: _SERVICE
    | {
        "apply_progress": "INSERT, UPDATE, DELETE",
        "receipts": "INSERT, UPDATE, DELETE",
        "shares": "INSERT, UPDATE, DELETE",
        "part_receipts": "INSERT, DELETE",
        "relation_descriptors": "INSERT, UPDATE, DELETE",
        "table_sync": "INSERT, UPDATE, DELETE",
        "anomalies": "INSERT, UPDATE",
        "sequence_sync": "INSERT, UPDATE, DELETE",
        "conflict_log": "INSERT",
        "partial_batches": "INSERT, UPDATE, DELETE",
        "multi_writer_tables": "UPDATE (writable, generation_floor, next_floor)",
        "horizons": "INSERT",
        "row_versions": "INSERT, UPDATE, DELETE",
        "purge_marks": "INSERT, UPDATE, DELETE",
        "future_commits": "INSERT, UPDATE",
        "parked": "INSERT, UPDATE (replayed_at, verdicts, replay_signed)",
        "parked_batches": "INSERT",
    },
    # Columns that say who and when are left out: their defaults fill them.
    OPERATOR: {
        # slot_created, confirmed_lsn: `syncctl start` makes the slot where its user has REPLICATION.
        "commands": "INSERT (role, chain, verb, args, reason)",
        "decisions": "INSERT (chain, kind, topic, partition, kafka_offset, sequence, reason,"
        " xid, commit_lsn, commit_time)",
        "streams": "UPDATE (desired, desired_reason, slot_created, confirmed_lsn, slot_from)",
        "audit_cosigned": "INSERT (chain, size, node, note)",
        "audit_segments": "INSERT",
    },
    ADMIN: dict.fromkeys(("commands", "decisions"), "INSERT, DELETE"),
}
# Tables a viewer sees only in part: the rest holds rows of users' tables.
_HIDDEN_COLUMNS = {
    "conflict_log": ("local_tuple", "remote_tuple", "row_key"),
    "row_versions": ("row_key",),
}
# Tables that hold keys of users' rows.
_TOMBSTONES = "tombstones_"
_LOG_AUDIT = "vsql_sync.log_audit(text, text, text, jsonb, jsonb, boolean, text)"
_NOTE_BREAK = "vsql_sync.note_audit_break(text, text, bigint, text, text)"
_END_BREAKS = "vsql_sync.end_audit_breaks(text, text)"
_FORGET_ACKS = "vsql_sync.forget_acknowledgements(text, text)"
_NOTE_REFUSAL = "vsql_sync.note_refused_connection(text, text, text, text, text)"
_COUNTED = "vsql_sync.require_counted(text, text, bigint)"
_PARTITION = "vsql_sync.ensure_audit_partition(timestamp with time zone)"
_RESTART_IDS = "vsql_sync.snowflake_restart(text)"
# Only the functions of ids move them (SQL 022): a value that somebody else took or set could be given twice.
_ID_SEQUENCES = "vsql_sync.snowflake_values, vsql_sync.snowflake_turns"
_PRUNE = ("vsql_sync.prune_audit(text, bigint)", "vsql_sync.drop_empty_audit_partitions()")


@dataclass(frozen=True, slots=True)
class Step:
    """A statement only a superuser may run; `probe` is true when `role` has what it gives."""

    statement: sql.Composed
    probe: sql.Composed
    role: str


def create(conn: Connection, logins: Mapping[str, SecretStr] | None = None) -> None:
    """Make the roles and grant them what they need on this server, database and schema vsql_sync.

    `logins`: role → password, for service roles that shall log in themselves.
    Raises RefusedError with the statements for a superuser where this user cannot.
    """
    with errors("creating the roles"):
        steps = _server_steps(conn)
        if not _is_superuser(conn):
            _refuse_missing(conn, steps)
        else:
            for step in steps:
                _run_shared(conn, step.statement)
        grant_schema(conn)
        for role, password in (logins or {}).items():
            _give_login(conn, role, password)


def require_possible(conn: Connection) -> None:
    """Raise RefusedError where `create` would, before anything is changed."""
    with errors("looking at the roles"):
        if not _is_superuser(conn):
            _refuse_missing(conn, _server_steps(conn))


def missing(conn: Connection) -> list[str]:
    """The superuser's statements that have not been run yet on this server and database."""
    return [step.statement.as_string(conn) for step in _server_steps(conn) if not _satisfied(conn, step)]


def exist(conn: Connection) -> bool:
    """Whether the service roles are there; without them (--no-roles) nothing is granted."""
    rows = conn.execute(
        "SELECT count(*) FROM pg_catalog.pg_roles WHERE rolname = ANY(%s)", (list(ROLES),)
    ).fetchone()
    return rows is not None and rows[0] == len(ROLES)


def grant_schema(conn: Connection) -> None:
    """Grant on schema vsql_sync what each role may do there; its owner runs this after every upgrade."""
    with conn.transaction():
        names = [
            row[0]
            for row in conn.execute(
                "SELECT relname FROM pg_catalog.pg_class WHERE relkind IN ('r', 'p', 'v')"
                " AND relnamespace = 'vsql_sync'::pg_catalog.regnamespace ORDER BY relname"
            )
            if not row[0].startswith(_TOMBSTONES)
        ]
        for role in ROLES:
            _grant(conn, "USAGE ON SCHEMA vsql_sync", role)
        for role in (PRODUCER, CONSUMER, ADMIN):
            _grant(conn, "SELECT ON ALL TABLES IN SCHEMA vsql_sync", role)
        for role in (PRODUCER, CONSUMER, OPERATOR, ADMIN):
            _grant(conn, "USAGE ON ALL SEQUENCES IN SCHEMA vsql_sync", role)
            _end_grant(conn, f"ALL ON SEQUENCE {_ID_SEQUENCES}", role)
            _grant(conn, f"EXECUTE ON FUNCTION {_LOG_AUDIT}", role)
        for role in (PRODUCER, CONSUMER, ADMIN):
            _grant(conn, f"EXECUTE ON FUNCTION {_PARTITION}", role)
            _grant(conn, f"EXECUTE ON FUNCTION {_COUNTED}", role)
            _grant(conn, f"EXECUTE ON FUNCTION {_NOTE_REFUSAL}", role)
            _grant(conn, f"EXECUTE ON FUNCTION {_NOTE_BREAK}", role)
            _grant(conn, f"EXECUTE ON FUNCTION {_END_BREAKS}", role)
        _grant(conn, f"EXECUTE ON FUNCTION {_FORGET_ACKS}", PRODUCER)
        for function in (*_PRUNE, _RESTART_IDS):
            _grant(conn, f"EXECUTE ON FUNCTION {function}", ADMIN)
        for name in names:
            _grant(conn, f"{_viewer_select(conn, name)} ON TABLE vsql_sync.{name}", VIEWER)
        _grant(conn, "ALL ON ALL TABLES IN SCHEMA vsql_sync", ADMIN)
        for role, tables in WRITES.items():
            for name, privileges in tables.items():
                if name in names:
                    _grant(conn, f"{privileges} ON TABLE vsql_sync.{name}", role)


def grant_source(conn: Connection, tables: Mapping[TableName, Sequence[str] | None]) -> None:
    """Let the producer read published columns (None: all of the table), for the first copy."""
    if exist(conn):
        _grant_tables(conn, PRODUCER, "SELECT", tables)


def grant_target(conn: Connection, tables: Iterable[TableName]) -> None:
    """Let the consumer write target tables."""
    if exist(conn):
        _grant_tables(conn, CONSUMER, "SELECT, INSERT, UPDATE, DELETE, TRUNCATE", dict.fromkeys(tables))


def grant_sequences(conn: Connection, role: str, names: Sequence[TableName]) -> None:
    """Let the producer read sequences, or the consumer read and set them."""
    if not names or not exist(conn):
        return
    privileges = "SELECT" if role == PRODUCER else "SELECT, UPDATE"
    for schema in sorted({name.schema for name in names}):
        conn.execute(
            sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), sql.Identifier(role))
        )
    listed = sql.SQL(", ").join(sql.Identifier(name.schema, name.table) for name in names)
    conn.execute(
        sql.SQL("GRANT {} ON SEQUENCE {} TO {}").format(_words(privileges), listed, sql.Identifier(role))
    )


def _grant_tables(
    conn: Connection, role: str, privileges: str, tables: Mapping[TableName, Sequence[str] | None]
) -> None:
    for schema in sorted({name.schema for name in tables}):
        conn.execute(
            sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), sql.Identifier(role))
        )
    for name, columns in tables.items():
        listed = sql.Composed([])
        if columns is not None:
            listed = sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, columns)))
        conn.execute(
            sql.SQL("GRANT {}{} ON TABLE {} TO {}").format(
                _words(privileges), listed, sql.Identifier(name.schema, name.table), sql.Identifier(role)
            )
        )


def _words(text: str) -> sql.SQL:
    """SQL of this module's own constants."""
    return sql.SQL(text)


def _grant(conn: Connection, what: str, role: str) -> None:
    conn.execute(sql.SQL("GRANT {} TO {}").format(_words(what), sql.Identifier(role)))


def _end_grant(conn: Connection, what: str, role: str) -> None:
    conn.execute(sql.SQL("REVOKE {} FROM {}").format(_words(what), sql.Identifier(role)))


def _viewer_select(conn: Connection, table: str) -> str:
    hidden = _HIDDEN_COLUMNS.get(table)
    if hidden is None:
        return "SELECT"
    columns = conn.execute(
        "SELECT attname FROM pg_catalog.pg_attribute"
        " WHERE attrelid = pg_catalog.format('vsql_sync.%%I', %s::text)::pg_catalog.regclass"
        " AND attnum > 0 AND NOT attisdropped AND attname <> ALL(%s) ORDER BY attnum",
        (table, list(hidden)),
    )
    return f"SELECT ({', '.join(row[0] for row in columns)})"


def _server_steps(conn: Connection) -> list[Step]:
    steps = [_role_step(role) for role in ROLES]
    steps += [
        Step(
            sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(member)),
            sql.SQL("SELECT pg_catalog.pg_has_role({}, {}, 'MEMBER')").format(member, group),
            member,
        )
        for group, member in _MEMBERS
    ]
    database = sql.Identifier(conn.info.dbname)
    for role in ROLES:
        steps.append(_database_step("CONNECT", database, role))
    steps.append(_database_step("TEMPORARY", database, CONSUMER))
    steps += [_function_step(function, CONSUMER) for function in ORIGIN_FUNCTIONS]
    steps += [_end_step(function, PRODUCER) for function in _granted(conn, ORIGIN_FUNCTIONS, PRODUCER)]
    steps.append(
        Step(
            sql.SQL("GRANT SET ON PARAMETER session_replication_role TO {}").format(sql.Identifier(CONSUMER)),
            sql.SQL(
                "SELECT pg_catalog.has_parameter_privilege({}, 'session_replication_role', 'SET')"
            ).format(CONSUMER),
            CONSUMER,
        )
    )
    return steps


def _role_step(role: str) -> Step:
    """CREATE ROLE has no IF NOT EXISTS; two installers at once must both succeed."""
    attribute = "REPLICATION" if role == PRODUCER else "NOREPLICATION"
    make = f"CREATE ROLE {role} NOLOGIN {attribute}"
    known = "EXCEPTION WHEN duplicate_object OR unique_violation THEN"
    body = f"BEGIN {make}; {known} ALTER ROLE {role} {attribute}; END"
    check = "AND rolreplication" if role == PRODUCER else ""
    return Step(
        sql.SQL("DO {}").format(sql.Literal(body)),
        sql.SQL("SELECT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {} {})").format(
            role, _words(check)
        ),
        role,
    )


def _database_step(privilege: str, database: sql.Identifier, role: str) -> Step:
    return Step(
        sql.SQL("GRANT {} ON DATABASE {} TO {}").format(_words(privilege), database, sql.Identifier(role)),
        sql.SQL("SELECT pg_catalog.has_database_privilege({}, pg_catalog.current_database(), {})").format(
            role, privilege
        ),
        role,
    )


def _function_step(function: str, role: str) -> Step:
    return Step(
        sql.SQL("GRANT EXECUTE ON FUNCTION pg_catalog.{} TO {}").format(
            _words(function), sql.Identifier(role)
        ),
        sql.SQL("SELECT pg_catalog.has_function_privilege({}, {}, 'EXECUTE')").format(
            role, f"pg_catalog.{function}"
        ),
        role,
    )


def _granted(conn: Connection, functions: Sequence[str], role: str) -> list[str]:
    """Those a role was given by its own name, as an earlier version did.

    Only what a superuser gave, as whose grants the owner's count: that is what one can take back.
    """
    rows = conn.execute(
        "SELECT f FROM pg_catalog.unnest(%s::text[]) f JOIN pg_catalog.pg_proc p"
        " ON p.oid = ('pg_catalog.' || f)::pg_catalog.regprocedure,"
        " LATERAL pg_catalog.aclexplode(p.proacl) a JOIN pg_catalog.pg_roles r ON r.oid = a.grantee"
        " WHERE r.rolname = %s AND a.grantor = p.proowner ORDER BY f",
        (list(functions), role),
    ).fetchall()
    return [function for (function,) in rows]


def _end_step(function: str, role: str) -> Step:
    """Made only while the grant is there; so its probe is never true."""
    return Step(
        sql.SQL("REVOKE EXECUTE ON FUNCTION pg_catalog.{} FROM {}").format(
            _words(function), sql.Identifier(role)
        ),
        sql.SQL("SELECT false").format(),
        role,
    )


def _satisfied(conn: Connection, step: Step) -> bool:
    known = conn.execute("SELECT FROM pg_catalog.pg_roles WHERE rolname = %s", (step.role,)).fetchone()
    if known is None:
        return False
    row = conn.execute(step.probe).fetchone()
    return row is not None and bool(row[0])


def _is_superuser(conn: Connection) -> bool:
    row = conn.execute("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user").fetchone()
    return row is not None and bool(row[0])


def _refuse_missing(conn: Connection, steps: Sequence[Step]) -> None:
    todo = [step.statement.as_string(conn) for step in steps if not _satisfied(conn, step)]
    if todo:
        statements = ";\n  ".join(todo)
        raise RefusedError(
            f"user {conn.info.user} is no superuser and {len(todo)} grants are missing, or to be taken back",
            hint=f"let a superuser run this in database {conn.info.dbname}, or give --no-roles:"
            f"\n  {statements};",
        )


def _run_shared(conn: Connection, statement: sql.Composed) -> None:
    """Run a statement on a catalog all databases share; another installer may write the same row now."""
    for attempt in range(5):
        try:
            with conn.transaction():
                conn.execute(statement)
            return
        except psycopg.errors.InternalError_:  # "tuple concurrently updated"
            if attempt == 4:
                raise


def _give_login(conn: Connection, role: str, password: SecretStr) -> None:
    """The password leaves this process only as a SCRAM verifier: statements may be logged."""
    secret = conn.pgconn.encrypt_password(
        password.get_secret_value().encode(), role.encode(), b"scram-sha-256"
    )
    conn.execute(
        sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(secret.decode()))
    )
