"""The base class of every type that is read from or written to a file.

Hides: pydantic's settings. An unknown field is an error and a value never changes.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """An immutable record that refuses unknown fields and writes infinity and NaN as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
