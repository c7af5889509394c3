"""`gteopt inspect`: facts of a base or an artifact, and estimates for every recipe.

Hides: how sizes follow from shapes. Refuses to know: weights; only headers and configs are read and
downloaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from gteopt.build.estimate import count_parameters, estimate_builds
from gteopt.build.quantize import ACTIVATION_BYTES
from gteopt.config.recipe import Recipe, load_recipe
from gteopt.config.yaml_files import list_shipped_names
from gteopt.encoder.description import (
    AskedBackend,
    RuntimeOptions,
    parse_dtype,
    pick_device,
    resolve_backend,
    resolve_dtype,
)
from gteopt.encoder.engines import engines_of_artifact
from gteopt.encoder.packed_weights import list_quantized_layers
from gteopt.encoder.skeleton import build_skeleton
from gteopt.errors import HubUnreachableError, InputError
from gteopt.kernels import kernel_name, speed_up_linears_
from gteopt.kernels.measured import DETERMINISTIC, choose_kernel_ways
from gteopt.model.card import stated_languages
from gteopt.model.checkpoint import Checkpoint, open_checkpoint
from gteopt.model.families import PUBLISHED
from gteopt.records.inspection import EstimateConditions, Inspection
from gteopt.records.manifest import EXPERTS
from gteopt.speed.random_model import read_model_shapes, write_published_settings


def inspect(
    source: str | Path,
    *,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
    recipe: Recipe | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    kernels: str = "deterministic",
    backend: AskedBackend = "torch",
    activation_bytes: int = ACTIVATION_BYTES,
) -> Inspection:
    """Describe a base, an artifact, or a model that another library quantized.

    A base gets an estimate for every shipped recipe. The weights of a model on the Hub are not
    downloaded.

    Args:
        source: see `open_checkpoint`.
        hub_dir: see `open_checkpoint`.
        revision: see `open_checkpoint`.
        family: see `open_checkpoint`.
        recipe: the recipe to estimate; None estimates every shipped recipe.
        dtype: see `quantize`.
        device: see `quantize`; this machine need not have it.
        kernels: kernels of an artifact on a CPU; see `load`.
        backend: "auto" finds the fastest backend; see `load`.
        activation_bytes: see `quantize`.

    Raises:
        InputError: a recipe for a model that is not a base, an unknown device, or see
            `open_checkpoint`.
        IntegrityError, UnsupportedError: see `open_checkpoint`.

    Example:
        >>> inspection = gteopt.inspect("nano")
        >>> inspection.dims
        256
    """
    kind = _kind_of(device)
    conditions = EstimateConditions(dtype=dtype, device=kind, activation_bytes=activation_bytes)
    with _opened(str(source), hub_dir, revision, family) as checkpoint:
        manifest, lengths = checkpoint.manifest, checkpoint.matryoshka_dims
        is_base = manifest is None and not checkpoint.is_quantized
        if recipe is not None and not is_base:
            raise InputError(
                f"{source} is quantized or an artifact; recipe {recipe.name} needs a base"
            )
        recipes = [recipe] if recipe else list(map(load_recipe, list_shipped_names("recipes")))
        options = RuntimeOptions(device, backend=backend, kernels=kernels)
        estimates = estimate_builds(
            checkpoint,
            recipes if is_base else (),
            dtype=dtype,
            device=kind,
            activation_bytes=activation_bytes,
            hub_dir=hub_dir,
        )
        return Inspection(
            schema="gteopt.inspection/1",
            id=checkpoint.id,
            revision=checkpoint.revision,
            sha256=checkpoint.sha256 if manifest else None,
            architecture=str(checkpoint.config["model_type"]),
            family=checkpoint.family.name if checkpoint.family else None,
            attention=checkpoint.attention,
            pooling=checkpoint.pooling,
            normalised=checkpoint.normalise,
            start_token=checkpoint.start_token,
            end_token=checkpoint.end_token,
            query_prompt=checkpoint.query_template or checkpoint.prompt("query"),
            document_prompt=checkpoint.prompt("document"),
            dims=manifest.vectors.dims if manifest else checkpoint.dims,
            matryoshka_dims=manifest.vectors.still_trained(lengths) if manifest else lengths,
            max_tokens=checkpoint.max_tokens,
            license=checkpoint.license,
            languages=stated_languages(checkpoint.folder),
            n_parameters=manifest.base.n_parameters if manifest else count_parameters(checkpoint),
            published_scores=dict(checkpoint.published.scores) if checkpoint.published else {},
            notes=(*checkpoint.notes, *(_expert_notes(checkpoint) if is_base else ())),
            estimates=tuple(estimates),
            estimated_for=conditions if is_base else None,
            manifest=manifest,
            engines=engines_of_artifact(checkpoint),
            kernels=_kernels(checkpoint, device, kernels),
        ).model_copy(update=_fastest(checkpoint, options))


@contextmanager
def _opened(
    source: str, hub_dir: Path | None, revision: str | None, family: str | None
) -> Iterator[Checkpoint]:
    """The model's checkpoint, without reading weights.

    A published name without an organisation stands for the shape that ships with gteopt. So does a
    full name where `hub_dir` lacks the model or the Hub cannot be reached.
    """
    name = source.rpartition("/")[2]
    is_shape = name in read_model_shapes() and not Path(source).exists() and revision is None
    if not is_shape or "/" in source:
        try:
            checkpoint = open_checkpoint(
                source, hub_dir=hub_dir, revision=revision, family=family, headers_only=True
            )
        except InputError as error:
            if not is_shape or (hub_dir is None and not isinstance(error, HubUnreachableError)):
                raise
        else:
            yield checkpoint
            return
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        full_id = next(hub_id for hub_id in PUBLISHED if hub_id.rpartition("/")[2] == name)
        write_published_settings(full_id, read_model_shapes()[name], folder)
        note = "sizes are computed from the shape that ships with gteopt; weights were not read"
        published = PUBLISHED[full_id]
        checkpoint = open_checkpoint(folder, family=family or published.family, headers_only=True)
        yield replace(
            checkpoint,
            id=source,
            license=published.license,
            published=published,
            matryoshka_dims=checkpoint.matryoshka_dims or published.trained_dims,
            notes=(*checkpoint.notes, note),
        )


def _expert_notes(checkpoint: Checkpoint) -> list[str]:
    """A note on the share of a base that no recipe quantizes."""
    sizes = [(p.dim(), p.numel()) for p in build_skeleton(checkpoint).parameters()]
    share = sum(n for n_axes, n in sizes if n_axes > 2) / sum(n for _, n in sizes)
    if not share:
        return []
    return [f"{EXPERTS} are {share:.0%} of all weights; no recipe quantizes them"]


def _kernels(checkpoint: Checkpoint, device: str, kernels: str) -> dict[str, int] | None:
    """The number of linear layers by kernel; see `Inspection`."""
    manifest = checkpoint.manifest
    is_foreign = manifest is None and checkpoint.is_quantized
    if is_foreign or (_kind_of(device) == "cuda" and not torch.cuda.is_available()):
        return None
    where, kind = pick_device(device), parse_dtype(resolve_dtype(checkpoint, "auto"))
    layers = list_quantized_layers(checkpoint)
    ways = choose_kernel_ways(layers, kind, kernels) if where.type == "cpu" else DETERMINISTIC
    module = build_skeleton(checkpoint).to(kind)
    speed_up_linears_(module, where, ways)
    names = {
        name: str(getattr(child, "kernel", "torch.linear"))
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    for layer in manifest.layers if manifest else ():
        shape = layer.out_features, layer.in_features
        names[layer.name] = kernel_name(layer.scheme, *shape, device=where, dtype=kind, ways=ways)
    return dict(sorted(Counter(names.values()).items()))


def _fastest(checkpoint: Checkpoint, options: RuntimeOptions) -> dict[str, str | None]:
    """`backend` and `backend_reason` of an `Inspection`; nothing if "auto" was not asked for."""
    is_here = _kind_of(options.device) == "cpu" or torch.cuda.is_available()
    if options.backend != "auto" or not is_here:
        return {}
    taken = resolve_backend(checkpoint, options)
    return {"backend": taken.backend, "backend_reason": taken.reason}


def _kind_of(device: str) -> str:
    """The kind of a device, "cpu" or "cuda"; the machine need not have it."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise InputError(f"unknown device '{device}': use auto, cpu, cuda or cuda:N")
    return device.partition(":")[0]
