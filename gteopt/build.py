"""The build: recipe + base -> artifact, block by block, resumable.

Hides: the order of work (plan, calibrate, solve, pack, shorten vectors, seal), what is written when
(each finished block at once, so that an interrupted build goes on behind it) and the Sentence
Transformers layout of the result. Refuses to know: how codes are found (quant/), how layers run.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gteopt.artifact import (
    alone,
    check_free,
    clear,
    file_records,
    is_artifact,
    read_manifest,
    seal,
    stage_folder,
)
from gteopt.calibration import (
    Block,
    BlockInput,
    CalibrationText,
    Original,
    Room,
    accumulate_hessian,
    advance_,
    copy_block,
    draw_texts,
    find_blocks,
    open_blocks,
    record,
    replay_dtype,
    stages,
    tokenize,
    watch_inputs,
    with_sentences,
)
from gteopt.card import CARD, card
from gteopt.checkpoint import (
    LATENT_FILE,
    LATENT_PREFIX,
    VECTOR_MODULES,
    VECTORS_FILE,
    Checkpoint,
    open_checkpoint,
)
from gteopt.encoder import (
    Encoder,
    build_skeleton,
    empty_,
    fill_,
    load_checkpoint,
    parse_dtype,
    swap_embedding_,
    swap_linear_,
)
from gteopt.errors import GteoptError, InputError, NumericsError, join_problems
from gteopt.formats import Shape, choose_layout
from gteopt.layout import WEIGHTS, save_tensors, write_model, write_vectors
from gteopt.machine import give_back, machine, versions
from gteopt.quant import gptq
from gteopt.quant.affine import (
    PARTS,
    PackedWeight,
    QuantizedWeight,
    group_size_problems,
    pack,
    packed_bytes,
    quantize_rtn,
    ratio_db,
    snr_db,
)
from gteopt.quant.allocation import allocate
from gteopt.quant.inputs import InputGrid, fit_inputs
from gteopt.quant.smooth import Smoothing
from gteopt.quant.vectors import VectorTransform, fit, identity
from gteopt.recipe import (
    Dims,
    Effort,
    Frozen,
    GptqWeights,
    LayerScheme,
    Layout,
    NoWeights,
    Progress,
    Recipe,
    RtnWeights,
    VectorCode,
    invalid,
    load_recipe,
    quiet,
)
from gteopt.records import (
    AllocationRecord,
    BaseRecord,
    CalibrationRecord,
    LayerRecord,
    Manifest,
    SmoothingRecord,
    TuningRecord,
    UnquantizedRecord,
    write_atomically,
    write_record,
)
from gteopt.sensitivity import DEEP_BLOCKS, estimate, measure
from gteopt.smoothing import smooth_block_
from gteopt.tuning import BLOCK_SCHEDULES, MOST_WEIGHTS, SCHEDULES, Tuned, tune, tune_block

ACTIVATION_BYTES = 4 << 30
"""Hidden states of the calibration texts that are kept in memory unless more or less is said."""
_STATE = "build-state.json"
_ACTIVATIONS = "activations"
_ALLOCATION = "allocation.json"
SENSITIVITY_TEXTS = 64
"""Texts of the calibration set that sensitivities are measured on."""
_EMBEDDING_ROWS = 8192
_SOLVED = "solved"
"""Where the solver's blocks lie while they wait for tuning."""
_LOSSES = TypeAdapter(dict[str, tuple[float, ...]])


class _BuildState(Frozen):
    """What a half-finished stage folder belongs to; anything else there is thrown away."""

    recipe_sha256: str
    base_sha256: str
    dtype: str
    versions: dict[str, str]


@dataclass(frozen=True)
class LayerPlan:
    """What a recipe does to each linear layer, decided before any work starts.

    Attributes:
        schemes: layer name -> scheme, in the model's order.
        notes: layer name -> what is out of the ordinary.
        unquantized: everything that stays as it is, with the reason.
        layout: how the packed weights will lie on disk; None without any.
        blocks: name of the model's list of transformer blocks; None where none is quantized.
        choices: layer name -> what its scheme is chosen from, where the recipe has a budget.
        tune_by: what is tuned at once behind the solver; None where nothing is.
    """

    schemes: Mapping[str, LayerScheme]
    notes: Mapping[str, str]
    unquantized: tuple[UnquantizedRecord, ...]
    layout: Layout | None
    blocks: str | None
    choices: Mapping[str, tuple[LayerScheme, ...]]
    tune_by: Literal["model", "block"] | None


def quantize(
    base: str | Path,
    recipe: Recipe | str,
    out: str | Path,
    *,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
    device: str = "auto",
    devices: Sequence[str] = (),
    dtype: str = "bfloat16",
    activation_bytes: int = ACTIVATION_BYTES,
    progress: Progress = quiet,
) -> Manifest:
    """Make the variant that `recipe` describes and put it at `out`.

    Finished blocks lie in a hidden folder beside `out`; the same call after an interruption goes
    on behind them. An `out` that already is this variant is left alone.

    Args:
        base: "nano", a model folder, or `<org>/<name>`.
        recipe: a recipe, a shipped name, or a YAML file.
        out: folder of the artifact; must not exist, or be empty.
        hub_dir: models and data sets are read from here and the network is never touched.
        revision: of a base on the Hub.
        family: see `open_checkpoint`; the artifact remembers it.
        device: where calibration runs.
        devices: where layers that read the same inputs are solved side by side (queries, keys and
            values; an MLP's gate and the other half), as `parse_devices` has them; given, the first
            one is where calibration runs. Changes no result among devices of a kind. Each holds
            the Hessian and what its solve takes.
        dtype: of everything that is not quantized, and of the computation (which is in float32
            where a processor only emulates bfloat16).
        activation_bytes: most memory for the hidden states of the calibration texts; what is more
            lies in files beside `out` during the build. Changes no result.
        progress: told after each block.

    Raises:
        InputError: base, recipe, calibration texts or `out` cannot be used; before any work.
        IntegrityError: the base's files are damaged.
        NumericsError: weights or activations hold NaN, or a factorisation failed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    out = Path(out)
    checkpoint = open_checkpoint(base, hub_dir=hub_dir, revision=revision, family=family)
    if checkpoint.manifest is not None:
        raise InputError(
            f"{base} is already an artifact ({checkpoint.manifest.recipe.name} of "
            f"{checkpoint.manifest.base.id}); quantize its base, or use truncate to shorten it"
        )
    if checkpoint.quantization is not None:
        raise InputError(
            f"{base} is already quantized (by {checkpoint.quantization.get('quant_method')}); "
            f"quantize the model that it was made from"
        )
    _check_dims(recipe.dims, checkpoint)
    parse_dtype(dtype)
    finished = _finished(out, recipe, checkpoint.sha256, dtype)
    if finished is not None:
        return finished
    with alone(stage_folder(out)):
        return _quantize(
            checkpoint, recipe, out, hub_dir, device, devices, dtype, activation_bytes, progress
        )  # fmt: skip


def _quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    hub_dir: Path | None,
    device: str,
    devices: Sequence[str],
    dtype: str,
    activation_bytes: int,
    progress: Progress,
) -> Manifest:
    """`quantize` of what was opened and checked, with the stage folder to itself."""
    sealed = _sealed(out, recipe, checkpoint.sha256, dtype)
    if sealed is not None:
        return sealed
    plan = plan_layers(checkpoint, recipe)
    texts = draw_texts(recipe.calibration, hub_dir=hub_dir) if _needs_texts(recipe) else ()
    stage = _open_stage(out, recipe, checkpoint, dtype)

    progress(f"loading {checkpoint.id}", 0, 1)
    with _memory_errors("what is outside the blocks"):
        encoder = load_checkpoint(
            checkpoint, device=devices[0] if devices else device, dtype=dtype, later=plan.blocks
        )
    base_record = describe_base(checkpoint, encoder)
    tokens = tokenize(encoder, texts, recipe.calibration.max_tokens)
    calibration = record(recipe.calibration, texts, tokens) if texts else None
    layers: tuple[LayerRecord, ...] = ()
    embedding = _pack_embedding_(encoder) if recipe.embedding == "int8" else None
    allocation: AllocationRecord | None = None
    tuning: TuningRecord | None = None
    if plan.choices:
        with _memory_errors("the measurement of sensitivities"):
            plan, allocation = _allocate(
                encoder, recipe, plan, tokens, stage, activation_bytes, progress
            )
    if plan.blocks is not None:
        tuned = plan.tune_by == "model"
        shards = stage / (_SOLVED if tuned else WEIGHTS)
        modules = list(encoder.module.get_submodule(plan.blocks).children())
        blocks = [Block(f"{plan.blocks}.{i}", m, ()) for i, m in enumerate(modules)]
        inputs: list[BlockInput] = []
        left = [i for i in range(len(blocks)) if not _notes(_shard(shards, i)).is_file()]
        if left and isinstance(recipe.weights, GptqWeights):
            # What the original model feeds the blocks lies beside what the quantized one does.
            n_kinds = 2 if needs_original(recipe, plan) else 1
            room = Room(activation_bytes // n_kinds, stage / _ACTIVATIONS)
            with _memory_errors(blocks[0].name):
                blocks, inputs = open_blocks(
                    encoder, tokens, dtype=replay_dtype(encoder), room=room
                )
        layers, tuning = _quantize_blocks(
            encoder, blocks, inputs, recipe, plan, shards, devices, progress
        )
        del inputs
        shutil.rmtree(stage / _ACTIVATIONS, ignore_errors=True)
        if tuned:
            with _memory_errors("the tuning of the whole model"):
                layers, tuning = _tune_blocks(
                    encoder, blocks, layers, tokens, recipe, stage, progress
                )
    write_model(encoder, stage, blocks=plan.blocks, layers=layers, layout=plan.layout)
    return _finish(
        encoder, recipe, stage, out, base_record, calibration, layers, embedding,
        allocation, tuning, plan.layout, plan.unquantized, texts, progress,
    )  # fmt: skip


def truncate(
    artifact: str | Path,
    out: str | Path,
    *,
    dims: int | None = None,
    method: str = "slice",
    vectors: VectorCode = "float32",
    rescore: int = 4,
    hub_dir: Path | None = None,
    device: str = "auto",
    progress: Progress = quiet,
) -> Manifest:
    """Make an artifact with the same weights and other vectors: fewer dimensions, smaller codes.

    Args:
        artifact: the artifact to start from; its own vector settings are replaced, not stacked.
        out: folder of the new artifact.
        dims: how many dimensions to keep; None keeps all.
        method: "slice" (the first dimensions), "pca", or "auto" (whichever keeps more).
        vectors: "float32", "int8" or "binary".
        rescore: candidates fetched per result when searching codes.
        hub_dir: where calibration data sets lie.
        device: where calibration vectors are computed.
        progress: told how far the step is.

    Raises:
        InputError: not an artifact, vectors that cannot be, more dimensions than the model has, or
            `out` is in use.
    """
    source = Path(artifact)
    old = read_manifest(source)
    shortened = dims is not None
    parts = [old.recipe.name, *([f"{method}{dims}"] if shortened else []), vectors]
    content = {
        **old.recipe.model_dump(by_alias=True),
        "name": "-".join(parts),
        "summary": f"{old.recipe.name} with other vectors",
        "dims": {"n": dims, "method": method} if shortened else None,
        "vectors": {"code": vectors, "rescore": rescore},
    }
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise invalid(f"what to make of {source}", error) from error
    return restyle(source, recipe, out, hub_dir=hub_dir, device=device, progress=progress)


def restyle(
    artifact: Path,
    recipe: Recipe,
    out: str | Path,
    *,
    hub_dir: Path | None = None,
    device: str = "auto",
    progress: Progress = quiet,
) -> Manifest:
    """Make `recipe` from an artifact whose weights are already what the recipe asks for.

    Raises:
        InputError: the artifact's weights were made by another recipe.
    """
    out = Path(out)
    old = read_manifest(artifact)
    if old.recipe.weights_sha256() != recipe.weights_sha256():
        raise InputError(
            f"{artifact} holds the weights of recipe {old.recipe.name}, which differ from those of "
            f"{recipe.name}; quantize the base instead"
        )
    finished = _finished(out, recipe, old.base.sha256, old.base.dtype)
    if finished is not None:
        return finished
    checkpoint = open_checkpoint(artifact)
    _check_dims(recipe.dims, checkpoint)
    texts = draw_texts(recipe.calibration, hub_dir=hub_dir) if _needs_texts(recipe) else ()
    with alone(stage_folder(out)):
        return _restyle(artifact, checkpoint, old, recipe, out, texts, device, progress)


def _restyle(
    artifact: Path,
    checkpoint: Checkpoint,
    old: Manifest,
    recipe: Recipe,
    out: Path,
    texts: Sequence[CalibrationText],
    device: str,
    progress: Progress,
) -> Manifest:
    """`restyle` of what was opened and checked, with the stage folder to itself."""
    stage = _open_stage(out, recipe, checkpoint, old.base.dtype)
    encoder = load_checkpoint(checkpoint, device=device)
    for file in old.files:
        if not file.path.startswith(VECTOR_MODULES) and file.path != VECTORS_FILE:
            target = stage / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact / file.path, target)
    calibration = old.calibration
    if texts and calibration is None:
        tokens = tokenize(encoder, texts, recipe.calibration.max_tokens)
        calibration = record(recipe.calibration, texts, tokens)
    return _finish(
        encoder, recipe, stage, out, old.base, calibration, old.layers, old.embedding,
        old.allocation, old.tuning, old.layout, old.unquantized, texts, progress,
    )  # fmt: skip


def fit_transforms(
    encoder: Encoder,
    dims: Sequence[int],
    codes: Sequence[VectorCode],
    *,
    hub_dir: Path | None = None,
    progress: Progress = quiet,
) -> list[VectorTransform]:
    """What `truncate` would make of the encoder's vectors, of every length in every code.

    An artifact's own way to shorten (slice, PCA, whichever keeps more) and its own calibration
    texts are used; a base is sliced. The texts are encoded once.

    Args:
        encoder: a base or an artifact.
        dims: lengths; none is the model's full one alone.
        codes: how a vector is stored.
        hub_dir: where calibration data sets lie.
        progress: told how many calibration texts are encoded.

    Returns:
        One transform for each length and code, codes innermost.

    Raises:
        InputError: more dimensions than the model has, or too few calibration texts.
    """
    manifest = encoder.manifest
    own = manifest.recipe if manifest else Recipe(schema="gteopt.recipe/1", name="base")
    method = own.dims.method if own.dims else "slice"
    recipes = []
    for n in dims or [encoder.full_dims]:
        shorter = Dims(n=n, method=method)
        _check_dims(shorter, encoder.checkpoint)
        for code in codes:
            vectors = own.vectors.model_copy(update={"code": code})
            wanted = shorter if n < encoder.full_dims else None
            recipes.append(own.model_copy(update={"dims": wanted, "vectors": vectors}))
    fitted = [
        recipe.vectors.code == "int8" or (recipe.dims is not None and method != "slice")
        for recipe in recipes
    ]
    # Nothing is fitted on these rows where nothing is to be; `fit` reads their width.
    texts = np.zeros((0, encoder.full_dims), np.float32)
    if any(fitted):
        drawn = draw_texts(own.calibration, hub_dir=hub_dir)
        texts = _calibration_vectors(encoder, own, drawn, progress)
    return [fit(texts, recipe.dims, recipe.vectors) for recipe in recipes]


def plan_layers(
    checkpoint: Checkpoint, recipe: Recipe, skeleton: nn.Module | None = None
) -> LayerPlan:
    """Decide each layer's scheme from the architecture alone; no weights are read.

    Args:
        checkpoint: a base.
        recipe: what to make of it.
        skeleton: of the checkpoint, where it was built already (which takes half a second of 7B).

    Raises:
        InputError: lists every layer whose input features the group size does not divide, unless
            the recipe names a fallback; or the recipe's layout cannot hold these layers.
        UnsupportedError: the architecture has no transformer blocks.
    """
    skeleton = build_skeleton(checkpoint) if skeleton is None else skeleton
    weights = recipe.weights
    schemes: dict[str, LayerScheme] = {}
    notes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    choices: dict[str, tuple[LayerScheme, ...]] = {}
    layout: Layout | None = None
    prefix: str | None = None
    tune_by: Literal["model", "block"] | None = None
    if not isinstance(weights, NoWeights):
        prefix, _ = find_blocks(skeleton, checkpoint.config.get("num_hidden_layers"))
        linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
        sizes: dict[str, int] = {}
        for name, linear in linears.items():
            if not name.startswith(f"{prefix}."):
                reasons[name] = "outside the transformer blocks"
            elif any(fnmatch.fnmatchcase(name, pattern) for pattern in weights.skip):
                reasons[name] = "the recipe skips it"
            else:
                sizes[name] = linear.in_features
        misfits = group_size_problems(sizes, weights.scheme.group_size)
        if misfits and weights.fallback == "error":
            subject = (
                f"recipe {recipe.name}: group size {weights.scheme.group_size} does not divide the "
                f"input features of {len(misfits)} layer(s); choose another group size, or set "
                f"weights.fallback to row or skip"
            )
            raise InputError(join_problems(subject, misfits))
        for name, in_features in sizes.items():
            scheme = weights.scheme
            if group_size_problems({name: in_features}, scheme.group_size):
                reason = f"group size {scheme.group_size} does not divide {in_features} features"
                if weights.fallback == "skip":
                    reasons[name] = reason
                    continue
                scheme = scheme.model_copy(update={"group_size": "row"})
                notes[name] = f"{reason}: one group a row"
            schemes[name] = scheme
        shapes = {n: Shape(linears[n].out_features, linears[n].in_features) for n in schemes}
        n_weights = sum(linears[n].weight.numel() for n in schemes)
        tune_by = _tune_by(recipe, n_weights)
        if isinstance(weights, GptqWeights) and weights.budget is not None:
            choices = {
                name: _fitting(sizes[name], scheme, weights) for name, scheme in schemes.items()
            }
        if recipe.embedding == "int8" and not schemes:
            raise InputError(
                f"recipe {recipe.name} skips every layer; embedding: int8 goes with quantized ones"
            )
        if checkpoint.latent is not None and recipe.layout not in ("auto", "gteopt"):
            raise InputError(
                f"recipe {recipe.name}: layout {recipe.layout} is for folders that other libraries "
                f"open; none has the latent-attention pooling of {checkpoint.id}. Leave layout out"
            )
        if schemes:
            nested = checkpoint.latent is not None
            layout = "gteopt" if nested else _plan_layout(recipe, schemes, choices, shapes)
    return LayerPlan(
        schemes=schemes,
        notes=notes,
        unquantized=tuple(
            each
            for each in _unquantized(skeleton, schemes, reasons)
            if recipe.embedding == "full" or each.name != _embedding_name(skeleton)
        )
        + _latent_record(checkpoint),
        layout=layout,
        blocks=prefix if schemes else None,
        choices=choices,
        tune_by=tune_by,
    )


def _tune_by(recipe: Recipe, n_weights: int) -> Literal["model", "block"] | None:
    """What a recipe tunes at once in a model of so many quantized weights.

    Raises:
        InputError: the whole model, which is too large for it.
    """
    weights = recipe.weights
    if not isinstance(weights, GptqWeights) or weights.effort == "fast":
        return None
    is_large = n_weights > MOST_WEIGHTS
    if weights.tune_by == "auto":
        return "block" if is_large else "model"
    if weights.tune_by == "model" and is_large:
        raise InputError(
            f"recipe {recipe.name}: tune_by: model takes up to {MOST_WEIGHTS / 1e9:g} billion "
            f"quantized weights, found {n_weights / 1e9:.2g} billion; say auto or block"
        )
    return weights.tune_by


def needs_original(recipe: Recipe, plan: LayerPlan) -> bool:
    """Whether each block's original runs beside the quantized one."""
    compensates = isinstance(recipe.weights, GptqWeights) and recipe.weights.compensate > 0
    return compensates or plan.tune_by == "block"


def _latent_record(checkpoint: Checkpoint) -> tuple[UnquantizedRecord, ...]:
    n_parameters = n_latent_parameters(checkpoint)
    if not n_parameters:
        return ()
    name = LATENT_PREFIX.removesuffix(".")
    reason = "the pooling, through which every vector goes"
    return (UnquantizedRecord(name=name, n_parameters=n_parameters, reason=reason),)


def n_latent_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of a latent-attention pooling; 0 without one."""
    shapes = dict(checkpoint.tensors)
    own = checkpoint.folder / LATENT_FILE
    if own.is_file():
        with safe_open(own, framework="numpy") as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return sum(math.prod(s) for name, s in shapes.items() if name.startswith(LATENT_PREFIX))


def _embedding_name(module: nn.Module) -> str:
    table = module.get_input_embeddings()  # type: ignore[operator]
    return next(str(name) for name, each in module.named_modules() if each is table)


@torch.inference_mode()
def _pack_embedding_(encoder: Encoder) -> LayerRecord:
    """Replace the token embedding table by int8 rows, a few thousand at a time."""
    name = _embedding_name(encoder.module)
    table = encoder.module.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    scheme = LayerScheme(bits=8, group_size="row", symmetric=True)
    chunks: list[QuantizedWeight] = []
    signal = noise = 0.0
    for rows in torch.split(table.weight, _EMBEDDING_ROWS):
        chunks.append(quantize_rtn(rows, scheme))
        signal += rows.double().square().sum().item()
        noise += (rows.double() - chunks[-1].dequantize()).square().sum().item()
    codes, scale, zero = (
        torch.cat([getattr(each, part) for each in chunks]) for part in ("codes", "scale", "zero")
    )
    packed = pack(QuantizedWeight(codes, scale, zero, scheme))
    swap_embedding_(encoder.module, name, packed, encoder.device, encoder.dtype)
    return LayerRecord(
        name=name,
        out_features=table.num_embeddings,
        in_features=table.embedding_dim,
        method="rtn",
        scheme=scheme,
        bits_per_weight=packed.bits_per_weight,
        weight_snr_db=ratio_db(signal, noise),
    )


def _fitting(
    in_features: int, scheme: LayerScheme, weights: GptqWeights
) -> tuple[LayerScheme, ...]:
    """A layer's own scheme and those of the recipe's choices whose groups divide its features."""
    offered = [
        each
        for each in weights.choices
        if not group_size_problems({"": in_features}, each.group_size)
    ]
    return tuple(dict.fromkeys([scheme, *offered]))


def _plan_layout(
    recipe: Recipe,
    schemes: Mapping[str, LayerScheme],
    choices: Mapping[str, tuple[LayerScheme, ...]],
    shapes: Mapping[str, Shape],
) -> Layout:
    """The layout for these layers; under a budget one that holds whatever will be chosen."""
    if recipe.embedding == "int8":
        return "gteopt"
    if not choices:
        return choose_layout(recipe.layout, schemes, shapes)
    any_scheme = {f"{name} ({i})": each for name, c in choices.items() for i, each in enumerate(c)}
    any_shape = {
        f"{name} ({i})": shapes[name] for name, c in choices.items() for i in range(len(c))
    }
    return choose_layout(recipe.layout, any_scheme, any_shape)


def describe_base(checkpoint: Checkpoint, encoder: Encoder) -> BaseRecord:
    """What the manifest says of the source model."""
    n_parameters = sum(p.numel() for p in encoder.module.parameters())
    n_parameters += n_latent_parameters(checkpoint)
    return BaseRecord(
        id=checkpoint.id,
        family=checkpoint.family.name if checkpoint.family else "sentence-transformers",
        revision=checkpoint.revision,
        sha256=checkpoint.sha256,
        dims=checkpoint.dims,
        n_parameters=n_parameters,
        dtype=str(encoder.dtype).removeprefix("torch."),
        weight_bytes=n_parameters * encoder.dtype.itemsize,
        license=checkpoint.license,
        matryoshka_dims=checkpoint.matryoshka_dims,
    )


def _unquantized(
    skeleton: nn.Module, schemes: Mapping[str, LayerScheme], reasons: Mapping[str, str]
) -> Iterable[UnquantizedRecord]:
    """Every module with parameters of its own that no scheme covers, with the reason."""
    for name, each in skeleton.named_modules():
        n = sum(p.numel() for p in each.parameters(recurse=False))
        if n == 0 or name in schemes:
            continue
        if name in reasons:
            reason = reasons[name]
        elif isinstance(each, nn.Linear):
            reason = "the recipe leaves weights as they are"
        elif isinstance(each, nn.Embedding):
            reason = "a lookup table: no product to speed up"
        else:
            reason = "a normalisation: too few weights to matter"
        yield UnquantizedRecord(name=name, n_parameters=n, reason=reason)


def shortens(recipe: Recipe) -> bool:
    """Whether the variant's vectors are other than the model's own."""
    return recipe.dims is not None or recipe.vectors.code != "float32"


def _effort(recipe: Recipe) -> Effort:
    return recipe.weights.effort if isinstance(recipe.weights, GptqWeights) else "fast"


def _needs_texts(recipe: Recipe) -> bool:
    fitted = recipe.dims is not None and recipe.dims.method != "slice"
    return recipe.weights.method == "gptq" or fitted or recipe.vectors.code == "int8"


def _check_dims(dims: Dims | None, checkpoint: Checkpoint) -> None:
    if dims is not None and dims.n > checkpoint.dims:
        trained = ", ".join(map(str, checkpoint.matryoshka_dims)) or "none stated"
        raise InputError(
            f"dims {dims.n} is more than the {checkpoint.dims} that {checkpoint.id} has (lengths "
            f"it was trained for: {trained})"
        )


def _finished(out: Path, recipe: Recipe, base_sha256: str, dtype: str) -> Manifest | None:
    """The manifest of `out` where it already is the wanted variant; refuses anything else there."""
    if is_artifact(out):
        manifest = read_manifest(out)
        found = (manifest.recipe_sha256, manifest.base.sha256, manifest.base.dtype)
        if found == (recipe.sha256(), base_sha256, dtype):
            return manifest
    check_free(out)
    return None


def _sealed(out: Path, recipe: Recipe, base_sha256: str, dtype: str) -> Manifest | None:
    """The manifest of the wanted variant where a build of it was interrupted on its last steps,
    which are taken now.
    """
    stage = stage_folder(out)
    if not is_artifact(stage):
        return None
    manifest = read_manifest(stage)
    found = (manifest.recipe_sha256, manifest.base.sha256, manifest.base.dtype, manifest.versions)
    if found != (recipe.sha256(), base_sha256, dtype, versions()):
        return None
    seal(stage, out, manifest)
    return manifest


def _open_stage(out: Path, recipe: Recipe, checkpoint: Checkpoint, dtype: str) -> Path:
    """The stage folder, with the finished blocks of an earlier run of the same build, if any."""
    stage = stage_folder(out)
    state = _BuildState(
        recipe_sha256=recipe.sha256(),
        base_sha256=checkpoint.sha256,
        dtype=dtype,
        versions=versions(),
    )
    state_path = stage / _STATE
    if state_path.is_file():
        try:
            if _BuildState.model_validate_json(state_path.read_bytes()) == state:
                # What a killed process was writing: ours and safetensors' names before a rename.
                for path in list(stage.rglob("*")):
                    if path.is_file() and (path.name.startswith(".") or path.suffix == ".part"):
                        path.unlink()
                return stage
        except ValueError:
            pass  # unreadable state belongs to no build; start afresh
    clear(stage)
    write_record(state_path, state)
    return stage


def _allocate(
    encoder: Encoder,
    recipe: Recipe,
    plan: LayerPlan,
    tokens: Sequence[Sequence[int]],
    stage: Path,
    state_bytes: int,
    progress: Progress,
) -> tuple[LayerPlan, AllocationRecord]:
    """The plan with each layer's scheme chosen under the recipe's budget.

    What was measured is on disk walk by walk; see `measure`.
    """
    assert isinstance(recipe.weights, GptqWeights)
    assert recipe.weights.budget is not None
    n_weights: dict[str, int] = {}
    n_bytes: dict[str, list[int]] = {}
    for name, offered in plan.choices.items():
        linear = encoder.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = linear.out_features, linear.in_features
        n_weights[name] = linear.weight.numel()
        n_bytes[name] = [packed_bytes(*shape, scheme) for scheme in offered]
        n_bytes[name].append(2 * n_weights[name])
    budget = int(sum(n_weights.values()) * recipe.weights.budget / 8)
    least = sum(map(min, n_bytes.values()))
    if least > budget:
        raise InputError(
            f"recipe {recipe.name}: a budget of {recipe.weights.budget:g} bits a weight cannot be "
            f"kept: the smallest choices take {8 * least / sum(n_weights.values()):.3f}"
        )
    assert plan.blocks is not None
    is_deep = len(list(encoder.module.get_submodule(plan.blocks).children())) > DEEP_BLOCKS
    stored = stage / _ALLOCATION
    losses: dict[str, tuple[float, ...]] = {}
    if stored.is_file():
        losses = _LOSSES.validate_json(stored.read_bytes())
    if left := {name: each for name, each in plan.choices.items() if name not in losses}:
        few = tokens[:SENSITIVITY_TEXTS]
        if is_deep:
            room = Room(state_bytes, stage / _ACTIVATIONS)
            walks = estimate(encoder, few, left, room=room, progress=progress)
        else:
            walks = measure(encoder, few, left, state_bytes=state_bytes, progress=progress)
        for found in walks:
            losses |= found
            write_atomically(stored, _LOSSES.dump_json(losses))
        shutil.rmtree(stage / _ACTIVATIONS, ignore_errors=True)
    losses = {name: losses[name] for name in plan.choices}
    picked = allocate([(*losses[n], 0.0) for n in losses], [n_bytes[n] for n in losses], budget)
    chosen = dict(zip(losses, picked, strict=True))
    schemes = {n: plan.choices[n][i] for n, i in chosen.items() if i < len(plan.choices[n])}
    whole = tuple(
        UnquantizedRecord(
            name=n,
            n_parameters=sum(p.numel() for p in encoder.module.get_submodule(n).parameters()),
            reason="the budget allows 16 bits",
        )
        for n in chosen
        if n not in schemes
    )
    tried = tuple(dict.fromkeys(scheme for each in plan.choices.values() for scheme in each))
    record = AllocationRecord(
        budget=recipe.weights.budget,
        bits_per_weight=8 * sum(n_bytes[n][i] for n, i in chosen.items()) / sum(n_weights.values()),
        predicted_loss=sum((*losses[n], 0.0)[i] for n, i in chosen.items()),
        schemes=tried,
        losses={
            n: tuple(dict(zip(plan.choices[n], losses[n], strict=True)).get(s) for s in tried)
            for n in losses
        },
        found_by="gradients" if is_deep else "runs",
    )
    schemes = {name: schemes[name] for name in plan.schemes if name in schemes}
    return replace(plan, schemes=schemes, unquantized=(*plan.unquantized, *whole)), record


def _quantize_blocks(
    encoder: Encoder,
    blocks: Sequence[Block],
    inputs: Sequence[BlockInput],
    recipe: Recipe,
    plan: LayerPlan,
    shards: Path,
    devices: Sequence[str],
    progress: Progress,
) -> tuple[tuple[LayerRecord, ...], TuningRecord | None]:
    """Quantize block after block, each on the outputs of those before it; store each at once.

    A block's weights are read when its turn comes and freed after it, unless the finished model is
    needed to fit vectors.

    Returns:
        What the manifest says of the layers, and of tuning where each block was tuned by itself.
    """
    weights = recipe.weights
    assert not isinstance(weights, NoWeights)
    layers: list[LayerRecord] = []
    tunings: list[TuningRecord] = []
    dtype = replay_dtype(encoder) if inputs else encoder.dtype
    # What the original model feeds each block, where something is to make up for the difference.
    # Without inputs nothing is left to solve.
    compares = bool(inputs) and needs_original(recipe, plan)
    exact = [batch.copy() for batch in inputs] if compares else None
    schedule = BLOCK_SCHEDULES[_effort(recipe)] if plan.tune_by == "block" else None
    what = f"quantizing {encoder.checkpoint.id} with {recipe.name}"
    order: list[list[str]] = []
    for i, block in enumerate(blocks):
        progress(what, i, len(blocks))
        shard = _shard(shards, i)
        notes = _notes(shard)
        is_last = i + 1 == len(blocks)
        with _memory_errors(block.name):
            if notes.is_file():
                done = _Done.model_validate_json(notes.read_bytes())
                tensors = load_file(shard)
                if exact is not None and not is_last:
                    fill_(encoder, block.name, dtype)
                    _smooth_(encoder, block, inputs, weights, plan)
                    advance_(block, exact)
            else:
                fill_(encoder, block.name, dtype)
                order = _order(block, inputs, order)
                records, packed, original = _quantize_block_(
                    encoder, block, inputs, exact, order, weights, plan, dtype, devices
                )
                done = _Done(layers=records)
                tensors = _shard_tensors(block, packed, encoder.dtype)
                if exact is not None and original is not None:
                    advance_(original, exact)
                    if schedule is not None:
                        start = _codes(records, tensors, encoder.device)
                        result = tune_block(original, start, inputs, exact, schedule)
                        whole = {n: each.weight for n, each in original.linears().items()}
                        taken = _take_(tensors, records, whole, result)
                        done = _Done(layers=taken, tuning=result.record)
                del original
                save_tensors(shard, tensors)
                write_atomically(notes, done.model_dump_json().encode())
            if inputs and not is_last:
                # What is stored is what later blocks see, whether made now or by an earlier run.
                _reload_block_(encoder, block, tensors, done.layers, dtype)
                advance_(block, inputs)
            if shortens(recipe):
                _reload_block_(encoder, block, tensors, done.layers, encoder.dtype)
            else:
                empty_(encoder, block.name)
        del tensors
        give_back()
        layers += done.layers
        tunings += [] if done.tuning is None else [done.tuning]
    progress(what, len(blocks), len(blocks))
    return tuple(layers), _mean(tunings) if tunings else None


class _Done(Frozen):
    """Written when the shards that it speaks of are there, a block's or all tuned ones."""

    layers: tuple[LayerRecord, ...]
    tuning: TuningRecord | None = None


def _mean(blocks: Sequence[TuningRecord]) -> TuningRecord:
    """One record of blocks of one shape that were tuned alike."""
    means = {
        field: sum(getattr(each, field) for each in blocks) / len(blocks)
        for field in ("error_before", "error_after", "codes_changed")
    }
    return blocks[0].model_copy(update=means)


def _codes(
    records: Sequence[LayerRecord], tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, QuantizedWeight]:
    """Codes and grid of those layers whose packed tensors are among these."""
    return {
        each.name: _packed(each, tensors).unpack().to(device)
        for each in records
        if f"{each.name}.qweight" in tensors
    }


def _take_(
    tensors: dict[str, Tensor],
    records: Sequence[LayerRecord],
    whole: Mapping[str, Tensor],
    tuned: Tuned,
) -> tuple[LayerRecord, ...]:
    """Put what was tuned in the place of what the solver left: packed layers, norms and biases.

    Args:
        tensors: of one shard; changed in place.
        records: what the manifest says of the solver's layers.
        whole: the weights as they were, by the layers' names.
        tuned: what tuning found.

    Returns:
        The records of the layers in this shard.
    """
    taken = []
    for each in records:
        if f"{each.name}.qweight" not in tensors:
            continue
        codes = tuned.weights[each.name]
        parts = pack(codes).to_tensors()
        tensors |= {f"{each.name}.{part}": t.cpu() for part, t in parts.items()}
        snr = snr_db(whole[each.name], codes.dequantize())
        # What the solver had measured on the layer's output holds no longer.
        update = {"weight_snr_db": snr, "output_snr_db": None}
        taken.append(each.model_copy(update=update))
    for name in tensors.keys() & tuned.rest.keys():
        tensors[name] = tuned.rest[name].to(tensors[name])
    return tuple(taken)


def _order(block: Block, inputs: Sequence[BlockInput], known: list[list[str]]) -> list[list[str]]:
    """The block's linear layers by their names within it, stage by stage where inputs are replayed.

    Blocks of a model are alike: what is known of an earlier one holds while the names are the same,
    which spares a forward pass.
    """
    within = len(block.name) + 1
    names = [name[within:] for name in block.linears()]
    if sorted(names) == sorted(name for stage in known for name in stage):
        return known
    if not inputs:
        return [names]
    return [[name[within:] for name in stage] for stage in stages(block, inputs)]


@contextmanager
def _memory_errors(name: str) -> Iterator[None]:
    """Memory that ran out, on the device or off it, as an error that names the layer."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # The allocator of the processor, mmap's, and those of CUDA's libraries.
        said = str(error)
        if not is_memory and not any(each in said for each in ("allocate memory", "ALLOC_FAILED")):
            raise
        raise GteoptError(
            f"memory ran out at {name}; finished blocks are kept, and the same command goes on "
            f"from there. Give it more memory (`gteopt inspect` says how much a build takes), "
            f"another --device or less --activation-gb"
        ) from error


@torch.inference_mode()
def _quantize_block_(
    encoder: Encoder,
    block: Block,
    inputs: Sequence[BlockInput],
    exact: Sequence[BlockInput] | None,
    order: Sequence[Sequence[str]],
    weights: RtnWeights | GptqWeights,
    plan: LayerPlan,
    dtype: torch.dtype,
    devices: Sequence[str],
) -> tuple[tuple[LayerRecord, ...], dict[str, dict[str, Tensor]], Block | None]:
    """Replace the block's linear layers by packed ones, in running order.

    Args:
        encoder: the model that the block is part of.
        block: its weights are there.
        inputs: what the model, quantized up to here, feeds the block.
        exact: what the original model does, where something is to make up for the difference.
        order: its linear layers as `stages` has them, by their names within the block.
        weights: of the recipe.
        plan: says the layers' schemes.
        dtype: what the block runs in.
        devices: where layers are solved side by side; without any, one after the other where the
            block is.

    Returns:
        What the manifest says of each layer, each layer's packed tensors and bias, and the block as
        it was where `exact` is given.
    """
    linears = {name: linear for name, linear in block.linears().items() if name in plan.schemes}
    names = list(linears)
    records: dict[str, LayerRecord] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    chosen = _smooth_(encoder, block, inputs, weights, plan)
    # Smoothing has moved numbers between layers by now: both blocks read the same.
    original = copy_block(block) if exact is not None else None
    compared: Original | None = None
    if isinstance(weights, GptqWeights) and weights.compensate > 0:
        assert original is not None
        assert exact is not None
        compared = Original(original, exact)
    for stage in order:
        within_model = [f"{block.name}.{name}" for name in stage]
        wanted = [name for name in within_model if name in linears]
        if not wanted:
            continue
        statistics, seen, grid = None, None, None
        if isinstance(weights, GptqWeights):
            with _memory_errors(wanted[0]):
                if weights.scheme.activation_static:
                    seen = watch_inputs(block, wanted[0], inputs)
                    grid = fit_inputs(seen)
                statistics = accumulate_hessian(
                    block, wanted[0], inputs, compared, is_alone=len(wanted) == 1, grid=grid
                )
            give_back()  # what the block's run took, before the solve takes its own
        for name in wanted:
            if not gptq.is_finite(linears[name].weight):
                raise NumericsError(f"the weights of {name} hold NaN or infinity in the base")
        here = [str(encoder.device)]
        for name, found, codes in _solve(
            wanted, linears, plan, weights, statistics, grid, devices or here
        ):
            linear, records[name] = linears[name], found
            if name in chosen:
                records[name] = _with_smoothing(records[name], chosen[name])
            each = pack(codes)
            packed[name] = each.to_tensors()
            bias: Tensor | None = linear.bias
            if bias is not None:
                if seen is not None and statistics is not None:
                    # What rounding does to the mean output (Nagel et al. 2019, arXiv:1906.04721).
                    meant = linear.weight.float() @ seen.mean
                    bias = bias + (meant - codes.dequantize() @ statistics.mean).to(bias.dtype)
                packed[name]["bias"] = bias
            swap_linear_(encoder.module, name, each, bias, encoder.device, dtype)
            del linear, linears[name]  # frees the weight
    return tuple(records[name] for name in names), packed, original


def _smooth_(
    encoder: Encoder,
    block: Block,
    inputs: Sequence[BlockInput],
    weights: RtnWeights | GptqWeights,
    plan: LayerPlan,
) -> dict[str, Smoothing]:
    """Smooth the block where the recipe says so; see `smooth_block_`."""
    if not isinstance(weights, GptqWeights) or not weights.smooth:
        return {}
    model_type = str(encoder.checkpoint.config["model_type"])
    return smooth_block_(block, inputs, plan.schemes, model_type)


def _solve(
    wanted: Sequence[str],
    linears: Mapping[str, nn.Linear],
    plan: LayerPlan,
    weights: RtnWeights | GptqWeights,
    statistics: gptq.HessianAccumulator | None,
    grid: InputGrid | None,
    devices: Sequence[str],
) -> Iterator[tuple[str, LayerRecord, QuantizedWeight]]:
    """Layers that read the same inputs, in order, each as `_quantize_layer` has it.

    With several devices a thread for each: layers know nothing of each other. With one, a layer is
    solved when it is asked for, so that its weight may be freed before the next one's turn.
    """

    @torch.inference_mode()  # which is a thread's own
    def solve(name: str, device: str) -> tuple[LayerRecord, QuantizedWeight]:
        weight = linears[name].weight
        seen = None if statistics is None else statistics.to(device)
        note = plan.notes.get(name)
        with _memory_errors(name):
            found, codes = _quantize_layer(
                name, weight.to(device).float(), plan.schemes[name], weights, seen, note, grid
            )
            return found, codes.to(weight.device)

    if len(devices) == 1:
        for name in wanted:
            yield name, *solve(name, devices[0])
        return
    if statistics is not None:
        _ = statistics.hessian  # mirrored once, before threads share it
    for device in devices:
        # torch loads its GPU algebra at first use, and fails where two threads do so at once
        # (https://github.com/pytorch/pytorch/issues/90613).
        torch.linalg.cholesky_ex(torch.eye(1, device=device))
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in devices]
        futures = [
            pools[i % len(devices)].submit(solve, name, devices[i % len(devices)])
            for i, name in enumerate(wanted)
        ]
        for name, future in zip(wanted, futures, strict=True):
            yield name, *future.result()


def _with_smoothing(record: LayerRecord, found: Smoothing) -> LayerRecord:
    """The record with what was decided on the layer's inputs."""
    return record.model_copy(
        update={
            "smoothing": SmoothingRecord(
                strength=found.strength,
                error_before=found.error_before,
                error_after=found.error_after,
            )
        }
    )


def _tune_blocks(
    encoder: Encoder,
    blocks: Sequence[Block],
    solved: Sequence[LayerRecord],
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    stage: Path,
    progress: Progress,
) -> tuple[tuple[LayerRecord, ...], TuningRecord]:
    """Tune what the solver left, and write it as the shards that the artifact is made from.

    Until every one of those is there tuning starts again from the solver's.
    """
    done = stage / WEIGHTS / "tuned.json"
    shards = {i: load_file(_shard(stage / _SOLVED, i)) for i in range(len(blocks))}
    if done.is_file():
        found = _Done.model_validate_json(done.read_bytes())
    else:
        schedule = SCHEDULES[_effort(recipe)]
        assert schedule is not None
        teacher = load_checkpoint(encoder.checkpoint, device=str(encoder.device), dtype="float32")
        start: dict[str, QuantizedWeight] = {}
        for tensors in shards.values():
            start |= _codes(solved, tensors, encoder.device)
        result = tune(teacher, start, tokens, schedule, progress=progress)
        whole = {
            name: module.weight
            for name, module in teacher.module.named_modules()
            if isinstance(module, nn.Linear)
        }
        layers: list[LayerRecord] = []
        for i, tensors in shards.items():
            layers += _take_(tensors, solved, whole, result)
            save_tensors(_shard(stage / WEIGHTS, i), tensors)
        found = _Done(layers=tuple(layers), tuning=result.record)
        write_atomically(done, found.model_dump_json().encode())
    if shortens(recipe):
        for i, block in enumerate(blocks):
            records = [each for each in found.layers if each.name.startswith(f"{block.name}.")]
            tensors = load_file(_shard(stage / WEIGHTS, i))
            _reload_block_(encoder, block, tensors, records, encoder.dtype)
    assert found.tuning is not None
    return found.layers, found.tuning


def _shard(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03}.safetensors"


def _notes(shard: Path) -> Path:
    """Where it says that a shard is whole and what is in it."""
    return shard.with_suffix(".json")


def _packed(record: LayerRecord, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """One layer's packed weight among the tensors of its shard."""
    own = {part: f"{record.name}.{part}" for part in PARTS if f"{record.name}.{part}" in tensors}
    return PackedWeight.from_tensors(
        record.scheme, record.in_features, {part: tensors[name] for part, name in own.items()}
    )


def _quantize_layer(
    name: str,
    weight: Tensor,
    scheme: LayerScheme,
    weights: RtnWeights | GptqWeights,
    statistics: gptq.HessianAccumulator | None,
    note: str | None,
    grid: InputGrid | None = None,
) -> tuple[LayerRecord, QuantizedWeight]:
    """Codes of one weight matrix [O, I] float32 and what the manifest says of them."""
    notes = [note] if note else []
    output_snr = None
    if grid is not None:  # inputs come in units of its scales
        grid = grid.to(weight.device)
        weight = weight * grid.scale
    if isinstance(weights, RtnWeights):
        codes = quantize_rtn(weight, scheme, clip_search=weights.clip_search)
    else:
        assert statistics is not None
        try:
            result = gptq.solve(
                weight,
                statistics.hessian,
                scheme,
                act_order=weights.act_order,
                damping=weights.damping,
                clip_search=weights.clip_search,
                lack=statistics.lack(weight),
                share=weights.compensate,
            )
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        # A copy: layers that read the same inputs are stored each for itself.
        codes = replace(result.weight, inputs=copy.deepcopy(grid))
        output_snr = result.output_snr_db
        if result.damping > weights.damping:
            notes.append(f"damping raised to {result.damping:g} for the factorisation")
        if result.n_dead:
            notes.append(f"{result.n_dead} input features never active in calibration")
    return (
        LayerRecord(
            name=name,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            method=weights.method,
            scheme=scheme,
            bits_per_weight=pack(codes).bits_per_weight,
            weight_snr_db=snr_db(weight, codes.dequantize()),
            output_snr_db=output_snr,
            note="; ".join(notes) or None,
        ),
        codes,
    )


def _shard_tensors(
    block: Block, packed: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Everything of one block by its name in the model: packed layers and what stays as it is."""
    tensors = {
        f"{layer}.{part}": tensor.to(dtype) if part == "bias" else tensor
        for layer, parts in packed.items()
        for part, tensor in parts.items()
    }
    for name, tensor in block.module.state_dict().items():
        layer = f"{block.name}.{name}".rpartition(".")[0]
        if layer not in packed:
            tensors[f"{block.name}.{name}"] = tensor.to(dtype)
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _reload_block_(
    encoder: Encoder,
    block: Block,
    tensors: Mapping[str, Tensor],
    records: Sequence[LayerRecord],
    dtype: torch.dtype,
) -> None:
    """Put a finished block into the model, to compute in `dtype`."""
    rest = dict(tensors)
    for each in records:
        own = [name for name in rest if name.startswith(f"{each.name}.")]
        parts = {name.removeprefix(f"{each.name}."): rest.pop(name) for name in own}
        bias = parts.pop("bias", None)
        packed = PackedWeight.from_tensors(each.scheme, each.in_features, parts)
        swap_linear_(encoder.module, each.name, packed, bias, encoder.device, dtype)
    plain = {n.removeprefix(f"{block.name}."): t.to(dtype) for n, t in rest.items()}
    block.module.load_state_dict(plain, strict=False, assign=True)
    block.module.to(encoder.device)


def _finish(
    encoder: Encoder,
    recipe: Recipe,
    stage: Path,
    out: Path,
    base: BaseRecord,
    calibration: CalibrationRecord | None,
    layers: tuple[LayerRecord, ...],
    embedding: LayerRecord | None,
    allocation: AllocationRecord | None,
    tuning: TuningRecord | None,
    layout: Layout | None,
    unquantized: tuple[UnquantizedRecord, ...],
    texts: Sequence[CalibrationText],
    progress: Progress,
) -> Manifest:
    """Fit and write the vectors, then seal."""
    transform = _fit_vectors(encoder, recipe, texts, progress)
    write_vectors(transform, stage, encoder.checkpoint.matryoshka_dims)
    # What an interrupted build goes on from is there until the manifest is.
    scraps = {stage / _STATE, stage / _ALLOCATION, stage / CARD}
    scraps |= {*(stage / _SOLVED).glob("*"), *(stage / WEIGHTS).glob("*.json")}
    if layout != "gteopt":
        scraps |= {*(stage / WEIGHTS).glob("*")}
    files = file_records(stage, scraps=scraps)
    weights = [
        f
        for f in files
        if f.path.startswith((f"{WEIGHTS}/", "model", LATENT_FILE))
        and f.path.endswith(".safetensors")
    ]
    manifest = Manifest(
        schema="gteopt.artifact/1",
        recipe=recipe,
        recipe_sha256=recipe.sha256(),
        base=base,
        calibration=calibration,
        layers=layers,
        embedding=embedding,
        allocation=allocation,
        tuning=tuning,
        layout=layout,
        unquantized=unquantized,
        vectors=transform.record(),
        weight_bytes=sum(f.n_bytes for f in weights),
        files=files,
        versions=versions(),
        machine=machine(),
    )
    (stage / CARD).write_text(card(manifest, encoder.checkpoint), encoding="utf-8")
    files = tuple(sorted((*files, *file_records(stage, only=CARD)), key=lambda each: each.path))
    manifest = manifest.model_copy(update={"files": files})
    seal(stage, out, manifest)
    return manifest


def _fit_vectors(
    encoder: Encoder, recipe: Recipe, texts: Sequence[CalibrationText], progress: Progress
) -> VectorTransform:
    """The recipe's vector transform, fitted on the variant's own vectors of the texts."""
    if not shortens(recipe):
        return identity(encoder.full_dims)
    vectors = _calibration_vectors(encoder, recipe, texts, progress)
    return fit(vectors, recipe.dims, recipe.vectors)


def _calibration_vectors(
    encoder: Encoder, recipe: Recipe, texts: Sequence[CalibrationText], progress: Progress
) -> npt.NDArray[np.float32]:
    """Vectors [N, full_dims] of the calibration texts and their sentences."""
    tokens = tokenize(encoder, with_sentences(texts), recipe.calibration.max_tokens)
    vectors = np.empty((len(tokens), encoder.full_dims), np.float32)
    done = 0
    for positions, batch in encoder.batches(tokens, 32):
        vectors[positions] = encoder.embed_tokens(batch)
        done += len(batch)
        progress(f"fitting vectors of {recipe.name}", done, len(tokens))
    return vectors
