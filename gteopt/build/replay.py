"""Run the blocks of a transformer one after the other on stored inputs.

Hides: how a transformer is cut into blocks and replayed with exactly the arguments that its own
forward pass gives each block (mask, positions, attention direction). Padding is never counted.
Refuses to know: texts, and what is done with the statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_weights_
from gteopt.errors import NumericsError, UnsupportedError
from gteopt.kernels.cpu import multiplies_bfloat16
from gteopt.quant.gptq import is_finite
from gteopt.quant.held_out_ranges import KindInputs
from gteopt.quant.hessian import HessianAccumulator
from gteopt.quant.static_activations import InputGrid, SeenInputs

BATCH_TOKENS = 2048
"""Padded tokens that run through a block at once. For so many tokens, a wide layer's output takes
160 MB in float32 (18,944 features)."""
SAMPLED_ROWS = 256
"""Inputs of a layer, of each kind of text, that its grid is judged on."""


@dataclass(frozen=True)
class StateSpill:
    """How much memory hidden states of the calibration texts may take, and where others are stored.

    Attributes:
        n_bytes: the most memory of all batches together.
        folder: folder for the other batches, with one file for each batch.
    """

    n_bytes: int
    folder: Path

    def file(self, name: str) -> Path:
        """The path of a file in the folder; makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.safetensors"


class BlockInput:
    """One padded batch on its way through the blocks; each block replaces `hidden`.

    Attributes:
        real: [N, T] bool, False on padding.
        pooled: [N, T], the tokens whose hidden states are pooled.
        kinds: [N] int64, number of each text's kind.
    """

    def __init__(
        self,
        hidden: Tensor,
        real: Tensor,
        pooled: Tensor,
        file: Path | None = None,
        kinds: Tensor | None = None,
    ) -> None:
        self.real = real
        self.pooled = pooled
        self.kinds = torch.zeros(len(real), dtype=torch.long) if kinds is None else kinds
        self._file = file
        self._held: Tensor | None = None
        self.hidden = hidden

    def copy(self) -> BlockInput:
        """An independent copy of the batch with the same hidden states."""
        file = None if self._file is None else self._file.with_name(f"copy-{self._file.name}")
        return BlockInput(self.hidden, self.real, self.pooled, file, self.kinds)

    def kinds_of_rows(self) -> Tensor:
        """[n], the kind of each token that is not padding, in the order of `hidden[real]`."""
        return self.kinds.repeat_interleave(self.real.sum(1).cpu())

    @property
    def hidden(self) -> Tensor:
        """The hidden states [N, T, D]; if they are in a file, each use reads the file."""
        if self._held is not None:
            return self._held
        assert self._file is not None
        hidden: Tensor = load_file(self._file)["hidden"]
        return hidden.to(self.real.device)

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        if self._file is None:
            self._held = value
        else:
            try:
                save_file({"hidden": value.contiguous().cpu()}, self._file)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(f"{self._file} cannot be written: {error}") from error


@dataclass(frozen=True)
class Block:
    """One transformer block with the arguments that the model's forward gives it for each batch."""

    name: str
    module: nn.Module
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    returns_tuple: bool = False

    def run(self, batch: int, hidden: Tensor) -> Tensor:
        """The block's output [N, T, D] for one batch."""
        args, kwargs = self.calls[batch]
        on_gpu = torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext()
        with on_gpu:  # Triton launches kernels on the current GPU
            out = self.module(hidden, *args, **kwargs)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers of the block by their name in the whole model."""
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
        }


def find_blocks(module: nn.Module, n_layers: int | None) -> tuple[str, nn.ModuleList]:
    """Find the list of transformer blocks inside a model; returns its name and the list.

    Raises:
        UnsupportedError: the model has no list of blocks of one type with linear layers.
    """
    for name, modules in module.named_modules():
        if (
            isinstance(modules, nn.ModuleList)
            and (n_layers is None or len(modules) == n_layers)
            and len({type(block) for block in modules}) == 1
            and any(isinstance(inner, nn.Linear) for inner in modules[0].modules())
        ):
            return name, modules
    raise UnsupportedError(
        f"{type(module).__name__} has no list of transformer blocks with linear layers; gteopt "
        f"cannot quantize it (recipes with method none still work)"
    )


class _Recorder(nn.Module):
    """Replaces a block: records its arguments, and returns the hidden states unchanged.

    The model's forward may read attributes of a block, such as ModernBERT's `attention_type`. The
    recorder takes them from the original block.
    """

    def __init__(self, returns_tuple: bool, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that torch does not register a submodule
        self.returns_tuple = returns_tuple
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.calls.append((args[1:], kwargs))
        self.hidden = hidden
        return (hidden, None) if self.returns_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._original[0], name)


@torch.inference_mode()
def open_blocks(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    *,
    kinds: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    spill: StateSpill | None = None,
) -> tuple[list[Block], list[BlockInput]]:
    """Cut the model into blocks, and compute what the first block reads.

    The model's own forward runs once with a recorder in place of every block. Later each block is
    replayed with its recorded keywords. Without the keyword `is_causal`, a block would attend
    causally.

    Args:
        encoder: the model; its blocks' weights may still be in their files.
        tokens: token ids of the texts.
        kinds: number of each text's kind; None if all texts are of one kind.
        dtype: dtype of the hidden states and of the blocks' other arguments; None means the
            model's.
        spill: where hidden states are stored; None keeps all in memory.

    Returns:
        The blocks in order, and a `BlockInput` for each batch of at most 2048 padded tokens.
    """
    name, block_list = find_blocks(
        encoder.module, encoder.checkpoint.config.get("num_hidden_layers")
    )
    originals = list(block_list)
    positions = list(_batch_positions(tokens))
    batches = [[tokens[i] for i in batch] for batch in positions]
    text_kinds = torch.tensor([0] * len(tokens) if kinds is None else kinds)
    dtype = dtype or encoder.dtype
    load_weights_(encoder, f"{name}.0")
    returns_tuple = _returns_tuple(encoder, originals[0], batches[0][0][:4])
    recorders = [_Recorder(returns_tuple, original) for original in originals]
    inputs: list[BlockInput] = []
    kept_bytes = 0
    try:
        for i, recorder in enumerate(recorders):
            block_list[i] = recorder
        for batch, of_batch in zip(batches, positions, strict=True):
            ids, mask = encoder.pad(batch)
            encoder.module(input_ids=ids, attention_mask=mask)
            hidden = recorders[0].hidden.to(dtype)
            n_bytes = hidden.numel() * hidden.element_size()
            file = None
            if spill is not None and kept_bytes + n_bytes > spill.n_bytes:
                file = spill.file(f"batch-{len(inputs):05}")
            else:
                kept_bytes += n_bytes
            pooled = encoder.pool_mask(batch, mask)
            inputs.append(BlockInput(hidden, mask.bool(), pooled, file, text_kinds[of_batch]))
    finally:
        for i, original in enumerate(originals):
            block_list[i] = original
    converted: dict[int, Tensor] = {}
    blocks = []
    for i, (original, recorder) in enumerate(zip(originals, recorders, strict=True)):
        calls = tuple(_cast(call, encoder.dtype, dtype, converted) for call in recorder.calls)
        blocks.append(Block(f"{name}.{i}", original, calls, returns_tuple))
    return blocks, inputs


def _returns_tuple(encoder: Encoder, block: nn.Module, tokens: Sequence[int]) -> bool:
    """Whether a block returns a tuple whose only tensor is the first item.

    Raises:
        UnsupportedError: other items are tensors, too.
    """
    returned: list[Any] = []

    def note(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        returned.append(out)
        raise _Stop

    ids, mask = encoder.pad([tokens])
    hook = block.register_forward_hook(note)
    with suppress(_Stop):
        encoder.module(input_ids=ids, attention_mask=mask)
    hook.remove()
    (out,) = returned
    if not isinstance(out, tuple):
        return False
    if any(isinstance(value, Tensor) for value in out[1:]):
        raise UnsupportedError(
            f"{type(encoder.module).__name__}: its blocks hand on more than hidden states (such as "
            f"T5's position bias), so they cannot be replayed one by one; use a recipe that needs "
            f"no calibration (rtn-int8, rtn-int4)"
        )
    return True


def replay_dtype(encoder: Encoder) -> torch.dtype:
    """The dtype in which a build replays blocks: float32 if bfloat16 is emulated, else the model's.

    A processor without bfloat16 instructions multiplies float32 several times faster.
    """
    if encoder.dtype == torch.bfloat16 and emulates_bfloat16(encoder.device.type):
        return torch.float32
    return encoder.dtype


def emulates_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are slower than those of float32 on "cpu" or "cuda"."""
    return device == "cpu" and not multiplies_bfloat16()


def _cast(value: Any, old: torch.dtype, new: torch.dtype, done: dict[int, Tensor]) -> Any:
    """Convert every tensor of dtype `old` in a block's arguments to `new`.

    Args:
        value: the arguments, or one of them.
        old: dtype of the tensors to convert.
        new: the dtype that they get.
        done: converted tensors by the `id` of the original, so that blocks still share them.
    """
    if isinstance(value, Tensor) and value.dtype == old != new:
        if id(value) not in done:
            done[id(value)] = value.to(new)
        return done[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, old, new, done) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, old, new, done) for key, item in value.items()}
    return value


def copy_block_arguments(value: Any, dtype: torch.dtype) -> Any:
    """A copy of a block's arguments, or of one argument, with float tensors in `dtype`.

    Gradients can flow through the copy, but not through tensors from inference mode.
    """
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, tuple | list):
        return type(value)(copy_block_arguments(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: copy_block_arguments(item, dtype) for key, item in value.items()}
    return value


class _FixedOutput(nn.Module):
    """Replaces every block: returns hidden states that were computed elsewhere."""

    hidden: Tensor

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return (self.hidden,) if self.returns_tuple else self.hidden


def replay_behind_blocks(
    encoder: Encoder,
    blocks: Sequence[Block],
    hidden: Sequence[Tensor],
    inputs: Sequence[BlockInput],
) -> Tensor:
    """Vectors float64 [n, D] for the last block's output, by the model's own forward.

    Differentiable.

    Args:
        encoder: the model that was given to `open_blocks`.
        blocks: the blocks that `open_blocks` returned.
        hidden: the last block's output [N, T, D], batch by batch.
        inputs: the batches that `open_blocks` returned.
    """
    _, block_list = find_blocks(encoder.module, encoder.checkpoint.config.get("num_hidden_layers"))
    stub = _FixedOutput(blocks[0].returns_tuple)
    vectors = []
    try:
        for i in range(len(block_list)):
            block_list[i] = stub
        for out, batch in zip(hidden, inputs, strict=True):
            stub.hidden, mask = out, batch.real.long()
            out = encoder.module(input_ids=torch.zeros_like(mask), attention_mask=mask)
            vectors.append(encoder.pooled(out.last_hidden_state, batch.pooled))
    finally:
        for i, block in enumerate(blocks):
            block_list[i] = block.module
    return torch.cat(vectors).double()


def batch_replay_texts(tokens: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Batches of texts of similar length, each of at most `BATCH_TOKENS` padded tokens."""
    for batch in _batch_positions(tokens):
        yield [tokens[i] for i in batch]


def _batch_positions(tokens: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The positions in `tokens` of each batch's texts."""
    batch: list[int] = []
    for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        if batch and (len(batch) + 1) * len(tokens[i]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch


@torch.inference_mode()
def order_block_layers(block: Block, inputs: Sequence[BlockInput]) -> list[list[str]]:
    """The block's linear layers in running order; layers that read the same tensor form a group.

    Quantizing group by group lets each layer read the output of the quantized layers before it
    ("true sequential" in the GPTQ code).
    """
    runs: list[tuple[str, int, tuple[int, ...]]] = []
    alive: list[Tensor] = []  # inputs stay alive, because a freed address could be used again

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            runs.append((name, args[0].data_ptr(), tuple(args[0].shape)))

        return hook

    handles = [
        linear.register_forward_pre_hook(note(name)) for name, linear in block.linears().items()
    ]
    try:
        block.run(0, inputs[0].hidden)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, address, shape in runs:
        groups.setdefault((address, shape), []).append(name)
    return list(groups.values())


class _Stop(Exception):
    """Ends a forward pass after a hook has the tensor that it needs."""


@dataclass(frozen=True)
class OriginalBlock:
    """A block before quantization, and its inputs in the original model."""

    block: Block
    inputs: Sequence[BlockInput]


def copy_block(block: Block) -> Block:
    """A copy of the block with its own weights."""
    return replace(block, module=copy.deepcopy(block.module))


@torch.inference_mode()
def accumulate_hessian(
    block: Block,
    layer: str,
    inputs: Sequence[BlockInput],
    original: OriginalBlock | None = None,
    *,
    is_alone: bool = False,
    grid: InputGrid | None = None,
) -> HessianAccumulator:
    """Statistics of the inputs of one linear layer, over all real tokens of all batches.

    Args:
        block: the partly quantized block.
        layer: name of the layer in the whole model.
        inputs: the block's inputs in the quantized model.
        original: if given, the cross term with the inputs in the original model is summed, too.
        is_alone: whether no other layer reads the same inputs.
        grid: if given, the statistics are of the inputs after rounding to this grid, in its steps.

    Raises:
        NumericsError: the activations hold NaN or infinity.
    """
    linear = _linear(block, layer)
    through = linear.weight if is_alone else None
    accumulator = HessianAccumulator(linear.in_features, linear.weight.device, through=through)
    for i, batch in enumerate(inputs):
        rows = _layer_inputs(block, layer, i, batch)
        if grid is not None:
            rows = grid.steps(rows)
        exact = None
        if original is not None:
            exact = _layer_inputs(original.block, layer, i, original.inputs[i])
        accumulator.add(rows, exact)
    return accumulator


def watch_layer_inputs(block: Block, layer: str, inputs: Sequence[BlockInput]) -> list[KindInputs]:
    """The inputs of one linear layer, over all real tokens of all batches, by kind of text.

    Raises:
        NumericsError: the activations hold NaN or infinity.
    """
    linear = _linear(block, layer)
    n_rows = torch.cat([batch.kinds_of_rows() for batch in inputs]).bincount()
    # A batch holds texts of one length. Equal steps take sampled rows from all batches.
    steps = (n_rows // SAMPLED_ROWS).clamp_min(1).tolist()
    seen = [SeenInputs(linear.in_features, linear.weight.device) for _ in steps]
    sampled: list[list[Tensor]] = [[] for _ in steps]
    for i, batch in enumerate(inputs):
        rows = _layer_inputs(block, layer, i, batch)
        row_kinds = batch.kinds_of_rows().to(rows.device)
        for kind in sorted(set(row_kinds.tolist())):
            of_kind = rows[row_kinds == kind]
            first = -seen[kind].n_rows % steps[kind]
            seen[kind].add(of_kind)
            sampled[kind].append(of_kind[first :: steps[kind]].float())
    return [
        KindInputs(of_kind, torch.cat(parts))
        for of_kind, parts in zip(seen, sampled, strict=True)
        if parts
    ]


def _linear(block: Block, layer: str) -> nn.Linear:
    linear = block.module.get_submodule(layer.removeprefix(f"{block.name}."))
    assert isinstance(linear, nn.Linear)
    return linear


def _layer_inputs(block: Block, layer: str, i: int, batch: BlockInput) -> Tensor:
    """The inputs of a layer for the real tokens of batch `i`: [n, I].

    Raises:
        NumericsError: an input is NaN or infinite.
    """
    rows: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Reshaped, because OPT flattens a batch to [N * T, I] before its MLP.
        rows.append(args[0].reshape(*batch.real.shape, -1)[batch.real])
        raise _Stop

    handle = _linear(block, layer).register_forward_pre_hook(hook)
    try:
        with suppress(_Stop):
            block.run(i, batch.hidden)
    finally:
        handle.remove()
    if not is_finite(rows[0]):
        raise NumericsError(f"the input of {layer} holds NaN or infinity during calibration")
    return rows[0]


@torch.inference_mode()
def replay_block_(block: Block, inputs: Sequence[BlockInput]) -> None:
    """Run the block on every batch; the batches are then the inputs of the next block."""
    for i, batch in enumerate(inputs):
        batch.hidden = block.run(i, batch.hidden)
