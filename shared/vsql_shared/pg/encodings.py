"""Databases of other encodings than UTF8: which ones a node may have, and our own texts in them.

Every session of ours speaks UTF8, and the server converts. So a value travels whole only where each text
that the database can hold has a form in UTF8, and comes back from it as the same bytes. That is so, byte by
byte, for the encodings below (`tests/topology/subscription/test_005_encoding.py`). In the others

* a stored byte may be no character at all (WIN1252 0x81; thousands of sequences of EUC_JP): its row could
  never be decoded, and no later one;
* two characters may become one (23 of EUC_JP);
* nobody knows what the bytes mean (SQL_ASCII), or no conversion exists (MULE_INTERNAL).

What our own tables are told in words (a status, an operator's reason) may hold characters the database lacks:
they are written there in an escaped form. Rows of users never pass here: they are copied as bytes, and a
character the target lacks is an error of its row.
"""

from __future__ import annotations

import json
from typing import Any

from psycopg import Connection
from psycopg.adapt import Buffer
from psycopg.types.json import set_json_dumps
from psycopg.types.string import StrDumper, StrDumperUnknown
from typing_extensions import override

UTF8 = "UTF8"
WHOLE = {
    "ISO_8859_5": "iso8859-5",
    "KOI8R": "koi8-r",
    "KOI8U": "koi8-u",
    "LATIN1": "iso8859-1",
    "LATIN2": "iso8859-2",
    "LATIN4": "iso8859-4",
    "LATIN5": "iso8859-9",
    "LATIN6": "iso8859-10",
    "LATIN7": "iso8859-13",
    "LATIN8": "iso8859-14",
    "LATIN9": "iso8859-15",
    "LATIN10": "iso8859-16",
    "WIN866": "cp866",
    "WIN1256": "cp1256",
}
"""PostgreSQL's names of the encodings a node may have beside UTF8 → Python's."""


def fit(text: str, encoding: str) -> str:
    """The text, with an escape in the place of each character that a database of this encoding lacks."""
    return text.encode(WHOLE[encoding], "backslashreplace").decode(WHOLE[encoding])


def fit_script(conn: Connection[Any], script: str) -> str:
    """An SQL script of ours as this database can take it: outside of ASCII it has comments only."""
    encoding = conn.info.parameter_status("server_encoding") or UTF8
    return fit(script, encoding) if encoding in WHOLE else script


def fit_parameters(conn: Connection[Any], encoding: str) -> None:
    """Have every text parameter of a session, and every one in a JSON parameter, fit its database."""
    if encoding not in WHOLE:
        return

    class Fitting(StrDumperUnknown):
        @override
        def dump(self, obj: str) -> Buffer | None:
            return super().dump(fit(obj, encoding))

    class FittingTyped(StrDumper):
        @override
        def dump(self, obj: str) -> Buffer | None:
            return super().dump(fit(obj, encoding))

    conn.adapters.register_dumper(str, FittingTyped)
    conn.adapters.register_dumper(str, Fitting)
    set_json_dumps(lambda value: json.dumps(_fit_all(value, encoding), ensure_ascii=False), conn)


def _fit_all(value: Any, encoding: str) -> Any:
    if isinstance(value, str):
        return fit(value, encoding)
    if isinstance(value, dict):
        return {_fit_all(key, encoding): _fit_all(item, encoding) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fit_all(item, encoding) for item in value]
    return value
