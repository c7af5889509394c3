"""The record of examples: a user's own texts with their neighbours before and after.

The file holds the texts themselves, so it is written only on request.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.frozen import Frozen


class Example(Frozen):
    """One text and its nearest neighbours, the nearest first.

    Attributes:
        before: neighbours by the baseline.
        after: neighbours by the variant, on its vectors as stored.
    """

    text: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def n_kept(self) -> int:
        """Number of neighbours before that are also neighbours after."""
        return len(set(self.before) & set(self.after))


class Examples(Frozen):
    """`RESULTS/examples/<variant>.json`: the texts whose neighbours changed most.

    Attributes:
        texts: name of the file with the texts.
        examples: the examples, those that changed most first.
    """

    schema_: Literal["gteopt.examples/1"] = Field(default="gteopt.examples/1", alias="schema")
    variant: str
    artifact_sha256: str
    baseline: str
    baseline_sha256: str
    texts: str
    examples: tuple[Example, ...]
