"""Measure how close each quantizer's variant is to the original model, on the same texts.

Prints a table for each model and writes one JSON, row by row. Other rows of the file stay, and
`--only` names the rows to measure. A peer that is not installed, or that refuses a model, has its
error in the table. `make interop` makes the environment with the peers:

    .venv-interop/bin/python benchmarks/peers_quality.py --hub-dir ../shared/hub \
        --beir ../shared/beir/cranfield --out benchmarks/results/peers_quality.json

Everything is float32 except quantized weights and 8-bit activations. Activations have 8 bits even
if this processor's product takes 7. Everyone calibrates on the same token ids: those of the first
built-in texts (--n-texts), and those of the random texts that gteopt adds to them. Rows "ideal
texts" are peers that calibrate on other texts of the sources that judge.

Variants are judged on the kinds of text of `text_kinds.py`, which come from other sources. The JSON
has the fields of `KindError` for each kind. Bits are those of the quantized layers as stored, with
scales and zero points.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_folders import model_folder
from numpy.typing import NDArray
from results_files import write_results
from text_kinds import encode_kinds, ideal_texts, judged_texts, kind_errors, mean_and_worst
from torch import nn

import gteopt
from gteopt.build.calibration_texts import (
    draw_calibration_texts,
    draw_random_texts,
    tokenize_calibration,
)
from gteopt.config.recipe import Calibration, Effort, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.tokenization import Role
from gteopt.kernels import KERNELS
from gteopt.kernels.cpu import DenseLinearCpu, activation_bits
from gteopt.machine import describe_machine, read_library_versions
from gteopt.speed.clock import Stopwatch

SCHEMA = "gteopt.peers-quality/2"
MAX_TOKENS = Calibration().max_tokens
PEERS = ("llmcompressor", "gptqmodel", "optimum", "torchao", "bitsandbytes", "hqq")
Variant = tuple[Encoder, float]
TokenIds = list[list[int]]


@dataclass(frozen=True)
class Row:
    """One variant of one model; a variant that could not be made has only `error`.

    Attributes:
        kinds: the fields of `KindError` by kind of text.
        mean: mean over kinds of 1 - cosine.
        worst: 1 - cosine of the worst kind.
        worst_kind: name of the worst kind.
        neighbour_overlap: mean over kinds.
        p1_cosine: least of all kinds.
        build_s: wall time of the build.
        cpu_s: CPU time of the build.
    """

    model: str
    peer: str
    bits_per_weight: float | None = None
    kinds: dict[str, dict[str, float]] | None = None
    mean: float | None = None
    worst: float | None = None
    worst_kind: str | None = None
    neighbour_overlap: float | None = None
    p1_cosine: float | None = None
    build_s: float | None = None
    cpu_s: float | None = None
    cpu: str | None = None
    transformers: str | None = None
    error: str | None = None


def main() -> None:
    """Measure every peer on every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--beir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["all-MiniLM-L6-v2", "gte-nano"])
    parser.add_argument("--only", nargs="+", help="peers to run, in this order, instead of all")
    parser.add_argument("--n-texts", type=int, default=256, help="calibration texts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    calibration = Calibration(n_texts=options.n_texts)
    if activation_bits() < 8:
        for key in [k for k in KERNELS if k[0].startswith("int8") and k[1] == "cpu"]:
            del KERNELS[key]
    texts = judged_texts(options.hub_dir, options.beir)
    rows: list[Row] = []
    if options.out and options.out.is_file():
        before = json.loads(options.out.read_text())
        if before["schema"] == SCHEMA and before["calibration"] == calibration.model_dump():
            rows = [Row(**row) for row in before["rows"]]
    for model in options.models:
        source = model_folder(model)
        base = gteopt.load(source, dtype="float32")
        reference = encode_kinds(base, texts)
        print(f"\n{model}: 1 - cosine, mean and worst of {', '.join(texts)}")
        print(f"{'':32}{'bits':>6}{'mean':>9}{'worst':>9}{'p1':>8}{'NN@10':>8}{'CPU s':>8}")
        table = quantizers(base, calibration)
        table |= ideal_peers(base, ideal_texts(options.hub_dir, options.beir))
        for peer in options.only or table:
            row = measure(model, peer, table[peer], source, reference, texts)
            rows = [r for r in rows if (r.model, r.peer) != (model, peer)]
            rows.append(row)
            print(show(row), flush=True)
            if options.out:
                write(options.out, calibration, rows)


def write(path: Path, calibration: Calibration, rows: list[Row]) -> None:
    """Write all rows so far; a peer that is not installed keeps its earlier version."""
    before = json.loads(path.read_text())["versions"] if path.is_file() else {}
    record = {
        "schema": SCHEMA,
        "calibration": calibration.model_dump(),
        "rows": [asdict(row) for row in rows],
        "machine": describe_machine().model_dump(),
        "versions": {**before, **read_library_versions(), **peer_versions(PEERS)},
        "n_threads": torch.get_num_threads(),
    }
    write_results(path, record, indent=2)


def measure(
    model: str,
    peer: str,
    make: Callable[[Path], Variant],
    source: Path,
    reference: Mapping[str, NDArray[np.float32]],
    texts: Mapping[str, list[str]],
) -> Row:
    """Build one variant and compare it with the original."""
    cpu, transformers = describe_machine().cpu, version("transformers")
    watch = Stopwatch()
    try:
        encoder, bits = make(source)
        build_s, cpu_s = watch.wall_s, watch.cpu_s
        errors = kind_errors(reference, encode_kinds(encoder, texts))
    except Exception as error:
        # A peer may refuse a model in any way; the refusal is the result.
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
        return Row(model, peer, cpu=cpu, transformers=transformers, error=reason[:160])
    mean, worst, worst_kind = mean_and_worst(errors)
    return Row(
        model=model,
        peer=peer,
        bits_per_weight=bits,
        kinds={kind: asdict(error) for kind, error in errors.items()},
        mean=mean,
        worst=worst,
        worst_kind=worst_kind,
        neighbour_overlap=float(np.mean([error.neighbour_overlap for error in errors.values()])),
        p1_cosine=min(error.p1_cosine for error in errors.values()),
        build_s=build_s,
        cpu_s=cpu_s,
        cpu=cpu,
        transformers=transformers,
    )


def quantizers(base: Encoder, calibration: Calibration) -> dict[str, Callable[[Path], Variant]]:
    """By name, a function that makes a variant of the model in a folder."""
    recipe = load_recipe("gptq-int4").model_copy(update={"calibration": calibration})
    texts = draw_calibration_texts(calibration) + draw_random_texts(recipe, base.tokenization)
    tokens = [
        list(ids) for ids in tokenize_calibration(base.tokenization, texts, calibration.max_tokens)
    ]
    ours = ["rtn-int4", "gptq-int4", "gptq-nf4", "gptq-int4-guided", "gptq-nf4-guided"]
    ours += [
        "mixed-nf4",
        "mixed-4.25",
        "mixed-3.5",
        "gptq-int3",
        "int8-static",
        "int8-weight",
        "gptq-int8",
        "int8",
        "rtn-int8",
        "fp8",
    ]
    table: dict[str, Callable[[Path], Variant]] = {}
    for name in ours:
        table[f"gteopt {name}"] = partial(gteopt_recipe, name=name, calibration=calibration)
    efforts: tuple[Effort, ...] = ("standard", "best")
    for effort in efforts:
        make = partial(gteopt_recipe, name="mixed-nf4", calibration=calibration, effort=effort)
        table[f"gteopt mixed-nf4 {effort}"] = make
    for scheme in ("W4A16_ASYM", "W4A16", "W8A8"):
        make = partial(llm_compressor, scheme=scheme, tokens=tokens)
        table[f"llm-compressor GPTQ {scheme}"] = make
    awq = partial(llm_compressor, scheme="W4A16_ASYM", tokens=tokens, awq=True)
    table["llm-compressor AWQ W4A16_ASYM"] = awq
    table["optimum GPTQ 4-bit asym"] = partial(optimum_gptq, tokens=tokens)
    table["GPTQModel 4-bit sym"] = partial(gptqmodel, tokens=tokens)
    table["torchao int4 g128"] = partial(torchao, kind="int4")
    table["torchao int8 weight"] = partial(torchao, kind="int8-weight")
    table["torchao W8A8"] = partial(torchao, kind="int8-dynamic")
    table["torch dynamic W8A8"] = torch_dynamic
    table["bitsandbytes nf4"] = partial(bitsandbytes, kind="nf4")
    table["bitsandbytes int8"] = partial(bitsandbytes, kind="int8")
    table["HQQ 4-bit g128"] = hqq
    return table


def ideal_peers(
    base: Encoder, texts: Mapping[str, list[str]]
) -> dict[str, Callable[[Path], Variant]]:
    """The best peers, calibrated on other texts of the sources that judge."""
    tokens: TokenIds = []
    for kind, of_kind in texts.items():
        role: Role = "query" if kind == "queries" else "document"
        ids = base.tokenization.tokenize(of_kind, role=role, max_tokens=MAX_TOKENS)
        tokens += [list(text) for text in ids]
    llm = partial(llm_compressor, scheme="W4A16_ASYM", tokens=tokens)
    return {
        "llm-compressor GPTQ W4A16_ASYM, ideal texts": llm,
        "optimum GPTQ 4-bit asym, ideal texts": partial(optimum_gptq, tokens=tokens),
        "llm-compressor GPTQ W8A8, ideal texts": partial(
            llm_compressor, scheme="W8A8", tokens=tokens
        ),
    }


def gteopt_recipe(
    source: Path, name: str, calibration: Calibration, effort: Effort | None = None
) -> Variant:
    """A recipe of gteopt, calibrated on the common texts."""
    recipe = load_recipe(name).model_copy(update={"calibration": calibration})
    if effort is not None:
        recipe = recipe.with_effort(effort)
    out = Path(tempfile.mkdtemp()) / name
    manifest = gteopt.quantize(source, recipe, out, dtype="float32")
    weights = sum(layer.out_features * layer.in_features for layer in manifest.layers)
    bits = sum(
        layer.bits_per_weight * layer.out_features * layer.in_features for layer in manifest.layers
    )
    if manifest.allocation is not None:  # its bits include layers that stay in 16 bits
        return gteopt.load(out), manifest.allocation.bits_per_weight
    return gteopt.load(out), bits / weights


def llm_compressor(source: Path, scheme: str, tokens: TokenIds, awq: bool = False) -> Variant:
    """llm-compressor's GPTQ or AWQ on a model loaded from a path, as its documentation asks."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModel, AutoTokenizer

    folder = plain_copy(source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    ignore = ["re:.*pooler.*"]
    modifiers = [GPTQModifier(targets="Linear", scheme=scheme, ignore=ignore)]
    if awq:
        rounding = QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore)
        modifiers = [AWQModifier(), rounding]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifiers,
        num_calibration_samples=len(rows),
        max_seq_length=MAX_TOKENS,
        tokenizer=tokenizer,
    )
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, save_compressed=True)
    return opened(folder)


def optimum_gptq(source: Path, tokens: TokenIds) -> Variant:
    """GPTQQuantizer of optimum, asymmetric because its symmetric checkpoints are mislabelled."""
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModel, AutoTokenizer

    folder = plain_copy(source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    bert = model.config.model_type == "bert"
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in (torch.tensor([text]) for text in tokens)
    ]
    quantizer = GPTQQuantizer(
        bits=4,
        group_size=128,
        sym=False,
        desc_act=True,
        dataset=rows,
        act_group_aware=False,
        block_name_to_quantize="encoder.layer" if bert else "layers",
        module_name_preceding_first_block=["embeddings" if bert else "embed_tokens"],
    )
    model = quantizer.quantize_model(model, tokenizer)
    quantizer.dataset = None  # else it would be written to the JSON, with its tensors
    model.config.quantization_config = quantizer.to_dict()
    (folder / "model.safetensors").unlink()
    quantizer.save(model, str(folder))
    return opened(folder)


def gptqmodel(source: Path, tokens: TokenIds) -> Variant:
    """GPTQModel's own entry point, which only knows language models."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on two cores
    from gptqmodel import GPTQModel, QuantizeConfig

    folder = plain_copy(source)
    config = QuantizeConfig(bits=4, group_size=128, offload_to_disk=False)
    model = GPTQModel.load(str(folder), config)
    model.quantize(
        [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens], batch_size=1
    )
    (folder / "model.safetensors").unlink()
    model.save(str(folder))
    return opened(folder)


def torchao(source: Path, kind: str) -> Variant:
    """The quantize_ of torchao, in place."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    encoder = gteopt.load(source, dtype="float32")
    use_plain_linears_(encoder.module)
    config: Any = {
        "int4": lambda: IntxWeightOnlyConfig(torch.int4, PerGroup(128)),  # type: ignore[attr-defined]
        "int8-weight": Int8WeightOnlyConfig,
        "int8-dynamic": Int8DynamicActivationInt8WeightConfig,
    }[kind]()
    quantize_(encoder.module, config)
    return encoder, {"int4": 4 + 32 / 128, "int8-weight": 8.0, "int8-dynamic": 8.0}[kind]


def use_plain_linears_(module: nn.Module) -> None:
    """Put torch's linear layers back; torchao lacks the product of gteopt's for a CPU."""
    for name, layer in list(module.named_modules()):
        if type(layer) is DenseLinearCpu:
            linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, linear)


def torch_dynamic(source: Path) -> Variant:
    """torch.ao's dynamic quantization in place, which only knows plain linear layers."""
    from transformers import AutoModel

    encoder = gteopt.load(source, dtype="float32")
    convert: Any = torch.ao.quantization.quantize_dynamic
    encoder.module = convert(AutoModel.from_pretrained(source).float().eval(), {nn.Linear})
    return encoder, 8.0


def bitsandbytes(source: Path, kind: str) -> Variant:
    """The linear layers of bitsandbytes, in place; nf4 has a float32 scale for each 64 weights."""
    replace = partial(bitsandbytes_linear, kind=kind)
    return in_place(source, replace, 4 + 32 / 64 if kind == "nf4" else 8.0)


def bitsandbytes_linear(
    linear: nn.Linear, kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """A layer of bitsandbytes, "int8" or "nf4", with the weight of a linear layer."""
    import bitsandbytes as bnb

    bias = linear.bias is not None
    new: Any
    if kind == "nf4":
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias, dtype, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias, has_fp16_weights=False, threshold=6.0
        )
        # bitsandbytes quantizes a weight when it moves from the CPU to the GPU.
        new.weight = bnb.nn.Int8Params(
            linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
        )
    if bias:
        new.bias = linear.bias
    placed: nn.Module = new.to(device)
    return placed


def hqq(source: Path) -> Variant:
    """HQQ's linear layer in place; float32 scale and zero point for each group of 128."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=128)

    def replace(linear: nn.Linear) -> nn.Module:
        layer: nn.Module = HQQLinear(
            copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu"
        )
        return layer

    return in_place(source, replace, 4 + 32 / 128)


def in_place(source: Path, replace: Callable[[nn.Linear], nn.Module], bits: float) -> Variant:
    """Swap every linear layer inside the blocks."""
    encoder = gteopt.load(source, dtype="float32")
    for name, linear in list(block_linears(encoder.module)):
        parent, _, leaf = name.rpartition(".")
        setattr(encoder.module.get_submodule(parent), leaf, replace(linear))
    return encoder, bits


def block_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers inside the transformer blocks, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and "layer" in name:
            yield name, layer


def opened(folder: Path) -> Variant:
    """A foreign checkpoint in gteopt, and the bits of its packed layers."""
    encoder = gteopt.load(folder, dtype="float32")
    n_bits = n_weights = 0
    for module in encoder.module.modules():
        is_dense = isinstance(module, DenseLinearCpu)
        if hasattr(module, "kernel") and hasattr(module, "in_features") and not is_dense:
            n_weights += int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
            # int8 products keep their weight outside of the buffers, and have sums beside it.
            packed = int(getattr(module, "packed_bytes", 0))
            beside = ("bias", "row") if packed else ("bias",)
            n_bits += 8 * packed
            n_bits += 8 * sum(
                tensor.numel() * tensor.element_size()
                for name, tensor in module.named_buffers()
                if name not in beside
            )
    return encoder, n_bits / n_weights


def plain_copy(source: Path) -> Path:
    """A scratch copy of a model folder that a peer may overwrite."""
    folder = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(source, folder)
    return folder


def peer_versions(peers: Iterable[str]) -> dict[str, str]:
    """Versions of the peers that are installed."""
    installed = {}
    for name in peers:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def show(row: Row) -> str:
    """One line of the table."""
    if row.error is not None:
        return f"{row.peer:32}{row.error}"
    return (
        f"{row.peer:32}{row.bits_per_weight:6.2f}{row.mean:9.5f}{row.worst:9.5f}"
        f"{row.p1_cosine:8.4f}{row.neighbour_overlap:8.3f}{row.cpu_s:8.1f}  {row.worst_kind}"
    )


if __name__ == "__main__":
    main()
