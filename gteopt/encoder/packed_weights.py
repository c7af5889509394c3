"""Reads quantized weights from their files into a module, one layer after the other.

Hides: which tensors make up a layer in each format. Refuses to know: texts, unquantized models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gteopt.encoder.skeleton import (
    build_skeleton,
    drop_pooler_,
    find_tied_names,
    map_bare_names,
    tie_parameters_,
)
from gteopt.errors import IntegrityError
from gteopt.formats import format_of
from gteopt.formats.packed import LinearShape, ReadLayer
from gteopt.kernels import make_linear
from gteopt.kernels.measured import DETERMINISTIC, KernelWays, MeasuredLayer
from gteopt.kernels.reference import PackedEmbedding
from gteopt.machine import release_freed_memory
from gteopt.model.checkpoint import Checkpoint
from gteopt.quant.affine import PackedWeight

_MAX_THREADS = 8
"""Layers that are built at the same time; each takes about three times its packed weight."""
_TRIM_BYTES = 64 << 20
"""After this many packed bytes, a load returns freed memory to the system. The allocator would
keep several times as much."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a quantized checkpoint as they are stored, by the module's names.

    Attributes:
        layers: quantized linear layers; each access reads the layer from its file.
        biases: biases of the quantized layers that have one.
        table: name and weight of the token embeddings; None if they are not quantized.
        plain: all other tensors in the model's dtype.
    """

    layers: Mapping[str, ReadLayer]
    biases: dict[str, Tensor]
    table: tuple[str, PackedWeight] | None
    plain: dict[str, Tensor]


def read_packed(
    checkpoint: Checkpoint, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> StoredWeights:
    """Read the weights of a quantized checkpoint; packed layers are read on access only.

    No full-precision copy of a quantized weight ever exists, and no second packed copy: a file is
    mapped for one layer at a time.
    """
    files: dict[str, tuple[Path, str]] = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as handle:
            files |= {name: (path, name) for name in handle.keys()}  # noqa: SIM118 - no mapping
    files = map_bare_names(files, module)

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(files[name][0], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, in_file in by_file.items():
            with safe_open(path, framework="pt", device=str(device)) as handle:
                tensors |= {name: handle.get_tensor(files[name][1]) for name in in_file}
        return tensors

    layers = _Layers(checkpoint, module, files, read)
    embedding = checkpoint.manifest.embedding if checkpoint.manifest is not None else None
    table, quantized = None, set(layers.tensors)
    if embedding is not None:
        names = [name for name in files if name.startswith(f"{embedding.name}.")]
        parts = {n.removeprefix(f"{embedding.name}."): part for n, part in read(names).items()}
        packed = PackedWeight.from_tensors(embedding.scheme, embedding.in_features, parts)
        table, quantized = (embedding.name, packed), quantized | set(names)
    plain = read(name for name in files if name not in quantized)
    biases = {name: plain.pop(f"{name}.bias") for name in layers if f"{name}.bias" in plain}
    plain = {n: t.to(dtype) if t.is_floating_point() else t for n, t in plain.items()}
    return StoredWeights(layers, biases, table, plain)


class _Layers(Mapping[str, ReadLayer]):
    """Quantized linear layers by name; each access reads the layer.

    Attributes:
        tensors: names of all tensors of these layers, without biases.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: nn.Module,
        names: Iterable[str],
        read: Callable[[Iterable[str]], dict[str, Tensor]],
    ) -> None:
        """Find the quantized layers and the names of their tensors.

        Args:
            checkpoint: says how the layers were quantized.
            module: the architecture.
            names: names of all tensors, as in the bare transformer.
            read: reads the tensors of some names.

        Raises:
            IntegrityError: a quantized layer is no linear layer of the architecture.
        """
        self._read, self._config = read, checkpoint.quantization
        manifest = checkpoint.manifest
        self._records = {record.name: record for record in manifest.layers} if manifest else {}
        modules = dict(module.named_modules())
        layer_names = list(self._records)
        if self._config is not None:
            layer_names = format_of(self._config).layers_in(names)
        self._tensors_of: dict[str, list[str]] = {name: [] for name in layer_names}
        self._shapes: dict[str, LinearShape] = {}
        for name in layer_names:
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise IntegrityError(
                    f"{checkpoint.folder}: the quantized layer {name} is no linear layer of the "
                    f"architecture; config.json belongs to another model"
                )
            self._shapes[name] = LinearShape(linear.out_features, linear.in_features)
        for name in names:
            parts = name.split(".")  # the name of a layer's tensor may contain a dot
            for n in range(1, len(parts)):
                if (layer := ".".join(parts[:n])) in self._tensors_of and parts[n:] != ["bias"]:
                    self._tensors_of[layer].append(name)

    @property
    def tensors(self) -> list[str]:
        return [name for names in self._tensors_of.values() for name in names]

    def __getitem__(self, name: str) -> ReadLayer:
        tensors = self._read(self._tensors_of[name])
        parts = {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items()}
        if self._config is None:
            record = self._records[name]
            return ReadLayer(PackedWeight.from_tensors(record.scheme, record.in_features, parts))
        form = format_of(self._config)
        return form.from_tensors(self._config, name, self._shapes[name], parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors_of)

    def __len__(self) -> int:
        return len(self._tensors_of)


def list_quantized_layers(checkpoint: Checkpoint) -> list[MeasuredLayer]:
    """Scheme and size of an artifact's quantized layers; empty for other libraries' checkpoints."""
    manifest = checkpoint.manifest
    records = manifest.layers if manifest is not None else ()
    return [
        MeasuredLayer(record.scheme, record.out_features, record.in_features) for record in records
    ]


def load_packed(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    ways: KernelWays = DETERMINISTIC,
) -> nn.Module:
    """The transformer with its packed layers, which multiply in the given ways."""
    module = build_skeleton(checkpoint)
    stored = read_packed(checkpoint, module, device, dtype)
    if stored.table is not None:
        swap_embedding_(module, *stored.table, device, dtype)
    bytes_since_trim = 0
    for name, layer, n_bytes in _build_layers(stored, device, dtype, ways):
        put_submodule_(module, name, layer)
        bytes_since_trim += n_bytes
        if bytes_since_trim > _TRIM_BYTES:
            release_freed_memory()
            bytes_since_trim = 0
    release_freed_memory()
    plain = stored.plain
    ties = find_tied_names(module)
    unexpected = module.load_state_dict(plain, strict=False, assign=True).unexpected_keys
    tie_parameters_(module, ties)
    buffers = {name for name, _ in module.named_buffers()}
    unexpected = [name for name in unexpected if name not in buffers]
    missing = [name for name, p in module.named_parameters() if p.is_meta]
    if missing and drop_pooler_(module, missing):
        missing = []
    if missing or unexpected:
        raise IntegrityError(
            f"{checkpoint.folder}: weights do not fit the architecture (missing: "
            f"{', '.join(missing[:5]) or 'none'}; unexpected: "
            f"{', '.join(unexpected[:5]) or 'none'})"
        )
    return module.to(device)


def _build_layers(
    stored: StoredWeights, device: torch.device, dtype: torch.dtype, ways: KernelWays
) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, layer and packed bytes on disk of each quantized layer.

    CPU libraries reorder the weights. This takes longer than reading them and uses one core, so
    several threads read and build layers.
    """

    def make(name: str) -> tuple[str, nn.Module, int]:
        read, bias = stored.layers[name], stored.biases.get(name)
        layer = make_linear(
            read.weight, bias, device=device, dtype=dtype, order=read.order, ways=ways
        )
        return name, layer, read.weight.n_bytes

    n_threads = min(torch.get_num_threads(), _MAX_THREADS) if device.type == "cpu" else 1
    with ThreadPoolExecutor(n_threads) as pool:
        yield from pool.map(make, stored.layers)


def swap_embedding_(
    module: nn.Module, name: str, table: PackedWeight, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace the embedding `name` inside `module` with its packed form."""
    put_submodule_(module, name, PackedEmbedding(table, dtype).to(device))


def swap_linear_(
    module: nn.Module,
    name: str,
    packed: PackedWeight,
    bias: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replace the linear layer `name` inside `module` with its packed form; see `make_linear`."""
    put_submodule_(module, name, make_linear(packed, bias, device=device, dtype=dtype))


def put_submodule_(module: nn.Module, name: str, part: nn.Module) -> None:
    """Replace the submodule `name` of `module`."""
    parent, _, leaf = name.rpartition(".")
    if not hasattr(part, "weight"):
        # T5 reads the dtype of a linear layer's `weight` if it is a tensor.
        part.register_parameter("weight", None)
    setattr(module.get_submodule(parent), leaf, part)
