"""The record of `gteopt inspect`: facts of a model, and estimates for recipes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.config.engines import Engine
from gteopt.config.recipe import FormatName
from gteopt.frozen import Frozen
from gteopt.records.manifest import Manifest


class RecipeEstimate(Frozen):
    """Estimates for a recipe on a base, computed from shapes alone.

    Attributes:
        weight_bytes: bytes of the variant's transformer, on disk and in memory.
        build_bytes: most host memory that the build needs, beyond the Python process.
        device_bytes: most GPU memory that the build needs, beyond CUDA's own; None on a CPU.
        disk_bytes: most disk space that the build needs, the artifact included.
        bytes_per_vector: bytes of one stored vector.
        build_s: seconds of the build without imports, to within a factor of about two.
        format: checkpoint format of the packed weights; None where no layer is quantized.
        engines: engines that open the variant; see `config.engines`.
        n_tokens: calibration tokens, padding included; None where no texts are read.
        warning: a drawback of a recipe that can be built; None where there is none.
        problem: why this recipe cannot be built from this base; None where it can be built.
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
    """Conditions of estimates; see the options of `quantize` with the same names."""

    dtype: str
    device: str
    activation_bytes: int


class Inspection(Frozen):
    """Facts of a base or an artifact, as `inspect` shows them.

    Attributes:
        revision: commit of a model on the Hub.
        sha256: hash of an artifact, from its manifest; None for a base, whose weights are not read.
        query_prompt, document_prompt: texts that are put before queries and documents.
        languages: ISO 639 codes on the model's card; empty where it states none.
        notes: unusual facts, such as remote code that is ignored.
        estimates: one for each recipe for a base; empty for an artifact.
        estimated_for: conditions of the estimates; None for an artifact.
        manifest: manifest of an artifact; None for a base.
        engines: engines that open an artifact; each estimate for a base has its own.
        kernels: number of linear layers by kernel of the torch backend, on the requested device.
            None where this machine lacks the device, and for other libraries' files.
        backend: the fastest backend on this machine; None if it was not asked for.
        backend_reason: why it is the fastest.
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
    engines: tuple[Engine, ...] = ()
    kernels: dict[str, int] | None = None
    backend: str | None = None
    backend_reason: str | None = None
