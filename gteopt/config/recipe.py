"""Recipes: how to make one variant, from a YAML file to a frozen type.

Refuses to know: torch, models, what a recipe does to a tensor.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from gteopt.config.yaml_files import find_yaml, read_yaml
from gteopt.errors import InputError
from gteopt.frozen import Frozen

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[32, 64, 128, "per_channel"]
FormatName = Literal["gteopt", "gptq", "compressed-tensors", "bitsandbytes"]
"""How packed weights lie on disk: our own tensors, or those of a `quant_method` of transformers."""
FormatChoice = Literal["auto", "gteopt", "gptq", "compressed-tensors", "bitsandbytes"]
VectorCode = Literal["float32", "int8", "int4", "binary", "rabitq", "pq"]
CodeChoice = Literal["auto", "float32", "int8", "int4", "binary", "rabitq", "pq"]
CODES_BY_DIMS: tuple[VectorCode, ...] = ("float32", "int8", "int4", "binary", "rabitq")
"""Codes whose bytes follow from the dimensions; pq is given its bytes."""
DimsMethod = Literal["slice", "pca", "auto"]
NumberFormat = Literal["int", "e4m3", "nf4"]
"""What a code is: a whole number of steps; an 8-bit float of 4 exponent and 3 mantissa bits; the
place of a number among the 16 of NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, app. E)."""
TuneBy = Literal["auto", "model", "block"]
"""What is tuned at once: the whole model, or one block after the other."""
Effort = Literal["fast", "standard", "best"]
"""How much time a build may take for quality: the solver alone, or tuning behind it."""


class LayerScheme(Frozen):
    """How one linear layer's weights are stored and how its product is computed.

    Attributes:
        bits: bits a weight code.
        group_size: consecutive input features that share a scale; "per_channel" is all of them.
        symmetric: zero point fixed in the middle of the code range.
        activation_bits: 16 computes in the model's own dtype on dequantized weights; 8 quantizes
            each token's input to the weights' kind of number and multiplies those.
        activation_symmetric: false gives each token a zero point too, which inputs that lean to
            one side (those behind GELU above all) need.
        activation_static: inputs are rounded by scales and zero points that calibration fixed for
            each feature, instead of by each token's own range: faster, less close.
        activation_outliers: inputs of at least this size are multiplied in full precision, the rest
            in 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339).
        number_format: what weight and activation codes are.
        double_quantization: the scales too have 8 bits (QLoRA, Dettmers et al. 2023,
            arXiv:2305.14314, section 3), as the format bitsandbytes stores them.
    """

    bits: Bits
    group_size: GroupSize
    symmetric: bool
    activation_bits: Literal[8, 16] = 16
    activation_symmetric: bool = True
    activation_static: bool = False
    activation_outliers: Annotated[float, Field(gt=0)] | None = None
    number_format: NumberFormat = "int"
    double_quantization: bool = False

    @model_validator(mode="after")
    def _has_a_kernel(self) -> Self:
        rows = (self.bits, self.group_size, self.symmetric) == (8, "per_channel", True)
        if self.activation_bits == 8 and not rows:
            raise ValueError(
                "activation_bits: 8 needs bits: 8, group_size: per_channel, symmetric: true "
                "(an integer product has one scale per output channel)"
            )
        if self.number_format == "e4m3" and not rows:
            raise ValueError(
                "number_format: e4m3 needs bits: 8, group_size: per_channel, symmetric: true"
            )
        if self.number_format == "nf4":
            plain = (self.bits, self.symmetric, self.activation_bits) == (4, True, 16)
            if not plain or self.group_size not in (64, 128):
                raise ValueError(
                    "number_format: nf4 needs bits: 4, group_size: 64 or 128, symmetric: true"
                )
        if self.double_quantization and self.number_format != "nf4":
            raise ValueError("double_quantization: true needs number_format: nf4")
        if not self.activation_symmetric and (self.activation_bits, self.number_format) != (
            8,
            "int",
        ):
            raise ValueError(
                "activation_symmetric: false needs activation_bits: 8, number_format: int"
            )
        if self.activation_static and self.activation_symmetric:
            raise ValueError("activation_static: true needs activation_symmetric: false")
        if self.activation_outliers is not None and (
            (self.activation_bits, self.number_format, self.activation_symmetric)
            != (8, "int", True)
        ):
            raise ValueError(
                "activation_outliers needs activation_bits: 8, number_format: int, "
                "activation_symmetric: true"
            )
        return self


class NoWeights(Frozen):
    """Weights stay as they are.

    Attributes:
        method: "none".
    """

    method: Literal["none"] = "none"


class RtnWeights(Frozen):
    """Round to nearest: no calibration data, each weight to its closest code.

    Attributes:
        method: "rtn".
        scheme: how every layer is stored and computed.
        clip_search: search each group's range for the least error instead of min and max.
        fallback: for a layer whose input features the group size does not divide: refuse the
            build ("error"), use one group a row ("per_channel") or leave it unquantized ("skip").
        skip: shell patterns of layer names that stay unquantized.
    """

    method: Literal["rtn"]
    scheme: LayerScheme
    clip_search: bool = False
    fallback: Literal["error", "per_channel", "skip"] = "error"
    skip: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _needs_no_calibration(self) -> Self:
        if self.scheme.activation_static:
            raise ValueError("activation_static: true needs calibration texts; use method: gptq")
        return self


class GptqWeights(Frozen):
    """GPTQ, Frantar et al. 2022 (arXiv:2210.17323).

    Attributes:
        method: "gptq".
        scheme: how layers are stored and computed.
        act_order: quantize input features in order of falling Hessian diagonal.
        damping: share of the mean Hessian diagonal that is added to the diagonal.
        clip_search: search each group's range for the least error instead of min and max.
        fallback: for a layer whose input features the group size does not divide: refuse the
            build ("error"), use one group a row ("per_channel") or leave it unquantized ("skip").
        skip: shell patterns of layer names that stay unquantized.
        gptaq_strength: share of the error in a layer's inputs, left by the layers before it,
            that its weights make up for (GPTAQ, Li et al. 2025, arXiv:2504.02692);
            0 is GPTQ, which takes its inputs for the truth.
        effort: "fast" is the solver alone; "standard" and "best" tune its codes and scales, and
            the blocks' norms and biases, against the original.
        tune_by: "model" tunes end to end against the original's vectors, "block" each block by
            itself against what the original's gives out; "auto" is "model" up to 2 billion weights.
        budget: mean bits a weight, as stored, that all layers may take together; each layer then
            gets `scheme`, one of `choices`, or stays in 16 bits, so that the loss predicted from
            measurements of each layer alone is least. None gives all layers `scheme`.
        choices: further schemes; one that does not fit a layer's features is not offered to it.
        smooth: move outliers of 8-bit activations into the weights (SmoothQuant, Xiao et al. 2022,
            arXiv:2211.10438) wherever the architecture can absorb it and the measured error falls.
    """

    method: Literal["gptq"]
    scheme: LayerScheme
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    clip_search: bool = True
    fallback: Literal["error", "per_channel", "skip"] = "error"
    skip: tuple[str, ...] = ()
    gptaq_strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    effort: Effort = "fast"
    tune_by: TuneBy = "auto"
    smooth: bool = False
    budget: Annotated[float, Field(gt=0, le=16)] | None = None
    choices: tuple[LayerScheme, ...] = ()

    @model_validator(mode="after")
    def _fits_its_scheme(self) -> Self:
        if self.effort != "fast" and not self.can_be_tuned:
            raise ValueError(
                "layers with activation_bits: 8, number_format: e4m3 or "
                "double_quantization: true are not tuned; leave effort: fast"
            )
        if self.choices and self.budget is None:
            raise ValueError("choices are for a budget; give one, or leave them out")
        if any(each.activation_bits == 8 or each.number_format == "e4m3" for each in self._offered):
            raise ValueError("a budget chooses among schemes with activation_bits: 16, not e4m3")
        if any(each.double_quantization for each in self._offered):
            raise ValueError("a budget chooses among schemes without double_quantization")
        if self.smooth and (self.scheme.activation_bits != 8 or self.scheme.activation_static):
            raise ValueError(
                "smooth: true is for activation_bits: 8 without activation_static, whose inputs "
                "have a scale each already"
            )
        if self.scheme.activation_static and self.gptaq_strength:
            raise ValueError("activation_static: true is built with gptaq_strength: 0")
        return self

    @property
    def _offered(self) -> tuple[LayerScheme, ...]:
        return () if self.budget is None else (self.scheme, *self.choices)

    @property
    def can_be_tuned(self) -> bool:
        """Whether efforts above "fast" exist."""
        scheme = self.scheme
        return not (
            scheme.activation_bits == 8
            or scheme.number_format == "e4m3"
            or scheme.double_quantization
        )


Weights = Annotated[NoWeights | RtnWeights | GptqWeights, Field(discriminator="method")]


class Calibration(Frozen):
    """Which texts the build looks at.

    Attributes:
        texts: "builtin", a .jsonl, .csv or .txt file, or a data set `<org>/<name>`.
        column: field or column that holds the text (not for .txt and builtin).
        split: split of a data set.
        n_texts: how many are drawn at most, seeded.
        max_tokens: longer texts are cut here during calibration.
        seed: of the draw.
    """

    texts: str = "builtin"
    column: str = "text"
    split: str = "train"
    n_texts: Annotated[int, Field(ge=1)] = 512
    max_tokens: Annotated[int, Field(ge=8)] = 512
    seed: int = 0


class Dims(Frozen):
    """Shorten vectors to `n` dimensions.

    Attributes:
        n: how many are kept.
        method: the first ones ("slice"), the principal ones ("pca"), or whichever of the two keeps
            more neighbours, searched by their codes, on calibration texts that it was not fitted on
            ("auto"). For binary and int4 codes principal dimensions are rotated where that keeps
            more.
    """

    n: Annotated[int, Field(ge=1)]
    method: DimsMethod = "slice"


class Vectors(Frozen):
    """How a vector is stored in an index.

    Attributes:
        code: float32; one signed byte (int8), four bits (int4) or one bit (binary) a dimension;
            `bits` a dimension and two bytes (rabitq); a byte for each group of dimensions (pq).
            "auto", which is what `bytes` alone means, is whichever keeps the most neighbours.
        rescore: a search on int8 or binary codes fetches `rescore * k` candidates and reorders them
            with the float query; 1 keeps the order of the codes. Other codes are compared with the
            float query at once.
        bits: a dimension, of rabitq.
        centred: of binary: the mean of the calibration vectors is subtracted before signs are
            taken. It is what vectors need that all lie in a narrow cone.
        bytes: of a stored vector. Dimensions, code and rescoring are then chosen together, by the
            nearest neighbours that held-out calibration texts keep.
    """

    code: CodeChoice = "float32"
    rescore: Annotated[int, Field(ge=1)] = 4
    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    centred: bool = False
    bytes: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _bytes_alone_choose_the_code(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("bytes") is not None and "code" not in content:
            return {**content, "code": "auto"}
        return content

    @model_validator(mode="after")
    def _settings_fit_the_code(self) -> Self:
        if self.bytes is not None and self.code not in ("auto", "pq"):
            raise ValueError(
                f"bytes is for code: auto or pq; the bytes of {self.code} follow from dims.n"
            )
        if self.bytes is None and self.code in ("auto", "pq"):
            raise ValueError(f"code: {self.code} needs bytes, such as bytes: 48")
        if self.bits is not None and self.code != "rabitq":
            raise ValueError("bits is for code: rabitq")
        if self.centred and self.code != "binary":
            raise ValueError("centred is for code: binary")
        return self


class Recipe(Frozen):
    """How to make one variant of a base.

    Attributes:
        name: must equal the file's name; small letters, digits, dots, hyphens, underscores.
        summary: one line for tables.
        weights: what happens to the linear layers' weights.
        calibration: which texts the build looks at.
        dims: shortens vectors; none keeps all dimensions.
        vectors: how vectors are stored.
        embedding: "int8" keeps the token embedding table in 8 bits with one scale a token; no
            standard format can hold that.
        format: how quantized weights lie on disk; "auto" takes the first standard format that can
            hold them exactly, which other libraries open without gteopt.
    """

    schema_: Literal["gteopt.recipe/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    summary: str = ""
    weights: Weights = NoWeights()
    embedding: Literal["full", "int8"] = "full"
    format: FormatChoice = "auto"
    calibration: Calibration = Calibration()
    dims: Dims | None = None
    vectors: Vectors = Vectors()

    @model_validator(mode="after")
    def _bytes_choose_dims_too(self) -> Self:
        if self.vectors.bytes is not None and self.dims is not None:
            raise ValueError("vectors.bytes chooses the dimensions too; leave dims out")
        return self

    @model_validator(mode="after")
    def _a_format_needs_packed_weights(self) -> Self:
        if self.format != "auto" and self.weights.method == "none":
            raise ValueError(
                f"format: {self.format} is for quantized weights; weights.method is none"
            )
        if self.embedding == "int8" and self.weights.method == "none":
            raise ValueError("embedding: int8 goes with quantized weights; weights.method is none")
        if self.embedding == "int8" and self.format not in ("auto", "gteopt"):
            raise ValueError(f"embedding: int8 needs format: gteopt or auto (found {self.format})")
        return self

    def with_int8_embedding(self) -> Recipe:
        """The same recipe with the token embedding table in int8.

        Raises:
            InputError: the recipe leaves weights as they are, or asks for another format.
        """
        return self._with("embedding", "int8")

    def with_format(self, format: FormatChoice) -> Recipe:
        """The same recipe with its quantized weights in another format on disk.

        Raises:
            InputError: the recipe leaves weights as they are, or only gteopt's own can hold them.
        """
        return self._with("format", format)

    def with_effort(self, effort: Effort) -> Recipe:
        """The same recipe at another effort.

        Raises:
            InputError: the recipe's method has no efforts to choose from.
        """
        if not isinstance(self.weights, GptqWeights):
            raise InputError(
                f"recipe {self.name} has no effort to choose: only weights.method gptq is tuned "
                f"(found {self.weights.method})"
            )
        if effort != "fast" and not self.weights.can_be_tuned:
            raise InputError(
                f"recipe {self.name} has no effort to choose: layers with 8-bit activations, "
                f"8-bit floats or doubly quantized scales are not tuned"
            )
        return self.model_copy(
            update={"weights": self.weights.model_copy(update={"effort": effort})}
        )

    def _with(self, field: str, value: str) -> Recipe:
        try:
            return Recipe.model_validate({**self.model_dump(by_alias=True), field: value})
        except ValidationError as error:
            reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise InputError(f"recipe {self.name}: {reason}") from error

    def sha256(self) -> str:
        """Hash of everything that decides the artifact's tensors (name and summary do not)."""
        return _sha256(self.model_dump(mode="json", exclude={"name", "summary", "schema_"}))

    def weights_sha256(self) -> str:
        """Hash of what decides the weights alone; recipes that share it share one build."""
        include = {"weights", "embedding", "format"}
        if self.weights.method == "gptq":
            include.add("calibration")
        return _sha256(self.model_dump(mode="json", include=include))


def load_recipe(name_or_file: str, *, beside: Path | None = None) -> Recipe:
    """A shipped recipe by name, or one from a YAML file."""
    return read_yaml(find_yaml("recipes", name_or_file, beside=beside), Recipe)


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
