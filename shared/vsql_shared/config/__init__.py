"""The one configuration file: typed settings, where it is found, what is refused.

    settings = load_settings(path)     valid in itself, on any machine; ConfigError lists what is not
    check_files(settings)              the files it names are here, and keys are not open to others
    require_built(settings)            nothing is asked for that this version does not do

Reading order: `settings.py` (the whole), then the section you need; `load.py` finds and reads the file,
`report.py` words the errors, `secrets.py` reads and hides secrets.
"""

from vsql_shared.config.built import advice, not_built, require_built
from vsql_shared.config.connection import ConnectionSettings
from vsql_shared.config.encryption import EncryptionSettings
from vsql_shared.config.files import check_files
from vsql_shared.config.governance import ApplySettings, AuditSettings
from vsql_shared.config.kafka import KafkaSettings
from vsql_shared.config.limits import LimitsSettings
from vsql_shared.config.load import find_config, load_settings, parse_settings
from vsql_shared.config.secrets import ConnectionString, mask_conninfo
from vsql_shared.config.service import LogSettings, MetricsSettings, ServerSettings
from vsql_shared.config.settings import Settings
from vsql_shared.config.show import masked, to_toml
from vsql_shared.config.topology import (
    PciColumns,
    PeerSettings,
    PublicationSettings,
    PublicationTable,
    SchemaSyncSettings,
)
from vsql_shared.config.values import split_address

__all__ = [
    "ApplySettings",
    "AuditSettings",
    "ConnectionSettings",
    "ConnectionString",
    "EncryptionSettings",
    "KafkaSettings",
    "LimitsSettings",
    "LogSettings",
    "MetricsSettings",
    "PciColumns",
    "PeerSettings",
    "PublicationSettings",
    "PublicationTable",
    "SchemaSyncSettings",
    "ServerSettings",
    "Settings",
    "advice",
    "check_files",
    "find_config",
    "load_settings",
    "mask_conninfo",
    "masked",
    "not_built",
    "parse_settings",
    "require_built",
    "split_address",
    "to_toml",
]
