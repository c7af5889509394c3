"""The machine and the library versions of a measurement, as a record."""

from __future__ import annotations

from gteopt.frozen import Frozen

Conditions = dict[str, str]
"""What a number depends on besides the variant: library versions, thread counts, environment."""


class Machine(Frozen):
    """Where something was measured or built."""

    cpu: str
    n_cores: int
    memory_bytes: int
    gpu: str | None
    os: str
    python: str
