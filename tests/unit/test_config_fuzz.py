"""Whatever is written into the file or the environment, the loader gives settings or one ConfigError."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.unit.test_config import MINIMAL
from vsql_shared.config import Settings, advice, masked, not_built, parse_settings, to_toml
from vsql_shared.config.fields import model_of
from vsql_shared.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(
    TEXT,
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["dev", "prod", "file", "all", "*", "7d", "4MiB", "127.0.0.1:1", "~", "~x/y", "a,b"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT.filter(bool), inner, max_size=3),
    max_leaves=6,
)


def _paths(model: type[BaseModel], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [(*at, name) for name in model.model_fields]
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        found += _paths(inner, (*at, name)) if inner is not None else []
    return found


PATHS = _paths(Settings)


def _toml(value: object) -> str:
    """An inline TOML value; JSON's strings are TOML's but for DEL."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f")


def _reads_well(message: str) -> None:
    assert message.startswith("/etc/vsql-sync/vsql-sync.toml: ")
    assert all(line.isprintable() for line in message.split("\n"))


def _loads_or_refuses(content: bytes | str, env: dict[str, str] | None = None) -> None:
    try:
        found = parse_settings(content, source=Path("/etc/vsql-sync/vsql-sync.toml"), env=env or {})
    except ConfigError as error:
        _reads_well(str(error))
        return
    shown = to_toml(masked(found))
    assert masked(parse_settings(shown, source=None, env={}))["cluster"] == masked(found)["cluster"]
    assert isinstance(not_built(found) + advice(found), list)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_in_words(content: bytes) -> None:
    _loads_or_refuses(content)


@given(TEXT.map(lambda text: MINIMAL + text))
def test_arbitrary_text_after_a_good_file_is_refused_in_words(content: str) -> None:
    _loads_or_refuses(content)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=4))
def test_arbitrary_values_under_known_keys_are_refused_in_words(
    changes: dict[tuple[str, ...], object],
) -> None:
    tree: dict[str, object] = {
        "cluster": {"name": "c", "node_id": 1, "node_name": "a"},
        "connection": {"database": "d"},
        "server": {"mode": "dev"},
    }
    for path, value in changes.items():
        table = tree
        for part in path[:-1]:
            inner = table.setdefault(part, {})
            table = inner if isinstance(inner, dict) else {}
        table[path[-1]] = value
    _loads_or_refuses("\n".join(f"{key} = {_toml(value)}" for key, value in tree.items()))


@given(st.dictionaries(TEXT.filter(bool), VALUES, max_size=3))
def test_arbitrary_sections_are_refused_in_words(tree: dict[str, object]) -> None:
    _loads_or_refuses("\n".join(f"{_toml(key)} = {_toml(value)}" for key, value in tree.items()))


@given(
    st.dictionaries(
        st.sampled_from(PATHS).map(lambda path: "VSQL_SYNC__" + "__".join(path).upper())
        | TEXT.map(lambda text: "VSQL_SYNC__" + text),
        # The system hands bytes that are no text over as lone surrogates.
        TEXT | st.sampled_from(["", "[]", "{}", "[[[", "1", "true", "null", "\udcff"]),
        max_size=4,
    )
)
@example({"VSQL_SYNC__CONNECTION__PASSWORD_FILE": "\0"})
def test_arbitrary_variables_are_refused_in_words(env: dict[str, str]) -> None:
    _loads_or_refuses(MINIMAL, env)
