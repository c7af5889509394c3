"""Smooth the inputs of layers inside a transformer block.

Each feature of an input is divided by a scale before it is rounded. The division is folded into the
layer that computes the input. So it costs nothing at run time, and no file format has to know of
it. Hides: in which layers an architecture allows that. Refuses to know: how strengths are chosen,
files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gteopt.build.replay import Block, BlockInput
from gteopt.config.recipe import LayerScheme
from gteopt.quant.smoothquant import Smoothing, choose_smoothing

_SAMPLE_TOKENS = 2048


@dataclass(frozen=True)
class _Fold:
    """`source` computes the input of `targets`; dividing its weight and bias divides that input."""

    source: str
    targets: tuple[str, ...]


_DECODER = (
    _Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    _Fold("self_attn.v_proj", ("self_attn.o_proj",)),
    _Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    _Fold("mlp.up_proj", ("mlp.down_proj",)),
)
# BERT's norms come after the residual sum, so their output also feeds the next sum, and the
# activation in its MLP is not linear. Neither can absorb a scale.
_BERT = (_Fold("attention.self.value", ("attention.output.dense",)),)
_FOLDS: dict[str, tuple[_Fold, ...]] = {
    **dict.fromkeys(("qwen2", "qwen3", "mistral", "llama"), _DECODER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
}


@torch.inference_mode()
def smooth_block_(
    block: Block,
    inputs: Sequence[BlockInput],
    schemes: Mapping[str, LayerScheme],
    model_type: str,
) -> dict[str, Smoothing]:
    """Smooth the inputs of a block's quantized layers in place, where the architecture allows it.

    Returns:
        The smoothing of each layer that was considered, by its name.
    """
    modules = dict(block.module.named_modules())
    folds = [
        fold
        for fold in _FOLDS.get(model_type, ())
        if all(f"{block.name}.{target}" in schemes for target in fold.targets)
        and fold.source in modules
    ]
    samples = _watch(block, inputs, [fold.targets[0] for fold in folds])
    chosen: dict[str, Smoothing] = {}
    for fold, sample in zip(folds, samples, strict=True):
        targets = [modules[target] for target in fold.targets]
        source = modules[fold.source]
        weights = [target.weight for target in targets]
        assert all(isinstance(weight, Tensor) for weight in weights)
        scheme = schemes[f"{block.name}.{fold.targets[0]}"]
        tied = _shared_heads(modules, source, sample.shape[1])
        smoothing = choose_smoothing(sample, weights, scheme, tied)
        for target in fold.targets:
            chosen[f"{block.name}.{target}"] = smoothing
        if smoothing.scale is not None:
            for target in targets:
                target.weight.mul_(smoothing.scale)
            _divide_(source, smoothing.scale, tied)
    return chosen


def _watch(block: Block, inputs: Sequence[BlockInput], layers: Sequence[str]) -> list[Tensor]:
    """A sample of each layer's inputs: float32 [n, I]."""
    n_tokens = sum(int(batch.real.sum()) for batch in inputs)
    share = min(1.0, _SAMPLE_TOKENS / n_tokens)
    generator = torch.Generator().manual_seed(0)
    picked = [torch.rand(int(b.real.sum()), generator=generator) < share for b in inputs]
    samples: dict[str, list[Tensor]] = {name: [] for name in layers}
    at = 0

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][inputs[at].real]  # [n, I]
            samples[name].append(rows[picked[at].to(rows.device)].float())

        return hook

    handles = [
        block.module.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers
    ]
    try:
        for at, batch in enumerate(inputs):
            block.run(at, batch.hidden)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(samples[name]) for name in layers]


def _shared_heads(
    modules: Mapping[str, nn.Module], source: nn.Module, n_features: int
) -> Tensor | None:
    """The row of `source` that computes each input of the output layer.

    In grouped-query attention, one value feature feeds several inputs of the output layer.

    Returns:
        int64 [n_features]; None if each row computes exactly one input.
    """
    if not isinstance(source, nn.Linear) or source.out_features == n_features:
        return None
    attention = next(m for m in modules.values() if hasattr(m, "head_dim"))
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    rows = torch.arange(source.out_features, device=source.weight.device).view(-1, 1, head_dim)
    return rows.expand(-1, n_features // source.out_features, -1).flatten()


def _divide_(source: nn.Module, scale: Tensor, tied: Tensor | None) -> None:
    """Divide the output of `source` by `scale` [I]; inputs of one row have equal scales."""
    if tied is not None:
        rows = torch.ones(int(tied.max()) + 1, device=scale.device)
        scale = rows.scatter(0, tied, scale)
    for name, parameter in source.named_parameters(recurse=False):
        wide = scale[:, None] if parameter.ndim == 2 else scale
        assert name in ("weight", "bias")
        parameter.div_(wide)
