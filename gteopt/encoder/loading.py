"""Files to an `Encoder`: a base or an artifact in memory, whole or block by block.

Hides: Hugging Face loading, what files call a weight, attention direction, which weights are
quantized and in whose format. The only file that knows them. Refuses to know: texts, how a variant
was made, measured or judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gteopt.encoder.description import (
    Backend,
    Description,
    Runtime,
    dtype_of,
    parse_dtype,
    pick_device,
)
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.openvino import OpenVinoModel, Weights
from gteopt.encoder.pooling import Head, LatentAttention
from gteopt.encoder.tokenization import import_transformers
from gteopt.errors import InputError, IntegrityError, UnsupportedError, suggest
from gteopt.formats import format_of
from gteopt.formats.packed import ReadLayer, Shape
from gteopt.kernels import make_linear, speed_up_linears_
from gteopt.kernels.reference import PackedEmbedding
from gteopt.machine import give_back
from gteopt.model.checkpoint import (
    LATENT_FILE,
    LATENT_PREFIX,
    Checkpoint,
    opening,
)
from gteopt.quant.affine import PackedWeight

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_Held = TypeVar("_Held")
_MOST_MAKERS = 8
"""Layers of an artifact that are made at a time: each takes some three times its packed weight."""
_TRIM_BYTES = 64 << 20
"""Packed weights after which a load returns what making their layers took: several times their own
size, which the allocator would keep (294 MB after three blocks of gte-Qwen2-1.5B in int8)."""


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: Backend = "torch",
    cuda_graphs: bool = True,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
) -> Encoder:
    """Load a base model or an artifact.

    Args:
        source: "nano", a folder, an artifact folder, or `<org>/<name>`.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" is bfloat16 for a base and the dtype it was built in for an artifact;
            also "bfloat16", "float32", "float64".
        backend: "torch", or "openvino", the faster one on a CPU for the architectures and layers
            that it knows; activations of quantized products are then rounded to 8 bits.
        cuda_graphs: on a GPU, record the forward pass of single short texts and replay it. This
            takes memory, and time for the first text of each of a few lengths.
        hub_dir: folder in the Hub's layout; given, the network is never touched.
        revision: commit, branch or tag on the Hub.
        family: see `open_checkpoint`.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint` and `load_checkpoint`.

    Example:
        >>> encoder = gteopt.load("nano")
        >>> encoder.encode(["a text", "another"]).shape
        (2, 256)
    """
    with opening(source, hub_dir=hub_dir, revision=revision, family=family) as checkpoint:
        return load_checkpoint(
            checkpoint, device=device, dtype=dtype, backend=backend, cuda_graphs=cuda_graphs
        )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: Backend = "torch",
    later: str | None = None,
    cuda_graphs: bool = False,
) -> Encoder:
    """Load what `open_checkpoint` has described.

    Args:
        checkpoint: a base or an artifact.
        device: see `load`.
        dtype: see `load`.
        backend: see `load`.
        later: a submodule of a base (its list of blocks) whose weights stay in their files until
            `fill_` asks for them; where the files name weights in another way than the
            architecture does, everything is read at once all the same.
        cuda_graphs: see `load`; not for who changes the module.

    Raises:
        InputError: an unknown backend.
        UnsupportedError: a backend that cannot compute this model, or not on this device.
    """
    where = _openvino_device(device) if backend == "openvino" else pick_device(device)
    kind = parse_dtype(dtype_of(checkpoint, dtype))
    openvino_model, streams = None, False
    if backend == "openvino":
        module = build_skeleton(checkpoint)
        weights = openvino_weights(checkpoint, module, kind)
        config = whole_config(checkpoint)
        openvino_model = OpenVinoModel(config, weights, dtype=kind, reads=checkpoint.pooling)
        give_back()
    elif backend != "torch":
        raise InputError(
            f"unknown backend '{backend}': {suggest(str(backend), ['torch', 'openvino'])}"
        )
    elif checkpoint.is_quantized:
        module = _load_packed(checkpoint, where, kind)
    else:
        module, streams = _load_unquantized(checkpoint, where, kind, later)
    module.eval().requires_grad_(False)
    if openvino_model is None:
        speed_up_linears_(module, where)
    return Encoder(
        Description(checkpoint, Runtime(where, kind, backend)),
        module,
        _load_head(checkpoint, where, kind),
        openvino_model=openvino_model,
        streams=streams,
        cuda_graphs=cuda_graphs,
    )


def fill_(encoder: Encoder, name: str, dtype: torch.dtype | None = None) -> None:
    """Read those weights of the submodule `name` that were left in their files.

    Args:
        encoder: as `load_checkpoint` returned it, given `later`.
        name: a block, say.
        dtype: of all its weights from here on; the model's own when None.
    """
    part = encoder.module.get_submodule(name)
    kind = dtype or encoder.dtype
    wanted = [each for each, p in part.named_parameters() if p.is_meta]
    names = {f"{name}.{each}": each for each in wanted}
    stored = _stored_names(encoder.checkpoint, encoder.module, names)
    tensors = {each: p.to(kind) for each, p in part.named_parameters() if not p.is_meta}
    tensors |= _read(
        encoder.checkpoint,
        {stored[full]: each for full, each in names.items()},
        encoder.device,
        kind,
    )
    part.load_state_dict(tensors, strict=False, assign=True)
    part.requires_grad_(False)


def empty_(encoder: Encoder, name: str) -> None:
    """Free the memory of the submodule `name`; shapes stay, packed layers do not."""
    part = encoder.module.get_submodule(name)
    for parent in list(part.modules()):
        for leaf, child in list(parent.named_children()):
            # What a library holds in an order of its own is in no buffer that could be moved.
            if hasattr(child, "kernel") and not isinstance(child, nn.Linear):
                setattr(parent, leaf, nn.Identity())
        for leaf, parameter in list(parent.named_parameters(recurse=False)):
            setattr(parent, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The transformer with every parameter on the meta device and its buffers real."""
    from accelerate import init_empty_weights

    transformers = import_transformers()
    with init_empty_weights(include_buffers=False):
        module: nn.Module = transformers.AutoModel.from_config(
            _hf_config(checkpoint), attn_implementation="sdpa"
        )
    return module


def _hf_config(checkpoint: Checkpoint) -> Any:
    fields = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in ("model_type", "quantization_config")  # the latter is ours to apply
    }
    window = fields.get("sliding_window")
    if isinstance(window, int) and window >= checkpoint.max_tokens:
        fields["sliding_window"] = (
            None  # never reached; transformers would make a mask all the same
        )
    kind = str(checkpoint.config["model_type"])
    try:
        return import_transformers().AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise UnsupportedError(
            f"{checkpoint.folder}: transformers has no architecture '{kind}' of its own"
        ) from error


def _load_unquantized(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, later: str | None = None
) -> tuple[nn.Module, bool]:
    """The transformer, and whether the weights of `later` are still in their files."""
    if later is not None or checkpoint.prefix:  # which from_pretrained does not know
        frame = _load_frame(checkpoint, device, dtype, later)
        if frame is not None:
            return frame, later is not None
    return _load_plain(checkpoint, device, dtype), False


def _load_plain(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    module, info = import_transformers().AutoModel.from_pretrained(
        checkpoint.folder,
        config=_hf_config(checkpoint),
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    # A pooler head is no part of the embedding; anything else missing would be random numbers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise _missing(checkpoint, missing)
    loaded: nn.Module = module.to(device)
    return loaded


def _missing(checkpoint: Checkpoint, names: Sequence[str]) -> IntegrityError:
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return IntegrityError(
        f"{checkpoint.folder}: {len(names)} tensors of the architecture are not in its "
        f"weight files ({shown}); the download is incomplete or config.json belongs to "
        f"another model"
    )


def _load_frame(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, later: str | None
) -> nn.Module | None:
    """The transformer without the weights of `later`; None where names in the files differ."""
    module = build_skeleton(checkpoint)
    names = [name for name, _ in module.named_parameters()]
    stored = _stored_names(checkpoint, module, names)
    if lacking := [name for name in names if name not in stored]:
        if not _drop_pooler_(module, lacking):
            if checkpoint.prefix:
                raise _missing(checkpoint, lacking)
            return None
        names = list(stored)
    behind = f"{later}." if later is not None else None
    now = {stored[n]: n for n in names if behind is None or not n.startswith(behind)}
    tensors = _read(checkpoint, now, device, dtype)
    module.load_state_dict(tensors, strict=False, assign=True)
    for name, buffer in module.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, buffer.to(device))
    return module


def _stored_names(
    checkpoint: Checkpoint, module: nn.Module, names: Iterable[str]
) -> dict[str, str]:
    """What the weight files call each parameter, as far as they have it; see `_bare_names`."""
    prefix = f"{checkpoint.prefix}{getattr(module, 'base_model_prefix', '')}."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        prefix = checkpoint.prefix
    stored = {name: f"{prefix}{name}" for name in names}
    return {name: each for name, each in stored.items() if each in checkpoint.tensors}


def _read(
    checkpoint: Checkpoint, wanted: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Copies of some of the tensors in the weight files, under new names, one after the other.

    Copies, so that the mapped files leave memory when the tensors do.
    """
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as handle:
            for stored in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if stored in wanted:
                    mapped = handle.get_tensor(stored)
                    tensors[wanted[stored]] = mapped.to(device, dtype, copy=True)
    return tensors


@dataclass(frozen=True)
class _Stored:
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


def _read_packed(
    checkpoint: Checkpoint, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> _Stored:
    """No full-precision copy of a quantized weight ever exists, and no second one of those that
    are packed: a file is mapped for one layer at a time.
    """
    files: dict[str, tuple[Path, str]] = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as handle:
            files |= {name: (path, name) for name in handle.keys()}  # noqa: SIM118 - no mapping
    files = _bare_names(files, module)

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
    return _Stored(layers, biases, table, plain)


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


def _load_packed(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with packed layers in place."""
    module = build_skeleton(checkpoint)
    stored = _read_packed(checkpoint, module, device, dtype)
    if stored.table is not None:
        swap_embedding_(module, *stored.table, device, dtype)
    since = 0
    for name, layer, n_bytes in _made(stored, device, dtype):
        _put_(module, name, layer)
        since += n_bytes
        if since > _TRIM_BYTES:
            give_back()
            since = 0
    give_back()
    plain = stored.plain
    unexpected = module.load_state_dict(plain, strict=False, assign=True).unexpected_keys
    buffers = {name for name, _ in module.named_buffers()}
    unexpected = [name for name in unexpected if name not in buffers]
    left = [name for name, p in module.named_parameters() if p.is_meta]
    if left and _drop_pooler_(module, left):
        left = []
    if left or unexpected:
        raise IntegrityError(
            f"{checkpoint.folder}: weights do not fit the architecture (missing: "
            f"{', '.join(left[:5]) or 'none'}; unexpected: {', '.join(unexpected[:5]) or 'none'})"
        )
    return module.to(device)


def _made(
    stored: _Stored, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, nn.Module, int]]:
    """Each layer by its name as it runs, and its packed bytes on disk.

    A processor's libraries put weights into an order of their own, which takes longer than a disk
    and works on one core: a thread a core reads and makes a layer each.
    """

    def make(name: str) -> tuple[str, nn.Module, int]:
        read, bias = stored.layers[name], stored.biases.get(name)
        layer = make_linear(read.weight, bias, device=device, dtype=dtype, order=read.order)
        return name, layer, read.weight.n_bytes

    n_threads = min(torch.get_num_threads(), _MOST_MAKERS) if device.type == "cpu" else 1
    with ThreadPoolExecutor(n_threads) as pool:
        yield from pool.map(make, stored.layers)


def _openvino_device(name: str) -> torch.device:
    if name not in ("auto", "cpu"):
        raise UnsupportedError(f"backend openvino runs on the CPU, not on {name}; leave device out")
    return torch.device("cpu")


def whole_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's config with what config.json leaves to defaults."""
    return {**checkpoint.config, **_hf_config(checkpoint).to_dict()}


class _Once(dict[str, _Held]):
    """Gives each value away: whoever asks for it holds the only one."""

    def __getitem__(self, name: str) -> _Held:
        return self.pop(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.pop(name, default)


def openvino_weights(checkpoint: Checkpoint, skeleton: nn.Module, dtype: torch.dtype) -> Weights:
    """What OpenVINO's graph of a checkpoint is made of; the skeleton is `build_skeleton`'s.

    A weight is freed when the graph has its copy: packed layers are read one by one, and of the
    others each can be read once.
    """
    cpu = torch.device("cpu")
    if not checkpoint.is_quantized:
        module, _ = _load_unquantized(checkpoint, cpu, dtype)
        return Weights(_Once(module.state_dict()))
    stored = _read_packed(checkpoint, skeleton, cpu, dtype)
    biases = {f"{name}.bias": bias.to(dtype) for name, bias in stored.biases.items()}
    return Weights(
        plain=_Once({**stored.plain, **biases}),
        packed=stored.layers,
        table=None if stored.table is None else stored.table[1],
    )


def _drop_pooler_(module: nn.Module, lacking: Sequence[str]) -> bool:
    """Take out a head of other tasks where only its weights are lacking; some files have none."""
    if not all(name.startswith("pooler.") for name in lacking):
        return False
    setattr(module, "pooler", None)  # noqa: B010 - modules declare no such attribute
    return True


def _bare_names(files: dict[str, _Held], module: nn.Module) -> dict[str, _Held]:
    """What belongs to tensors, by names as in the bare transformer, where a checkpoint has it
    inside a model with a head (`model.layers.0...` beside `lm_head`); the head is no part of the
    embedding.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    inside = {n.removeprefix(prefix): t for n, t in files.items() if n.startswith(prefix)}
    return inside or files


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
    setattr(module.get_submodule(parent), leaf, part)


def _load_dense(folder: Path) -> nn.Module:
    """A Sentence Transformers `Dense` module as a function of the vector alone, in float32."""
    from sentence_transformers.models import Dense

    dense = Dense.load(str(folder))
    return nn.Sequential(dense.linear.float(), dense.activation_function)


def latent_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the latent-attention pooling by their published names, in `dtype`.

    Raises:
        IntegrityError: some are missing.
    """
    own = checkpoint.folder / LATENT_FILE
    files = [own] if own.is_file() else checkpoint.weight_files
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.startswith(LATENT_PREFIX):
                    short = name.removeprefix(LATENT_PREFIX)
                    tensors[short] = handle.get_tensor(name).to(dtype, copy=True)
    return tensors


def _load_head(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Head:
    latent = None
    if checkpoint.latent is not None:
        try:
            latent = LatentAttention(checkpoint.latent, latent_tensors(checkpoint, dtype))
        except KeyError as error:
            raise _missing(checkpoint, [f"{LATENT_PREFIX}{error.args[0]}"]) from error
    dense = [_load_dense(path) for path in checkpoint.dense]
    head = Head(checkpoint.pooling, dense, normalise=checkpoint.normalise, latent=latent)
    return head.to(device).eval().requires_grad_(False)
