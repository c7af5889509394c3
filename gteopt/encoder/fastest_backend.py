"""Chooses the backend that computes a model fastest on this machine, by measuring once.

A few blocks of the model's shape, with random weights in its schemes, run on each backend. The
times are stored beside those of kernels.

Hides: the workloads, what excludes a backend. Refuses to know: files of weights, texts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gteopt.config.recipe import LayerScheme
from gteopt.encoder.forward import unpadded_forward
from gteopt.encoder.openvino import OpenVinoModel, OpenVinoWeights, openvino_can_hold
from gteopt.encoder.packed_weights import list_quantized_layers, put_submodule_
from gteopt.encoder.skeleton import build_skeleton, build_whole_config
from gteopt.errors import UnsupportedError, install_command
from gteopt.formats.packed import ReadLayer
from gteopt.kernels import make_linear, speed_up_linears_
from gteopt.kernels.measured import (
    KernelComparison,
    KernelWays,
    LayerTimes,
    MeasuredLayer,
    choose_kernel_ways,
    kernel_microseconds,
    measured_times,
)
from gteopt.machine import describe_machine, release_freed_memory
from gteopt.model.checkpoint import Checkpoint
from gteopt.version import __version__

if TYPE_CHECKING:
    from gteopt.encoder.description import Backend

_CPU = torch.device("cpu")
_TORCH, _OPENVINO = "torch", "openvino"
_WEIGHTS = 16 << 20
"""The most weights of the measured blocks, if these are several. A small model is measured whole,
because what its blocks share takes a large part of its time."""
_VOCABULARY = 256
_FEW, _MANY = 16, 128
"""Tokens of the short text, and of each text of the batch."""
_MOST_TEXTS = 8
_MANY_WORK = 1 << 33
"""The most multiplications of a batch of several texts, so that a 7B model takes seconds."""
_CLEARLY = 1.15
"""OpenVINO is used if it is this much faster, because it holds weights twice and rounds inputs."""
_MEMORY_SHARE = 0.75
"""OpenVINO is not used if its two copies of the weights exceed this fraction of the memory."""
_Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class BackendChoice:
    """A backend, and why it was chosen; the reason is None if the user named the backend."""

    backend: Backend
    reason: str | None = None


def fastest_backend(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = "deterministic",
    *,
    folder: Path | None = None,
) -> BackendChoice:
    """The backend that computes a model fastest on this machine.

    One choice holds for short texts and batches, because a text's vector must not depend on its
    batch. OpenVINO is chosen if the geometric mean of both speeds is clearly higher. If only torch
    can compute the model, nothing is measured.

    Args:
        checkpoint: the model; its weights are not read.
        device: device that is to compute it.
        dtype: dtype of the layers that are not quantized.
        kernels: kernels of the torch backend; see `gteopt.load`.
        folder: where times are stored; None uses the Hub client's folder for assets.

    Raises:
        InputError: see `choose_kernel_ways`.
        IntegrityError, UnsupportedError: see `build_skeleton`.
    """
    if (obstacle := _obstacle(checkpoint, device, dtype)) is not None:
        return BackendChoice("torch", obstacle)
    ways = choose_kernel_ways(list_quantized_layers(checkpoint), dtype, kernels, folder=folder)
    blocks = _Blocks.of(checkpoint, dtype, ways)
    comparison = KernelComparison(frozenset((_TORCH, _OPENVINO)), blocks.measure)
    try:
        times = measured_times({blocks.key: comparison}, folder)[blocks.key]
    except UnsupportedError as error:
        return BackendChoice("torch", str(error))
    finally:
        release_freed_memory()
    return choose_backend(times)


def choose_backend(times: LayerTimes) -> BackendChoice:
    """The faster backend, by the times of a short text and of a batch."""
    few, many = (
        by_backend[_OPENVINO] / by_backend[_TORCH] for by_backend in (times.few, times.many)
    )
    reason = (
        f"OpenVINO takes {few:.2f} of torch's time for a text of {_FEW} tokens, and {many:.2f} for "
        f"texts of {_MANY}"
    )
    return BackendChoice("openvino" if few * many * _CLEARLY**2 < 1 else "torch", reason)


def _obstacle(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why only torch can compute the model; None if both backends can."""
    if device.type != "cpu":
        return "OpenVINO is for the CPU"
    if find_spec("openvino") is None:
        return f"OpenVINO is not installed ({install_command('openvino')})"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"OpenVINO does not compute in {str(dtype).removeprefix('torch.')}"
    manifest = checkpoint.manifest
    if manifest is None and checkpoint.is_quantized:
        return "layers that another library quantized are not measured"
    schemes = [layer.scheme for layer in manifest.layers] if manifest is not None else []
    if checkpoint.is_table or not openvino_can_hold(build_whole_config(checkpoint), schemes):
        return "OpenVINO has no operations for this architecture, or for one of its layers"
    if 2 * checkpoint.stored_bytes > _MEMORY_SHARE * describe_machine().memory_bytes:
        return "OpenVINO holds weights twice, for which this machine has too little memory"
    return None


@dataclass(frozen=True)
class _Blocks:
    """A few blocks of a model, to be measured with random weights.

    Attributes:
        checkpoint: description of a model that has only these blocks.
        schemes: schemes of its quantized linear layers by name.
        n_weights: number of weights of all its linear layers.
        dtype: dtype of the layers that are not quantized.
        ways: how the torch backend multiplies.
    """

    checkpoint: Checkpoint
    schemes: Mapping[str, LayerScheme]
    n_weights: int
    dtype: torch.dtype
    ways: KernelWays

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype, ways: KernelWays) -> _Blocks:
        """The blocks that stand for a model."""
        depth = int(build_whole_config(checkpoint)["num_hidden_layers"])
        one = _n_weights(build_skeleton(_shallow(checkpoint, 1, depth)))
        n = max(1, min(depth, _WEIGHTS // one))
        shallow = _shallow(checkpoint, n, depth)
        skeleton = build_skeleton(shallow)
        usual = _usual_schemes(checkpoint, depth)
        schemes = {name: usual.get(_place(name)) for name in _linears(skeleton)}
        quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
        return cls(shallow, quantized, _n_weights(skeleton), dtype, ways)

    @property
    def key(self) -> str:
        """Everything that the times depend on, except for processor, threads and torch."""
        config = build_whole_config(self.checkpoint)
        facts = {
            "config": {name: config.get(name) for name in _SHAPE},
            "schemes": {name: scheme.model_dump() for name, scheme in self.schemes.items()},
            "products": {name: str(product) for name, product in self.ways.products.items()},
            "decodes": self.ways.decodes,
            "packs": self.ways.packs,
            "dtype": str(self.dtype),
            "gteopt": __version__,
        }
        digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        kind = self.checkpoint.config["model_type"]
        return f"blocks of {kind} {digest}, openvino {version('openvino')}"

    def measure(self) -> LayerTimes:
        """Times of both backends.

        Raises:
            UnsupportedError: OpenVINO cannot compute such blocks here.
        """
        n_texts = max(1, min(_MOST_TEXTS, _MANY_WORK // (self.n_weights * _MANY)))
        longest = min(_MANY, self.checkpoint.max_tokens)
        few, many = [[1] * min(_FEW, longest)], [[1] * longest] * n_texts
        timed: dict[str, tuple[float, float]] = {}
        for name, make in ((_TORCH, self._by_torch), (_OPENVINO, self._by_openvino)):
            call = make()
            timed[name] = kernel_microseconds(call, few), kernel_microseconds(call, many)
        return LayerTimes(
            few={name: few for name, (few, _) in timed.items()},
            many={name: many for name, (_, many) in timed.items()},
        )

    def _by_torch(self) -> Callable[[_Tokens], object]:
        module = build_skeleton(self.checkpoint)
        plain = _random_tensors(module, self.schemes, self.dtype)
        for name, layer in self._layers(module).items():
            bias = plain.pop(f"{name}.bias", None)
            linear = make_linear(
                layer.random(), bias, device=_CPU, dtype=self.dtype, ways=self.ways
            )
            put_submodule_(module, name, linear)
        module.load_state_dict(plain, strict=False, assign=True)
        module.eval().requires_grad_(False)
        speed_up_linears_(module, _CPU, self.ways)
        forward = unpadded_forward(self.checkpoint.config, "mean", _CPU)
        if forward is None:
            return lambda tokens: module(**dict(zip(_INPUTS, _padded(tokens), strict=True)))
        return lambda tokens: forward(module, tokens)

    def _by_openvino(self) -> Callable[[_Tokens], object]:
        skeleton = build_skeleton(self.checkpoint)
        plain = _random_tensors(skeleton, self.schemes, self.dtype)
        packed = {n: ReadLayer(layer.random()) for n, layer in self._layers(skeleton).items()}
        try:
            config = build_whole_config(self.checkpoint)
            model = OpenVinoModel(config, OpenVinoWeights(plain, packed), dtype=self.dtype)
            model(*_padded([[1]]))
        except (RuntimeError, AttributeError, ImportError) as error:
            # A version of the library that lacks an operation; it has no type of its own for that.
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedError(f"OpenVINO cannot compute it here: {said[0]}") from error
        return lambda tokens: model(*_padded(tokens))

    def _layers(self, skeleton: nn.Module) -> dict[str, MeasuredLayer]:
        linears = _linears(skeleton)
        return {
            name: MeasuredLayer(scheme, linears[name].out_features, linears[name].in_features)
            for name, scheme in self.schemes.items()
        }


_INPUTS = ("input_ids", "attention_mask")
_SHAPE = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "is_causal"),
)
"""Fields of config.json that decide the time of a block."""


def _shallow(checkpoint: Checkpoint, n: int, depth: int) -> Checkpoint:
    """The description of a model of `n` of the `depth` blocks, with a small vocabulary."""
    config = {
        name: value[:n] if isinstance(value, list) and len(value) == depth else value
        for name, value in checkpoint.config.items()
    }
    small = {"num_hidden_layers": n, "vocab_size": _VOCABULARY, "pad_token_id": 0}
    return replace(checkpoint, config={**config, **small})


def _usual_schemes(checkpoint: Checkpoint, depth: int) -> dict[str, LayerScheme]:
    """The most frequent scheme at each place in a block that most blocks quantize."""
    manifest = checkpoint.manifest
    counts: dict[str, Counter[LayerScheme]] = {}
    for layer in manifest.layers if manifest is not None else ():
        counts.setdefault(_place(layer.name), Counter())[layer.scheme] += 1
    return {
        place: schemes.most_common(1)[0][0]
        for place, schemes in counts.items()
        if 2 * schemes.total() > depth
    }


def _place(name: str) -> str:
    """A layer's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: inner for name, inner in module.named_modules() if isinstance(inner, nn.Linear)}


def _n_weights(module: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in _linears(module).values())


def _random_tensors(
    module: nn.Module, quantized: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random parameters of a module, except for the weights of its quantized layers."""
    # One tile is repeated, because drawing a block of a 7B model takes seconds.
    tile = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    left_out = {f"{name}.weight" for name in quantized}
    return {
        name: tile.repeat(-(-tensor.numel() // len(tile)))[: tensor.numel()].view(tensor.shape)
        for name, tensor in module.named_parameters()
        if name not in left_out
    }


def _padded(tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """Ids and mask int64 [N, T] of texts of one length."""
    ids = torch.tensor(tokens)
    return ids, torch.ones_like(ids)
