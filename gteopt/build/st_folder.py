"""Write an artifact as a Sentence Transformers folder, as artifacts/README.md specifies it.

Hides: which files other libraries expect, and how packed weights are stored. The files are a list
of modules, pooling, prompts, a tokenizer that appends the end token, and a projection as a Dense
module. Refuses to know: how weights or projections were computed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gteopt.build.tensor_files import save_tensors, tensor_write_errors
from gteopt.config.recipe import FormatName
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_latent_tensors
from gteopt.encoder.skeleton import find_tied_names
from gteopt.encoder.tokenization import Tokenization
from gteopt.formats import FORMATS, Format
from gteopt.model.checkpoint import (
    LATENT_FILE,
    LATENT_PREFIX,
    VECTOR_MODULES,
    VECTORS_FILE,
    Checkpoint,
)
from gteopt.model.config_file import hidden_dims
from gteopt.model.st_files import STATIC, ModuleEntry
from gteopt.quant.affine import PARTS, PackedWeight
from gteopt.records.manifest import LayerRecord
from gteopt.vectors.transform import VectorTransform
from gteopt.version import __version__

WEIGHTS = "weights"
_REST = "rest"
_FILE_BYTES = 256 << 20
"""The most bytes of blocks in one file of standard weights, because a file is in memory while it is
converted. A larger block gets its own file."""


def write_st_folder(
    encoder: Encoder,
    stage: Path,
    *,
    blocks: str | None,
    layers: Sequence[LayerRecord],
    format: FormatName | None,
) -> None:
    """Write config, weights, tokenizer and the Sentence Transformers module files.

    Args:
        encoder: the loaded model, quantized or not.
        stage: the folder to write into.
        blocks: name of the list of transformer blocks whose shards `stage` already holds; None
            writes all weights as transformers does.
        layers: the quantized layers in those shards.
        format: format of the weights; "gteopt" keeps the shards.
    """
    checkpoint = encoder.checkpoint
    config = {
        **checkpoint.artifact_config,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "architectures": [type(encoder.module).__name__],
    }
    config.pop("torch_dtype", None)
    if checkpoint.latent is not None:
        config["architectures"] = ["NVEmbedModel"]
        kept = load_latent_tensors(checkpoint, encoder.dtype)
        save_tensors(stage / LATENT_FILE, {f"{LATENT_PREFIX}{n}": t for n, t in kept.items()})
    _write_json(stage / "config.json", config)
    if blocks is not None:
        ties = find_tied_names(encoder.module)
        rest = {
            name: tensor.contiguous().cpu()
            for name, tensor in encoder.module.state_dict().items()
            if not name.startswith(f"{blocks}.") and name not in ties
        }
        save_tensors(stage / WEIGHTS / f"{_REST}.safetensors", rest)
        form = FORMATS.get(format) if format is not None else None
        if form is not None:
            schemes = {layer.name: layer.scheme for layer in layers}
            linears = [n for n, m in encoder.module.named_modules() if isinstance(m, nn.Linear)]
            config["quantization_config"] = form.quantization_config(
                schemes,
                # Filtered, because the model of a resumed build may still have plain layers.
                [name for name in linears if name not in schemes],
                blocks,
                f"gteopt:{__version__}",
            )
            _write_json(stage / "config.json", config)
            _write_standard(stage, layers, form)
    else:
        # safetensors stores each tensor once; the architecture restores tied names.
        with tensor_write_errors(stage / "model.safetensors"):
            encoder.module.save_pretrained(stage)  # type: ignore[operator]
        _write_json(stage / "config.json", config)
    _write_tokenizer(checkpoint, stage)
    _write_modules(checkpoint, stage)


def _write_standard(stage: Path, layers: Sequence[LayerRecord], form: Format) -> None:
    """Convert the staged shards to the files that other libraries read.

    The shards stay, so that an interrupted build can resume from them.
    """
    shards = sorted((stage / WEIGHTS).glob("*.safetensors"))
    files: list[list[Path]] = []
    free_bytes = 0
    for path in shards:
        n_bytes = path.stat().st_size
        if not files or n_bytes > free_bytes:
            files.append([])
            free_bytes = _FILE_BYTES
        files[-1].append(path)
        free_bytes -= n_bytes
    where: dict[str, str] = {}
    total = 0
    for i, parts in enumerate(files, start=1):
        tensors: dict[str, Tensor] = {}
        for path in parts:
            tensors |= _standard_tensors(load_file(path), layers, form)
        name = f"model-{i:05}-of-{len(files):05}.safetensors"
        if len(files) == 1:
            name = "model.safetensors"
        if [path.stem for path in parts] == [_REST]:  # it has no packed layers to convert
            parts[0].replace(stage / name)
        else:
            save_tensors(stage / name, tensors)
        where |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(stage / "model.safetensors.index.json", index)


def _standard_tensors(
    tensors: dict[str, Tensor], layers: Sequence[LayerRecord], form: Format
) -> dict[str, Tensor]:
    """The tensors of a shard with its packed layers in another format; others are unchanged."""
    for layer in layers:
        names = {part: f"{layer.name}.{part}" for part in PARTS}
        if names["qweight"] not in tensors:
            continue
        parts = {part: tensors.pop(name) for part, name in names.items() if name in tensors}
        packed = PackedWeight.from_tensors(layer.scheme, layer.in_features, parts)
        tensors |= {f"{layer.name}.{n}": t for n, t in form.to_tensors(packed).items()}
    return tensors


def _write_tokenizer(checkpoint: Checkpoint, stage: Path) -> None:
    """Write the tokenizer; it is changed to append the end token, as other libraries expect."""
    tokenization = Tokenization(checkpoint)
    tokenizer = tokenization.tokenizer
    if tokenization.end_ids:
        ids = tokenizer("a")["input_ids"]
        starts, ends = tokenization.start_ids, tokenization.end_ids
        has_start, has_end = ids[: len(starts)] == starts, ids[-len(ends) :] == ends
        start, end = (tokenizer.convert_ids_to_tokens(ids) for ids in (starts, ends))
        missing = [*([] if has_start else start), *([] if has_end else end)]
        if missing:
            from tokenizers.processors import Sequence as Processors
            from tokenizers.processors import TemplateProcessing

            parts = [*([] if has_start else start), "$A", *([] if has_end else end)]
            template = TemplateProcessing(
                single=" ".join(parts),
                special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in missing],
            )
            backend = tokenizer.backend_tokenizer
            before = backend.post_processor
            backend.post_processor = Processors([before, template]) if before else template
    tokenizer.model_max_length = checkpoint.max_tokens
    tokenizer.save_pretrained(stage)


def _write_modules(checkpoint: Checkpoint, stage: Path) -> None:
    """Write modules.json and its files, in the form that all Sentence Transformers releases read.

    A model with latent attention gets no modules.json, because Sentence Transformers has no module
    for it. Then it refuses the folder; with another pooling it would give wrong vectors.
    """
    if checkpoint.latent is not None:
        return
    modules = checkpoint.modules or tuple(
        ModuleEntry(kind, "", "")
        for kind in ("Transformer", "Pooling", *["Normalize"] * checkpoint.normalise)
    )
    rows = []
    for i, module in enumerate(modules):
        path = "" if module.kind in ("Transformer", STATIC) else f"{i}_{module.kind}"
        kind = f"sentence_transformers.models.{module.kind}"
        rows.append({"idx": i, "name": str(i), "path": path, "type": kind})
        if module.kind == "Pooling" and checkpoint.pooling != "modules":
            _write_json(stage / path / "config.json", _pooling_config(checkpoint))
        elif module.config:
            _write_json(stage / path / "config.json", dict(module.config))
            weights = checkpoint.folder / module.path / "model.safetensors"
            if weights.is_file():
                shutil.copyfile(weights, stage / path / weights.name)
    _write_json(stage / "modules.json", rows)
    settings, transformer = checkpoint.st.settings, checkpoint.st.transformer
    prompts = {name: text or "" for name, text in settings.prompts.items()}
    if checkpoint.query_template is not None and not prompts.get("query"):
        query = checkpoint.query_template.format(instruction=checkpoint.default_instruction)
        prompts = {**prompts, "query": query, "document": checkpoint.prompt("document")}
    default = settings.default_prompt_name
    if default is None and checkpoint.family and checkpoint.family.document_prompt:
        default = "document"  # so that Sentence Transformers uses the prompt for documents, too
        prompts["document"] = checkpoint.prompt("document")
    _write_json(
        stage / "config_sentence_transformers.json",
        {
            "prompts": prompts,
            "default_prompt_name": default,
            "similarity_fn_name": settings.similarity,
        },
    )
    lengths = {
        name: value
        for name in ("query_length", "document_length", "processing_kwargs")
        if (value := getattr(transformer, name))
    }
    _write_json(
        stage / "sentence_bert_config.json",
        {
            "max_seq_length": checkpoint.max_tokens,
            "do_lower_case": checkpoint.lower_case,
            **lengths,
        },
    )


def _pooling_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a pooling with one mode, with the names that every release reads."""
    return {
        "word_embedding_dimension": hidden_dims(checkpoint.config),
        **{
            f"pooling_mode_{name}": checkpoint.pooling == short
            for name, short in (("cls_token", "cls"), ("mean_tokens", "mean"))
        },
        "pooling_mode_lasttoken": checkpoint.pooling == "lasttoken",
        "include_prompt": not checkpoint.excludes_prompt,
    }


def write_st_vectors(transform: VectorTransform, stage: Path, trained: Sequence[int]) -> None:
    """Write vectors.safetensors, and the projection as modules for Sentence Transformers.

    config.json gets the dimensions to which engines may cut these vectors.

    Args:
        transform: how the model's vectors are shortened and coded.
        stage: the folder, which holds everything else already.
        trained: the base's Matryoshka dimensions.
    """
    config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
    config.pop("matryoshka_dimensions", None)
    if lengths := transform.record().still_trained(trained):
        config["matryoshka_dimensions"] = list(lengths)
    _write_json(stage / "config.json", config)
    tensors = {name: torch.from_numpy(array) for name, array in transform.to_tensors().items()}
    if tensors:
        save_tensors(stage / VECTORS_FILE, tensors)
    if not (stage / "modules.json").is_file():
        return
    written = json.loads((stage / "modules.json").read_text(encoding="utf-8"))
    modules = [m for m in written if not m["path"].startswith(VECTOR_MODULES)]
    is_plain = transform.method == "full" and transform.projection is None
    if not is_plain:
        modules += _vector_modules(transform, stage, len(modules))
    if modules != written:
        _write_json(stage / "modules.json", modules)
    settings = stage / "config_sentence_transformers.json"
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if (content.get("similarity_fn_name") == "dot") != (transform.similarity == "dot"):
        _write_json(settings, {**content, "similarity_fn_name": transform.similarity})


def _vector_modules(
    transform: VectorTransform, stage: Path, n_before: int
) -> list[dict[str, int | str]]:
    """Write the projection's files; returns their entries for modules.json."""
    weight = transform.projection
    if weight is None:
        weight = np.eye(transform.dims, transform.full_dims, dtype=np.float32)
    dense = stage / f"{VECTOR_MODULES}dense"
    _write_json(
        dense / "config.json",
        {
            "in_features": transform.full_dims,
            "out_features": transform.dims,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    save_tensors(dense / "model.safetensors", {"linear.weight": torch.from_numpy(weight)})
    kinds = ("dense", "normalize") if transform.similarity == "cosine" else ("dense",)
    return [
        {
            "idx": i,
            "name": str(i),
            "path": f"{VECTOR_MODULES}{kind}",
            "type": f"sentence_transformers.models.{kind.capitalize()}",
        }
        for i, kind in enumerate(kinds, start=n_before)
    ]


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
