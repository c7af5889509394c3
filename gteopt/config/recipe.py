"""Recipes: how to make one variant, from a YAML file to a frozen type.

Refuses to know: torch, models, how a recipe changes a tensor.
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
"""How packed weights are stored: as gteopt's tensors, or for a `quant_method` of transformers."""
FormatChoice = Literal["auto", "gteopt", "gptq", "compressed-tensors", "bitsandbytes"]
VectorCode = Literal["float32", "int8", "int4", "binary", "rabitq", "pq"]
CodeChoice = Literal["auto", "float32", "int8", "int4", "binary", "rabitq", "pq"]
CODES_BY_DIMS: tuple[VectorCode, ...] = ("float32", "int8", "int4", "binary", "rabitq")
"""Codes whose bytes follow from the dimensions; pq takes its bytes from the recipe."""
DimsMethod = Literal["slice", "pca", "auto"]
NumberFormat = Literal["int", "e4m3", "nf4"]
"""What a code stands for.

"int" is a whole number of steps. "e4m3" is an 8-bit float with 4 exponent and 3 mantissa bits.
"nf4" is an index into the 16 numbers of NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314,
appendix E).
"""
TuneBy = Literal["auto", "model", "block"]
"""What is tuned together: the whole model, or each block in turn."""
Effort = Literal["fast", "standard", "best"]
"""How much time a build spends on quality: the solver alone, or tuning after it."""


class LayerScheme(Frozen):
    """How one linear layer's weights are stored and how its product is computed.

    Attributes:
        bits: bits of a weight code.
        group_size: consecutive input features that share a scale; "per_channel" is all of them.
        symmetric: the zero point is fixed in the middle of the code range.
        activation_bits: 16 multiplies dequantized weights in the model's dtype. 8 quantizes each
            token's input to the weights' number format and multiplies codes.
        activation_symmetric: false gives each token a zero point too. Inputs that are not centred
            on zero, such as the output of GELU, need it.
        activation_static: inputs are rounded by scales and zero points that calibration fixed for
            each feature, instead of by each token's range. This is faster and less accurate.
        activation_outliers: inputs of at least this size are multiplied in full precision, the rest
            in 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339).
        number_format: what weight and activation codes stand for.
        double_quantization: scales are stored in 8 bits too (QLoRA, Dettmers et al. 2023,
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
        is_8_bit_row = (self.bits, self.group_size, self.symmetric) == (8, "per_channel", True)
        if self.activation_bits == 8 and not is_8_bit_row:
            raise ValueError(
                "activation_bits: 8 needs bits: 8, group_size: per_channel, symmetric: true "
                "(an integer product has one scale per output channel)"
            )
        if self.number_format == "e4m3" and not is_8_bit_row:
            raise ValueError(
                "number_format: e4m3 needs bits: 8, group_size: per_channel, symmetric: true"
            )
        if self.number_format == "nf4":
            is_4_bit = (self.bits, self.symmetric, self.activation_bits) == (4, True, 16)
            if not is_4_bit or self.group_size not in (64, 128):
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
    """Weights are not quantized.

    Attributes:
        method: "none".
    """

    method: Literal["none"] = "none"


class RtnWeights(Frozen):
    """Round each weight to its nearest code, without calibration texts.

    Attributes:
        method: "rtn".
        scheme: how every layer is stored and computed.
        clip_search: choose each group's range for the least error, instead of min and max.
        fallback: for layers whose input features the group size does not divide. "error" refuses
            the build, "per_channel" uses one group a row, "skip" leaves them unquantized.
        skip: shell patterns of the names of layers to leave unquantized.
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
        clip_search: choose each group's range for the least error, instead of min and max.
        fallback: for layers whose input features the group size does not divide. "error" refuses
            the build, "per_channel" uses one group a row, "skip" leaves them unquantized.
        skip: shell patterns of the names of layers to leave unquantized.
        gptaq_strength: share of the input error from earlier layers that a layer corrects (GPTAQ,
            Li et al. 2025, arXiv:2504.02692). 0 is GPTQ, which assumes exact inputs.
        row_feedback: share of the correlations between gradients of outputs by which rows of a
            weight correct each other (Tseng et al. 2025, arXiv:2505.22988). 0 is GPTQ, whose rows
            are independent. It is not used above 2 billion quantized weights, nor by efforts that
            tune, which it does not bring closer.
        effort: "fast" runs the solver alone. "standard" and "best" then tune codes, scales, and the
            blocks' norms and biases against the original model.
        tune_by: "model" tunes end to end against the original's vectors. "block" tunes each block
            against the original block's output. "auto" is "model" up to 2 billion weights.
        budget: mean stored bits per weight over all layers. Each layer gets `scheme`, one of
            `choices` or 16 bits, so that the predicted loss is least. All layers get `scheme` when
            left out.
        choices: further schemes for a budget; a layer is offered only those that fit its features.
        smooth: move outliers of 8-bit activations into the weights (SmoothQuant, Xiao et al. 2022,
            arXiv:2211.10438), where the architecture allows it and the measured error falls.
    """

    method: Literal["gptq"]
    scheme: LayerScheme
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    clip_search: bool = True
    fallback: Literal["error", "per_channel", "skip"] = "error"
    skip: tuple[str, ...] = ()
    gptaq_strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    row_feedback: Annotated[float, Field(ge=0, lt=1)] = 0.0
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
            raise ValueError("choices need a budget; give a budget, or leave out choices")
        if any(s.activation_bits == 8 or s.number_format == "e4m3" for s in self._offered):
            raise ValueError("a budget chooses among schemes with activation_bits: 16, not e4m3")
        if any(scheme.double_quantization for scheme in self._offered):
            raise ValueError("a budget chooses among schemes without double_quantization")
        if self.smooth and (self.scheme.activation_bits != 8 or self.scheme.activation_static):
            raise ValueError(
                "smooth: true needs activation_bits: 8 and activation_static: false (static inputs "
                "already have a scale for each feature)"
            )
        if self.smooth and self.row_feedback:
            raise ValueError("smooth: true needs row_feedback: 0 (smoothing scales outputs)")
        if self.scheme.activation_static and self.gptaq_strength:
            raise ValueError("activation_static: true needs gptaq_strength: 0")
        return self

    @property
    def _offered(self) -> tuple[LayerScheme, ...]:
        return () if self.budget is None else (self.scheme, *self.choices)

    @property
    def can_be_tuned(self) -> bool:
        """Whether the recipe allows an effort above "fast"."""
        scheme = self.scheme
        return not (
            scheme.activation_bits == 8
            or scheme.number_format == "e4m3"
            or scheme.double_quantization
        )


Weights = Annotated[NoWeights | RtnWeights | GptqWeights, Field(discriminator="method")]


class Calibration(Frozen):
    """The texts that a build calibrates on.

    Attributes:
        texts: "builtin", a .jsonl, .csv or .txt file, or a data set `<org>/<name>`.
        column: field or column that holds the text (not for .txt and builtin).
        split: split of a data set.
        n_texts: largest number of texts, drawn at random.
        max_tokens: longer texts are cut to this length for calibration.
        seed: random seed of the draw.
        random_texts: number of texts of random tokens, which layers see beside the others. They
            stand for languages and scripts that no text is in. None means 48 for the method
            "gptq", else 0.
    """

    texts: str = "builtin"
    column: str = "text"
    split: str = "train"
    n_texts: Annotated[int, Field(ge=1)] = 512
    max_tokens: Annotated[int, Field(ge=8)] = 512
    seed: int = 0
    random_texts: Annotated[int, Field(ge=0)] | None = None


class Dims(Frozen):
    """Shorten vectors to `n` dimensions.

    Attributes:
        n: number of dimensions to keep.
        method: "slice" keeps the first dimensions, "pca" the principal ones. "auto" takes the one
            that keeps more nearest neighbours on held-out calibration texts, as stored. For binary
            and int4 codes, principal dimensions are rotated where that keeps more neighbours.
    """

    n: Annotated[int, Field(ge=1)]
    method: DimsMethod = "slice"


class Vectors(Frozen):
    """How a vector is stored in an index.

    Attributes:
        code: "float32"; per dimension one byte ("int8"), four bits ("int4") or one bit ("binary");
            `bits` per dimension plus two bytes per vector ("rabitq"); a byte per group of
            dimensions ("pq"). "auto", the default with `bytes`, keeps the most neighbours.
        rescore: a search on int8 or binary codes fetches `rescore * k` candidates and reorders them
            by the float query; 1 keeps the order of the codes. Other codes are compared with the
            float query directly.
        bits: bits per dimension, for rabitq.
        centred: for binary, subtract the mean of the calibration vectors before taking signs.
            Vectors that all lie in a narrow cone need it.
        bytes: bytes of a stored vector. Dimensions, code and rescoring are then chosen together, so
            that held-out calibration texts keep the most nearest neighbours.
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
                f"bytes needs code: auto or pq; the bytes of {self.code} follow from dims.n"
            )
        if self.bytes is None and self.code in ("auto", "pq"):
            raise ValueError(f"code: {self.code} needs bytes, such as bytes: 48")
        if self.bits is not None and self.code != "rabitq":
            raise ValueError("bits needs code: rabitq")
        if self.centred and self.code != "binary":
            raise ValueError("centred needs code: binary")
        return self


class Recipe(Frozen):
    """How to make one variant of a base.

    Attributes:
        name: small letters, digits, dots, hyphens, underscores.
        summary: one line for tables.
        weights: how the weights of linear layers are quantized.
        calibration: the texts that the build calibrates on.
        dims: shortens vectors; all dimensions are kept when left out.
        vectors: how vectors are stored.
        embedding: "int8" stores the token embedding table in 8 bits with a scale per token; no
            standard format supports that.
        format: how quantized weights are stored. "auto" takes the first standard format that holds
            them exactly; other libraries open it without gteopt.

    Example:
        >>> from gteopt.config.recipe import load_recipe
        >>> load_recipe("gptq-int4").with_effort("standard").weights.effort
        'standard'
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
                f"format: {self.format} needs quantized weights; weights.method is none"
            )
        if self.embedding == "int8" and self.weights.method == "none":
            raise ValueError("embedding: int8 needs quantized weights; weights.method is none")
        if self.embedding == "int8" and self.format not in ("auto", "gteopt"):
            raise ValueError(f"embedding: int8 needs format: gteopt or auto (found {self.format})")
        return self

    def with_int8_embedding(self) -> Recipe:
        """The same recipe with the token embedding table in int8.

        Raises:
            InputError: the recipe does not quantize weights, or asks for another format.
        """
        return self._with("embedding", "int8")

    def with_format(self, format: FormatChoice) -> Recipe:
        """The same recipe with its quantized weights in another checkpoint format.

        Raises:
            InputError: the recipe does not quantize weights, or only the format gteopt holds them.
        """
        return self._with("format", format)

    def with_effort(self, effort: Effort) -> Recipe:
        """The same recipe at another effort.

        Raises:
            InputError: the recipe's method has no efforts to choose from.
        """
        if not isinstance(self.weights, GptqWeights):
            raise InputError(
                f"recipe {self.name} does not support effort: only weights.method gptq is tuned "
                f"(found {self.weights.method})"
            )
        if effort != "fast" and not self.weights.can_be_tuned:
            raise InputError(
                f"recipe {self.name} does not support effort: layers with 8-bit activations, 8-bit "
                f"floats or double quantization are not tuned"
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
        """Hash of everything that the artifact's tensors depend on; not of name and summary."""
        return _sha256(self.model_dump(mode="json", exclude={"name", "summary", "schema_"}))

    def weights_sha256(self) -> str:
        """Hash of what the weights alone depend on; recipes with equal hashes share one build."""
        include = {"weights", "embedding", "format"}
        if self.weights.method == "gptq":
            include.add("calibration")
        return _sha256(self.model_dump(mode="json", include=include))


def load_recipe(name_or_file: str, *, beside: Path | None = None) -> Recipe:
    """A shipped recipe by name, or one from a YAML file."""
    return read_yaml(find_yaml("recipes", name_or_file, beside=beside), Recipe)


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
