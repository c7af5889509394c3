"""Build an artifact from a recipe and a base, block by block, so that a build can resume.

Hides: the order of work (plan, calibrate, solve, pack, shorten vectors, seal), and when files are
written. A finished block is stored at once, so that an interrupted build resumes after it. Refuses
to know: how codes are found (quant/), how layers run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from gteopt.build.bit_budget import allocate_schemes
from gteopt.build.blocks import (
    SOLVED,
    BlockBuild,
    block_notes_path,
    block_shard_path,
    quantize_blocks,
    tune_blocks,
)
from gteopt.build.calibration_texts import (
    draw_calibration_texts,
    draw_random_texts,
    number_text_kinds,
    record_calibration,
    tokenize_calibration,
)
from gteopt.build.fit_vectors import check_vector_recipe, needs_calibration_texts
from gteopt.build.kept_states import KeptStates
from gteopt.build.layer_plan import (
    LayerPlan,
    count_latent_parameters,
    find_embedding_layer,
    needs_original_blocks,
    plan_layers,
)
from gteopt.build.layers import layer_memory_errors
from gteopt.build.output_hessians import (
    OUTPUT_HESSIANS,
    STATE_BYTES,
    measure_output_hessians,
    output_hessian_path,
)
from gteopt.build.replay import Block, BlockInput, StateSpill, open_blocks, replay_dtype
from gteopt.build.st_folder import WEIGHTS, write_st_folder
from gteopt.build.stage import (
    BuildRun,
    StageParts,
    find_finished_variant,
    finish_stage,
    open_stage,
    seal_finished_stage,
)
from gteopt.config.recipe import GptqWeights, LayerScheme, Recipe, load_recipe
from gteopt.encoder.description import RuntimeOptions, parse_dtype
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_checkpoint
from gteopt.encoder.packed_weights import swap_embedding_
from gteopt.errors import InputError
from gteopt.model.artifact import (
    lock_stage,
    stage_folder,
)
from gteopt.model.checkpoint import Checkpoint, open_checkpoint
from gteopt.progress import Progress, ignore_progress
from gteopt.quant.affine import QuantizedWeight, pack, quantize_rtn, ratio_db
from gteopt.records.manifest import (
    AllocationRecord,
    BaseRecord,
    LayerRecord,
    Manifest,
    TuningRecord,
)

ACTIVATION_BYTES = 4 << 30
"""Default memory for the hidden states of the calibration texts."""
_EMBEDDING_ROWS = 8192


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
    progress: Progress = ignore_progress,
) -> Manifest:
    """Make the variant that `recipe` describes, and write it to `out`.

    Finished blocks are kept in a hidden folder beside `out`; after an interruption, the same call
    resumes there. If `out` already holds this variant, nothing changes.

    Args:
        base: "nano", a model folder, or `<org>/<name>`.
        recipe: a recipe, a shipped name, or a YAML file.
        out: folder of the artifact; must not exist, or be empty.
        hub_dir: folder in the Hub's layout. Models and data sets are read from it, and the network
            is not used.
        revision: revision of a base on the Hub.
        family: see `open_checkpoint`; the artifact records it.
        device: device of the build.
        devices: devices of one kind that solve layers with the same inputs at the same time, such
            as queries, keys and values. Calibration runs on the first device. Each device needs
            memory for the Hessian and the solver. The devices change no result.
        dtype: dtype of weights that are not quantized, and of the computation. A processor that
            only emulates bfloat16 computes in float32.
        activation_bytes: the most memory for hidden states of the calibration texts. Larger states
            are written to files beside `out` during the build. It changes no result.
        progress: called after each block.

    Raises:
        InputError: base, recipe, calibration texts or `out` cannot be used; raised before any work.
        IntegrityError: the base's files are damaged.
        NumericsError: weights or activations hold NaN, or a factorization failed.

    Example:
        >>> manifest = gteopt.quantize("nano", "gptq-int4", "artifacts/nano-int4")
        >>> manifest.weight_bytes < manifest.base.weight_bytes
        True
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
    check_vector_recipe(recipe, checkpoint)
    parse_dtype(dtype)
    finished = find_finished_variant(out, recipe, checkpoint.sha256, dtype)
    if finished is not None:
        return finished
    with lock_stage(stage_folder(out)):
        return _quantize(
            BuildRun(
                checkpoint=checkpoint,
                recipe=recipe,
                out=out,
                hub_dir=hub_dir,
                device=devices[0] if devices else device,
                devices=tuple(devices),
                dtype=dtype,
                activation_bytes=activation_bytes,
                progress=progress,
            )
        )


def _quantize(run: BuildRun) -> Manifest:
    """The rest of `quantize`, with checked arguments and a lock on the stage folder."""
    checkpoint, recipe = run.checkpoint, run.recipe
    sealed = seal_finished_stage(run)
    if sealed is not None:
        return sealed
    plan = plan_layers(checkpoint, recipe)
    texts = (
        draw_calibration_texts(recipe.calibration, hub_dir=run.hub_dir)
        if needs_calibration_texts(recipe)
        else ()
    )
    stage = open_stage(run)

    run.progress(f"loading {checkpoint.id}", 0, 1)
    with layer_memory_errors("the weights outside of the blocks"):
        options = RuntimeOptions(run.device, run.dtype)
        encoder = load_checkpoint(checkpoint, options, later=plan.blocks)
    base = describe_base(checkpoint, encoder)
    random = draw_random_texts(recipe, encoder.tokenization) if texts else ()
    layer_texts = texts + random
    tokens = tokenize_calibration(encoder.tokenization, layer_texts, recipe.calibration.max_tokens)
    calibration = None
    if texts:
        longest = encoder.tokenization.max_tokens
        calibration = record_calibration(
            recipe.calibration, layer_texts, tokens, n_random=len(random), longest=longest
        )
    embedding = _pack_embedding_(encoder) if recipe.embedding == "int8" else None
    allocation: AllocationRecord | None = None
    if plan.choices:
        with layer_memory_errors("the measurement of sensitivities"):
            plan, allocation = allocate_schemes(run, encoder, plan, tokens)
    layers, tuning = _quantize_layers(run, encoder, plan, tokens, number_text_kinds(layer_texts))
    write_st_folder(encoder, stage, blocks=plan.blocks, layers=layers, format=plan.format)
    parts = StageParts(
        base=base,
        calibration=calibration,
        layers=layers,
        embedding=embedding,
        allocation=allocation,
        tuning=tuning,
        format=plan.format,
        unquantized=plan.unquantized,
    )
    return finish_stage(run, encoder, parts, texts, plan.blocks)


def _quantize_layers(
    run: BuildRun,
    encoder: Encoder,
    plan: LayerPlan,
    tokens: Sequence[Sequence[int]],
    kinds: Sequence[int],
) -> tuple[tuple[LayerRecord, ...], TuningRecord | None]:
    """Quantize all blocks, and tune the whole model if the plan says so."""
    if plan.blocks is None:
        return (), None
    tuned = plan.tune_by == "model"
    shards = run.stage / (SOLVED if tuned else WEIGHTS)
    modules = list(encoder.module.get_submodule(plan.blocks).children())
    blocks = [Block(f"{plan.blocks}.{i}", m, ()) for i, m in enumerate(modules)]
    inputs: list[BlockInput] = []
    is_done = [block_notes_path(block_shard_path(shards, i)).is_file() for i in range(len(blocks))]
    output_hessians: Path | None = None
    if not all(is_done) and plan.corrects_rows:
        output_hessians = run.stage / OUTPUT_HESSIANS
        # Files are written from the last block to the first.
        if not output_hessian_path(output_hessians, blocks[is_done.index(False)].name).is_file():
            states = run.activations / "fed"
            with layer_memory_errors("the measurement of gradients"):
                measure_output_hessians(
                    *(encoder, tokens, plan.schemes, output_hessians),
                    spill=StateSpill(min(run.activation_bytes, STATE_BYTES), states),
                    progress=run.progress,
                )
            shutil.rmtree(states, ignore_errors=True)
    if not all(is_done) and isinstance(run.recipe.weights, GptqWeights):
        # With the original model's hidden states, each kind gets half of the memory.
        n_kinds = 2 if needs_original_blocks(run.recipe, plan) else 1
        spill = StateSpill(run.activation_bytes // n_kinds, run.activations)
        with layer_memory_errors(blocks[0].name):
            blocks, inputs = open_blocks(
                encoder, tokens, kinds=kinds, dtype=replay_dtype(encoder), spill=spill
            )
    build = BlockBuild(encoder, run.recipe, plan, run.devices, run.progress, output_hessians)
    # States of at most the token table's size never raise the peak disk of the build, because the
    # table is written only at the end.
    table = encoder.module.get_input_embeddings()  # type: ignore[operator]
    n_bytes = sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers()))
    # States above `activation_bytes` are on disk already; a second copy would double their size.
    kept = KeptStates(run.activations / "kept", min(n_bytes, run.activation_bytes))
    layers, tuning = quantize_blocks(build, blocks, inputs, shards, kept)
    del inputs
    shutil.rmtree(run.activations, ignore_errors=True)
    shutil.rmtree(run.stage / OUTPUT_HESSIANS, ignore_errors=True)
    if tuned:
        with layer_memory_errors("the tuning of the whole model"):
            layers, tuning = tune_blocks(build, blocks, layers, tokens, run.stage)
    return layers, tuning


@torch.inference_mode()
def _pack_embedding_(encoder: Encoder) -> LayerRecord:
    """Replace the token embedding table by int8 rows; a few thousand rows at a time."""
    name = find_embedding_layer(encoder.module)
    table = encoder.module.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    scheme = LayerScheme(bits=8, group_size="per_channel", symmetric=True)
    chunks: list[QuantizedWeight] = []
    signal = noise = 0.0
    for rows in torch.split(table.weight, _EMBEDDING_ROWS):
        chunks.append(quantize_rtn(rows, scheme))
        signal += rows.double().square().sum().item()
        noise += (rows.double() - chunks[-1].dequantize()).square().sum().item()
    codes, scale, zero = (
        torch.cat([getattr(chunk, part) for chunk in chunks]) for part in ("codes", "scale", "zero")
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


def describe_base(checkpoint: Checkpoint, encoder: Encoder) -> BaseRecord:
    """The manifest's record of the base."""
    n_parameters = sum(p.numel() for p in encoder.module.parameters())
    n_parameters += count_latent_parameters(checkpoint)
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
