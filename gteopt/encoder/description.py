"""Describes an encoder without reading its weights.

Caches and reports use an `EncoderDescription` as their key. A process whose workers encode needs no
more.
Hides: which device and dtype a name means. Refuses to know: weights, how vectors are computed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from safetensors import safe_open

from gteopt.encoder.fastest_backend import BackendChoice, fastest_backend
from gteopt.encoder.tokenization import Tokenization
from gteopt.errors import InputError, UnsupportedError, suggest_names
from gteopt.kernels import arithmetic_name
from gteopt.kernels.measured import DETERMINISTIC, KernelWays
from gteopt.machine import gpu_name
from gteopt.model.checkpoint import VECTORS_FILE, Checkpoint, open_checkpoint
from gteopt.model.foreign import foreign_errors
from gteopt.records.manifest import Manifest, Similarity
from gteopt.vectors.transform import VectorTransform, identity_transform

Backend = Literal["torch", "openvino"]
AskedBackend = Literal["auto", "torch", "openvino"]
"""A backend as users name it; "auto" chooses the fastest, see `fastest_backend`."""
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class EncoderRuntime:
    """Where and how token vectors are computed.

    Attributes:
        device: where the weights are.
        dtype: dtype of the layers that are not quantized.
        backend: the library that computes.
        ways: how quantized layers multiply on a CPU.
        backend_reason: why "auto" took this backend; None if the user named it.
    """

    device: torch.device
    dtype: torch.dtype
    backend: Backend = "torch"
    ways: KernelWays = DETERMINISTIC
    backend_reason: str | None = None


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how an encoder should compute, by the names that users write; see `gteopt.load`.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" or a name that `parse_dtype` knows.
        backend: the library that computes.
        kernels: kernels of the torch backend's quantized layers on a CPU.
        cuda_graphs: whether a GPU records the forward pass; not allowed if the module changes.
    """

    device: str = "auto"
    dtype: str = "auto"
    backend: AskedBackend = "torch"
    kernels: str = "deterministic"
    cuda_graphs: bool = False


class EncoderDescription:
    """What is known of an encoder without its weights.

    Attributes:
        checkpoint: what the folder says about the model.
        runtime: where and how it computes.
        vectors: what happens to an embedding after the model.
        tokenization: turns texts into token ids.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: EncoderRuntime,
        vectors: VectorTransform | None = None,
    ) -> None:
        """Load the tokenizer, and the vector ranges of an artifact unless `vectors` is given."""
        self.checkpoint = checkpoint
        self.runtime = runtime
        self.vectors = load_vector_transform(checkpoint) if vectors is None else vectors
        self.tokenization = Tokenization(checkpoint)

    @property
    def name(self) -> str:
        """The encoder's name in progress lines, warnings and errors."""
        return self.tokenization.name

    @name.setter
    def name(self, name: str) -> None:
        self.tokenization.name = name

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.runtime.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers that are not quantized."""
        return self.runtime.dtype

    @property
    def backend(self) -> Backend:
        """The library that computes token vectors."""
        return self.runtime.backend

    @property
    def sha256(self) -> str:
        """Hash of the base's files or of the artifact; the key of caches and reports."""
        return self.checkpoint.sha256

    @property
    def manifest(self) -> Manifest | None:
        """The artifact's manifest; None for a base."""
        return self.checkpoint.manifest

    @property
    def full_dims(self) -> int:
        """Dimensions of the model's own output."""
        return self.checkpoint.dims

    @property
    def dims(self) -> int:
        """Dimensions of the vectors that `Encoder.encode` returns."""
        return self.vectors.dims

    @property
    def max_tokens(self) -> int:
        """Longest input in tokens; longer texts are cut."""
        return self.tokenization.max_tokens

    @property
    def takes_instructions(self) -> bool:
        """Whether queries carry an instruction."""
        return self.tokenization.takes_instructions

    @property
    def arithmetic(self) -> str:
        """The libraries and instructions that affect rounding, besides weights and dtype."""
        if self.backend == "openvino":
            return f"openvino {version('openvino')}, {arithmetic_name(self.device)}"
        return arithmetic_name(self.device, self.runtime.ways)

    @property
    def gpu(self) -> str | None:
        """Name of the GPU that computes; None on a CPU, or if this machine has no GPU."""
        return gpu_name(str(self.device))


def describe_encoder(
    source: str | Path,
    *,
    device: str,
    dtype: str = "auto",
    backend: AskedBackend = "torch",
    hub_dir: Path | None = None,
    revision: str | None = None,
) -> EncoderDescription:
    """Describe a base or an artifact for a process whose workers encode.

    Args:
        source: see `load`.
        device: kind of device that the workers use; this machine may lack it.
        dtype: see `load`.
        backend: see `load`.
        hub_dir: see `load`.
        revision: see `load`.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source, hub_dir=hub_dir, revision=revision)
    kind, where = parse_dtype(resolve_dtype(checkpoint, dtype)), torch.device(device)
    taken = (
        fastest_backend(checkpoint, where, kind) if backend == "auto" else BackendChoice(backend)
    )
    runtime = EncoderRuntime(where, kind, taken.backend, backend_reason=taken.reason)
    return EncoderDescription(checkpoint, runtime)


def resolve_backend(checkpoint: Checkpoint, options: RuntimeOptions) -> BackendChoice:
    """The backend that options name; for "auto", the fastest with their device and dtype.

    Raises:
        InputError, UnsupportedError: see `pick_device`, `parse_dtype` and `fastest_backend`.
    """
    if options.backend != "auto":
        return BackendChoice(options.backend)
    kind = parse_dtype(resolve_dtype(checkpoint, options.dtype))
    return fastest_backend(checkpoint, pick_device(options.device), kind, options.kernels)


def resolve_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """The name itself; "auto" is the dtype of the base that an artifact was built from."""
    if dtype != "auto":
        return dtype
    return checkpoint.manifest.base.dtype if checkpoint.manifest else "bfloat16"


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a dtype, as `parse_dtype` reads it."""
    return str(dtype).removeprefix("torch.")


def device_name(device: str | int | torch.device) -> str:
    """The name of a device, as `pick_device` reads it; a number means a GPU."""
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name; "bf16" and "fp32" are allowed too.

    Raises:
        InputError: the name is unknown, or float16, which overflows in gte-Qwen2.
    """
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
    if name == "float16":
        raise InputError(
            "dtype float16 is refused: activations of gte-Qwen2 overflow in it; use bfloat16"
        )
    if name not in _DTYPES:
        raise InputError(f"unknown dtype '{name}': {suggest_names(name, _DTYPES)}")
    return _DTYPES[name]


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here.

    Raises:
        InputError: the name is unknown.
        UnsupportedError: torch does not see the GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError):  # raised by torch for a name that it does not know
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError(f"device {name} was asked for, but torch sees no GPU; use cpu")
        if device.type == "cuda" and (device.index or 0) >= (n := torch.cuda.device_count()):
            raise UnsupportedError(f"device {name} was asked for, but torch sees {n} GPU(s)")
        if device.type in ("cpu", "cuda"):
            return device
    raise InputError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N")


def load_vector_transform(checkpoint: Checkpoint) -> VectorTransform:
    """The vector transform of a checkpoint, with the ranges that an artifact stores."""
    if checkpoint.manifest is None:
        similarity: Similarity = "cosine" if checkpoint.unit_vectors else "dot"
        return identity_transform(
            checkpoint.dims, kept=checkpoint.truncate_dim, similarity=similarity
        )
    path = checkpoint.folder / VECTORS_FILE
    tensors: dict[str, NDArray[Any]] = {}
    if path.is_file():
        with foreign_errors(path, "reading"), safe_open(path, framework="numpy") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return VectorTransform.from_tensors(checkpoint.manifest.vectors, checkpoint.dims, tensors)
