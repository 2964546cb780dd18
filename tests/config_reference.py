"""The table of every configuration key, made from the models: docs/operations/configuration.md holds it.

`python -m tests.config_reference` writes it there; a unit test says when it is not what the models say.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vsql_shared.config import Settings
from vsql_shared.config.fields import is_secret_field, model_of, section_at
from vsql_shared.config.values import format_duration

PAGE = Path(__file__).parents[1] / "docs" / "operations" / "configuration.md"
BEGIN = "<!-- every key: made by `python -m tests.config_reference` -->"
END = "<!-- end of every key -->"


def reference() -> str:
    """All sections, one table each, in the order of the models."""
    return "\n".join(_sections(Settings, ())).strip()


def _sections(model: type[BaseModel], at: tuple[str, ...]) -> Iterator[str]:
    keys = [(name, field) for name, field in model.model_fields.items() if model_of(field.annotation) is None]
    if keys:
        yield from (f"### `{_header(at)}`", "", "| key | default | meaning |", "|---|---|---|")
        yield from (
            f"| `{name}` | {_default(field)} | {_meaning(model, name, field)} |" for name, field in keys
        )
        yield ""
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        if inner is not None:
            yield from _sections(inner, (*at, name))


def _header(at: tuple[str, ...]) -> str:
    name = ".".join(at)
    parent = section_at(at[:-1])
    many = parent is not None and get_origin(parent.model_fields[at[-1]].annotation) is list
    return f"[[{name}]]" if many else f"[{name}]"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "secret" if is_secret_field(field) else "–"
    if isinstance(value, timedelta):
        return f'`"{format_duration(value)}"`'
    return f"`{json.dumps(value)}`"


def meaning(model: type[BaseModel], name: str) -> str:
    """The docstring of a key, which stands below it in its class; empty where there is none.

    Read from the source, here and not by pydantic: that would cost each start of each program a sixth.
    """
    where = next(one for one in model.__mro__ if name in inspect.get_annotations(one))
    return _docstrings(where).get(name, "")


@cache
def _docstrings(model: type) -> Mapping[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        key.target.id: inspect.cleandoc(text.value.value)
        for key, text in pairwise(tree.body)
        if isinstance(key, ast.AnnAssign)
        and isinstance(key.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _meaning(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    text = " ".join(meaning(model, name).split()).replace("|", "\\|")
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    return f"{text} One of {', '.join(f'`{choice}`' for choice in choices)}." if len(choices) > 1 else text


def page_with(table: str) -> str:
    """The page with this table in its place."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(reference()), encoding="utf-8")
