"""What every section of the configuration has in common.

Rules: a section is immutable, knows all its keys (an unknown one is an error), and its validation
errors never print their input, because the input may be a secret.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One table of the TOML file."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )
