"""Loads a base or an artifact from its files into an `Encoder`, whole or block by block.

Hides: how unquantized weights are read, and which modules follow the transformer. Refuses to know:
texts, how a variant was made, measured or judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gteopt.encoder.description import (
    AskedBackend,
    EncoderDescription,
    EncoderRuntime,
    RuntimeOptions,
    device_name,
    dtype_name,
    parse_dtype,
    pick_device,
    resolve_backend,
    resolve_dtype,
)
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.openvino import OpenVinoModel, OpenVinoWeights
from gteopt.encoder.packed_weights import list_quantized_layers, load_packed, read_packed
from gteopt.encoder.pooling import LatentAttention, Normalized, PoolingHead
from gteopt.encoder.skeleton import (
    attention_implementation,
    build_hf_config,
    build_skeleton,
    build_whole_config,
    check_unexpected_tensors,
    drop_pooler_,
    explain_missing_tensors,
    find_model_class,
    find_stored_names,
    find_tied_names,
    tie_parameters_,
)
from gteopt.errors import InputError, NumericsError, UnsupportedError, suggest_names
from gteopt.kernels import speed_up_linears_
from gteopt.kernels.measured import DETERMINISTIC, choose_kernel_ways
from gteopt.machine import keep_freed_memory, release_freed_memory
from gteopt.model.checkpoint import LATENT_FILE, LATENT_PREFIX, Checkpoint, opening_checkpoint
from gteopt.model.foreign import foreign_errors
from gteopt.model.st_files import STATIC

_Held = TypeVar("_Held")


def load(
    source: str | Path,
    *,
    device: str | int | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: AskedBackend = "torch",
    kernels: str = "deterministic",
    cuda_graphs: bool = True,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
    copy: bool = False,
) -> Encoder:
    """Load a base model or an artifact.

    Args:
        source: "nano", a folder, an artifact folder, or `<org>/<name>`.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", a torch.device, or the
            number of a GPU.
        dtype: "auto" is bfloat16 for a base, and for an artifact the dtype that it was built in.
            Also "bfloat16", "float32", "float64", or a torch.dtype.
        backend: "torch" or "openvino". OpenVINO is faster on a CPU for the architectures and
            layers that it supports, and rounds activations of quantized products to 8 bits. "auto"
            uses the faster one: the first load of a shape on a machine measures both.
        kernels: of the torch backend's linear layers on a CPU. "deterministic" uses kernels
            that every machine has, and keeps weights packed. "measured" uses the fastest: the
            first load of a shape on a machine measures quantized layers, and the times are stored.
            Unquantized layers keep a second copy of their weight, which makes queries faster. A
            name fixes the kernel: "fbgemm", "onednn" or "int_mm" for int8 products, "decoded" for
            weights that are decoded once.
        cuda_graphs: on a GPU, record the forward pass of single short texts and replay it. This
            takes memory, and time for the first text of each of a few lengths.
        hub_dir: folder in the Hub's layout; if given, the network is never used.
        revision: commit, branch or tag on the Hub.
        family: see `open_checkpoint`.
        copy: copy the weights into memory. Otherwise they may stay mapped from their files, which
            must then not change while the encoder is in use.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint` and `load_checkpoint`.

    Example:
        >>> encoder = gteopt.load("nano")
        >>> encoder.encode(["a text", "another"]).shape
        (2, 256)
    """
    with opening_checkpoint(
        source, hub_dir=hub_dir, revision=revision, family=family
    ) as checkpoint:
        options = RuntimeOptions(
            device_name(device), dtype_name(dtype), backend, kernels, cuda_graphs
        )
        encoder = load_checkpoint(checkpoint, options)
        if copy:
            _copy_tensors_(encoder.module)
        return encoder


def load_checkpoint(
    checkpoint: Checkpoint,
    options: RuntimeOptions = RuntimeOptions(),  # noqa: B008 - frozen
    *,
    later: str | None = None,
) -> Encoder:
    """Load a model that `open_checkpoint` has described.

    Args:
        checkpoint: a base or an artifact.
        options: where and how the encoder computes.
        later: a submodule of a base (its list of blocks) whose weights stay in their files until
            `load_weights_` reads them. If the files name weights differently from the architecture,
            everything is read at once.

    Raises:
        InputError: the backend or kernel is unknown.
        UnsupportedError: the backend cannot compute this model, or not on this device.
    """
    taken = resolve_backend(checkpoint, options)
    backend = taken.backend
    device = (
        _openvino_device(options.device) if backend == "openvino" else pick_device(options.device)
    )
    dtype = parse_dtype(resolve_dtype(checkpoint, options.dtype))
    openvino_model, streams, ways = None, False, DETERMINISTIC
    if backend == "torch" and device.type == "cpu":
        if later is None:  # a build that reads block by block has no memory to spare
            keep_freed_memory()
        ways = choose_kernel_ways(list_quantized_layers(checkpoint), dtype, options.kernels)
    if backend == "openvino":
        module = build_skeleton(checkpoint)
        weights = load_openvino_weights(checkpoint, module, dtype)
        config = build_whole_config(checkpoint)
        openvino_model = OpenVinoModel(config, weights, dtype=dtype, reads=checkpoint.pooling)
        release_freed_memory()
    elif backend != "torch":
        raise InputError(
            f"unknown backend '{backend}': "
            f"{suggest_names(str(backend), ['auto', 'torch', 'openvino'])}"
        )
    elif checkpoint.is_quantized:
        # Another library may have written the files, so config.json and tensors may not fit.
        with foreign_errors(checkpoint.folder, "loading the quantized weights"):
            module = load_packed(checkpoint, device, dtype, ways)
    else:
        module, streams = _load_unquantized(checkpoint, device, dtype, later)
    module.eval().requires_grad_(False)
    if openvino_model is None:
        speed_up_linears_(module, device, ways)
    return Encoder(
        EncoderDescription(checkpoint, EncoderRuntime(device, dtype, backend, ways, taken.reason)),
        module,
        _load_head(checkpoint, device, dtype),
        openvino_model=openvino_model,
        streams=streams,
        cuda_graphs=options.cuda_graphs,
    )


def _copy_tensors_(module: nn.Module) -> None:
    """Copy every tensor of a module into its own memory; tied tensors stay tied."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.data.clone())

    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = copied(parameter)
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, copied(buffer))
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, copied(value))


def load_weights_(encoder: Encoder, name: str, dtype: torch.dtype | None = None) -> None:
    """Read the weights of the submodule `name` that were left in their files.

    Args:
        encoder: from `load_checkpoint` with `later`.
        name: for example a block.
        dtype: of all its weights afterwards; None keeps the model's dtype.
    """
    part = encoder.module.get_submodule(name)
    dtype = dtype or encoder.dtype
    short_names = {f"{name}.{short}": short for short, p in part.named_parameters() if p.is_meta}
    stored = find_stored_names(encoder.checkpoint, encoder.module, short_names)
    tensors = {short: p.to(dtype) for short, p in part.named_parameters() if not p.is_meta}
    tensors |= _read(
        encoder.checkpoint,
        {stored[full]: short for full, short in short_names.items()},
        encoder.device,
        dtype,
    )
    _check_finite(encoder.checkpoint, {f"{name}.{short}": t for short, t in tensors.items()})
    part.load_state_dict(tensors, strict=False, assign=True)
    part.requires_grad_(False)


def unload_weights_(encoder: Encoder, name: str) -> None:
    """Free the memory of the submodule `name`; shapes stay, packed layers are removed."""
    part = encoder.module.get_submodule(name)
    for parent in list(part.modules()):
        for leaf, child in list(parent.named_children()):
            # Prepacked weights are not torch buffers, so the layer is dropped.
            if hasattr(child, "kernel") and not isinstance(child, nn.Linear):
                setattr(parent, leaf, nn.Identity())
        for leaf, parameter in list(parent.named_parameters(recurse=False)):
            setattr(parent, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _load_unquantized(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, later: str | None = None
) -> tuple[nn.Module, bool]:
    """The transformer, and whether the weights of `later` are still in their files."""
    # from_pretrained handles none of these cases.
    if later is not None or checkpoint.prefix or checkpoint.is_table:
        frame = _load_frame(checkpoint, device, dtype, later)
        if frame is not None:
            return frame, later is not None
    return _load_plain(checkpoint, device, dtype), False


def _load_plain(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer as the library transformers loads it, with its rules for names."""
    config = build_hf_config(checkpoint)
    architecture = find_model_class(checkpoint, config)
    with foreign_errors(checkpoint.folder, "loading the weights"):
        module, info = architecture.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention_implementation(architecture),
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    # No embedding needs the pooler head. Any other missing weight would be random numbers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise explain_missing_tensors(checkpoint, missing)
    prefix = f"{module.base_model_prefix}."
    check_unexpected_tensors(
        checkpoint, module, [name.removeprefix(prefix) for name in info["unexpected_keys"]]
    )
    if info.get("mismatched_keys"):
        raise explain_missing_tensors(checkpoint, [str(key) for key, *_ in info["mismatched_keys"]])
    loaded: nn.Module = module.to(device)
    return loaded


def _load_frame(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, later: str | None
) -> nn.Module | None:
    """The transformer without the weights of `later`; None if the files use other names."""
    module = build_skeleton(checkpoint)
    names = [name for name, _ in module.named_parameters()]
    stored = find_stored_names(checkpoint, module, names)
    if lacking := [name for name in names if name not in stored]:
        if not drop_pooler_(module, lacking):
            if checkpoint.prefix:
                raise explain_missing_tensors(checkpoint, lacking)
            return None
        names = list(stored)
    prefix = f"{checkpoint.prefix}{getattr(module, 'base_model_prefix', '')}."
    unused = set(checkpoint.tensors) - set(stored.values())
    check_unexpected_tensors(checkpoint, module, [name.removeprefix(prefix) for name in unused])
    postponed = f"{later}." if later is not None else None
    now = {stored[n]: n for n in names if postponed is None or not n.startswith(postponed)}
    tensors = _read(checkpoint, now, device, dtype)
    if later is not None:  # a build: bad weights must not reach an artifact
        _check_finite(checkpoint, tensors)
    ties = find_tied_names(module)
    with foreign_errors(checkpoint.folder, "loading the weights"):
        module.load_state_dict(tensors, strict=False, assign=True)
    tie_parameters_(module, ties)
    if any(parameter.is_meta for name, parameter in module.named_parameters() if name in tensors):
        return None
    for name, buffer in module.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, buffer.to(device))
    return module


def _read(
    checkpoint: Checkpoint, wanted: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Copies of the wanted tensors of the weight files, one after the other.

    A tensor that is not copied would keep its whole file mapped.

    Args:
        checkpoint: its weight files are read.
        wanted: new name by name in the files.
        device: where the copies are.
        dtype: of the copies.
    """
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.weight_files:
        with foreign_errors(path, "reading"), safe_open(path, framework="pt") as handle:
            for stored in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if stored in wanted:
                    mapped = handle.get_tensor(stored)
                    tensors[wanted[stored]] = mapped.to(device, dtype, copy=True)
    return tensors


def _check_finite(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to build from weights with NaN or infinity.

    Raises:
        NumericsError: names the first few of these tensors.
    """
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
        # Minimum and maximum show both: NaN spreads to them, infinity is one of them.
        if not torch.stack(torch.aminmax(tensor)).isfinite().all()
    ]
    if bad:
        raise NumericsError(
            f"{checkpoint.folder}: {len(bad)} tensors hold NaN or infinity ({', '.join(bad[:5])}); "
            f"download the model again"
        )


def _openvino_device(name: str) -> torch.device:
    if name not in ("auto", "cpu"):
        raise UnsupportedError(f"backend openvino runs on the CPU, not on {name}; leave device out")
    return torch.device("cpu")


class _Once(dict[str, _Held]):
    """A dict that forgets each value when it is read, so that the reader alone holds it."""

    def __getitem__(self, name: str) -> _Held:
        return self.pop(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.pop(name, default)


def load_openvino_weights(
    checkpoint: Checkpoint, skeleton: nn.Module, dtype: torch.dtype
) -> OpenVinoWeights:
    """The weights of a checkpoint's OpenVINO model; `skeleton` comes from `build_skeleton`.

    A weight is freed when the OpenVINO model has its copy. Packed layers are read one by one, and
    each other weight can be read once.
    """
    cpu = torch.device("cpu")
    if not checkpoint.is_quantized:
        module, _ = _load_unquantized(checkpoint, cpu, dtype)
        return OpenVinoWeights(_Once(module.state_dict()))
    stored = read_packed(checkpoint, skeleton, cpu, dtype)
    biases = {f"{name}.bias": bias.to(dtype) for name, bias in stored.biases.items()}
    return OpenVinoWeights(
        plain=_Once({**stored.plain, **biases}),
        packed=stored.layers,
        table=None if stored.table is None else stored.table[1],
    )


def load_latent_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the latent-attention pooling by their published names, in `dtype`."""
    latent_file = checkpoint.folder / LATENT_FILE
    files = [latent_file] if latent_file.is_file() else checkpoint.weight_files
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.startswith(LATENT_PREFIX):
                    short = name.removeprefix(LATENT_PREFIX)
                    tensors[short] = handle.get_tensor(name).to(dtype, copy=True)
    return tensors


def _load_head(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> PoolingHead:
    latent = None
    if checkpoint.latent is not None:
        try:
            latent = LatentAttention(checkpoint.latent, load_latent_tensors(checkpoint, dtype))
        except KeyError as error:
            raise explain_missing_tensors(
                checkpoint, [f"{LATENT_PREFIX}{error.args[0]}"]
            ) from error
    pooling_modules, final_modules = _load_modules(checkpoint)
    head = PoolingHead(
        checkpoint.pooling, final_modules, pooling_modules=pooling_modules, latent=latent
    )
    return head.to(device).eval().requires_grad_(False)


def _load_modules(checkpoint: Checkpoint) -> tuple[list[nn.Module], list[nn.Module]]:
    """Sentence Transformers' modules up to the last pooling, and those after it, in float32."""
    poolings = [i for i, entry in enumerate(checkpoint.modules) if entry.kind == "Pooling"]
    if not poolings and not checkpoint.is_table:
        return [], [Normalized()] if checkpoint.normalise else []
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling

    classes = {kind.__name__: kind for kind in (Dense, Normalize, Dropout, LayerNorm, Pooling)}
    last = max(poolings, default=0)
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    for i, entry in enumerate(checkpoint.modules):
        is_replaced = i == last and checkpoint.pooling != "modules"  # by `pool_token_vectors`
        if entry.kind in ("Transformer", STATIC) or is_replaced:
            continue
        folder = checkpoint.folder / entry.path
        module: nn.Module = Normalized()
        if entry.kind != "Normalize" or entry.config:
            with foreign_errors(folder, f"loading the module {entry.kind}"):
                module = classes[entry.kind].load(str(folder), local_files_only=True).float()
        (before if i <= last else after).append(module)
    return before, after
