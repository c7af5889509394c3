"""Quantized weights from their files into a module, one layer after the other.

Hides: which tensors make a layer in whose format. Refuses to know: texts, unquantized models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gteopt.encoder.skeleton import bare_names, build_skeleton, drop_pooler_, tie_, tied_names
from gteopt.errors import IntegrityError
from gteopt.formats import format_of
from gteopt.formats.packed import ReadLayer, Shape
from gteopt.kernels import make_linear
from gteopt.kernels.measured import DETERMINISTIC, Layer, Ways
from gteopt.kernels.reference import PackedEmbedding
from gteopt.machine import give_back
from gteopt.model.checkpoint import Checkpoint
from gteopt.quant.affine import PackedWeight

_MOST_MAKERS = 8
"""Layers of an artifact that are made at a time: each takes some three times its packed weight."""
_TRIM_BYTES = 64 << 20
"""Packed weights after which a load returns the memory that making their layers took. The
allocator would keep several times their own size."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a quantized checkpoint as they lie in its files, by the module's names.

    Attributes:
        layers: quantized linear layers, each read anew whenever it is asked for.
        biases: of those that have one.
        table: the token embeddings with their name; None where they are not quantized.
        plain: everything else in the model's dtype.
    """

    layers: Mapping[str, ReadLayer]
    biases: dict[str, Tensor]
    table: tuple[str, PackedWeight] | None
    plain: dict[str, Tensor]


def read_packed(
    checkpoint: Checkpoint, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> StoredWeights:
    """No full-precision copy of a quantized weight ever exists, and no second one of those that
    are packed: a file is mapped for one layer at a time.
    """
    files: dict[str, tuple[Path, str]] = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as handle:
            files |= {name: (path, name) for name in handle.keys()}  # noqa: SIM118 - no mapping
    files = bare_names(files, module)

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        inside: dict[Path, list[str]] = {}
        for name in names:
            inside.setdefault(files[name][0], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, own in inside.items():
            with safe_open(path, framework="pt", device=str(device)) as handle:
                tensors |= {name: handle.get_tensor(files[name][1]) for name in own}
        return tensors

    layers = _Layers(checkpoint, module, files, read)
    embedding = checkpoint.manifest.embedding if checkpoint.manifest is not None else None
    table, own = None, set(layers.tensors)
    if embedding is not None:
        names = [name for name in files if name.startswith(f"{embedding.name}.")]
        parts = {n.removeprefix(f"{embedding.name}."): each for n, each in read(names).items()}
        packed = PackedWeight.from_tensors(embedding.scheme, embedding.in_features, parts)
        table, own = (embedding.name, packed), own | set(names)
    plain = read(name for name in files if name not in own)
    biases = {name: plain.pop(f"{name}.bias") for name in layers if f"{name}.bias" in plain}
    plain = {n: each.to(dtype) if each.is_floating_point() else each for n, each in plain.items()}
    return StoredWeights(layers, biases, table, plain)


class _Layers(Mapping[str, ReadLayer]):
    """Quantized linear layers by name, each read when it is asked for.

    Attributes:
        tensors: names of all their tensors, biases left out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: nn.Module,
        names: Iterable[str],
        read: Callable[[Iterable[str]], dict[str, Tensor]],
    ) -> None:
        """Find out which they are.

        Args:
            checkpoint: says how they were quantized.
            module: the architecture.
            names: of all tensors, as in the bare transformer.
            read: those of some names.

        Raises:
            IntegrityError: one is no linear layer of the architecture.
        """
        self._read, self._config = read, checkpoint.quantization
        manifest = checkpoint.manifest
        self._records = {each.name: each for each in manifest.layers} if manifest else {}
        modules = dict(module.named_modules())
        found = list(self._records)
        if self._config is not None:
            found = format_of(self._config).layers_in(names)
        self._own: dict[str, list[str]] = {name: [] for name in found}
        self._shapes: dict[str, Shape] = {}
        for name in found:
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise IntegrityError(
                    f"{checkpoint.folder}: the quantized layer {name} is no linear layer of the "
                    f"architecture; config.json belongs to another model"
                )
            self._shapes[name] = Shape(linear.out_features, linear.in_features)
        for name in names:
            parts = name.split(".")  # a tensor of a layer may have a dot in its own name
            for n in range(1, len(parts)):
                if (layer := ".".join(parts[:n])) in self._own and parts[n:] != ["bias"]:
                    self._own[layer].append(name)

    @property
    def tensors(self) -> list[str]:
        return [name for own in self._own.values() for name in own]

    def __getitem__(self, name: str) -> ReadLayer:
        own = self._read(self._own[name])
        parts = {each.removeprefix(f"{name}."): tensor for each, tensor in own.items()}
        if self._config is None:
            record = self._records[name]
            return ReadLayer(PackedWeight.from_tensors(record.scheme, record.in_features, parts))
        form = format_of(self._config)
        return form.from_tensors(self._config, name, self._shapes[name], parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def quantized_layers(checkpoint: Checkpoint) -> list[Layer]:
    """What decides the speed of an artifact's quantized layers; none of other libraries' files."""
    manifest = checkpoint.manifest
    records = manifest.layers if manifest is not None else ()
    return [Layer(each.scheme, each.out_features, each.in_features) for each in records]


def load_packed(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    ways: Ways = DETERMINISTIC,
) -> nn.Module:
    """The transformer with packed layers in place, which multiply in the given ways."""
    module = build_skeleton(checkpoint)
    stored = read_packed(checkpoint, module, device, dtype)
    if stored.table is not None:
        swap_embedding_(module, *stored.table, device, dtype)
    since = 0
    for name, layer, n_bytes in _made(stored, device, dtype, ways):
        _put_(module, name, layer)
        since += n_bytes
        if since > _TRIM_BYTES:
            give_back()
            since = 0
    give_back()
    plain = stored.plain
    ties = tied_names(module)
    unexpected = module.load_state_dict(plain, strict=False, assign=True).unexpected_keys
    tie_(module, ties)
    buffers = {name for name, _ in module.named_buffers()}
    unexpected = [name for name in unexpected if name not in buffers]
    left = [name for name, p in module.named_parameters() if p.is_meta]
    if left and drop_pooler_(module, left):
        left = []
    if left or unexpected:
        raise IntegrityError(
            f"{checkpoint.folder}: weights do not fit the architecture (missing: "
            f"{', '.join(left[:5]) or 'none'}; unexpected: {', '.join(unexpected[:5]) or 'none'})"
        )
    return module.to(device)


def _made(
    stored: StoredWeights, device: torch.device, dtype: torch.dtype, ways: Ways
) -> Iterator[tuple[str, nn.Module, int]]:
    """Each layer by its name as it runs, and its packed bytes on disk.

    A processor's libraries put weights into an order of their own, which takes longer than a disk
    and works on one core: a thread a core reads and makes a layer each.
    """

    def make(name: str) -> tuple[str, nn.Module, int]:
        read, bias = stored.layers[name], stored.biases.get(name)
        layer = make_linear(
            read.weight, bias, device=device, dtype=dtype, order=read.order, ways=ways
        )
        return name, layer, read.weight.n_bytes

    n_threads = min(torch.get_num_threads(), _MOST_MAKERS) if device.type == "cpu" else 1
    with ThreadPoolExecutor(n_threads) as pool:
        yield from pool.map(make, stored.layers)


def swap_embedding_(
    module: nn.Module, name: str, table: PackedWeight, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace the embedding `name` inside `module` by its packed form."""
    _put_(module, name, PackedEmbedding(table, dtype).to(device))


def swap_linear_(
    module: nn.Module,
    name: str,
    packed: PackedWeight,
    bias: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replace the linear layer `name` inside `module` by its packed form; see `make_linear`."""
    _put_(module, name, make_linear(packed, bias, device=device, dtype=dtype))


def _put_(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    if not hasattr(part, "weight"):
        # T5 asks for the dtype of a linear layer's weight, unless it is no tensor.
        part.register_parameter("weight", None)
    setattr(module.get_submodule(parent), leaf, part)
