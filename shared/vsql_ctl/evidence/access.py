"""Who may do what: PostgreSQL's roles, memberships and grants as they are, and Kafka's ACLs.

Rules: catalogs are read, no table of users. No password, verifier or option of an authentication method is
read. ACLs are those that reach this cluster's topics and groups, whoever's they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vsql_shared.errors import BrokerError, TransientError

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

    from vsql_ctl.evidence.brokers import Brokers
    from vsql_shared.config import Settings
    from vsql_shared.pg.connect import Connection

_ROLES = """
SELECT r.rolname, r.rolsuper, r.rolcreaterole, r.rolcreatedb, r.rolreplication, r.rolbypassrls, r.rolcanlogin,
       r.rolvaliduntil, coalesce((SELECT pg_catalog.jsonb_agg(g.rolname ORDER BY g.rolname)
         FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles g ON g.oid = m.roleid
         WHERE m.member = r.oid), '[]')
FROM pg_catalog.pg_roles r WHERE r.rolname !~ '^pg_' ORDER BY 1
"""
_ROLE_COLUMNS = (
    "role", "superuser", "create_role", "create_database", "replication", "bypass_row_security", "login",
    "valid_until", "member_of",
)  # fmt: skip
# Our schema, what is published, and what the services may touch.
_TABLES = """
WITH ours AS (
    SELECT c.oid FROM pg_catalog.pg_class c
    WHERE c.relnamespace = 'vsql_sync'::pg_catalog.regnamespace AND c.relkind IN ('r', 'p', 'v', 'S')
    UNION SELECT c.oid FROM vsql_sync.publication_tables t
    JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass(
        pg_catalog.format('%I.%I', t.table_schema, t.table_name))
    UNION SELECT c.oid FROM pg_catalog.pg_publication_tables t
    JOIN pg_catalog.pg_namespace n ON n.nspname = t.schemaname
    JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename
    UNION SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relacl::text ~ 'vsql_sync_(producer|consumer)='
), named AS (
    SELECT c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name, c.relowner, c.relacl,
           c.relrowsecurity, c.relkind, c.relnamespace
    FROM ours JOIN pg_catalog.pg_class c USING (oid) JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
)
"""
# ruff: noqa: S608 - constants of this module, put together
_OWNERS = _TABLES + "SELECT name, pg_get_userbyid(relowner), relrowsecurity FROM named ORDER BY name"
_GRANTS = (
    _TABLES
    + """
, granted AS (
    -- Where nobody has granted anything the built-in rights count, which give PUBLIC some.
    SELECT name, ''::text AS part, coalesce(relacl, pg_catalog.acldefault(
        (CASE relkind WHEN 'S' THEN 's' ELSE 'r' END)::"char", relowner)) AS acl FROM named
    UNION ALL SELECT name, t.attname::text, t.attacl
    FROM named JOIN pg_catalog.pg_attribute t ON t.attrelid = oid
    UNION ALL SELECT 'schema ' || nspname, '', coalesce(nspacl, pg_catalog.acldefault('n', nspowner))
    FROM pg_catalog.pg_namespace n WHERE n.oid IN (SELECT relnamespace FROM named)
    UNION ALL SELECT 'function ' || p.oid::pg_catalog.regprocedure::text,
        CASE WHEN prosecdef THEN 'SECURITY DEFINER' ELSE '' END,
        coalesce(proacl, pg_catalog.acldefault('f', proowner))
    FROM pg_catalog.pg_proc p WHERE pronamespace = 'vsql_sync'::pg_catalog.regnamespace
    UNION ALL SELECT 'database', '', coalesce(datacl, pg_catalog.acldefault('d', datdba))
    FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()
)
SELECT name, part, coalesce(g.rolname, 'PUBLIC'), a.privilege_type, a.is_grantable
FROM granted CROSS JOIN LATERAL pg_catalog.aclexplode(acl) a
LEFT JOIN pg_catalog.pg_roles g ON g.oid = a.grantee ORDER BY 1, 2, 3, 4
"""
)
_TIMEOUT_SECONDS = 10.0


def roles(conn: Connection) -> dict[str, Any]:
    """Roles, owners and grants of this node's database."""
    from vsql_shared.pg.connect import errors

    with errors("reading roles and grants"):
        return {
            "roles": _rows(conn, _ROLE_COLUMNS, _ROLES),
            "owners": _rows(conn, ("object", "owner", "row_security"), _OWNERS),
            "grants": _rows(conn, ("object", "column", "grantee", "privilege", "grantable"), _GRANTS),
        }


def client_authentication(conn: Connection) -> list[dict[str, Any]]:
    """The server's rules of who may connect from where; options are left out: they may hold a password."""
    from vsql_shared.pg.connect import errors

    columns = ("line", "type", "databases", "users", "address", "netmask", "method", "error")
    with errors("reading the server's rules for connections"):
        return _rows(
            conn,
            columns,
            "SELECT line_number, type, database, user_name, address, netmask, auth_method,"
            " error IS NOT NULL FROM pg_catalog.pg_hba_file_rules ORDER BY line_number",
        )


def _rows(conn: Connection, columns: Sequence[str], query: str) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in conn.execute(query.encode())]


def kafka_acls(settings: Settings, kafka: Brokers) -> list[dict[str, Any]]:
    """The ACLs that reach topics and groups of this cluster, and those of the brokers themselves.

    Raises BrokerError where they are not shown, or where nothing looks at them: Kafka's client gives an empty
    list of either.
    """
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import (  # type: ignore[attr-defined]  # no stubs say so
        AclBindingFilter,
        AclOperation,
        AclPermissionType,
        ResourcePatternType,
        ResourceType,
    )

    from vsql_shared.kafka.clients import from_exception

    admin = kafka.client()
    name: Any = None  # any; the types say a text
    kinds = ResourceType.ANY, name, ResourcePatternType.ANY
    wanted = AclBindingFilter(*kinds, name, name, AclOperation.ANY, AclPermissionType.ANY)
    try:
        _require_shown(admin)
        found = admin.describe_acls(wanted, request_timeout=_TIMEOUT_SECONDS).result(_TIMEOUT_SECONDS + 1)
        if not found:
            _require_authorizer(admin)
    except TimeoutError:
        raise TransientError("no Kafka broker answers while ACLs are read") from None
    except KafkaException as error:
        raise from_exception(error, "read the ACLs") from error
    rows = [
        {
            "principal": one.principal,
            "host": one.host,
            "resource": one.restype.name.lower(),
            "name": one.name,
            "pattern": one.resource_pattern_type.name.lower(),
            "operation": one.operation.name.lower(),
            "permission": one.permission_type.name.lower(),
        }
        for one in found
    ]
    return sorted((row for row in rows if reaches(row, settings.cluster.name)), key=str)


def _require_shown(admin: AdminClient) -> None:
    """Raise BrokerError unless this principal may see ACLs."""
    from confluent_kafka.admin import AclOperation  # type: ignore[attr-defined]  # no stubs say so

    answer = admin.describe_cluster(include_authorized_operations=True, request_timeout=_TIMEOUT_SECONDS)
    allowed = answer.result(_TIMEOUT_SECONDS + 1).authorized_operations or ()
    if AclOperation.DESCRIBE not in allowed:
        raise BrokerError(
            "Kafka: this principal has no authorization to see ACLs",
            hint="grant it Describe on the cluster, or have an administrator's principal make the bundle",
        )


def _require_authorizer(admin: AdminClient) -> None:
    """Raise BrokerError where brokers have no authorizer: there are no ACLs then, and no rights either."""
    from confluent_kafka.admin import (  # type: ignore[attr-defined]  # no stubs say so
        ConfigResource,
        ResourceType,
    )

    nodes = admin.describe_cluster(request_timeout=_TIMEOUT_SECONDS).result(_TIMEOUT_SECONDS + 1).nodes
    broker = ConfigResource(ResourceType.BROKER, str(nodes[0].id))
    answer = admin.describe_configs([broker], request_timeout=_TIMEOUT_SECONDS)[broker]
    setting = answer.result(_TIMEOUT_SECONDS + 1).get("authorizer.class.name")
    if setting is None or not setting.value:
        raise BrokerError("the brokers have no authorizer: whoever reaches them may do everything")


def reaches(row: dict[str, Any], cluster: str) -> bool:
    """Whether an ACL's resource is, or may be, one of this cluster's."""
    from vsql_shared import names

    name = str(row["name"])
    if row["resource"] not in ("topic", "group") or name == "*":
        return True
    ours = (
        names.topic_prefix(f"{names.topic_part(cluster)}."),
        f"vsql-sync.{cluster}.",
        "vsql-sync.audit-verify",
    )
    if row["pattern"] == "prefixed":
        return any(name.startswith(one) or one.startswith(name) for one in ours)
    return name.startswith(ours)
