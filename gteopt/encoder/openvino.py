"""Builds the transformer as an OpenVINO model with packed weights: the fast backend of CPUs.

Hides: how architectures, quantized weights and 8-bit activations are written as OpenVINO
operations. Refuses to know: how weights are read, how texts become tokens, how token vectors become
an embedding.

Weights of 2 to 8 bits stay packed in memory. Processors with VNNI or AMX round the inputs of their
products to 8 bits at run time. Each `_ACTIVATION_GROUP` values of a token share a scale, which is
finer than one scale a token. Other processors decompress the weights first.
Static activations are rounded by the operation that makes them, so products read bytes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.encoder.forward import has_known_forward_settings, reads_one_token
from gteopt.errors import UnsupportedError, install_command
from gteopt.formats.packed import ReadLayer
from gteopt.kernels.cpu import activation_bits, multiplies_bfloat16, signed_codes
from gteopt.model.families import Pooling
from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import symmetric_zero_point
from gteopt.quant.packing import pack_codes, unpack_codes
from gteopt.quant.static_activations import InputGrid

_ACTIVATION_GROUP = 128
"""Values of a token that share a scale. Half as many are slower; a scale a token is less exact."""
_MASKED = -65504.0
"""Added to the score of a padded position; the least float16, so that no precision overflows."""
Node = Any
"""An OpenVINO output; the library ships no types."""


@dataclass(frozen=True)
class OpenVinoWeights:
    """The weights of an OpenVINO model, by the names of the bare transformer.

    Attributes:
        plain: tensors that are not quantized, with the biases of quantized layers.
        packed: quantized linear layers by module name ("layers.0.mlp.up_proj").
        table: the token embeddings in int8; None if they are in `plain`.
    """

    plain: Mapping[str, Tensor]
    packed: Mapping[str, ReadLayer] = field(default_factory=dict)
    table: PackedWeight | None = None


class OpenVinoModel:
    """Token ids to token vectors, compiled for this CPU.

    Attributes:
        weight_bytes: bytes of all weights as stored.
        table_bytes: bytes of the token embeddings among them.
        kernels: number of linear layers by the kernel that runs them.
        number_type: "int8", "bfloat16" or "float32", the type that most linear layers multiply. If
            any layer rounds its inputs at run time, all layers with integer weights do.
        pools: whether it returns only the one token a text that pooling reads.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: OpenVinoWeights,
        *,
        dtype: torch.dtype,
        reads: Pooling = "mean",
    ) -> None:
        """Build and compile the model for torch's number of threads; this takes seconds.

        Args:
            config: the transformer's config.json.
            weights: of the whole transformer.
            dtype: bfloat16 or float32, for everything outside quantized products. A processor that
                emulates bfloat16 uses float32 in any case.
            reads: the pooling that follows. If it reads one token a text, only that token is
                returned, and the last block computes query, output projection and MLP for it only.

        Raises:
            UnsupportedError: OpenVINO is not installed, or it does not support the dtype, the
                architecture or a weight.
        """
        if dtype not in (torch.bfloat16, torch.float32):
            raise UnsupportedError(
                f"backend openvino computes in bfloat16 or float32, not in {dtype}; use backend "
                f"torch"
            )
        model, builder = _model(config, weights, static=activation_bits() == 8, reads=reads)
        in_short = dtype == torch.bfloat16 and multiplies_bfloat16()
        self.weight_bytes, self.table_bytes = builder.n_bytes, builder.table_bytes
        self.kernels = dict(sorted(builder.kernels.items()))
        self.pools = builder.pools
        self._lent = builder.lent  # the compiled model reads this memory
        commonest = builder.kernels.most_common(1)[0][0] if builder.kernels else ""
        rounded = "static" in commonest or (builder.rounds and "openvino.int" in commonest)
        self.number_type = "int8" if rounded else "bfloat16" if in_short else "float32"
        self._compiled = _library().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # two processes would bind to the same cores
                "INFERENCE_PRECISION_HINT": "bf16" if in_short else "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": _ACTIVATION_GROUP if builder.rounds else 0,
            },
        )

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token vectors float32 [N, T, D], or [N, 1, D] if it `pools`.

        Ids and mask are int64 [N, T], padded on the right.
        """
        outputs = self._compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(np.array(outputs[0], dtype=np.float32))


def save_openvino_model(config: Mapping[str, Any], weights: OpenVinoWeights, folder: Path) -> None:
    """Write `openvino/openvino_model.xml` and `.bin` into a Sentence Transformers folder.

    The folder then opens with `backend="openvino"`. Static activations are rounded on every
    processor; one without VNNI may saturate.

    Raises:
        UnsupportedError: see `OpenVinoModel`.
        OSError: the files cannot be written (a full disk).
    """
    model, builder = _model(config, weights, static=True)
    target = folder / "openvino" / "openvino_model.xml"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _library().save_model(model, target, compress_to_fp16=False)
    except RuntimeError as error:  # the library raises it for everything, a full disk too
        raise OSError(f"{target} cannot be written; is the disk full? ({error})") from error
    del builder  # the model reads its arrays until here


def openvino_can_hold(config: Mapping[str, Any], schemes: Iterable[LayerScheme]) -> bool:
    """Whether OpenVINO supports a transformer with this config.json and these layers."""
    return _architecture_problem(config) is None and not any(map(_unknown_weights, schemes))


def refuse_unknown_openvino(config: Mapping[str, Any]) -> None:
    """Refuse an architecture by its config.json alone, before anything is built or loaded.

    Raises:
        UnsupportedError: `OpenVinoModel` does not support it.
    """
    if (problem := _unknown_architecture(config)) is not None:
        raise UnsupportedError(f"{problem}; use backend torch")


def _unknown_architecture(config: Mapping[str, Any]) -> str | None:
    kind, known = str(config.get("model_type")), ", ".join(_ARCHITECTURES)
    if kind in _ARCHITECTURES:
        return None
    return f"backend openvino supports {known} models, and this is a {kind} model"


def _architecture_problem(config: Mapping[str, Any]) -> str | None:
    kind, known = str(config.get("model_type")), ", ".join(_ARCHITECTURES)
    if (problem := _unknown_architecture(config)) is not None or has_known_forward_settings(config):
        return problem
    return (
        f"backend openvino supports {known} models with their usual settings, and this {kind} "
        f"model has other settings"
    )


def _unknown_weights(scheme: LayerScheme) -> str | None:
    """The name of a weight format that OpenVINO lacks; None for a format that it supports."""
    if scheme.activation_outliers is not None:
        return "LLM.int8()"
    return "e4m3" if scheme.number_format == "e4m3" else None


def _model(
    config: Mapping[str, Any], weights: OpenVinoWeights, *, static: bool, reads: Pooling = "mean"
) -> tuple[Any, _Builder]:
    library, kind = _library(), str(config.get("model_type"))
    if problem := _architecture_problem(config):
        raise UnsupportedError(f"{problem}; use backend torch")
    builder = _Builder(weights, static=static)
    names = ("input_ids", "attention_mask")
    inputs = [builder.op.parameter([-1, -1], np.int64, name) for name in names]
    for parameter, name in zip(inputs, names, strict=True):
        parameter.output(0).set_names({name})
    ids, mask = (parameter.output(0) for parameter in inputs)
    hidden = _ARCHITECTURES[kind](builder, config, reads, ids, mask)
    hidden.set_names({"last_hidden_state"})
    return library.Model([builder.op.result(hidden)], inputs, "gteopt"), builder


def _library() -> Any:
    """OpenVINO, imported late because it is an extra."""
    try:
        import openvino
    except ImportError as error:
        raise UnsupportedError(
            f"backend openvino needs OpenVINO: {install_command('openvino')}"
        ) from error
    return openvino


class _Builder:
    """Makes OpenVINO operations on named weights; `static` rounds the inputs of static layers."""

    def __init__(self, weights: OpenVinoWeights, *, static: bool) -> None:
        from openvino import opset15

        self.op: Any = opset15
        self.n_bytes = self.table_bytes = 0
        self.kernels: Counter[str] = Counter()
        self.rounds = self.pools = False
        self.lent: list[NDArray[Any]] = []
        self._static_inputs = static
        self._rounded: dict[tuple[str, int, bytes], Node] = {}
        self._weights = weights

    def constant(
        self, values: NDArray[Any] | Tensor, kind: str | None = None, flip: int = 0
    ) -> Node:
        """A constant of an array.

        `kind` reads the array's bytes as elements of another type, along the last axis. `flip`
        inverts these bits of each byte.
        """
        import openvino

        array = values.contiguous().numpy() if isinstance(values, Tensor) else values
        self.n_bytes += array.nbytes
        if kind is None:
            return self.op.constant(array).output(0)
        element = getattr(openvino.Type, kind)
        shape = [*array.shape[:-1], array.shape[-1] * array.itemsize * 8 // element.bitwidth]
        # openvino.Tensor does not keep an array alive, so the bytes are copied into its memory.
        tensor = openvino.Tensor(element, openvino.Shape(shape))
        if flip:  # while copying, which saves a second copy
            target = tensor.data.reshape(-1).view(np.uint8)
            np.bitwise_xor(array.reshape(-1).view(np.uint8), np.uint8(flip), out=target)
        else:
            openvino.Tensor(array, openvino.Shape(shape), element).copy_to(tensor)
        return self.op.constant(tensor, shared_memory=True).output(0)

    def borrowed(self, tensor: Tensor, kind: str) -> Node:
        """A constant that shares the memory of a contiguous tensor; `lent` keeps it alive.

        A table in a mapped file, of which only some rows are read, needs no copy.
        """
        import openvino

        array = tensor.numpy()
        self.n_bytes += array.nbytes
        self.lent.append(array)
        element = getattr(openvino.Type, kind)
        shared = openvino.Tensor(array, openvino.Shape(array.shape), element)
        return self.op.constant(shared, shared_memory=True).output(0)

    def number(self, value: float) -> Node:
        """A scalar."""
        return self.op.constant(np.float32(value)).output(0)

    def shape(self, *sizes: int) -> Node:
        """An int64 constant: a shape, axes or an order."""
        return self.op.constant(np.array(sizes, dtype=np.int64)).output(0)

    def wide(self, x: Node) -> Node:
        """`x` in float32."""
        return self.op.convert(x, "f32").output(0)

    def floats(self, tensor: Tensor) -> Node:
        """A float tensor in float32; bfloat16 is stored as it is."""
        if tensor.dtype == torch.bfloat16:
            return self.wide(self.constant(tensor.contiguous().view(torch.int16), "bf16"))
        return self.constant(tensor.float())

    def plain(self, name: str) -> Node:
        """A weight that is not quantized."""
        return self.floats(self._weights.plain[name])

    def embed(self, name: str, ids: Node) -> Node:
        """Rows [..., D] of the token embeddings."""
        axis, before = self.shape(0), self.n_bytes
        table = self._weights.table
        if table is None:
            plain = self._weights.plain[f"{name}.weight"].contiguous()
            if plain.dtype == torch.bfloat16:
                stored = self.borrowed(plain.view(torch.int16), "bf16")
            else:
                stored = self.borrowed(plain.float(), "f32")
            rows = self.wide(self.op.gather(stored, ids, axis).output(0))
        else:
            codes = self.constant(table.qweight, "i8", 0x80)
            scale = self.constant(table.scale)
            rows = self.op.multiply(
                self.wide(self.op.gather(codes, ids, axis).output(0)),
                self.wide(self.op.gather(scale, ids, axis).output(0)),
            ).output(0)
        self.table_bytes = self.n_bytes - before
        return rows

    def linear(self, name: str, x: Node) -> Node:
        """The product x W^T + bias of the linear layer `name`."""
        read = self._weights.packed.get(name)
        if read is not None and read.weight.inputs is not None:
            return self._static(name, x, read.weight, read.weight.inputs)
        if read is None:
            weight = self.plain(f"{name}.weight")
            self.kernels["openvino.dense"] += 1
        else:
            weight = self._decoded(name, read.weight)
            if read.order is not None:
                x = self.op.gather(x, self.constant(read.order), self.shape(-1)).output(0)
        y = self.op.matmul(x, weight, False, True).output(0)
        if f"{name}.bias" in self._weights.plain:
            y = self.op.add(y, self.plain(f"{name}.bias")).output(0)
        return y

    def _static(self, name: str, x: Node, packed: PackedWeight, grid: InputGrid) -> Node:
        """The product of a layer with static activations: a fixed grid rounds its inputs.

        Without `static`, inputs are not rounded.
        """
        codes, scale = signed_codes(packed)
        bias = self._weights.plain.get(f"{name}.bias")
        offset = torch.zeros(packed.out_features) if bias is None else bias.float()
        if self._static_inputs:
            offset = offset - (codes.float() @ grid.zero) * scale
        producer = x.get_node().get_friendly_name()  # unique in a model; a Python id is not
        key = (producer, x.get_index(), grid.scale.numpy().tobytes())
        if key not in self._rounded:  # once for all layers that share these inputs
            scaled = self.op.multiply(x, self.constant(1 / grid.scale))
            if self._static_inputs:
                ends = [self.number(0.0), self.number(255.0)] * 2
                shifted = self.op.add(scaled, self.constant(grid.zero))
                scaled = self.op.fake_quantize(shifted, *ends, 256)
            self._rounded[key] = scaled.output(0)
        weight = self.op.multiply(self.wide(self.constant(codes)), self.constant(scale[:, None]))
        y = self.op.matmul(self._rounded[key], weight, False, True)
        how = "static" if self._static_inputs else "inputs as they are: no VNNI"
        self.kernels[f"openvino.int8 ({how})"] += 1
        return self.op.add(y, self.constant(offset)).output(0)

    def _decoded(self, name: str, packed: PackedWeight) -> Node:
        """(codes - zero) * scale in a form that OpenVINO recognises, so that codes stay packed."""
        scheme, n_groups = packed.scheme, packed.scale.shape[1]
        if unknown := _unknown_weights(scheme):
            raise UnsupportedError(
                f"backend openvino takes weights in NF4 or in whole numbers of 2 to 8 bits, and "
                f"{name} is {unknown}; use backend torch, or build from int8, gptq-int4 or gptq-nf4"
            )
        outputs, width = packed.out_features, packed.in_features // n_groups
        bits = 8 if scheme.bits == 8 else 4
        codes, zeros = packed.qweight, packed.qzero
        if scheme.bits not in (4, 8):  # codes of 2 and 3 bits are stored in 4
            codes = pack_codes(unpack_codes(codes, scheme.bits, packed.in_features), 4)
        scale = packed.scale.reshape(outputs, n_groups, 1)
        grouped = codes.reshape(outputs, n_groups, width * bits // 8)
        is_nf4 = scheme.number_format == "nf4"
        if is_nf4:
            values = self.wide(self.constant(grouped, "nf4"))
        elif zeros is None and scheme.bits in (4, 8):
            # Flipping the top bit of a code subtracts the middle of its range.
            flip = 0x80 if bits == 8 else 0x88
            values = self.wide(self.constant(grouped, f"i{bits}", flip))
        else:
            if zeros is None:
                zeros = torch.full(
                    (outputs, n_groups), symmetric_zero_point(scheme), dtype=torch.uint8
                )
            else:
                zeros = unpack_codes(zeros, scheme.bits, n_groups)
            stored = pack_codes(zeros.reshape(outputs * n_groups), bits)
            zero = self.op.reshape(
                self.constant(stored, f"u{bits}"), self.shape(outputs, n_groups, 1), False
            )
            values = self.op.subtract(
                self.wide(self.constant(grouped, f"u{bits}")), self.wide(zero.output(0))
            ).output(0)
        weight = self.op.multiply(values, self.wide(self.constant(scale))).output(0)
        self.rounds |= scheme.activation_bits == 8 or (scheme.bits < 8 and not is_nf4)
        self.kernels[f"openvino.{'nf' if is_nf4 else 'int'}{scheme.bits}"] += 1
        return self.op.reshape(weight, self.shape(outputs, packed.in_features), False).output(0)

    def heads(self, x: Node, n_heads: int, width: int) -> Node:
        """[N, T, H * d] to [N, H, T, d]."""
        split = self.op.reshape(x, self.shape(0, 0, n_heads, width), True)
        return self.op.transpose(split, self.shape(0, 2, 1, 3)).output(0)

    def repeated(self, x: Node, n_shared: int, n_heads: int, width: int) -> Node:
        """[N, H', T, d] to [N, H, T, d]: each shared head once for each query head."""
        if n_shared == n_heads:
            return x
        op = self.op
        wide = op.unsqueeze(x, self.shape(2))  # [N, H', 1, T, d]
        times = self.shape(1, 1, n_heads // n_shared, 1, 1)
        spread = op.broadcast(wide, times, broadcast_spec="BIDIRECTIONAL")
        heads = op.transpose(spread, self.shape(0, 3, 1, 2, 4))
        merged = op.reshape(heads, self.shape(0, 0, n_heads, width), True)
        return op.transpose(merged, self.shape(0, 2, 1, 3)).output(0)

    def attend(self, q: Node, k: Node, v: Node, mask: Node, n_heads: int, width: int) -> Node:
        """Attention of [N, H, T, d] each, with `mask` added to the scores: [N, T, H * d]."""
        mixed = self.op.scaled_dot_product_attention(q, k, v, mask)
        together = self.op.transpose(mixed, self.shape(0, 2, 1, 3))
        return self.op.reshape(together, self.shape(0, 0, n_heads * width), True).output(0)

    def place_read(self, mask: Node, config: Mapping[str, Any], reads: Pooling) -> Node | None:
        """int64 [N, 1], the place of the token that pooling reads; None if all are needed."""
        if not reads_one_token(config, reads):
            return None
        self.pools = True
        n_tokens = self.op.reduce_sum(mask, self.shape(1), True)
        last = self.op.subtract(n_tokens, self.shape(1))
        return self.op.multiply(last, self.shape(int(reads == "lasttoken"))).output(0)

    def at(self, x: Node, place: Node) -> Node:
        """Rows [N, 1, D] of x [N, T, D] at place [N, 1]."""
        return self.op.gather(x, place, self.shape(1), 1).output(0)

    def scores_mask(self, mask: Node, *, causal: bool) -> Node:
        """Added to attention scores: float32 [N, 1, 1, T], or [N, 1, T, T] if causal."""
        op = self.op
        hidden = op.subtract(self.number(1.0), self.wide(mask))
        added = op.multiply(op.unsqueeze(hidden, self.shape(1, 2)), self.number(_MASKED))
        if causal:
            place = self.positions(mask)
            later = op.greater(
                op.unsqueeze(place, self.shape(0)), op.unsqueeze(place, self.shape(1))
            )
            later = op.multiply(self.wide(later.output(0)), self.number(_MASKED))
            added = op.minimum(added, op.unsqueeze(later, self.shape(0, 1)))
        return added.output(0)

    def positions(self, ids: Node) -> Node:
        """int64 [T], from 0."""
        op = self.op
        length = op.gather(op.shape_of(ids, "i64"), self.shape(1), self.shape(0))
        length = op.squeeze(length, self.shape(0))
        start, step = op.constant(np.int64(0)), op.constant(np.int64(1))
        return op.range(start, length, step, "i64").output(0)


def _bert(b: _Builder, config: Mapping[str, Any], reads: Pooling, ids: Node, mask: Node) -> Node:
    op, n_heads = b.op, int(config["num_attention_heads"])
    width, eps = int(config["hidden_size"]) // n_heads, float(config["layer_norm_eps"])

    def norm(name: str, x: Node) -> Node:
        normal = op.mvn(x, b.shape(-1), True, eps, "inside_sqrt")
        scaled = op.multiply(normal, b.plain(f"{name}.weight"))
        return op.add(scaled, b.plain(f"{name}.bias")).output(0)

    added = b.scores_mask(mask, causal=False)
    places = b.plain("embeddings.position_embeddings.weight")
    kinds = b.plain("embeddings.token_type_embeddings.weight")
    x = op.add(
        b.embed("embeddings.word_embeddings", ids), op.gather(places, b.positions(ids), b.shape(0))
    )
    x = norm("embeddings.LayerNorm", op.add(x, op.gather(kinds, b.shape(0), b.shape(0))))
    place = b.place_read(mask, config, reads)
    n_blocks = int(config["num_hidden_layers"])
    for i in range(n_blocks):
        at = f"encoder.layer.{i}.attention.self"
        k = b.heads(b.linear(f"{at}.key", x), n_heads, width)
        v = b.heads(b.linear(f"{at}.value", x), n_heads, width)
        if place is not None and i == n_blocks - 1:
            x = b.at(x, place)
        q = b.heads(b.linear(f"{at}.query", x), n_heads, width)
        at = f"encoder.layer.{i}"
        mixed = b.linear(f"{at}.attention.output.dense", b.attend(q, k, v, added, n_heads, width))
        x = norm(f"{at}.attention.output.LayerNorm", op.add(mixed, x))
        inside = op.gelu(b.linear(f"{at}.intermediate.dense", x), "erf").output(0)
        x = norm(f"{at}.output.LayerNorm", op.add(b.linear(f"{at}.output.dense", inside), x))
    return x


def _decoder(b: _Builder, config: Mapping[str, Any], reads: Pooling, ids: Node, mask: Node) -> Node:
    op, n_heads = b.op, int(config["num_attention_heads"])
    n_shared = int(config.get("num_key_value_heads") or n_heads)
    width = int(config.get("head_dim") or int(config["hidden_size"]) // n_heads)
    eps = float(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)

    def norm(name: str, x: Node) -> Node:
        squares = op.reduce_mean(op.power(x, b.number(2.0)), b.shape(-1), True)
        root = op.sqrt(op.add(squares, b.number(eps)))
        normal = op.multiply(x, op.divide(b.number(1.0), root))
        return op.multiply(b.plain(f"{name}.weight"), normal).output(0)

    angles = op.multiply(
        op.unsqueeze(b.wide(b.positions(ids)), b.shape(1)),
        b.constant(1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32)[None] / width)),
    )
    both = op.concat([angles, angles], -1)  # [T, d]

    def rotated(x: Node, angles: Node) -> Node:
        """X [N, H, T, d] by angles [1 or N, 1, T, d]."""
        cos, sin = op.cos(angles), op.sin(angles)
        first, second = op.split(x, op.constant(np.int64(3)), 2).outputs()
        turned = op.concat([op.multiply(second, b.number(-1.0)), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin)).output(0)

    causal = config.get("is_causal") is not False
    added = b.scores_mask(mask, causal=causal)
    turns = op.unsqueeze(both, b.shape(0, 1)).output(0)  # [1, 1, T, d]
    place = b.place_read(mask, config, reads)
    x = b.embed("embed_tokens", ids)
    n_blocks = int(config["num_hidden_layers"])
    for i in range(n_blocks):
        at = f"layers.{i}"
        h = norm(f"{at}.input_layernorm", x)
        k = rotated(b.heads(b.linear(f"{at}.self_attn.k_proj", h), n_shared, width), turns)
        v = b.heads(b.linear(f"{at}.self_attn.v_proj", h), n_shared, width)
        if place is not None and i == n_blocks - 1:
            x, h = b.at(x, place), b.at(h, place)
            added = b.scores_mask(mask, causal=False)
            turns = op.unsqueeze(op.gather(both, place, b.shape(0)), b.shape(1)).output(0)
        q = rotated(b.heads(b.linear(f"{at}.self_attn.q_proj", h), n_heads, width), turns)
        keys, values = (b.repeated(heads, n_shared, n_heads, width) for heads in (k, v))
        mixed = b.attend(q, keys, values, added, n_heads, width)
        x = op.add(x, b.linear(f"{at}.self_attn.o_proj", mixed)).output(0)
        h = norm(f"{at}.post_attention_layernorm", x)
        gate = op.swish(b.linear(f"{at}.mlp.gate_proj", h))
        inside = op.multiply(gate, b.linear(f"{at}.mlp.up_proj", h)).output(0)
        x = op.add(x, b.linear(f"{at}.mlp.down_proj", inside)).output(0)
    return norm("norm", x)


_Architecture = Callable[[_Builder, Mapping[str, Any], Pooling, Node, Node], Node]
_ARCHITECTURES: Mapping[str, _Architecture] = {
    "qwen2": _decoder,
    "mistral": _decoder,
    "bert": _bert,
}
