"""The blocks of a transformer, run one after the other on stored inputs.

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
from gteopt.encoder.loading import fill_
from gteopt.errors import NumericsError, UnsupportedError
from gteopt.kernels.cpu import multiplies_bfloat16
from gteopt.quant.gptq import is_finite
from gteopt.quant.hessian import HessianAccumulator
from gteopt.quant.static_activations import InputGrid, SeenInputs

BATCH_TOKENS = 2048
"""Padded tokens that run through a block at once: what its widest layer gives out for them, in
float32, is 160 MB for 18,944 features."""


@dataclass(frozen=True)
class StateSpill:
    """Where hidden states of the calibration texts go when memory has no room for them.

    Attributes:
        n_bytes: most that they take in memory, over all batches.
        folder: where the others lie, a file a batch.
    """

    n_bytes: int
    folder: Path


class BlockInput:
    """One padded batch on its way through the blocks; `hidden` moves on in place.

    Attributes:
        real: [N, T] bool, False on padding.
        pooled: [N, T], the tokens that a text's vector is made of.
    """

    def __init__(
        self, hidden: Tensor, real: Tensor, pooled: Tensor, file: Path | None = None
    ) -> None:
        self.real = real
        self.pooled = pooled
        self._file = file
        self._held: Tensor | None = None
        self.hidden = hidden

    def copy(self) -> BlockInput:
        """The same batch at the same place, which moves on by itself."""
        file = None if self._file is None else self._file.with_name(f"copy-{self._file.name}")
        return BlockInput(self.hidden, self.real, self.pooled, file)

    @property
    def hidden(self) -> Tensor:
        """[N, T, D]; read from its file at each use where it has one."""
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
            except SafetensorError as error:  # a full disk, in a type of its own
                raise OSError(f"{self._file} cannot be written: {error}") from error


@dataclass(frozen=True)
class Block:
    """One transformer block with the arguments that the model's own forward gives it, a batch."""

    name: str
    module: nn.Module
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    returns_tuple: bool = False

    def run(self, batch: int, hidden: Tensor) -> Tensor:
        """The block's output [N, T, D] for one batch."""
        args, kwargs = self.calls[batch]
        on_gpu = torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext()
        with on_gpu:  # Triton launches on the current one
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
    """The list of transformer blocks inside a model and its name.

    Raises:
        UnsupportedError: the model has no list of alike blocks with linear layers.
    """
    for name, each in module.named_modules():
        if (
            isinstance(each, nn.ModuleList)
            and (n_layers is None or len(each) == n_layers)
            and len({type(block) for block in each}) == 1
            and any(isinstance(inner, nn.Linear) for inner in each[0].modules())
        ):
            return name, each
    raise UnsupportedError(
        f"{type(module).__name__} has no list of transformer blocks with linear layers; gteopt "
        f"cannot quantize it (recipes with method none still work)"
    )


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments, hands the hidden states on unchanged.

    What the model's forward reads of a block (`attention_type` of ModernBERT's) is the block's own.
    """

    def __init__(self, returns_tuple: bool, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule
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
    dtype: torch.dtype | None = None,
    spill: StateSpill | None = None,
) -> tuple[list[Block], list[BlockInput]]:
    """Cut the model into blocks and bring the texts before the first one.

    The model's own forward runs once with every block replaced by a recorder, so that each block
    is later replayed with its own keywords: a dropped `is_causal` would calibrate causally.

    Args:
        encoder: the model; its blocks' weights may still be in their files.
        tokens: token ids of the texts.
        dtype: of the hidden states and of whatever else the blocks are handed; the model's own
            when None.
        spill: for the hidden states; None keeps all of them in memory.

    Returns:
        The blocks in order, and one `BlockInput` a batch of at most 2048 padded tokens.
    """
    name, block_list = find_blocks(
        encoder.module, encoder.checkpoint.config.get("num_hidden_layers")
    )
    originals = list(block_list)
    batches = list(token_batches(tokens))
    sample = encoder.pad([batches[0][0][:4]])
    returned: list[Any] = []

    def note(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        returned.append(out)
        raise _Stop

    fill_(encoder, f"{name}.0")
    hook = originals[0].register_forward_hook(note)
    with suppress(_Stop):
        encoder.module(input_ids=sample[0], attention_mask=sample[1])
    hook.remove()
    extra = returned[0][1:] if isinstance(returned[0], tuple) else ()
    if any(isinstance(each, Tensor) for each in extra):
        raise UnsupportedError(
            f"{type(encoder.module).__name__}: its blocks hand on more than hidden states "
            f"(T5's first one makes the position bias of all), so they cannot be replayed one by "
            f"one; use a recipe that needs no calibration (rtn-int8, rtn-int4)"
        )
    recorders = [_Recorder(isinstance(returned[0], tuple), each) for each in originals]
    inputs: list[BlockInput] = []
    kept_bytes = 0
    try:
        for i, recorder in enumerate(recorders):
            block_list[i] = recorder
        for batch in batches:
            ids, mask = encoder.pad(batch)
            encoder.module(input_ids=ids, attention_mask=mask)
            hidden = recorders[0].hidden.to(dtype or encoder.dtype)
            n_bytes = hidden.numel() * hidden.element_size()
            file = None
            if spill is not None and kept_bytes + n_bytes > spill.n_bytes:
                spill.folder.mkdir(parents=True, exist_ok=True)
                file = spill.folder / f"batch-{len(inputs):05}.safetensors"
            else:
                kept_bytes += n_bytes
            inputs.append(BlockInput(hidden, mask.bool(), encoder.pool_mask(batch, mask), file))
    finally:
        for i, original in enumerate(originals):
            block_list[i] = original
    calls = [recorder.calls for recorder in recorders]
    cast: dict[int, Tensor] = {}
    blocks = [
        Block(
            f"{name}.{i}",
            original,
            tuple(_cast(call, encoder.dtype, dtype or encoder.dtype, cast) for call in calls[i]),
            recorders[i].returns_tuple,
        )
        for i, original in enumerate(originals)
    ]
    return blocks, inputs


def replay_dtype(encoder: Encoder) -> torch.dtype:
    """What a build replays blocks in: the model's dtype, or float32 where bfloat16 is emulated.

    A processor without bfloat16 instructions multiplies float32 several times faster.
    """
    if encoder.dtype == torch.bfloat16 and emulates_bfloat16(encoder.device.type):
        return torch.float32
    return encoder.dtype


def emulates_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are slower than those of float32 on "cpu" or "cuda"."""
    return device == "cpu" and not multiplies_bfloat16()


def _cast(value: Any, old: torch.dtype, new: torch.dtype, done: dict[int, Tensor]) -> Any:
    """A block's arguments with every tensor of dtype `old` in `new`.

    Args:
        value: the arguments, or one of them.
        old: of the tensors to change.
        new: what they become.
        done: by the `id` of a tensor what became of it: blocks share theirs, before and after.
    """
    if isinstance(value, Tensor) and value.dtype == old != new:
        if id(value) not in done:
            done[id(value)] = value.to(new)
        return done[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(_cast(each, old, new, done) for each in value)
    if isinstance(value, dict):
        return {key: _cast(each, old, new, done) for key, each in value.items()}
    return value


def learnable(value: Any, dtype: torch.dtype) -> Any:
    """A block's arguments, or one of them, copied with float tensors in `dtype`: fit for gradients,
    which tensors made in inference mode are not.
    """
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, tuple | list):
        return type(value)(learnable(each, dtype) for each in value)
    if isinstance(value, dict):
        return {key: learnable(each, dtype) for key, each in value.items()}
    return value


class _Given(nn.Module):
    """Stands in for every block: gives out hidden states that were computed elsewhere."""

    hidden: Tensor

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return (self.hidden,) if self.returns_tuple else self.hidden


def behind_blocks(
    encoder: Encoder,
    blocks: Sequence[Block],
    hidden: Sequence[Tensor],
    inputs: Sequence[BlockInput],
) -> Tensor:
    """Vectors float64 [n, D] of what the last block gave out, by the model's own forward;
    differentiable.

    Args:
        encoder: the model that `open_blocks` was given.
        blocks: as it returned them.
        hidden: the last block's output [N, T, D], batch by batch.
        inputs: the batches, as it returned them.
    """
    _, block_list = find_blocks(encoder.module, encoder.checkpoint.config.get("num_hidden_layers"))
    stub = _Given(blocks[0].returns_tuple)
    vectors = []
    try:
        for i in range(len(block_list)):
            block_list[i] = stub
        for each, batch in zip(hidden, inputs, strict=True):
            stub.hidden, mask = each, batch.real.long()
            out = encoder.module(input_ids=torch.zeros_like(mask), attention_mask=mask)
            vectors.append(encoder.pooled(out.last_hidden_state, batch.pooled))
    finally:
        for i, block in enumerate(blocks):
            block_list[i] = block.module
    return torch.cat(vectors).double()


def token_batches(tokens: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts sorted by length, cut so that a padded batch stays within the token budget."""
    batch: list[Sequence[int]] = []
    for ids in sorted(tokens, key=len):
        if batch and (len(batch) + 1) * len(ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


@torch.inference_mode()
def stages(block: Block, inputs: Sequence[BlockInput]) -> list[list[str]]:
    """The block's linear layers in running order; layers that read the same tensor stand together.

    Quantizing stage by stage lets each layer see what the layers before it have become
    ("true sequential" in the GPTQ code).
    """
    seen: list[tuple[str, int, tuple[int, ...]]] = []
    alive: list[Tensor] = []  # inputs are kept alive, or a freed address could be used again

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            seen.append((name, args[0].data_ptr(), tuple(args[0].shape)))

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
    for name, address, shape in seen:
        groups.setdefault((address, shape), []).append(name)
    return list(groups.values())


class _Stop(Exception):
    """Ends a block's forward pass once the wanted input has been seen."""


@dataclass(frozen=True)
class Original:
    """A block as it was before it was quantized, with what the original model feeds it."""

    block: Block
    inputs: Sequence[BlockInput]


def copy_block(block: Block) -> Block:
    """The block with weights of its own."""
    return replace(block, module=copy.deepcopy(block.module))


@torch.inference_mode()
def accumulate_hessian(
    block: Block,
    layer: str,
    inputs: Sequence[BlockInput],
    original: Original | None = None,
    *,
    is_alone: bool = False,
    grid: InputGrid | None = None,
) -> HessianAccumulator:
    """Statistics of what one linear layer reads, over all real tokens of all batches.

    Args:
        block: partly quantized.
        layer: name of the layer in the whole model.
        inputs: what the quantized model feeds the block.
        original: given, the accumulator also compares with what the original layer reads.
        is_alone: the statistics are for this layer only, not for others that read the same.
        grid: given, the statistics are of the steps that it rounds the inputs to.

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


def watch_inputs(block: Block, layer: str, inputs: Sequence[BlockInput]) -> SeenInputs:
    """Ranges and moments of what one linear layer reads, over all real tokens of all batches.

    Raises:
        NumericsError: the activations hold NaN or infinity.
    """
    linear = _linear(block, layer)
    seen = SeenInputs(linear.in_features, linear.weight.device)
    for i, batch in enumerate(inputs):
        seen.add(_layer_inputs(block, layer, i, batch))
    return seen


def _linear(block: Block, layer: str) -> nn.Linear:
    linear = block.module.get_submodule(layer.removeprefix(f"{block.name}."))
    assert isinstance(linear, nn.Linear)
    return linear


def _layer_inputs(block: Block, layer: str, i: int, batch: BlockInput) -> Tensor:
    """What a layer of the block reads of the real tokens of batch `i`: [n, I].

    Raises:
        NumericsError: it holds NaN or infinity.
    """
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # OPT lays the tokens of a batch end to end before its MLP: [N * T, I].
        found.append(args[0].reshape(*batch.real.shape, -1)[batch.real])
        raise _Stop

    handle = _linear(block, layer).register_forward_pre_hook(hook)
    try:
        with suppress(_Stop):
            block.run(i, batch.hidden)
    finally:
        handle.remove()
    if not is_finite(found[0]):
        raise NumericsError(f"the input of {layer} holds NaN or infinity during calibration")
    return found[0]


@torch.inference_mode()
def advance_(block: Block, inputs: Sequence[BlockInput]) -> None:
    """Move every batch through the block; the inputs become the next block's."""
    for i, batch in enumerate(inputs):
        batch.hidden = block.run(i, batch.hidden)
