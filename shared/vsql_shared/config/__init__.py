"""The one configuration file: typed settings, where it is found, what is refused.

    settings = load_settings(path)     valid in itself, on any machine; ConfigError lists what is not
    check_files(settings)              the files it names are here, and keys are not open to others
    require_built(settings)            nothing is asked for that this version does not do

Reading order: `settings.py` (the whole), then the section you need; `load.py` finds and reads the file,
`report.py` words the errors, `secrets.py` reads and hides secrets.
"""

from .built import advice, not_built, require_built
from .connection import ConnectionSettings
from .encryption import EncryptionSettings
from .files import check_files
from .governance import ApplySettings, AuditSettings
from .kafka import KafkaSettings
from .limits import LimitsSettings
from .load import find_config, load_settings, parse_settings
from .secrets import ConnectionString, mask_conninfo
from .service import LogSettings, MetricsSettings, ServerSettings
from .settings import Settings
from .show import masked, to_toml
from .topology import PciColumns, PeerSettings, PublicationSettings, PublicationTable
from .values import split_address

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
