"""Measure the second moments of the gradients by each layer's output, and store them by block.

Hides: which texts and directions they are measured on, and how large matrices are cut. Refuses to
know: what they are used for (`quant/row_feedback.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gteopt.build.gradients import Watch, walk_back
from gteopt.build.replay import StateSpill, emulates_bfloat16, find_blocks
from gteopt.build.tensor_files import save_tensors
from gteopt.encoder.encoder import Encoder
from gteopt.progress import Progress, ignore_progress
from gteopt.quant.products import block_spans, matrix_product

OUTPUT_HESSIANS = "output-hessians"
"""Folder of the files in a build's stage."""
N_TEXTS = 256
"""How many calibration texts gradients are taken on: this many if there are as many, and fewer than
twice as many."""
N_PROBES = 4
"""Random directions of each text's vector."""
STATE_BYTES = 256 << 20
"""The most memory for the inputs of all blocks; others are on disk. Without a limit, memory would
grow with the number of blocks."""
MOST_OUTPUTS = 2048
"""Output features of one matrix. A wider layer has several, so that memory and disk do not grow
with the square of its width."""


def measure_output_hessians(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    layers: Collection[str],
    folder: Path,
    *,
    spill: StateSpill,
    progress: Progress = ignore_progress,
) -> None:
    """Write a file with the matrices of each block's layers to `folder`, the last block first.

    The gradients are those of random combinations of the unit vector's elements. So the mean of
    their products is the Gauss-Newton matrix of the distance between vectors.

    Args:
        encoder: the base; its weights may still be in their files.
        tokens: token ids of the calibration texts; every n-th of them is used.
        layers: names of linear layers.
        folder: where the files go.
        spill: see `walk_back`.
        progress: called with the passes through a block.

    Raises:
        NumericsError: hidden states or vectors hold NaN or infinity.
    """
    some = list(tokens[:: max(1, len(tokens) // N_TEXTS)])
    _, blocks = find_blocks(encoder.module, encoder.checkpoint.config.get("num_hidden_layers"))
    sums: dict[str, list[Tensor]] = {}
    n_passed = 0

    def passed(n: int) -> None:
        nonlocal n_passed
        n_passed += n
        activity = f"measuring gradients of {encoder.checkpoint.id}"
        progress(activity, n_passed, (2 + N_PROBES) * len(blocks))

    @torch.inference_mode()
    def add(name: str, gradients: Tensor) -> None:
        # A product of bfloat16 is twice as fast, and its rounding is far below the noise of texts.
        emulated = emulates_bfloat16(gradients.device.type)
        gradients = gradients.float() if emulated else gradients.bfloat16()
        outputs = gradients.T.contiguous()  # [O, n]
        parts = [outputs[start:end] for start, end in block_spans(len(outputs), MOST_OUTPUTS)]
        products = [matrix_product(part, part) for part in parts]
        if name in sums:
            for total, product in zip(sums[name], products, strict=True):
                total.add_(product)
        else:
            sums[name] = [product.float() for product in products]

    finished: str | None = None
    walk = walk_back(
        encoder, some, n_probes=N_PROBES, spill=spill, passed=passed, watch=Watch(layers, add)
    )
    for at in walk:
        if finished is not None:
            _write(output_hessian_path(folder, finished), sums)
        finished, sums = at.block.name, {}
    if finished is not None:
        _write(output_hessian_path(folder, finished), sums)


def output_hessian_path(folder: Path, block: str) -> Path:
    """The file of one block's matrices."""
    return folder / f"{block}.safetensors"


def read_output_hessians(path: Path) -> dict[str, list[Tensor]]:
    """The matrices of each layer of a block, bfloat16 [o, o], in the order of output features."""
    matrices: dict[str, list[Tensor]] = {}
    tensors = load_file(path)
    for key in sorted(tensors, key=lambda key: int(key.rpartition(".")[2])):
        matrices.setdefault(key.rpartition(".")[0], []).append(tensors[key])
    return matrices


def output_hessian_bytes(out_features: Iterable[int], *, item_bytes: int) -> int:
    """Bytes of the matrices of some layers."""
    spans = [span for n in out_features for span in block_spans(n, MOST_OUTPUTS)]
    return item_bytes * sum((end - start) ** 2 for start, end in spans)


def _write(path: Path, sums: Mapping[str, Sequence[Tensor]]) -> None:
    tensors = {
        f"{name}.{part}": total.to(torch.bfloat16).cpu()
        for name, of_layer in sums.items()
        for part, total in enumerate(of_layer)
    }
    save_tensors(path, tensors)
