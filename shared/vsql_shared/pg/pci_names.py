"""What a column may hold, by its name and type: account data, or sensitive authentication data. Pure.

A suggestion, never a proof: a card number in a column called `note` is found by nobody here. Not here: marks,
and what follows from either (pci.py). Rules:

* A name is taken apart at everything that is no letter or digit, and where lower case turns to upper:
  `cardNumber`, `CARD_NUMBER` and `card-number` are one. The name of a user's type counts like the column's.
* Digits behind a word mean nothing: `pan2`, `cvv1` and `card_number3` are what they are without.
* Whole words only: `span`, `expansion` and `spinning` are nobody's. A type that cannot hold the value (a card
  number in a boolean) suggests nothing.
* Sensitive authentication data wins: `card_pin` is a PIN before it is a card's.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What PCI DSS calls it."""

    CARDHOLDER = "cardholder"
    """Card number, cardholder's name, expiry date, service code: may be stored, protected."""
    AUTHENTICATION = "authentication"
    """Card verification code, track, PIN: must not be kept after authorization, so it is never sent."""


class Suggestion(NamedTuple):
    """What a column looks like, in words."""

    kind: Kind
    looks_like: str


class _Rule(NamedTuple):
    kind: Kind
    looks_like: str
    words: tuple[str, ...]
    """Each is a run of words, written together: `pinblock` is `pinblock`, `pin_block` and `PinBlock`."""


_AUTHENTICATION = (
    _Rule(
        Kind.AUTHENTICATION,
        "a card verification code",
        ("cvv", "cvvs", "cvc", "cid", "cav", "csc", "cvn", "icvv", "dcvv", "securitycode",
         "cardverificationcode", "cardverificationvalue", "cardverificationnumber", "verificationvalue",
         "cvvcode", "cvvnumber", "cvvhash", "cvccode", "cardcvv", "cardcvc", "cardcsc"),
    ),
    _Rule(
        Kind.AUTHENTICATION,
        "track data",
        ("track1", "track2", "track3", "trackdata", "trackone", "tracktwo", "magstripe", "magneticstripe",
         "magstripedata", "fulltrack", "track1data", "track2data", "trackequivalent", "trk1", "trk2", "trk3",
         "swipedata"),
    ),
    _Rule(
        Kind.AUTHENTICATION,
        "a PIN",
        ("pin", "pinblock", "pvv", "pinverificationvalue", "pinoffset", "cardpin", "pincode", "pinhash",
         "pinnumber", "atmpin"),
    ),
)  # fmt: skip
_CARDHOLDER = (
    _Rule(
        Kind.CARDHOLDER,
        "a card number",
        ("pan", "pans", "dpan", "fpan", "primaryaccountnumber", "cardnumber", "cardno", "cardnum", "cardnr",
         "cardnumbers", "ccnumber", "ccnum", "ccno", "ccn", "creditcard", "creditcardnumber", "creditcardno",
         "creditcardnum", "debitcard", "debitcardnumber", "debitcardno", "paymentcardnumber", "maskedpan",
         "cardpan", "pannumber", "panno", "panhash"),
    ),
    _Rule(
        Kind.CARDHOLDER,
        "a cardholder's name",
        ("cardholder", "cardholdername", "nameoncard", "cardname", "ccname", "cardowner", "ccowner",
         "ccholder"),
    ),
    _Rule(
        Kind.CARDHOLDER,
        "a card's expiry date",
        ("expiry", "expirydate", "expirymonth", "expiryyear", "expdate", "expmonth", "expyear", "cardexp",
         "cardexpiry", "cardexpiration", "expirationdate", "expirationmonth", "expirationyear", "ccexp",
         "expmm", "expyy", "expyyyy", "validthru", "goodthru"),
    ),
    _Rule(Kind.CARDHOLDER, "a card's service code", ("servicecode",)),
)  # fmt: skip
_RULES = (*_AUTHENTICATION, *_CARDHOLDER)
_WORDS = {word: rule for rule in reversed(_RULES) for word in rule.words}
_LONGEST = 4
"""Words of a column's name that are read together, at most: `primary_account_number` has three."""

_BREAKS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# These hold a moment, a flag or an id, and neither digits of a card nor a name.
_CANNOT_HOLD = re.compile(
    r"(boolean|uuid|timestamp|timestamptz|time|timetz|interval|point|line|box|path|polygon|circle|inet|cidr"
    r"|macaddr8?|tsvector|tsquery|\w*range|oid|xid8?|cid|tid|pg_lsn|reg\w+)"
    r"(\b|\()"
)
_CARD_TEXT = re.compile(r"(character|character varying|char|varchar|bpchar)\((1[2-9])\)$")
_CARD = frozenset(("card", "cc"))


def suggest(column: str, type_name: str) -> Suggestion | None:
    """What a column of this name and type (as format_type prints it) may hold; None: nothing is suggested."""
    plain = type_name.removeprefix("pg_catalog.")
    if "." not in plain and _CANNOT_HOLD.match(plain):
        return None
    # No word of a type of PostgreSQL's own is in the rules, but those just ruled out.
    found = [_named(column), _named(plain.rpartition(".")[2]), _sized(column, plain)]
    rules = [rule for rule in found if rule is not None]
    best = min(rules, key=_RULES.index, default=None)
    return None if best is None else Suggestion(best.kind, best.looks_like)


def kind_of(looks_like: str) -> Kind:
    """Which kind a suggestion's words stand for."""
    return next((rule.kind for rule in _RULES if rule.looks_like == looks_like), Kind.CARDHOLDER)


def _named(name: str) -> _Rule | None:
    """The first rule one of whose words stands in the name."""
    words = [word.lower() for word in _BREAKS.split(name) if word]
    runs = {
        "".join(words[at : at + size])
        for size in range(1, _LONGEST + 1)
        for at in range(len(words) - size + 1)
    }
    runs |= {run.rstrip("0123456789") for run in runs}
    rules = [_WORDS[run] for run in runs if run in _WORDS]
    return min(rules, key=_RULES.index, default=None)


def _sized(name: str, type_name: str) -> _Rule | None:
    """Text of 12 to 19 characters in a column with `card` in its name: a card number is as long."""
    words = {word.lower() for word in _BREAKS.split(name) if word}
    if words & _CARD and _CARD_TEXT.match(type_name):
        return next(rule for rule in _CARDHOLDER if "cardnumber" in rule.words)
    return None
