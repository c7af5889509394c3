"""Recipes, plans and policies: YAML in, frozen types out.

Hides: where shipped files lie, how YAML is read, how validation problems are worded (all of a file
at once, each with its line). Refuses to know: torch, models, what a recipe does to a tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from gteopt.errors import InputError, join_problems, suggest

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[32, 64, 128, "row"]
Layout = Literal["gteopt", "gptq", "compressed-tensors", "bitsandbytes"]
"""How packed weights lie on disk: our own tensors, or those of a `quant_method` of transformers."""
LayoutChoice = Literal["auto", "gteopt", "gptq", "compressed-tensors", "bitsandbytes"]
VectorCode = Literal["float32", "int8", "binary"]
DimsMethod = Literal["slice", "pca", "auto"]
Element = Literal["int", "e4m3", "nf4"]
"""What a code is: a whole number of steps; an 8-bit float of 4 exponent and 3 mantissa bits; the
place of a number among the 16 of NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, app. E)."""
TuneBy = Literal["auto", "model", "block"]
"""What is tuned at once: the whole model, or one block after the other."""
Effort = Literal["fast", "standard", "best"]
"""How much time a build may take for quality: the solver alone, or tuning behind it."""
DEFAULT_MARGIN = 0.01
"""One point of a score that is shown in per cent."""
Metric = Literal[
    "retention",
    "retention_low",
    "mean_cosine",
    "neighbour_overlap",
    "spearman",
    "weight_bytes",
    "peak_memory_bytes",
    "p95_ms",
    "tokens_per_s",
    "index_bytes",
    "cost_per_million_tokens",
]
HIGHER_IS_BETTER: frozenset[str] = frozenset(
    {"retention", "retention_low", "mean_cosine", "neighbour_overlap", "spearman", "tokens_per_s"}
)

METRIC_WORDS: dict[Metric, str] = {
    "retention": "retention",
    "retention_low": "lower end of retention's 95 % interval",
    "mean_cosine": "mean cosine",
    "neighbour_overlap": "neighbour overlap",
    "spearman": "Spearman correlation",
    "weight_bytes": "weight size",
    "peak_memory_bytes": "peak memory",
    "p95_ms": "p95 latency",
    "tokens_per_s": "throughput",
    "index_bytes": "index size per million vectors",
    "cost_per_million_tokens": "cost per million tokens",
}

_EVALUATE, _BENCH = "`gteopt evaluate --out` does", "`gteopt bench --out` does"
METRIC_SOURCES: dict[Metric, str] = {
    "retention": _EVALUATE,
    "retention_low": f"{_EVALUATE} where every task has an interval",
    "mean_cosine": _EVALUATE,
    "neighbour_overlap": _EVALUATE,
    "spearman": _EVALUATE,
    "weight_bytes": _BENCH,
    "peak_memory_bytes": _BENCH,
    "p95_ms": _BENCH,
    "tokens_per_s": _BENCH,
    "index_bytes": _BENCH,
    "cost_per_million_tokens": "`gteopt bench --price-per-hour --out` does",
}


def metric_amount(metric: Metric, value: float) -> str:
    """A metric's value with its unit, to four significant digits."""
    if metric.endswith("_bytes"):
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= scale:
                return f"{value / scale:.4g} {unit}"
        return f"{value:.0f} bytes"
    if metric == "p95_ms":
        return f"{value:.4g} ms"
    if metric == "tokens_per_s":
        return f"{value:,.0f} tokens/s"
    if metric == "cost_per_million_tokens":
        return f"${value:.4g}"
    if metric in ("retention", "retention_low", "neighbour_overlap"):
        return f"{100 * value:.4g} %"
    return f"{value:.4g}"


def points(share: float) -> str:
    """A difference of scores (0 to 1) as it is spoken of."""
    return f"{100 * share:g} point{'' if share == 0.01 else 's'}"


class Progress(Protocol):
    """Told how far a long step is; the command line draws a bar from it."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of the step `what` are finished."""


def quiet(what: str, done: int, total: int) -> None:
    """The progress receiver that shows nothing (the default from Python)."""


class Frozen(BaseModel):
    """Immutable, refuses unknown fields; infinity and NaN survive JSON, as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerScheme(Frozen):
    """How one linear layer's weights are stored and how its product is computed.

    Attributes:
        bits: bits a weight code.
        group_size: consecutive input features that share a scale; "row" is all of them.
        symmetric: zero point fixed in the middle of the code range.
        activation_bits: 16 computes in the model's own dtype on dequantized weights; 8 quantizes
            each token's input to the weights' kind of number and multiplies those.
        activation_symmetric: false gives each token a zero point too, which inputs that lean to
            one side (those behind GELU above all) need.
        activation_static: inputs are rounded by scales and zero points that calibration fixed for
            each feature, instead of by each token's own range: faster, less close.
        activation_outliers: inputs of at least this size are multiplied in full precision, the rest
            in 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339).
        element: what weight and activation codes are.
        nested_scales: the scales too are in 8 bits (double quantization: QLoRA, Dettmers et al.
            2023, arXiv:2305.14314, section 3), as the layout bitsandbytes stores them.
    """

    bits: Bits
    group_size: GroupSize
    symmetric: bool
    activation_bits: Literal[8, 16] = 16
    activation_symmetric: bool = True
    activation_static: bool = False
    activation_outliers: Annotated[float, Field(gt=0)] | None = None
    element: Element = "int"
    nested_scales: bool = False

    @model_validator(mode="after")
    def _has_a_kernel(self) -> Self:
        rows = (self.bits, self.group_size, self.symmetric) == (8, "row", True)
        if self.activation_bits == 8 and not rows:
            raise ValueError(
                "activation_bits: 8 needs bits: 8, group_size: row, symmetric: true (an integer "
                "product has one scale per output channel)"
            )
        if self.element == "e4m3" and not rows:
            raise ValueError("element: e4m3 needs bits: 8, group_size: row, symmetric: true")
        if self.element == "nf4":
            plain = (self.bits, self.symmetric, self.activation_bits) == (4, True, 16)
            if not plain or self.group_size not in (64, 128):
                raise ValueError(
                    "element: nf4 needs bits: 4, group_size: 64 or 128, symmetric: true"
                )
        if self.nested_scales and self.element != "nf4":
            raise ValueError("nested_scales: true needs element: nf4")
        if not self.activation_symmetric and (self.activation_bits, self.element) != (8, "int"):
            raise ValueError("activation_symmetric: false needs activation_bits: 8, element: int")
        if self.activation_static and self.activation_symmetric:
            raise ValueError("activation_static: true needs activation_symmetric: false")
        if self.activation_outliers is not None and (
            (self.activation_bits, self.element, self.activation_symmetric) != (8, "int", True)
        ):
            raise ValueError(
                "activation_outliers needs activation_bits: 8, element: int, "
                "activation_symmetric: true"
            )
        return self


class NoWeights(Frozen):
    """Weights stay as they are."""

    method: Literal["none"] = "none"


class RtnWeights(Frozen):
    """Round to nearest: no calibration data, each weight to its closest code."""

    method: Literal["rtn"]
    scheme: LayerScheme
    clip_search: bool = False
    fallback: Literal["error", "row", "skip"] = "error"
    skip: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _needs_no_calibration(self) -> Self:
        if self.scheme.activation_static:
            raise ValueError("activation_static: true needs calibration texts; use method: gptq")
        return self


class GptqWeights(Frozen):
    """GPTQ, Frantar et al. 2022 (arXiv:2210.17323).

    Attributes:
        act_order: quantize input features in order of falling Hessian diagonal.
        damping: share of the mean Hessian diagonal that is added to the diagonal.
        clip_search: search each group's range for the least error instead of min and max.
        fallback: for a layer whose input features the group size does not divide: refuse the
            build ("error"), use one group a row ("row") or leave it unquantized ("skip").
        skip: shell patterns of layer names that stay unquantized.
        compensate: share of the error in a layer's inputs, left by the layers before it, that its
            weights make up for (asymmetric calibration: GPTAQ, Li et al. 2025, arXiv:2504.02692);
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
    fallback: Literal["error", "row", "skip"] = "error"
    skip: tuple[str, ...] = ()
    compensate: Annotated[float, Field(ge=0, le=1)] = 0.0
    effort: Effort = "fast"
    tune_by: TuneBy = "auto"
    smooth: bool = False
    budget: Annotated[float, Field(gt=0, le=16)] | None = None
    choices: tuple[LayerScheme, ...] = ()

    @model_validator(mode="after")
    def _fits_its_scheme(self) -> Self:
        if self.effort != "fast" and not self.can_be_tuned:
            raise ValueError(
                "layers with activation_bits: 8, element: e4m3 or nested_scales: true are not "
                "tuned; leave effort: fast"
            )
        if self.choices and self.budget is None:
            raise ValueError("choices are for a budget; give one, or leave them out")
        if any(each.activation_bits == 8 or each.element == "e4m3" for each in self._offered):
            raise ValueError("a budget chooses among schemes with activation_bits: 16, not e4m3")
        if any(each.nested_scales for each in self._offered):
            raise ValueError("a budget chooses among schemes without nested_scales")
        if self.smooth and (self.scheme.activation_bits != 8 or self.scheme.activation_static):
            raise ValueError(
                "smooth: true is for activation_bits: 8 without activation_static, whose inputs "
                "have a scale each already"
            )
        if self.scheme.activation_static and self.compensate:
            raise ValueError("activation_static: true is built with compensate: 0")
        return self

    @property
    def _offered(self) -> tuple[LayerScheme, ...]:
        return () if self.budget is None else (self.scheme, *self.choices)

    @property
    def can_be_tuned(self) -> bool:
        """Whether efforts above "fast" exist."""
        scheme = self.scheme
        return not (scheme.activation_bits == 8 or scheme.element == "e4m3" or scheme.nested_scales)


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
            ("auto"). For binary codes principal dimensions are turned (ITQ) where that keeps more.
    """

    n: Annotated[int, Field(ge=1)]
    method: DimsMethod = "slice"


class Vectors(Frozen):
    """How a vector is stored in an index.

    Attributes:
        code: float32, one signed byte a dimension, or one bit a dimension.
        rescore: a search on codes fetches `rescore * k` candidates and reorders them with the
            float query; 1 keeps the order of the codes.
    """

    code: VectorCode = "float32"
    rescore: Annotated[int, Field(ge=1)] = 4


class Recipe(Frozen):
    """How to make one variant of a base.

    Attributes:
        embedding: "int8" keeps the token embedding table in 8 bits with one scale a token; no
            standard layout can hold that.
        layout: how quantized weights lie on disk; "auto" takes the first standard layout that can
            hold them exactly, which other libraries open without gteopt.
    """

    schema_: Literal["gteopt.recipe/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    summary: str = ""
    weights: Weights = NoWeights()
    embedding: Literal["full", "int8"] = "full"
    layout: LayoutChoice = "auto"
    calibration: Calibration = Calibration()
    dims: Dims | None = None
    vectors: Vectors = Vectors()

    @model_validator(mode="after")
    def _a_layout_needs_packed_weights(self) -> Self:
        if self.layout != "auto" and self.weights.method == "none":
            raise ValueError(
                f"layout: {self.layout} is for quantized weights; weights.method is none"
            )
        if self.embedding == "int8" and self.weights.method == "none":
            raise ValueError("embedding: int8 goes with quantized weights; weights.method is none")
        if self.embedding == "int8" and self.layout not in ("auto", "gteopt"):
            raise ValueError(f"embedding: int8 needs layout: gteopt or auto (found {self.layout})")
        return self

    def with_int8_embedding(self) -> Recipe:
        """The same recipe with the token embedding table in int8.

        Raises:
            InputError: the recipe leaves weights as they are, or asks for another layout.
        """
        return self._with("embedding", "int8")

    def with_layout(self, layout: LayoutChoice) -> Recipe:
        """The same recipe with its quantized weights in another layout on disk.

        Raises:
            InputError: the recipe leaves weights as they are, or only gteopt's own can hold them.
        """
        return self._with("layout", layout)

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
                f"8-bit floats or nested scales are not tuned"
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
        include = {"weights", "embedding", "layout"}
        if self.weights.method == "gptq":
            include.add("calibration")
        return _sha256(self.model_dump(mode="json", include=include))


class Workload(Frozen):
    """One throughput measurement: `batch_size` texts of exactly `tokens` tokens.

    Attributes:
        lengths: "equal", or "lognormal": seeded lengths of median `tokens`, the deviation of their
            logarithm 0.8, from an eighth to four times the median; in batches of at most 32.
    """

    batch_size: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    lengths: Literal["equal", "lognormal"] = "equal"

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it may have."""
        return self.tokens if self.lengths == "equal" else 4 * self.tokens

    @property
    def name(self) -> str:
        """As the command line takes it: "8x128", or "64x~128" for lengths around a median."""
        return f"{self.batch_size}x{'' if self.lengths == 'equal' else '~'}{self.tokens}"


WorkloadSet = Literal["short", "long"]
WORKLOADS: dict[WorkloadSet, tuple[Workload, ...]] = {
    "short": (
        Workload(batch_size=32, tokens=32),
        Workload(batch_size=32, tokens=128),
        Workload(batch_size=8, tokens=512),
    ),
    "long": (
        *(Workload(batch_size=16_384 // n, tokens=n) for n in (128, 512, 2048, 8192)),
        Workload(batch_size=1, tokens=32_768),
        Workload(batch_size=128, tokens=128, lengths="lognormal"),
    ),
}
"""What to measure where nobody says: "short" on a CPU; "long", 16,384 tokens a batch (one text of
32,768), and texts of mixed lengths, on a GPU."""


class BenchSpec(Frozen):
    """What `bench` measures.

    Attributes:
        query_tokens: length of the single query whose latency is measured.
        n_queries: single queries timed per variant.
        workloads: the throughput grid; a plan may name a set of `WORKLOADS`, "short" or "long".
        warmup: uncounted runs before each measurement.
        repeats: counted runs of each workload, interleaved over the variants.
    """

    query_tokens: Annotated[int, Field(ge=1)] = 16
    n_queries: Annotated[int, Field(ge=10)] = 50
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1)] = WORKLOADS["short"]
    warmup: Annotated[int, Field(ge=0)] = 2
    repeats: Annotated[int, Field(ge=1)] = 5

    @field_validator("workloads", mode="before")
    @classmethod
    def _of_a_set(cls, found: object) -> object:
        if not isinstance(found, str):
            return found
        if found not in WORKLOADS:
            raise ValueError(f"no set of workloads has this name; {suggest(found, WORKLOADS)}")
        return WORKLOADS[found]


class PlanBench(BenchSpec):
    """What a plan measures, and what its machine costs.

    Attributes:
        price_per_hour: of the machine, in dollars: gives costs, and changes no measurement.
    """

    price_per_hour: Annotated[FiniteFloat, Field(ge=0)] | None = None

    @property
    def spec(self) -> BenchSpec:
        """What is measured."""
        return BenchSpec.model_validate(self.model_dump(exclude={"price_per_hour"}))


class Limit(Frozen):
    """A bound on one metric; at least one side is given."""

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None

    @model_validator(mode="after")
    def _can_be_kept(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}; nothing can keep both")
        return self


class Objective(Frozen):
    """What to optimise among the variants that keep every limit."""

    minimise: Metric | None = None
    maximise: Metric | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.minimise is None) == (self.maximise is None):
            raise ValueError("give exactly one of minimise and maximise")
        return self

    @property
    def metric(self) -> Metric:
        """The metric that is optimised."""
        metric = self.minimise or self.maximise
        assert metric is not None
        return metric


class Policy(Frozen):
    """The user's limits and what to optimise within them.

    Attributes:
        margin: a difference of scores (0 to 1) that does not matter to the user; a variant whose
            95 % interval lies within it on both sides is called equivalent to the baseline.
    """

    schema_: Literal["gteopt.policy/1"] = Field(alias="schema")
    name: str
    summary: str = ""
    limits: dict[Metric, Limit] = {}
    objective: Objective
    margin: Annotated[float, Field(gt=0, lt=1)] = DEFAULT_MARGIN


class Plan(Frozen):
    """One base, several recipes, a suite, bench workloads, a policy: the main job.

    `recipes` and `policy` are shipped names or files (relative to the plan's folder).
    """

    schema_: Literal["gteopt.plan/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    summary: str = ""
    base: str
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    suite: str = "mini"
    bench: PlanBench = PlanBench()
    policy: str = "balanced"
    out: Path


ShippedKind = Literal["recipes", "recipes/plans", "recipes/policies", "eval/suites"]
_KIND_WORD: dict[ShippedKind, str] = {
    "recipes": "recipe",
    "recipes/plans": "plan",
    "recipes/policies": "policy",
    "eval/suites": "suite",
}
Document = TypeVar("Document", bound=BaseModel)


def shipped_dir(kind: str) -> Path:
    """The folder of shipped files: inside the wheel, or the repository of an editable install."""
    package = Path(__file__).parent
    inside_wheel = package / "shipped" / kind
    return inside_wheel if inside_wheel.is_dir() else package.parent / kind


def shipped_names(kind: ShippedKind) -> list[str]:
    """Names of the YAML files of one kind that come with gteopt, sorted."""
    return sorted(path.stem for path in shipped_dir(kind).glob("*.yaml"))


def find_yaml(kind: ShippedKind, name_or_file: str, *, beside: Path | None = None) -> Path:
    """The file that a name or a path means.

    Args:
        kind: what is looked for.
        name_or_file: a shipped name, or a path that ends in .yaml or .yml.
        beside: folder that a relative path is tried against before the working directory.

    Raises:
        InputError: no such file, or no such name (with the nearest one).
    """
    what = _KIND_WORD[kind]
    if name_or_file.endswith((".yaml", ".yml")):
        candidates = [Path(name_or_file)]
        if beside is not None:
            candidates.insert(0, beside / name_or_file)
        for path in candidates:
            if path.is_file():
                return path
        raise InputError(
            f"{what} file {name_or_file} does not exist; give an existing file or a shipped name "
            f"({', '.join(shipped_names(kind))})"
        )
    path = shipped_dir(kind) / f"{name_or_file}.yaml"
    if path.is_file():
        return path
    raise InputError(
        f"unknown {what} '{name_or_file}': {suggest(name_or_file, shipped_names(kind))} "
        f"(for a file of your own, give its path ending in .yaml)"
    )


def read_yaml(path: Path, document: type[Document]) -> Document:
    """Read and validate one YAML file.

    Raises:
        InputError: unreadable, not YAML, or not valid; lists every problem with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        node = yaml.compose(text)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}: not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of fields, found {type(data).__name__}")
    problems = _repeated_fields(path, node)
    try:
        read = document.model_validate(data)
    except ValidationError as error:
        found = [dict(each) for each in error.errors()]
        problems += [_problem(path, node, document, e) for e in found if not _is_consequence(e)]
    if problems:
        raise InputError(join_problems(f"{path} has {len(problems)} problem(s)", problems))
    return read


def load_recipe(name_or_file: str, *, beside: Path | None = None) -> Recipe:
    """A shipped recipe by name, or one from a YAML file."""
    return read_yaml(find_yaml("recipes", name_or_file, beside=beside), Recipe)


def load_policy(name_or_file: str, *, beside: Path | None = None) -> Policy:
    """A shipped policy by name, or one from a YAML file."""
    return read_yaml(find_yaml("recipes/policies", name_or_file, beside=beside), Policy)


def load_plan(name_or_file: str) -> Plan:
    """A shipped plan by name, or one from a YAML file."""
    return read_yaml(find_yaml("recipes/plans", name_or_file), Plan)


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _repeated_fields(path: Path, root: yaml.Node | None) -> list[str]:
    """Fields written twice in one mapping; YAML would silently keep the last."""
    problems: list[str] = []
    nodes, visited = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:  # an alias
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            first_line: dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                name, line = str(key.value), key.start_mark.line + 1
                if name in first_line:
                    problems.append(
                        f"{path}:{line}: field '{name}' is given twice, first on line "
                        f"{first_line[name]}"
                    )
                first_line.setdefault(name, line)
    return problems


def _is_consequence(error: dict[str, Any]) -> bool:
    """A list whose items are invalid is also called too short; the items' problems are enough."""
    return error["type"] == "too_short" and bool(len(error["input"]) >= error["ctx"]["min_length"])


def _problem(
    path: Path, node: yaml.Node | None, document: type[BaseModel], error: dict[str, Any]
) -> str:
    """One validation problem as 'file:line: field: what was found, what is allowed'."""
    kind, context, found = error["type"], error.get("ctx", {}), error.get("input")
    location = [str(part) for part in error["loc"]]
    message = str(error["msg"]).removeprefix("Value error, ")
    options = str(context.get("expected", ""))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location.append(context["discriminator"].strip("'"))
        if kind == "union_tag_invalid":
            found, options = context["tag"], context["expected_tags"]
            message = f"Input should be one of {options}"
    line, keys = _locate(node, location)
    field = ".".join(keys) or "(file)"
    if kind == "extra_forbidden":
        hint = suggest(keys[-1], _fields_at(document, location[:-1]))
        return f"{path}:{line}: unknown field '{field}': {hint}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{path}:{line}: field '{'.'.join([*keys, location[-1]])}' is missing"
    return f"{path}:{line}: {field}: {_said(message, found, options)}"


def _said(message: str, found: object, options: str) -> str:
    """What is wrong, with what was found and the name that was probably meant."""
    shown = "" if isinstance(found, dict | BaseModel) else f" (found {found!r})"
    if isinstance(found, str) and options:
        hint = suggest(found, re.findall("'([^']+)'", options))
        shown += f"; {hint}" if hint.startswith("did you mean") else ""
    return f"{message}{shown}"


def invalid(subject: str, error: ValidationError) -> InputError:
    """What a validation found, worded as `read_yaml` does where there is no file."""
    problems = []
    for found in error.errors():
        each: dict[str, Any] = dict(found)
        if not _is_consequence(each):
            message = str(each["msg"]).removeprefix("Value error, ")
            said = _said(message, each["input"], str(each.get("ctx", {}).get("expected", "")))
            where = ".".join(str(part) for part in each["loc"])
            problems.append(f"{where}: {said}" if where else said)
    return InputError(join_problems(f"{subject} has {len(problems)} problem(s)", problems))


def _locate(node: yaml.Node | None, location: list[str]) -> tuple[int, list[str]]:
    """Line (from 1) of the deepest part of `location` that the YAML has, and that part's keys.

    pydantic puts a union's tag into the location; parts that the YAML does not have are dropped.
    """
    line = node.start_mark.line + 1 if node is not None else 1
    keys: list[str] = []
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == part:
                    line, node = key_node.start_mark.line + 1, value_node
                    keys.append(part)
                    break
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            keys.append(part)
    return line, keys


def _fields_at(document: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the fields that may stand at a pydantic `location`."""
    models = [document]
    for part in location:
        fields = [
            field
            for model in models
            for name, field in model.model_fields.items()
            if part in (name, field.alias)
        ]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        else:
            # The tag of a union's variant, or else a list's index or a mapping's key.
            variants = [
                model
                for model in models
                if any(part in get_args(f.annotation) for f in model.model_fields.values())
            ]
            models = variants or models
    return sorted({f.alias or n for model in models for n, f in model.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
