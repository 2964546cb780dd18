"""A staged value as the target column's type, as SQL expressions. Pure.

Not here: which types may lose something (fitting.py), and the statements (statements.py). Rules:

1. A value goes to a column of another type by way of its text: what the type's output function prints.
2. Where the target's column may hold less, what came is compared with what would be stored, read back as
   the source's type. A value that comes back changed is an error of its row: what no smallint holds, or what
   is too long. Where a row is looked for, it finds none: none can have it.
"""

from __future__ import annotations

from vsql_consumers import fitting
from vsql_consumers.target import TargetColumn, TypeName

_TEXT_OID, _VARCHAR_OID, _MONEY_OID = 25, 1043, 790
_CHAR_OID, _REGCLASS_OID = 18, 2205
# Types whose cast to text is not what their output function prints, and so not what a session of text sends:
# boolean, bpchar, inet.
_PRINTS = {16: "boolout", 1042: "bpcharout", 869: "inet_out"}
# What 17 and later send for the infinite intervals is for older servers this; its text is not accepted by 17.
_INFINITE = (
    ("-178956970 years -8 mons -2147483648 days -2562047788:00:54.775808", "-infinity"),
    ("178956970 years 7 mons 2147483647 days 2562047788:00:54.775807", "infinity"),
)
# Integers that hold every value of the other.
_WIDER = frozenset({(21, 23), (21, 20), (23, 20)})


def convert(value: str, staged: TypeName, target: TypeName) -> str:
    """A staged value as the target's type, without its length or precision."""
    if staged.finite:
        return _finite(value, staged.sql, target.sql)
    if staged.oid == target.oid or (staged.oid, target.oid) in _WIDER:
        return value
    text = value if staged.oid == _TEXT_OID else printed(value, staged)
    return text if target.oid == _TEXT_OID else parsed(text, target)


def hold(
    value: str,
    staged_value: str,
    staged: TypeName,
    source: TypeName,
    column: TargetColumn,
    *,
    seek: bool,
) -> str:
    """`value`, converted from `staged_value`, if the column holds it as it came.

    Else it is an error of its row, or with `seek`, where a row is looked for, NULL: it finds none. `source`:
    its type on the source; it is staged as this, or as text. The row's alias is `s`.
    """
    came, back = _both(value, staged_value, staged, source, column)
    if seek:
        never = "NULL"
    elif column.type.oid == _VARCHAR_OID and column.modifier != -1:
        # Too long to be assigned: that error says what it is.
        never = f"CAST(pg_catalog.rpad('', {column.modifier}, 'x') AS {column.type.sql})"
    else:
        never = f"CAST(CAST(CAST(s.k * 0 + 32768 AS int2) AS text) AS {column.type.sql})"
    return f"CASE WHEN {came} IS NOT DISTINCT FROM {back} THEN {value} ELSE {never} END"


def _both(
    value: str, staged_value: str, staged: TypeName, source: TypeName, column: TargetColumn
) -> tuple[str, str]:
    """What came and what would be stored, to be compared: exactly, but for what the types call equal."""
    target, stored = column.type.oid, f"CAST({value} AS {column.exact})"
    came = staged_value if staged.oid == source.oid else parsed(staged_value, source)
    if source.oid == target and not fitting.is_text(target):
        return came, stored
    if fitting.is_number(source.oid):
        number = "numeric[]" if fitting.is_array(source.oid) else "numeric"
        text = stored if target == _MONEY_OID else f"CAST({stored} AS text)"
        return f"CAST(CAST({came} AS text) AS {number})", f"CAST({text} AS {number})"
    if fitting.is_time(source.oid) and fitting.is_time(target):
        return came, parsed(printed(stored, column.type), source)
    if fitting.rounds(target):
        return value, stored  # what its text says in the target's type, before that one's precision
    text = staged_value if staged.oid == _TEXT_OID else f"CAST({staged_value} AS text)"
    return f'({text}) COLLATE "C"', f'CAST({stored} AS text) COLLATE "C"'


def printed(value: str, type_: TypeName) -> str:
    """A value as the text its type's output function makes."""
    if type_.oid in _PRINTS:
        return f"pg_catalog.textin(pg_catalog.{_PRINTS[type_.oid]}({value}))"
    return f"CAST({value} AS text)"


def parsed(text: str, type_: TypeName) -> str:
    """A text as a value, by what its type's input function does; a cast from text may do something else."""
    if type_.oid == _REGCLASS_OID:  # the cast knows neither "-" nor numbers
        return f"pg_catalog.regclassin(pg_catalog.textout({text}))"
    if type_.oid == _CHAR_OID:  # before 16 neither knows the octal form of bytes above 127
        digits = " + ".join(f"(ascii(substr({text}, {n}, 1)) - 48) * {8 ** (4 - n)}" for n in (2, 3, 4))
        octal = f"octet_length({text}) = 4 AND ascii({text}) = 92"
        return f'CASE WHEN {octal} THEN CAST({digits} - 256 AS "char") ELSE CAST({text} AS "char") END'
    return f"CAST({text} AS {type_.sql})"


def _finite(value: str, staged: str, target: str) -> str:
    """A value that holds intervals; an infinite one is an error of its row: it would be misread here."""
    text = f"CAST({value} AS text)"
    for misread, meant in _INFINITE:
        text = f"replace({text}, '{misread}', '{meant}')"
    same = f"CAST({value} AS {target})" if staged == target else f"CAST(CAST({value} AS text) AS {target})"
    return f"CASE WHEN {text} = CAST({value} AS text) THEN {same} ELSE CAST({text} AS {target}) END"
