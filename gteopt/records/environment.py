"""The machine and the library versions of a measurement, as a record."""

from __future__ import annotations

from gteopt.frozen import Frozen

Conditions = dict[str, str]
"""What a result depends on besides the variant: library versions, thread counts, environment."""


class MachineRecord(Frozen):
    """The machine of a measurement or a build."""

    cpu: str
    n_cores: int
    memory_bytes: int
    gpu: str | None
    os: str
    python: str
