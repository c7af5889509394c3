"""`gteopt.json`: everything that an artifact says of itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gteopt.config.recipe import FormatName, LayerScheme, Recipe, VectorCode
from gteopt.frozen import Frozen
from gteopt.records.canary import CanaryRecord
from gteopt.records.environment import Conditions, Machine


class BaseRecord(Frozen):
    """The source model.

    Attributes:
        id: what the user named it by: Hub id, folder name or "nano".
        family: row of the family table.
        revision: commit of a Hub download, where known.
        sha256: hash over the base's weight, config and tokenizer files.
        dims: full embedding dimension.
        n_parameters: all parameters of the transformer.
        weight_bytes: of the transformer in `dtype`.
        license: as its model card states it.
        matryoshka_dims: lengths that its vectors were trained to be cut to, longest first; empty
            where it was not trained so.
    """

    id: str
    family: str
    revision: str | None
    sha256: str
    dims: int
    n_parameters: int
    dtype: str
    weight_bytes: int
    license: str | None
    matryoshka_dims: tuple[int, ...]


class CalibrationRecord(Frozen):
    """The texts that a build looked at; `sha256` covers texts, roles, instructions and order.

    Attributes:
        n_cut: texts that were longer than `max_tokens`.
    """

    source: str
    n_texts: int
    n_tokens: int
    max_tokens: int
    n_cut: int
    seed: int
    sha256: str


class SmoothingRecord(Frozen):
    """What smoothing did to a layer's inputs; strength 0 where it did not pay.

    Attributes:
        strength: share of the outliers' size that went into the weights, 0 to 1.
        error_before: relative squared output error, summed over the layers that read the same
            inputs, with weights rounded to nearest and no smoothing.
        error_after: the same with it.
    """

    strength: float
    error_before: float
    error_after: float


class LayerRecord(Frozen):
    """One quantized linear layer.

    Attributes:
        method: how its codes were found.
        bits_per_weight: as stored, scales and zero points included.
        weight_snr_db: 10 log10(|W|^2 / |W - Wq|^2).
        output_snr_db: 10 log10(|XW|^2 / |X(W - Wq)|^2) on the calibration tokens, where measured;
            W is what the solver was given; with GPTAQ it is not the base's own weight.
        smoothing: of the inputs; None where the recipe or the architecture has none.
        note: anything out of the ordinary: a fallback, raised damping, dead input features.
    """

    name: str
    out_features: int
    in_features: int
    method: str
    scheme: LayerScheme
    bits_per_weight: float
    weight_snr_db: float
    output_snr_db: float | None = None
    smoothing: SmoothingRecord | None = None
    note: str | None = None


class AllocationRecord(Frozen):
    """Which scheme each layer got under a budget, and why.

    Attributes:
        budget: mean bits a weight that were allowed.
        bits_per_weight: mean bits a weight that the choice takes; 16-bit layers counted in.
        predicted_loss: sum of the chosen schemes' losses.
        schemes: what was tried.
        losses: by layer, the mean cosine distance to the base's vectors with this layer alone
            rounded to each of `schemes`; None where a scheme does not fit the layer.
        found_by: "runs" through all later blocks, or "gradients" of the vectors, to first order.
    """

    budget: float
    bits_per_weight: float
    predicted_loss: float
    schemes: tuple[LayerScheme, ...]
    losses: dict[str, tuple[float | None, ...]]
    found_by: Literal["runs", "gradients"] = "runs"


class TuningRecord(Frozen):
    """What tuning after the solver did.

    Attributes:
        by: what was tuned at once.
        n_steps: batches; of each block where it was tuned by itself.
        error_before: how far what the solver left is from the original on the calibration texts:
            by "model", 1 - the mean cosine of the vectors; by "block", the mean over blocks and
            tokens of texts that the block was not tuned on of the squared distance of its output,
            relative to the original's.
        error_after: the same after tuning; equal where tuning was thrown away.
        codes_changed: share of the codes that are others than the solver's.
    """

    by: Literal["model", "block"]
    n_steps: int
    error_before: float
    error_after: float
    codes_changed: float


class UnquantizedRecord(Frozen):
    """One group of parameters left in full precision, and why."""

    name: str
    n_parameters: int
    reason: str


EXPERTS = "experts in one tensor"
"""How the reason of experts that stay as they are begins."""


Similarity = Literal["cosine", "dot"]
"""How stored vectors are compared: unit rows by their cosine; rows that keep the length that
shortening left them by their dot product, whose ranking is closer to that of the full vectors."""


class CodeTrial(Frozen):
    """One way to store a vector that was tried for a number of bytes.

    Attributes:
        neighbours_kept: share of nearest neighbours in full dimension, as in `VectorRecord`.
    """

    method: Literal["full", "slice", "pca"]
    dims: int
    rotated: bool
    similarity: Similarity
    code: VectorCode
    bits: int | None
    centred: bool
    rescore: int
    bytes_per_vector: int
    neighbours_kept: float


class VectorRecord(Frozen):
    """What happens to an embedding after the model; the tensors lie in vectors.safetensors.

    Attributes:
        dims: dimensions after projection.
        method: "full", "slice" or "pca".
        rotated: whether the kept dimensions were rotated so that their code keeps more of them.
        similarity: how the vectors are compared.
        neighbours_kept: the share of the nearest neighbours in full dimension (one of a hundred
            vectors) that remain with each of "slice", "pca" and "pca rotated" that was tried,
            searched as stored and rescored, on calibration texts held out from the fit, a quarter
            at a time; None where nothing was chosen by it.
        trials: all that was tried for `vectors.bytes`, best first; the first is what is stored.
        explained_variance_ratio: share of the calibration vectors' variance that is kept.
        bits: a dimension, of rabitq.
        centred: of binary: the mean is subtracted before signs are taken.
        bytes_per_vector: of one stored code.
    """

    dims: int
    method: Literal["full", "slice", "pca"]
    explained_variance_ratio: float | None = None
    rotated: bool = False
    similarity: Similarity = "cosine"
    neighbours_kept: dict[str, float] | None = None
    trials: tuple[CodeTrial, ...] = ()
    code: VectorCode = "float32"
    bits: int | None = None
    centred: bool = False
    rescore: int = 1
    bytes_per_vector: int

    def still_trained(self, lengths: Iterable[int]) -> tuple[int, ...]:
        """Those of the base's Matryoshka lengths that these vectors can still be cut to.

        A slice keeps the shorter ones; a PCA's dimensions are others than the trained ones.
        """
        kept = self.method != "pca" and not self.rotated
        return tuple(n for n in lengths if n <= self.dims) if kept else ()


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0]:
        raise ValueError(f"'{path}' leads out of the artifact")
    return path


class FileRecord(Frozen):
    """One file of an artifact; `path` is relative, with forward slashes, and leads into it.

    A manifest may come from anywhere, and its paths are read, copied and, after a failed download,
    removed.
    """

    path: Annotated[str, AfterValidator(_inside)]
    n_bytes: int
    sha256: str


class Manifest(Frozen):
    """`gteopt.json`: what an artifact is and how it came to be. Specified in artifacts/README.md.

    It holds no time and no path, so that the same build gives the same bytes.

    Attributes:
        format: how the layers' packed weights lie on disk; None when no layer is quantized.
        embedding: the token embedding table, a row a token; None where it is not quantized.
        allocation: how bits were chosen by layer; None without a budget.
        tuning: what was learned after the solver; None at effort fast.
        canary: a text and its vector, which `serve` compares with what it computes; None in older
            artifacts.
        published_from: in a published folder, the hash of the artifact that it was made from, which
            differs from it in README.md only; None in an artifact as it was built.
    """

    schema_: Literal["gteopt.artifact/1"] = Field(default="gteopt.artifact/1", alias="schema")
    recipe: Recipe
    recipe_sha256: str
    base: BaseRecord
    calibration: CalibrationRecord | None
    layers: tuple[LayerRecord, ...]
    embedding: LayerRecord | None = None
    allocation: AllocationRecord | None = None
    tuning: TuningRecord | None = None
    format: FormatName | None = None
    unquantized: tuple[UnquantizedRecord, ...]
    vectors: VectorRecord
    weight_bytes: int
    canary: CanaryRecord | None = None
    files: tuple[FileRecord, ...]
    versions: Conditions
    machine: Machine
    published_from: str | None = None

    @property
    def expert_share(self) -> float:
        """Share of the base's weights that are experts and stay as they are."""
        stay = sum(e.n_parameters for e in self.unquantized if e.reason.startswith(EXPERTS))
        return stay / self.base.n_parameters
