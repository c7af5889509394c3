"""Write models of published shapes with random weights, to measure speed without a download.

The result is a Sentence Transformers folder with last-token pooling and the tokenizer of gte-nano.
Another tokenizer would not change the time of a token. NV-Embed's own pooling is not measured.

Hides: the shapes of published models (`assets/configs/`), how a folder of random weights is written
without holding it in memory. Refuses to know: what is measured on it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from gteopt.encoder.tokenization import import_transformers
from gteopt.errors import InputError, UnsupportedError, suggest_names
from gteopt.model.checkpoint import open_checkpoint
from gteopt.model.families import FAMILIES, PUBLISHED
from gteopt.paths import ASSETS
from gteopt.progress import Progress, ignore_progress

_CONFIGS = ASSETS / "configs"
_DECODERS = ("qwen2", "qwen3", "mistral")
_DEVIATION = 0.02
_ATTEND, _MLP = (f"latent_attention_model.cross_attend_blocks.{i}." for i in (0, 1))
_LATENT: Mapping[str, tuple[int, ...]] = {
    "latent_attention_model.latents": (512, 4096),
    **{
        f"{norm}.{part}": (4096,)
        for norm in (f"{_ATTEND}norm", f"{_ATTEND}norm_context", f"{_MLP}norm")
        for part in ("weight", "bias")
    },
    f"{_ATTEND}fn.to_q.weight": (32_768, 4096),
    f"{_ATTEND}fn.to_kv.weight": (65_536, 4096),
    f"{_ATTEND}fn.to_out.weight": (4096, 32_768),
    f"{_MLP}fn.net.0.weight": (32_768, 4096),
    f"{_MLP}fn.net.0.bias": (32_768,),
    f"{_MLP}fn.net.2.weight": (4096, 16_384),
    f"{_MLP}fn.net.2.bias": (4096,),
}
"""NV-Embed's pooling: 512 latents and 8 heads of the model's width (arXiv:2405.17428)."""
_MEMORY_SHARE, _DISK_SHARE = 1.7, 2.5
"""What a bench needs, in multiples of the model's bytes. In memory it has the model, its largest
variant (int8, with the token table unquantized) and a batch. On disk it has the model and three
variants."""


def read_model_shapes() -> dict[str, dict[str, Any]]:
    """`config.json` of the models whose shape ships with gteopt, by published name.

    Models of the same sizes share one file.
    """
    shipped = {path.stem: json.loads(path.read_text()) for path in sorted(_CONFIGS.glob("*.json"))}
    shared = {
        name.rpartition("/")[2]: dict(shipped[published.shape])
        for name, published in PUBLISHED.items()
        if published.shape
    }
    return shipped | shared


def write_random_model(
    base: str,
    folder: Path,
    *,
    n_layers: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress = ignore_progress,
) -> tuple[int, int]:
    """Write a model folder with random bfloat16 weights, one file for each block.

    Linear weights are normal with deviation 0.02. Weights that write into the residual stream are
    divided by sqrt(2 n_layers) (Radford et al. 2019, section 2.3). So activations are as large as
    in trained models. Norms are one, biases zero.

    Args:
        base: name of a published model, with or without its organization, or a folder with a
            `config.json`.
        folder: where to write; must not exist.
        n_layers: blocks to keep, counted from the first; None keeps all.
        seed: seed of the weights.
        device: where weights are drawn, a block at a time. A GPU is much faster, but draws other
            weights than a CPU.
        progress: called after each block.

    Returns:
        The number of blocks written, and the number of blocks of the model.

    Raises:
        InputError: the name is unknown, the model has fewer blocks, or memory or disk is too small.
        UnsupportedError: the architecture is not Qwen2, Qwen3 or Mistral.
    """
    config, n_of_model = shape_at_depth(base, n_layers)
    n = int(config["num_hidden_layers"])
    _check_room(base, config, n, n_of_model, folder.parent)
    write_model_frame(config, folder)
    generator = torch.Generator(device).manual_seed(seed)
    where: dict[str, str] = {}
    n_bytes = 0
    for part in range(n + 1):
        file = f"model-{part + 1:05d}-of-{n + 1:05d}.safetensors"
        tensors = {name: weight.cpu() for name, weight in random_block(config, part, generator)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        n_bytes += sum(weight.nbytes for weight in tensors.values())
        progress(f"writing random weights of {base}", part + 1, n + 1)
    index = {"metadata": {"total_size": n_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return n, n_of_model


def shape_at_depth(base: str, n_layers: int | None = None) -> tuple[dict[str, Any], int]:
    """`config.json` of a shape with `n_layers` blocks, and how many blocks the model has.

    Arguments and errors are those of `write_random_model`.
    """
    config = _config(base)
    n_of_model = int(config["num_hidden_layers"])
    n = n_of_model if n_layers is None else n_layers
    if not 1 <= n <= n_of_model:
        raise InputError(f"--layers {n}: {base} has {n_of_model} blocks; give 1 to {n_of_model}")
    config["num_hidden_layers"] = config["max_window_layers"] = n
    config.pop("layer_types", None)
    return config, n_of_model


def write_model_frame(config: Mapping[str, Any], folder: Path) -> None:
    """Write a model folder of a shape without weights; `folder` must not exist."""
    nano = open_checkpoint("nano")
    shutil.copytree(nano.folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "LICENSE"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    pooling = folder / "1_Pooling" / "config.json"
    settings = json.loads(pooling.read_text())
    sizes = ("word_embedding_dimension", "embedding_dimension")
    settings.update({key: config["hidden_size"] for key in sizes if key in settings})
    pooling.write_text(json.dumps(settings))


def write_published_settings(name: str, config: Mapping[str, Any], folder: Path) -> None:
    """Write the settings of a published model's folder, for checks that need no weights.

    The tokenizer is gte-nano's, and weight files have a header only.

    Args:
        name: name of the model, with its organization.
        config: config.json of its transformer.
        folder: where to write; must not exist.
    """
    published = PUBLISHED[name]
    family = FAMILIES[published.family] if published.family else None
    pooling = published.pooling or (family.pooling if family else None)
    write_model_frame(config, folder)
    for of_nano in ("sentence_bert_config.json", "README.md"):
        (folder / of_nano).unlink()
    tokenizer = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(tokenizer.read_text())
    longest = published.max_tokens or (family.max_tokens if family else None)
    tokenizer_config["model_max_length"] = longest
    tokenizer.write_text(json.dumps(tokenizer_config))
    prompts = {"query": published.query_prompt, "document": published.document_prompt}
    settings = {"prompts": {role: text for role, text in prompts.items() if text}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    sizes = _sizes(config)
    if pooling == "latent" or (family is not None and family.excludes_prompt):
        (folder / "modules.json").unlink()  # the published folder has none
    else:
        modules: list[tuple[str, dict[str, Any]]] = [("Transformer", {})]
        width = int(config["hidden_size"])
        modules.append(("Pooling", {"embedding_dimension": width, "pooling_mode": pooling}))
        for n_in, n_out in pairwise((width, *published.dense)):
            modules.append(("Dense", {"in_features": n_in, "out_features": n_out, "bias": False}))
        _write_modules([*modules, ("Normalize", {})], folder)
    if pooling == "latent":
        nested = {"model_type": "nvembed", "text_config": dict(config)}
        (folder / "config.json").write_text(json.dumps({**nested, "latent_attention_config": {}}))
        nested_sizes = {f"embedding_model.{part}": shape for part, shape in sizes.items()}
        sizes = {**nested_sizes, **_LATENT}
    write_sparse_weights(sizes, folder / "model.safetensors")


def _write_modules(modules: Sequence[tuple[str, Mapping[str, Any]]], folder: Path) -> None:
    """Write modules.json and the folders that it names; Dense layers have no bias or numbers."""
    rows = []
    for i, (kind, config) in enumerate(modules):
        path = f"{i}_{kind}" if i else ""
        rows.append({"idx": i, "name": str(i), "path": path})
        rows[-1]["type"] = f"sentence_transformers.models.{kind}"
        if i:
            (folder / path).mkdir(exist_ok=True)
            (folder / path / "config.json").write_text(json.dumps(config))
        if kind == "Dense":
            (folder / path / "config.json").write_text(
                json.dumps({**config, "activation_function": "torch.nn.modules.linear.Identity"})
            )
            shape = config["out_features"], config["in_features"]
            write_sparse_weights({"linear.weight": shape}, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(rows))


def _sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of an architecture."""
    from accelerate import init_empty_weights

    transformers = import_transformers()
    fields = {name: value for name, value in config.items() if name != "model_type"}
    with init_empty_weights():
        kind = transformers.AutoConfig.for_model(config["model_type"], **fields)
        module = transformers.AutoModel.from_config(kind)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def write_sparse_weights(shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Write a safetensors file of bfloat16 tensors whose numbers are a hole: it takes no disk."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def random_block(
    config: Mapping[str, Any], part: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Names and bfloat16 weights of one block, as `write_random_model` draws them.

    Args:
        config: config.json of the model.
        part: number of the block; the number of blocks means all weights outside of the blocks.
        generator: random numbers; weights are drawn on its device.
    """
    n = int(config["num_hidden_layers"])
    for name, shape in _parts(config, part, n):
        yield name, _random(name, shape, n, generator)


def _config(base: str) -> dict[str, Any]:
    shipped = read_model_shapes()
    name = base.rpartition("/")[2]
    file = Path(base) / "config.json"
    if file.is_file():
        config: dict[str, Any] = json.loads(file.read_text())
        config.pop("auto_map", None)
    elif name in shipped:
        config = shipped[name]
    else:
        raise InputError(
            f"gteopt does not know the shape of '{base}': {suggest_names(name, shipped)}; or give "
            f"a folder with its config.json"
        )
    if config.get("model_type") not in _DECODERS:
        raise UnsupportedError(
            f"{base} is a {config.get('model_type')}; random weights are made for "
            f"{', '.join(_DECODERS)} only"
        )
    return config


def largest_depth(base: str, scratch: Path) -> int:
    """How many blocks of `base` fit into memory and onto the disk of `scratch`; at least 1.

    Raises:
        InputError, UnsupportedError: see `write_random_model`.
    """
    config, n_of_model = shape_at_depth(base)
    frame, block = _frame_and_block_bytes(config)
    fits = min(int((free / share - frame) // block) for _, share, free in _room(scratch))
    return max(1, min(n_of_model, fits))


def _frame_and_block_bytes(config: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the weights outside of the blocks, and bytes of one block."""

    def part_bytes(part: int) -> int:
        return sum(2 * torch.Size(shape).numel() for _, shape in _parts(config, part, 1))

    return part_bytes(1), part_bytes(0)


def _room(scratch: Path) -> tuple[tuple[str, float, int], ...]:
    """What a bench needs: the resource, a multiple of the model's bytes, and the free bytes."""
    return (
        ("memory", _MEMORY_SHARE, int(psutil.virtual_memory().available)),
        (f"disk in {scratch}", _DISK_SHARE, shutil.disk_usage(scratch).free),
    )


def _check_room(
    base: str, config: Mapping[str, Any], n: int, n_of_model: int, scratch: Path
) -> None:
    """Check memory and disk before the slow part.

    Raises:
        InputError: says what is needed, what is free and how many layers fit.
    """
    frame, block = _frame_and_block_bytes(config)
    for resource, share, free in _room(scratch):
        if share * (frame + n * block) > free:
            fits = int((free / share - frame) // block)
            advice = f"; --layers {fits} fits" if fits > 0 else ""
            needed = share * (frame + n * block)
            raise InputError(
                f"{n} of {n_of_model} blocks of {base} take {needed / 1e9:.1f} GB of {resource} to "
                f"build and measure, {free / 1e9:.1f} GB are free{advice}"
            )


def _parts(
    config: Mapping[str, Any], part: int, n_layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of block `part`; for `n_layers`, of the weights outside of the blocks."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    if part == n_layers:
        yield "embed_tokens.weight", (int(config["vocab_size"]), hidden)
        yield "norm.weight", (hidden,)
        return
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or hidden // heads)
    q, kv = heads * width, int(config["num_key_value_heads"]) * width
    prefix = f"layers.{part}."
    for name, n_out in (("q", q), ("k", kv), ("v", kv)):
        yield f"{prefix}self_attn.{name}_proj.weight", (n_out, hidden)
        if config["model_type"] == "qwen2":
            yield f"{prefix}self_attn.{name}_proj.bias", (n_out,)
    if config["model_type"] == "qwen3":
        for name in ("q", "k"):
            yield f"{prefix}self_attn.{name}_norm.weight", (width,)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, q)
    yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
    yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
    yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
    yield f"{prefix}input_layernorm.weight", (hidden,)
    yield f"{prefix}post_attention_layernorm.weight", (hidden,)


def _random(name: str, shape: tuple[int, ...], n_layers: int, generator: torch.Generator) -> Tensor:
    kind: Any = {"dtype": torch.bfloat16, "device": generator.device}
    if name.endswith("norm.weight"):
        return torch.ones(shape, **kind)
    if name.endswith("bias"):
        return torch.zeros(shape, **kind)
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    deviation = _DEVIATION / ((2 * n_layers) ** 0.5 if writes else 1)
    return torch.empty(shape, **kind).normal_(0, deviation, generator=generator)
