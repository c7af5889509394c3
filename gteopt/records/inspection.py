"""The record of what `gteopt inspect` finds and predicts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.config.engines import Engine
from gteopt.config.recipe import FormatName
from gteopt.frozen import Frozen
from gteopt.records.manifest import Manifest


class RecipeEstimate(Frozen):
    """What a recipe would make of a base, worked out from shapes alone.

    Attributes:
        weight_bytes: of the variant's transformer, on disk and in memory.
        build_bytes: memory of the host that the build needs at most beyond the Python process.
        device_bytes: of a GPU that it needs at most, beyond what CUDA itself takes; None on a CPU.
        disk_bytes: that it takes at most, the artifact included.
        bytes_per_vector: of one stored vector.
        build_s: seconds that the build takes, within a factor of two or so, imports left out.
        format: checkpoint format of the packed weights; None where no layer is quantized.
        engines: what opens the variant; see `config.engines`.
        n_tokens: calibration tokens, padding included; None where no texts are read.
        warning: what is wanting though the recipe can be built; None where nothing is.
        problem: why this recipe cannot be built from this base; None when it can.
    """

    recipe: str
    summary: str
    weight_bytes: int | None
    build_bytes: int | None
    device_bytes: int | None = None
    disk_bytes: int | None
    bytes_per_vector: int | None
    build_s: float | None = None
    format: FormatName | None = None
    engines: tuple[Engine, ...] = ()
    n_tokens: int | None = None
    warning: str | None = None
    problem: str | None


class EstimateConditions(Frozen):
    """What estimates hold for: the options of `quantize` of the same names."""

    dtype: str
    device: str
    activation_bytes: int


class Inspection(Frozen):
    """What `inspect` says of a base or an artifact.

    Attributes:
        revision: commit of a model on the Hub.
        sha256: of an artifact, from its manifest; None of a base, whose weights are not read.
        query_prompt, document_prompt: what is put before a text of each role.
        languages: ISO 639 codes that the model's card states; empty where it states none.
        notes: anything out of the ordinary, remote code that is ignored for one.
        estimates: one a recipe, for a base; empty for an artifact.
        estimated_for: None for an artifact.
        manifest: of an artifact.
        kernels: how many linear layers run on which kernel of the torch backend, on the device
            that was asked for; None where this machine has none, and of other libraries' files.
    """

    schema_: Literal["gteopt.inspection/1"] = Field("gteopt.inspection/1", alias="schema")
    id: str
    revision: str | None = None
    sha256: str | None
    architecture: str
    family: str | None
    attention: str
    pooling: str
    normalised: bool
    start_token: str | None
    end_token: str | None
    query_prompt: str
    document_prompt: str
    dims: int
    matryoshka_dims: tuple[int, ...]
    max_tokens: int
    license: str | None
    languages: tuple[str, ...] = ()
    n_parameters: int
    published_scores: dict[str, float]
    notes: tuple[str, ...]
    estimates: tuple[RecipeEstimate, ...]
    estimated_for: EstimateConditions | None
    manifest: Manifest | None
    kernels: dict[str, int] | None = None
