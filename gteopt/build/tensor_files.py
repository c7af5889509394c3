"""Write tensors to safetensors files, with an error that a user can act on.

Hides: file sizes and disk errors. Refuses to know: what the tensors are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that gets its name only when it is complete.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with tensor_write_errors(path):
        save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)


@contextmanager
def tensor_write_errors(path: Path) -> Iterator[None]:
    """Turn safetensors' own error for a full disk into an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
