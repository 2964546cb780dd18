"""Columns are suggested by whole words of their names and by their types, never by a part of a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsql_shared.pg.pci_names import Kind, suggest

AUTHENTICATION = [
    ("cvv", "text"), ("CVV2", "character(3)"), ("cvv_hash", "text"), ("card_cvc", "integer"),
    ("cid", "bigint"),
    ("securityCode", "text"), ("track1", "text"), ("track_2", "bytea"), ("track_data", "jsonb"),
    ("magStripe", "bytea"), ("pin", "character(4)"), ("PINBlock", "text"), ("card_pin", "text"),
    ("cvv1", "text"), ("pin2", "text"), ("cvn", "text"), ("CVVcode", "text"), ("cardcvv", "text"),
    ("pinhash", "text"), ("trk2_enc", "bytea"), ("cvv", "real"), ("cvc", "double precision"),
    ("pin_block_enc", "bytea"), ("v", "public.cvv"), ("x", '"Shop"."CVV"'), ("x", "box.pin_block"),
]  # fmt: skip
CARDHOLDER = [
    ("pan", "text"), ("pan_encrypted", "bytea"), ("cardNumber", "text"), ("CARD_NO", "text"),
    ("ccNumber", "text"),
    ("credit_card", "text"), ("cardholder_name", "text"), ("card_holder", "text"), ("name_on_card", "text"),
    ("expiry_encrypted", "bytea"), ("exp_month", "smallint"), ("expiration_date", "date"),
    ("pan2", "text"), ("card_number3", "text"), ("card_number_2", "text"), ("ccn", "text"),
    ("PANnumber", "text"), ("creditcardno", "text"), ("cc_owner", "text"), ("valid_thru", "text"),
    ("exp_yy", "smallint"), ("pan", "double precision"),
    ("service_code", "integer"), ("card", "character(16)"), ("cc", "character varying(19)"),
    ("v", "card_number"), ("v", "public.primary_account_number"), ("pans", "text[]"),
]  # fmt: skip
NOTHING = [
    ("span", "text"), ("company", "text"), ("spinning", "text"), ("is_pinned", "text"), ("cidr", "cidr"),
    ("pin", "boolean"), ("pinned_at", "timestamp with time zone"), ("cid", "uuid"), ("v", "cid"),
    ("expiry", "timestamp with time zone"), ("expires_at", "text"), ("card", "text"), ("card_id", "bigint"),
    ("account_id", "character varying(16)"), ("name", "text"), ("tracking", "text"), ("soundtrack", "text"),
    ("pan", "boolean"), ("", "text"), ("id", "pg_catalog.int4range"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "type_name"), AUTHENTICATION)
def test_sensitive_authentication_data_is_suggested(column: str, type_name: str) -> None:
    found = suggest(column, type_name)
    assert found is not None
    assert found.kind == Kind.AUTHENTICATION


@pytest.mark.parametrize(("column", "type_name"), CARDHOLDER)
def test_account_data_is_suggested(column: str, type_name: str) -> None:
    found = suggest(column, type_name)
    assert found is not None
    assert found.kind == Kind.CARDHOLDER


@pytest.mark.parametrize(("column", "type_name"), NOTHING)
def test_parts_of_words_and_types_that_cannot_hold_it_suggest_nothing(column: str, type_name: str) -> None:
    assert suggest(column, type_name) is None


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_name_and_type_has_an_answer(column: str, type_name: str) -> None:
    found = suggest(column, type_name)
    assert found is None or found.looks_like.startswith(("a ", "track"))


@given(st.sampled_from(["cvv", "track2", "pin_block"]), st.sampled_from(["card_", "old_", "x-"]))
def test_words_around_it_hide_nothing(word: str, before: str) -> None:
    for name in (before + word, f"{before}{word}_enc", (before + word).upper()):
        found = suggest(name, "text")
        assert found is not None
        assert found.kind == Kind.AUTHENTICATION
