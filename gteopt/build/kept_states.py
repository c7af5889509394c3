"""Store the hidden states after the latest finished block, so that a resumed build starts there.

Hides: the files. Refuses to know: blocks and texts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gteopt.build.replay import BlockInput
from gteopt.build.tensor_files import save_tensors

_PARTIAL = "begun"


@dataclass(frozen=True)
class KeptStates:
    """Files of hidden states, one file for each batch.

    Attributes:
        folder: folder of the files.
        n_bytes: the most bytes that the files may take. Larger states are not stored, and a resumed
            build replays the finished blocks.
    """

    folder: Path
    n_bytes: int

    def keep(self, n_blocks: int, batches: Sequence[BlockInput]) -> None:
        """Store the states after the first `n_blocks` blocks; earlier states are removed."""
        hidden = batches[0].hidden
        n_tokens = sum(batch.real.numel() for batch in batches)
        if n_tokens * hidden.shape[-1] * hidden.element_size() > self.n_bytes:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        partial = self.folder / _PARTIAL
        for i, batch in enumerate(batches):
            save_tensors(_file(partial, i), {"hidden": batch.hidden.contiguous().cpu()})
        partial.rename(self.folder / str(n_blocks))

    def n_blocks(self, batches: Sequence[BlockInput]) -> int:
        """After how many blocks the stored states were taken; 0 if none fit these batches."""
        kept = [path for path in self.folder.glob("*") if path.name.isdigit()]
        if len(kept) != 1 or len(list(kept[0].glob("*"))) != len(batches):
            return 0
        for i, batch in enumerate(batches):
            try:
                with safe_open(_file(kept[0], i), framework="pt") as file:
                    shape = file.get_slice("hidden").get_shape()
            except (SafetensorError, OSError):  # cut short by a crash of the machine
                return 0
            if shape[:-1] != list(batch.real.shape):
                return 0
        return int(kept[0].name)

    def restore_(self, batches: Sequence[BlockInput]) -> None:
        """Read the stored states into the batches; they are then after `n_blocks` blocks."""
        folder = self.folder / str(self.n_blocks(batches))
        for i, batch in enumerate(batches):
            batch.hidden = load_file(_file(folder, i))["hidden"].to(batch.real.device)


def _file(folder: Path, batch: int) -> Path:
    return folder / f"{batch:05}.safetensors"
