"""[[peers]], [[publications]], [[pci.columns]]: what `config apply` brings into the database.

The database holds the truth about these; here is only what a file wishes for.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from vsql_shared.config.clocks import ClockSyncSettings
from vsql_shared.config.secrets import ConnectionString
from vsql_shared.config.section import Section
from vsql_shared.config.service import NodeId
from vsql_shared.config.values import Identifier, NodeName, TableName, refusal
from vsql_shared.strategies import Strategy

StreamMode = Literal["uni-directional", "bidirectional"]
ApplyMode = Literal["transactional", "partitioned"]
SchemaSyncMode = Literal["strict", "auto", "manual"]


def _table_entry(value: object) -> object:
    """A table given by its name alone is that table with all columns."""
    return {"name": value} if isinstance(value, str) else value


def _columns(value: object) -> object:
    """Read "all" as leaving the list out; a list names what is replicated."""
    if value == "all":
        return None
    if isinstance(value, str):
        raise refusal('write "all" or a list of column names')
    if isinstance(value, list) and not value:
        raise refusal('a publication of no columns is not possible; write "all" or name some')
    return value


class PeerSettings(Section):
    """[[peers]]: another node of the cluster."""

    node_id: NodeId
    """Its number."""
    node_name: NodeName
    """Its name."""
    connection: ConnectionString
    """How to reach its database (libpq connection string); a password in it is never shown."""
    mode: StreamMode = "uni-directional"
    """Whether it only receives, or both nodes write."""


class SchemaSyncSettings(Section):
    """[replication.initialization.schema_sync]: tables that are not defined alike when a peer is added."""

    mode: SchemaSyncMode = "manual"
    """"strict" refuses the peer, "manual" names them and goes on where it can take the rows."""


class InitializationSettings(Section):
    """[replication.initialization]: how a peer begins."""

    schema_sync: SchemaSyncSettings = SchemaSyncSettings()
    """Tables that are not defined alike."""


class ReplicationSettings(Section):
    """[replication]: streams as a whole."""

    initialization: InitializationSettings = InitializationSettings()
    """How a peer begins."""
    clock_sync: ClockSyncSettings = ClockSyncSettings()
    """How far the clocks of nodes may be apart."""


class PublicationTable(Section):
    """[[publications.tables]]: one table of a publication."""

    name: TableName
    """Table, with its schema if not public; "*" is every table."""
    columns: Annotated[list[Identifier] | None, BeforeValidator(_columns)] = None
    """Columns that are replicated; "all" (the default) is every one."""
    exclude_pci: bool = False
    """Leave out the columns marked as PCI, and keep them out of the WAL stream."""
    where: str | None = None
    """Row filter: a predicate as in CREATE PUBLICATION … WHERE, such as "region = 'US'"."""

    @model_validator(mode="after")
    def _no_repeats(self) -> PublicationTable:
        for column in self.columns or []:
            if (self.columns or []).count(column) > 1:
                raise refusal("a column is named twice")
        return self


class PublicationSettings(Section):
    """[[publications]]: a set of tables that travels as one stream."""

    name: Identifier
    """Name, unique in the database."""
    mode: StreamMode = "uni-directional"
    """Whether only this node writes these tables."""
    via_leaf: bool = False
    """Partitioned tables travel leaf by leaf, each under its own name, instead of as one table."""
    apply_mode: ApplyMode = "transactional"
    """How targets apply it: whole transactions in order, or each row's changes in order, by members."""
    conflict_strategy: Strategy | None = None
    """Where every node writes its tables: their strategy; else [conflict] default_strategy."""
    tables: list[Annotated[PublicationTable, BeforeValidator(_table_entry)]] = Field(default_factory=list)
    """Tables, by name or as [[publications.tables]]."""
    message_prefixes: list[str] = Field(default_factory=list)
    """Logical messages with exactly these prefixes are carried."""
    sequences: bool = False
    """Whether the sequences of published columns are carried."""
    more_sequences: list[TableName] = Field(default_factory=list)
    """Further sequences that are carried, with their schema if not public."""


class PciColumns(Section):
    """[[pci.columns]]: columns that hold cardholder data."""

    table: TableName
    """Table, with its schema if not public."""
    columns: Annotated[list[Identifier], Field(min_length=1)]
    """Columns."""


class PciSettings(Section):
    """[pci]: what is cardholder data."""

    columns: list[PciColumns] = Field(default_factory=list)
    """One entry per table."""
