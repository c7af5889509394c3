"""`gteopt.json`: an artifact's description of itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gteopt.config.recipe import FormatName, LayerScheme, Recipe, VectorCode
from gteopt.frozen import Frozen
from gteopt.records.canary import CanaryRecord
from gteopt.records.environment import Conditions, MachineRecord


class BaseRecord(Frozen):
    """The source model.

    Attributes:
        id: the name that the user gave: Hub id, folder name or "nano".
        family: model family, a row of the family table.
        revision: commit of a Hub download; None where it is not known.
        sha256: hash over the base's weight, config and tokenizer files.
        dims: full embedding dimension.
        n_parameters: all parameters of the transformer.
        weight_bytes: bytes of the transformer in `dtype`.
        license: license on its model card.
        matryoshka_dims: dimensions that its vectors were trained to be cut to, longest first; empty
            without Matryoshka training.
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
    """The calibration texts of a build; `sha256` covers texts, roles, instructions and order.

    Attributes:
        n_random: number of texts of random tokens, which `n_texts` does not count.
        n_cut: texts that were cut because they were longer than `max_tokens`.
    """

    source: str
    n_texts: int
    n_random: int
    n_tokens: int
    max_tokens: int
    n_cut: int
    seed: int
    sha256: str


class SmoothingRecord(Frozen):
    """Smoothing of a layer's inputs; strength 0 where smoothing did not reduce the error.

    Attributes:
        strength: share of the outliers' magnitude that was moved into the weights, 0 to 1.
        error_before: relative squared output error without smoothing, with weights rounded to
            nearest, summed over the layers that read the same inputs.
        error_after: the same error with smoothing.
    """

    strength: float
    error_before: float
    error_after: float


class LayerRecord(Frozen):
    """One quantized linear layer.

    Attributes:
        method: method that chose its codes.
        bits_per_weight: stored bits, scales and zero points included.
        weight_snr_db: 10 log10(|W|^2 / |W - Wq|^2).
        output_snr_db: 10 log10(|XW|^2 / |X(W - Wq)|^2) on the calibration tokens, where measured. W
            is the solver's input, which differs from the base's weight with GPTAQ. Row feedback
            lowers it, and brings vectors closer.
        smoothing: smoothing of its inputs; None where the recipe or the architecture has none.
        note: unusual events, such as a fallback, raised damping or dead input features.
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
    """The scheme of each layer under a budget, and the losses behind the choice.

    Attributes:
        budget: allowed mean bits per weight.
        bits_per_weight: mean bits per weight of the choice, 16-bit layers included.
        predicted_loss: sum of the chosen schemes' losses.
        schemes: the schemes to choose from.
        losses: by layer, the mean cosine distance to the base's vectors with only this layer
            rounded, for each of `schemes`; None where a scheme does not fit the layer.
        found_by: how losses were computed: "runs" through all later blocks, or a first-order
            estimate from "gradients" of the vectors.
    """

    budget: float
    bits_per_weight: float
    predicted_loss: float
    schemes: tuple[LayerScheme, ...]
    losses: dict[str, tuple[float | None, ...]]
    found_by: Literal["runs", "gradients"] = "runs"


class TuningRecord(Frozen):
    """Result of tuning after the solver.

    Attributes:
        by: what was tuned together.
        n_steps: training batches; for "block", the batches of each block.
        error_before: error of the solver's result on the calibration texts. For "model", 1 - mean
            cosine with the original's vectors. For "block", the squared distance of each block's
            output relative to the original's, averaged over blocks and tokens of held-out texts.
        error_after: the same error after tuning; equal where tuning was discarded.
        codes_changed: share of codes that differ from the solver's.
    """

    by: Literal["model", "block"]
    n_steps: int
    error_before: float
    error_after: float
    codes_changed: float


class UnquantizedRecord(Frozen):
    """A group of parameters that is left in full precision, and why."""

    name: str
    n_parameters: int
    reason: str


EXPERTS = "experts in one tensor"
"""The start of the reason for experts that are not quantized."""
Similarity = Literal["cosine", "dot"]
"""How stored vectors are compared.

Unit vectors are compared by cosine. Shortened vectors that are not normalised again are compared by
dot product, which ranks more like the full vectors.
"""


class CodeTrial(Frozen):
    """One way to store a vector in a given number of bytes, with its measured quality.

    Attributes:
        neighbours_kept: share of nearest neighbours kept, as in `VectorRecord`.
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
    """What happens to a vector after the model; the tensors are in vectors.safetensors.

    Attributes:
        dims: dimensions after projection.
        method: "full", "slice" or "pca".
        rotated: whether the kept dimensions were rotated so that their code keeps more neighbours.
        similarity: how the vectors are compared.
        neighbours_kept: share of nearest neighbours (1 % of the texts, in full dimensions) that
            stay, by tried method: "slice", "pca" or "pca rotated". Vectors are searched as stored,
            on held-out quarters of the calibration texts. None where no method was chosen so.
        trials: all trials for `vectors.bytes`, best first; the first is what is stored.
        explained_variance_ratio: share of the calibration vectors' variance that is kept.
        bits: bits per dimension, for rabitq.
        centred: for binary, whether the mean is subtracted before signs are taken.
        bytes_per_vector: bytes of one stored vector.
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
        """The base's Matryoshka dimensions that these vectors can still be cut to.

        A slice can be cut to shorter ones. PCA and rotation mix the dimensions, so none remain.
        """
        kept = self.method != "pca" and not self.rotated
        return tuple(n for n in lengths if n <= self.dims) if kept else ()


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0]:
        raise ValueError(f"path '{path}' is not inside the artifact")
    return path


class FileRecord(Frozen):
    """One file of an artifact; `path` is relative, with forward slashes, inside the artifact.

    Paths are checked because a manifest may come from an untrusted source. Its files are read,
    copied and, after a failed download, removed.
    """

    path: Annotated[str, AfterValidator(_inside)]
    n_bytes: int
    sha256: str


class Manifest(Frozen):
    """`gteopt.json`: what an artifact is and how it was made. Specified in artifacts/README.md.

    It holds no time and no path, so that the same build gives the same bytes.

    Attributes:
        format: checkpoint format of the packed weights; None where no layer is quantized.
        embedding: the token embedding table, a row per token; None where it is not quantized.
        allocation: how bits were chosen by layer; None without a budget.
        tuning: result of tuning after the solver; None at effort fast.
        canary: a text and its vector; `serve` encodes the text again and compares. None in older
            artifacts.
        published_from: hash of the artifact that a published folder was made from; the two differ
            only in README.md. None in an artifact that was not published.
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
    machine: MachineRecord
    published_from: str | None = None

    @property
    def expert_share(self) -> float:
        """Share of the base's parameters that are experts and not quantized."""
        n_in_experts = sum(
            group.n_parameters for group in self.unquantized if group.reason.startswith(EXPERTS)
        )
        return n_in_experts / self.base.n_parameters
