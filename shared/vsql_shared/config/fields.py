"""Which field of which section a key names: for messages, for masking and for the environment."""

from __future__ import annotations

from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from vsql_shared.config.settings import Settings

Location = tuple[int | str, ...]


def unwrap(annotation: object) -> list[object]:
    """The types an annotation allows, without Annotated and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return unwrap(get_args(annotation)[0])
    if origin is Union or type(annotation).__name__ == "UnionType":
        return [kind for part in get_args(annotation) for kind in unwrap(part) if part is not type(None)]
    return [annotation]


def model_of(annotation: object) -> type[BaseModel] | None:
    """The section an annotation stands for, directly or as the entries of a list."""
    for kind in unwrap(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        if get_origin(kind) is list:
            return model_of(get_args(kind)[0])
    return None


def field_at(at: Location) -> FieldInfo | None:
    """The field a dotted key names; None for an unknown key, or one inside a plain value."""
    model: type[BaseModel] | None = Settings
    found: FieldInfo | None = None
    for part in at:
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return None
        found = model.model_fields[part]
        model = model_of(found.annotation)
    return found


def section_at(at: Location) -> type[BaseModel] | None:
    """The section whose keys stand directly below `at`, also where `at` is an entry of a list."""
    if not at:
        return Settings
    field = field_at(at)
    return None if field is None else model_of(field.annotation)


def model_at(at: Location) -> type[BaseModel] | None:
    """The section `at` itself names; None for a list of sections and for plain keys."""
    field = field_at(at)
    if field is None or takes_json(at):
        return None
    return model_of(field.annotation)


def takes_json(at: Location) -> bool:
    """Whether the key holds a list or a table of free keys, which a variable gives as JSON."""
    field = field_at(at)
    return field is not None and any(get_origin(kind) in (list, dict) for kind in unwrap(field.annotation))


def is_secret_field(field: FieldInfo) -> bool:
    """Whether the field's value may hold a secret."""
    return any(isinstance(kind, type) and issubclass(kind, SecretStr) for kind in unwrap(field.annotation))


def may_show(at: Location) -> bool:
    """Whether a bad value at `at` may stand in a message: only a plain, known, not secret key's may."""
    field = field_at(at)
    if field is None or is_secret_field(field) or model_of(field.annotation) is not None:
        return False
    return not any(get_origin(kind) is dict for kind in unwrap(field.annotation))
