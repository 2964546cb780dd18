"""Whether a column of the target holds every value of the source's, by their types alone. Pure.

PostgreSQL rounds in silence where a column has fewer digits than a value: numeric(10,2) takes 1.234,
timestamp(0) takes half a second, varchar(3) takes four characters of which the last are blanks; and the text
of a timestamp is accepted as a date. Native replication does the same. Where that could be, the statement
that writes compares what came with what would be stored (conversion.py); a value that would not come back
the same is an error of its row.

Not here: types whose input says itself what it does not take (integers, bit strings, enums, …), and what two
types mean by equal: json becomes jsonb without its blanks, because the target's owner chose jsonb.

Modifiers are pg_attribute.atttypmod: the manual's types leave them opaque; they are as in numeric.c,
timestamp.c and varchar.c.
"""

from __future__ import annotations

_INT2, _INT4, _INT8, _FLOAT4, _FLOAT8, _NUMERIC = 21, 23, 20, 700, 701, 1700
_DATE, _TIME, _TIMETZ, _TIMESTAMP, _TIMESTAMPTZ, _INTERVAL = 1082, 1083, 1266, 1114, 1184, 1186
_TEXT, _VARCHAR, _BPCHAR, _NAME, _CHAR = 25, 1043, 1042, 19, 18
_MONEY, _OID = 790, 26

_INTEGERS = frozenset({_INT2, _INT4, _INT8})
_NUMBERS = frozenset({_INT2, _INT4, _INT8, _FLOAT4, _FLOAT8, _NUMERIC})
_SECONDS = frozenset({_TIME, _TIMETZ, _TIMESTAMP, _TIMESTAMPTZ})
_TIMES = _SECONDS | {_DATE, _INTERVAL}
_ROUNDING = _SECONDS | {_NUMERIC, _INTERVAL}
_STRINGS = frozenset({_TEXT, _VARCHAR, _BPCHAR})
# Target types that hold every value of the source's, whatever it is.
_HELD = frozenset(
    {
        (_INT2, _NUMERIC), (_INT4, _NUMERIC), (_INT8, _NUMERIC), (_FLOAT4, _NUMERIC), (_FLOAT8, _NUMERIC),
        (_INT2, _FLOAT4), (_INT2, _FLOAT8), (_INT4, _FLOAT8), (_FLOAT4, _FLOAT8),
        (_DATE, _TIMESTAMP), (_DATE, _TIMESTAMPTZ), (_TIME, _TIMETZ), (_TIME, _INTERVAL),
        (_TIMESTAMP, _TIMESTAMPTZ), (_TIMESTAMPTZ, _TIMESTAMP),
    }
)  # fmt: skip
# An array has the modifier of its elements.
_ELEMENTS = {
    1005: _INT2, 1007: _INT4, 1016: _INT8, 1021: _FLOAT4, 1022: _FLOAT8, 1231: _NUMERIC,
    1182: _DATE, 1183: _TIME, 1270: _TIMETZ, 1115: _TIMESTAMP, 1185: _TIMESTAMPTZ, 1187: _INTERVAL,
    1009: _TEXT, 1015: _VARCHAR, 1014: _BPCHAR, 1003: _NAME, 1002: _CHAR,
}  # fmt: skip
_HEADER = 4  # lengths and precisions are stored with the size of a varlena header
_ANY_FIELDS = 0x7FFF
_ANY_DIGITS = 0xFFFF
_MOST_DIGITS = 6


def holds(source: int, source_modifier: int, target: int, target_modifier: int) -> bool:
    """Whether no value of the source's type changes in the target's. Types by OID; modifier -1: none."""
    if (source in _ELEMENTS) != (target in _ELEMENTS):
        return True  # its text says what it is
    source, target = _ELEMENTS.get(source, source), _ELEMENTS.get(target, target)
    if source == target or (source in _STRINGS and target in _STRINGS):
        return _no_narrower(source, source_modifier, target, target_modifier)
    if target in (_NAME, _CHAR):
        return False
    if target == _VARCHAR:
        # Numbers and times do not end in blanks.
        return target_modifier == -1 or source in _NUMBERS or source in _TIMES
    if source in _NUMBERS and target in (_MONEY, _OID):
        return False
    if target_modifier != -1 and target in _ROUNDING:
        return False
    # The input of integers takes no fraction.
    return (
        (source, target) in _HELD
        or target in _INTEGERS
        or not any(source in family and target in family for family in (_NUMBERS, _TIMES))
    )


def is_number(type_oid: int) -> bool:
    """Whether values of a type, or of an array of it, are numbers."""
    return _ELEMENTS.get(type_oid, type_oid) in _NUMBERS


def is_time(type_oid: int) -> bool:
    """Whether values of a type, or of an array of it, are dates, times or intervals."""
    return _ELEMENTS.get(type_oid, type_oid) in _TIMES


def rounds(type_oid: int) -> bool:
    """Whether a type's precision rounds its values."""
    return _ELEMENTS.get(type_oid, type_oid) in _ROUNDING


def is_array(type_oid: int) -> bool:
    """Whether it is one of the arrays that are looked into."""
    return type_oid in _ELEMENTS


def is_text(type_oid: int) -> bool:
    """Whether values of a type, or of an array of it, are strings of any length."""
    return _ELEMENTS.get(type_oid, type_oid) in (*_STRINGS, _NAME)


def _no_narrower(source: int, have: int, target: int, need: int) -> bool:
    """Two types of one family; `need` is the target's modifier."""
    if need == -1 or (source, have) == (target, need):
        return True
    if target == _NUMERIC:
        return have != -1 and _scale(need) >= _scale(have)
    if target in _SECONDS:
        return need >= (_MOST_DIGITS if have == -1 else have)
    if target == _INTERVAL:
        return need >> 16 == _ANY_FIELDS and _digits(need) >= (_MOST_DIGITS if have == -1 else _digits(have))
    if target == _VARCHAR:
        # Blanks at the end of a longer value are cut without an error; those of char(n) mean nothing.
        return source == _BPCHAR or (have != -1 and need >= have)
    return True


def _scale(modifier: int) -> int:
    """Digits behind the point, negative before it (15 and later): eleven bits with a sign."""
    return (((modifier - _HEADER) & 0x7FF) ^ 1024) - 1024


def _digits(modifier: int) -> int:
    digits = modifier & _ANY_DIGITS
    return _MOST_DIGITS if digits == _ANY_DIGITS else digits
