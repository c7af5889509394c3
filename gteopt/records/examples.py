"""The record of examples: a user's own texts with their neighbours before and after.

Such a file holds texts in clear, so nothing writes it unless it is asked for.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.frozen import Frozen


class Example(Frozen):
    """One text and its nearest others, the nearest first.

    Attributes:
        before: by the baseline.
        after: by the variant, on the vectors as it stores them.
    """

    text: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def n_kept(self) -> int:
        """How many of the neighbours before are among those after."""
        return len(set(self.before) & set(self.after))


class Examples(Frozen):
    """`RESULTS/examples/<variant>.json`: the texts whose neighbours changed most.

    Attributes:
        texts: name of the file that they are of.
        examples: those that changed most first.
    """

    schema_: Literal["gteopt.examples/1"] = Field(default="gteopt.examples/1", alias="schema")
    variant: str
    artifact_sha256: str
    baseline: str
    baseline_sha256: str
    texts: str
    examples: tuple[Example, ...]
