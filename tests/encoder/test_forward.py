"""The forward pass without padding computes what the module's own forward pass does."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gteopt.config.recipe import LayerScheme
from gteopt.encoder import forward as runtime
from gteopt.encoder.forward import (
    count_forward_operations,
    padded_forward,
    pass_padding,
    reads_one_token,
    unpadded_forward,
)
from gteopt.encoder.pooling import pool_token_vectors
from gteopt.kernels import make_linear, speed_up_linears_
from gteopt.kernels.reference import DequantLinear, PackedEmbedding
from gteopt.model.families import Pooling
from gteopt.quant.affine import pack, quantize_rtn
from tests.support.random_models import random_module

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "hidden_act": "silu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**DECODER, "model_type": "qwen2", "is_causal": False},
    "qwen2 causal": {**DECODER, "model_type": "qwen2"},
    "qwen3": {**DECODER, "model_type": "qwen3", "head_dim": 32},
    "mistral": {**DECODER, "model_type": "mistral", "sliding_window": None, "head_dim": 24},
    "bert": {**SIZES, "model_type": "bert", "hidden_act": "gelu"},
}
POOLINGS: tuple[Pooling, ...] = ("lasttoken", "mean", "cls")
TOKENS = [[7, 3, 9, 1, 4], [5], [8, 8, 2, 6, 1], [11, 12], [1, 2, 3], [13, 14], [40] * 9]


def own_forward(module: nn.Module, pooling: Pooling) -> Tensor:
    """One text at a time through the module itself."""
    vectors = []
    for ids in TOKENS:
        row, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)
        hidden = module(input_ids=row, attention_mask=mask).last_hidden_state
        vectors.append(pool_token_vectors(hidden, mask, pooling))
    return torch.cat(vectors)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_operations_are_those_that_torch_counts(name: str, pooling: Pooling) -> None:
    module = random_module(CONFIGS[name])
    config = {**module.config.to_dict(), **CONFIGS[name]}
    forward = unpadded_forward(config, pooling, CPU)
    assert forward is not None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(module, TOKENS)
    lengths = [len(ids) for ids in TOKENS]
    alone = reads_one_token(config, pooling)
    assert counter.get_total_flops() == count_forward_operations(
        module, config, lengths, one_token=alone
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_packed_texts_have_the_vectors_of_the_module_alone(name: str, pooling: Pooling) -> None:
    module = random_module(CONFIGS[name])
    forward = unpadded_forward(CONFIGS[name], pooling, CPU)
    assert forward is not None
    exact = own_forward(module.double(), pooling)
    vectors = forward(module, TOKENS)
    assert float((vectors - exact).norm() / exact.norm()) <= 1e-6  # angles stay float32
    assert (exact[0] - exact[2]).abs().max() > 1e-2  # the texts have different vectors
    vectors = forward(module.float(), TOKENS).double()
    assert float((vectors - exact).norm() / exact.norm()) <= 2e-6


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=200))
def test_a_pass_is_padded_with_few_tokens_in_texts_no_longer_than_its_own(
    lengths: list[int],
) -> None:
    added = pass_padding(lengths)
    assert all(0 < n <= max(lengths) for n in added)
    assert sum(added) < max(1, sum(lengths) / 32)


def test_passes_of_up_to_8192_tokens_have_under_300_totals() -> None:
    totals = {n + sum(pass_padding([n])) for n in range(1, 8193)}
    assert len(totals) < 300
    assert pass_padding([]) == pass_padding([0, 0]) == []


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_texts_that_pad_a_pass_change_no_vector_and_give_none(name: str, pooling: Pooling) -> None:
    module = random_module(CONFIGS[name])
    forward = unpadded_forward(CONFIGS[name], pooling, CPU)
    assert forward is not None
    texts = [[i % 50 for i in range(length)] for length in (60, 7, 1, 200, 61)]
    assert len(pass_padding([len(ids) for ids in texts])) == 1
    together = forward(module, texts)
    alone = torch.cat([forward(module, [ids]) for ids in texts])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)


@torch.inference_mode()
def test_what_replaces_or_hooks_a_layer_takes_part() -> None:
    config = CONFIGS["qwen2"]
    module = random_module(config)
    forward = unpadded_forward(config, "lasttoken", CPU)
    assert forward is not None
    scheme = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            weight = pack(quantize_rtn(linear.weight, scheme))
            layer = make_linear(weight, linear.bias, device=CPU, dtype=torch.float32)
            setattr(module.get_submodule(parent), leaf, layer)
    shapes: list[tuple[int, ...]] = []
    last = module.get_submodule("layers.2.mlp.gate_proj")
    last.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    vectors, exact = forward(module, TOKENS), None
    exact = own_forward(module, "lasttoken")
    assert float((vectors - exact).norm() / exact.norm()) <= 1e-5
    assert shapes[0] == (len(TOKENS), 64)  # the last block's MLP: one token a text


@torch.inference_mode()
def test_16_bit_modules_stay_within_their_rounding() -> None:
    for name in ("qwen2", "bert"):
        module = random_module(CONFIGS[name])
        exact = own_forward(module, "mean").double()
        forward = unpadded_forward(CONFIGS[name], "mean", CPU)
        assert forward is not None
        half = module.bfloat16()
        speed_up_linears_(half, CPU)
        vectors = forward(half, TOKENS).double()
        assert float((vectors - exact).norm() / exact.norm()) <= 3e-2


def test_settings_that_are_not_known_leave_the_module_its_own_forward_pass() -> None:
    for change in (
        {"model_type": "roberta"},
        {"layer_types": ["sliding_attention"]},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"use_sliding_window": True},
        {"hidden_act": "gelu_new"},
        {"sliding_window": 512, "model_type": "mistral"},
    ):
        assert unpadded_forward({**CONFIGS["qwen2"], **change}, "mean", CPU) is None


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_text_with_padding_behind_it_has_the_vector_of_the_text_alone(
    name: str, pooling: Pooling
) -> None:
    module = random_module(CONFIGS[name])
    forward = padded_forward(CONFIGS[name], pooling)
    assert forward is not None
    exact = own_forward(module.double(), pooling)
    for places in (9, 16):  # the longest text has no padding in the former
        vectors = padded(forward, module, places)
        assert float((vectors - exact).norm() / exact.norm()) <= 1e-6  # angles stay float32


def padded(forward: runtime.PaddedForward, module: nn.Module, places: int) -> Tensor:
    """One text at a time, with other ids behind it."""
    rows = [torch.tensor([*ids, *[3] * (places - len(ids))]) for ids in TOKENS]
    return torch.cat(
        [forward(module, row, torch.tensor([len(ids)])) for row, ids in zip(rows, TOKENS)]  # noqa: B905
    )


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: tuple[Tensor, int],
    keys: tuple[Tensor, int],
    *,
    causal: bool,
) -> Tensor:
    """Attention within each text between bounds; rows behind the last bound are NaN."""
    out = torch.full_like(query, float("nan"))
    (query_bounds, _), (bounds, _) = queries, keys
    for limits, longest_one in (queries, keys):
        assert limits.dtype == torch.int32
        assert int(limits.diff().max()) <= longest_one
    spans = zip(pairwise(query_bounds.tolist()), pairwise(bounds.tolist()), strict=True)
    for (q_begin, q_end), (begin, end) in spans:
        parts = (query[q_begin:q_end], key[begin:end], value[begin:end])
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        )
        out[q_begin:q_end] = mixed[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_attention_over_all_texts_at_once_is_that_of_each_alone(
    name: str, pooling: Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with a reference function in place of the kernel."""
    monkeypatch.setattr(runtime, "_has_varlen", lambda _: True)
    monkeypatch.setattr(runtime, "_varlen", varlen_reference)
    module = random_module(CONFIGS[name]).double()
    exact = own_forward(module, pooling)
    packed = unpadded_forward(CONFIGS[name], pooling, CPU)
    forward = padded_forward(CONFIGS[name], pooling)
    assert packed is not None
    assert forward is not None
    for vectors in (packed(module, TOKENS), padded(forward, module, 16)):
        assert float((vectors - exact).norm() / exact.norm()) <= 1e-6


W8A8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
GPU_SCHEMES = {
    "bf16": None,
    "int8": W8A8,
    "int8, token zero points": W8A8.model_copy(update={"activation_symmetric": False}),
    "fp8": W8A8.model_copy(update={"number_format": "e4m3"}),
    "int4": LayerScheme(bits=4, group_size=64, symmetric=False),
    "nf4": LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4"),
    "int3, portable": LayerScheme(bits=3, group_size=64, symmetric=False),
}
"""All of them with the token table in 8 bits."""
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}


def on_gpu_layers_(module: nn.Module, scheme: LayerScheme | None, cuda: ModuleType) -> None:
    """Swap in the layers that a GPU would have; without a GPU, Triton interprets them."""
    if scheme is None:
        return
    make: Callable[..., nn.Module] = DequantLinear
    if scheme.activation_bits == 8:
        make = cuda.Fp8LinearCuda if scheme.number_format == "e4m3" else cuda.Int8LinearCuda
    elif scheme.bits == 4:
        make = cuda.Int4LinearCuda
    for name, linear in list(module.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(linear, nn.Linear):
            layer = make(pack(quantize_rtn(linear.weight.float(), scheme)), linear.bias)
            setattr(module.get_submodule(parent), leaf, layer)
        if leaf in ("embed_tokens", "word_embeddings"):
            rows = LayerScheme(bits=8, group_size="per_channel", symmetric=True)
            table = PackedEmbedding(
                pack(quantize_rtn(linear.weight.float(), rows)), linear.weight.dtype
            )
            setattr(module.get_submodule(parent), leaf, table)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels for GPUs, which the forward pass takes on this device too."""
    pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")
    kernels = importlib.import_module("gteopt.kernels.cuda")
    monkeypatch.setattr(runtime, "gpu_kernels", lambda _: kernels)
    return kernels


class _NoHostTransfers(TorchDispatchMode):
    """Refuses what cannot be recorded in a CUDA graph: numbers that the host sends or reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if name.startswith(("aten.lift_fresh", "aten._local_scalar_dense", "aten.nonzero")):
            raise AssertionError(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", GPU_SCHEMES)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "bert"])
@torch.inference_mode()
def test_the_padded_pass_can_be_recorded_with_every_gpu_layer(
    cuda: ModuleType, name: str, scheme: str
) -> None:
    """The tensors have no data, so a read raises; a copy from the host is refused."""
    config = {**CONFIGS[name], **WIDE}
    module = random_module(config).bfloat16()
    on_gpu_layers_(module, GPU_SCHEMES[scheme], cuda)
    mode = FakeTensorMode()
    without_data_(module, mode)
    for pooling in POOLINGS:
        forward = padded_forward(config, pooling)
        assert forward is not None
        with mode:
            ids, n_tokens = (torch.empty(n, dtype=torch.int64) for n in (16, 1))
            with _NoHostTransfers():
                assert forward(module, ids, n_tokens).shape == (1, 128)


def without_data_(module: nn.Module, mode: FakeTensorMode) -> None:
    for part in module.modules():
        for tensors in cast("list[dict[str, Any]]", [part._parameters, part._buffers]):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor)


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("bf16", 3e-6), ("int8", 5e-2), ("int8, token zero points", 5e-2), ("int4", 1e-5)],
)
@torch.inference_mode()
def test_the_pass_with_gpu_kernels_computes_what_the_module_does(
    cuda: ModuleType, scheme: str, bound: float
) -> None:
    """bf16 runs in float32 here, because the interpreter multiplies bfloat16 wrongly."""
    config = {**CONFIGS["qwen2"], **WIDE}
    module, exact_module = random_module(config), random_module(config)
    on_gpu_layers_(module, GPU_SCHEMES[scheme], cuda)
    if (chosen := GPU_SCHEMES[scheme]) is not None:
        for name, linear in exact_module.named_modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data = quantize_rtn(linear.weight, chosen).dequantize()
            if name == "embed_tokens":
                linear.weight.data = module.embed_tokens(torch.arange(len(linear.weight)))
    exact = own_forward(exact_module.double(), "lasttoken")
    packed = unpadded_forward(config, "lasttoken", CPU)
    forward = padded_forward(config, "lasttoken")
    assert packed is not None
    assert forward is not None
    for vectors in (packed(module, TOKENS), padded(forward, module, 16)):
        assert float((vectors - exact).norm() / exact.norm()) <= bound


@torch.inference_mode()
def test_what_cannot_be_recorded_is_noticed() -> None:
    """The check sees that a packed pass sends token ids, and that LLM.int8() reads activations."""
    config = CONFIGS["qwen2"]
    outliers = W8A8.model_copy(update={"activation_outliers": 6.0})
    packed = unpadded_forward(config, "lasttoken", CPU)
    assert packed is not None
    module, mode = random_module(config), FakeTensorMode()
    without_data_(module, mode)
    with mode, pytest.raises(AssertionError, match="lift_fresh"), _NoHostTransfers():
        packed(module, [[1, 2, 3]])
    layer = make_linear(
        pack(quantize_rtn(torch.randn(8, 64), outliers)), None, device=CPU, dtype=torch.float32
    )
    without_data_(layer, mode)
    wanted = (DynamicOutputShapeException, AssertionError)
    with mode, pytest.raises(wanted, match="nonzero"), _NoHostTransfers():
        layer(torch.empty(4, 64))
