"""Functions that make columns add up, by the names users know them by. Pure.

Not here: the arithmetic (vsql_consumers/adding.py). A name may say the type of its column, which is then
compared with the column's; nothing else follows from it.
"""

from __future__ import annotations

import re

TYPES = {
    "int2": "smallint",
    "int4": "integer",
    "int8": "bigint",
    "numeric": "numeric",
    "float4": "real",
    "float8": "double precision",
    "money": "money",
}
"""Types that add up: as names of functions have them, and as PostgreSQL writes them."""
ROUNDED = frozenset({"real", "double precision"})
"""Those whose sums depend on the order of the summands, in the last digits."""
_FUNCTION = re.compile(rf"(?:spock[._])?delta_apply(?:_({'|'.join(TYPES)}))?")


def type_of(function: str) -> str | None:
    """The type a function is for, "" where its name says none; None where it is no function of ours."""
    found = _FUNCTION.fullmatch(function)
    return None if found is None else TYPES.get(found[1] or "", "")
