"""Tune a quantized model: learn codes, scales, norms and biases against the original.

A solver minimizes each layer's output error, as if all tokens and features were equally important.
But an embedding model is used for its pooled vector only. So the variant is trained to reproduce
the vectors of the original, its teacher; no label is needed. If the model is too large for that,
each block is trained to reproduce the original block's output. Hides: the objectives, the
schedules, and how a few hundred texts become many batches. Refuses to know: where codes came from,
how they are packed, files.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gteopt.build.replay import BATCH_TOKENS, Block, BlockInput, copy_block_arguments, find_blocks
from gteopt.config.recipe import Effort
from gteopt.encoder.encoder import Encoder
from gteopt.errors import NumericsError
from gteopt.progress import Progress, ignore_progress
from gteopt.quant.affine import QuantizedWeight
from gteopt.quant.learned_rounding import TunableLinear
from gteopt.records.manifest import TuningRecord

MOST_WEIGHTS = 2_000_000_000
"""The most quantized weights that are tuned at once. With more, the optimizer's state does not fit
a large GPU."""
_FIXED_BYTES_PER_WEIGHT = 4 + 4 + 4 + 4 + 2
"""The teacher's weight, the latent, the rounded weight, its gradient, and the saved codes."""
_BYTES_PER_WEIGHT = _FIXED_BYTES_PER_WEIGHT + 8
"""Also Adam's two moments of the latent."""
_FLOATS_PER_HIDDEN = 40
"""Activations that a block keeps for its backward pass, per token, in multiples of its width."""
_BETAS = (0.9, 0.95)
_WARMUP_STEPS = 20
_SPLICED = 0.5
_SUBSTITUTED = 0.7
_MOST_SUBSTITUTION = 0.5
_HELD_OUT = 8
"""One text in eight is held out of a block's tuning, to see whether tuning helps. With fewer than
16 texts, none is held out."""


@dataclass(frozen=True)
class TuningSchedule:
    """The number of steps and the learning rates of tuning.

    Attributes:
        n_steps: number of steps, each with one batch.
        batch_size: texts of a batch; unused for a block, which takes its calibration batches.
        text_tokens: longer texts are cut to this length; unused for a block.
        codes_rate: Adam's learning rate for codes, in steps of the grid; 0 keeps the codes.
        scales_rate: learning rate for scales, relative to the scale.
        rest_rate: learning rate for norms and biases.
        drift_weight: weight of the blocks' outputs in the objective; unused for a block.
        seed: seed of the batches.
    """

    n_steps: int
    batch_size: int = 32
    text_tokens: int = 128
    codes_rate: float = 1e-3
    scales_rate: float = 5e-4
    rest_rate: float = 2e-4
    drift_weight: float = 3.0
    seed: int = 0


SCHEDULES: dict[Effort, TuningSchedule | None] = {
    "fast": None,
    "standard": TuningSchedule(n_steps=400),
    "best": TuningSchedule(n_steps=1600),
}
BLOCK_SCHEDULES: dict[Effort, TuningSchedule | None] = {
    "fast": None,
    "standard": TuningSchedule(n_steps=100, codes_rate=0.0, scales_rate=1e-3),
    "best": TuningSchedule(n_steps=400, codes_rate=0.0, scales_rate=1e-3),
}
"""Schedules for a block that is tuned by itself. Codes are not tuned, because they overfit to few
texts: the error then falls on these texts, but rises on others."""


@dataclass(frozen=True)
class TuningResult:
    """The result of tuning.

    Attributes:
        weights: codes and grid of each layer, by name.
        rest: the blocks' norms and biases by their names, float32.
        record: the manifest's record.
    """

    weights: Mapping[str, QuantizedWeight]
    rest: Mapping[str, Tensor]
    record: TuningRecord


def tune_model(
    teacher: Encoder,
    start: Mapping[str, QuantizedWeight],
    tokens: Sequence[Sequence[int]],
    schedule: TuningSchedule,
    *,
    progress: Progress = ignore_progress,
) -> TuningResult:
    """Learn codes, scales, norms and biases that reproduce the teacher's vectors.

    Objective, over the N texts of a batch with the teacher's unit vectors t and the variant's s:

        mean(1 - s_i . t_i) + mean_{i != j} (s_i . s_j - t_i . t_j)^2
            + drift_weight * mean over blocks and tokens of |h_s - h_t|^2 / |h_t|^2

    A search depends on the first two terms. The drift of each block's output h gives every layer a
    signal from every token, which prevents overfitting to a few thousand calibration tokens. For
    the same reason, texts are spliced together, and some tokens are replaced by random ones. This
    is possible because the teacher has a vector for any text.

    If the mean cosine on the calibration texts has not risen, the start is returned. So tuning
    never ends farther from the teacher than it began.

    Args:
        teacher: the original in float32; not changed.
        start: the solver's codes and grid by layer name.
        tokens: token ids of the calibration texts, including special tokens.
        schedule: see `TuningSchedule`.
        progress: called after each step.

    Raises:
        NumericsError: the objective became NaN or infinite.
    """
    prefix, _ = find_blocks(teacher.module, teacher.checkpoint.config.get("num_hidden_layers"))
    student = _Student(teacher.module, start, f"{prefix}.", schedule)
    before = 1 - _mean_cosine(teacher, student.module, tokens)
    texts = _Texts(teacher, tokens, schedule)
    for step in range(schedule.n_steps):
        ids, mask = teacher.pad(texts.batch())
        with torch.no_grad():
            wanted, teacher_hidden = _forward(teacher, teacher.module, prefix, ids, mask)
        vectors, hidden = _forward(teacher, student.module, prefix, ids, mask)
        loss = _distance(vectors, wanted)
        loss = loss + schedule.drift_weight * _drift(hidden, teacher_hidden, mask.bool())
        student.learn_(loss, step)
        progress("tuning against the original's vectors", step + 1, schedule.n_steps)
    return student.better("model", before, 1 - _mean_cosine(teacher, student.module, tokens))


def tune_block(
    original: Block,
    start: Mapping[str, QuantizedWeight],
    inputs: Sequence[BlockInput],
    wanted: Sequence[BlockInput],
    schedule: TuningSchedule,
) -> TuningResult:
    """Learn the scales, norms and biases of one block that reproduce the original's output.

    Objective: the mean over tokens of |f(x) - f0(x0)|^2 / |f0(x0)|^2. f is the tuned block and x
    its input in the partly quantized model; f0 is the original block and x0 its input in the
    original model. BRECQ (Li et al. 2021, arXiv:2102.05426) and SignRound also reconstruct blocks.
    One text in eight is held out; if the error on these texts has not fallen, the start is
    returned.

    Args:
        original: the block with its original weights; not changed.
        start: the solver's codes and grid by layer name.
        inputs: x, batch by batch.
        wanted: f0(x0), batch by batch.
        schedule: its steps and rates; each step takes a batch.

    Raises:
        NumericsError: the objective became NaN or infinite.
    """
    # The student gets a float32 copy, because tensors from inference mode cannot have gradients.
    n_prefix = len(original.name) + 1
    start_in_block = {name[n_prefix:]: codes for name, codes in start.items()}
    student = _Student(copy.deepcopy(original.module).float(), start_in_block, "", schedule)
    block = replace(original, module=student.module)

    holds_out = sum(len(batch.real) for batch in inputs) >= 2 * _HELD_OUT

    def error(i: int, is_out: bool) -> Tensor:
        """Mean drift over the tokens of one batch, either of held-out texts or of the others."""
        batch, (args, kwargs) = inputs[i], original.calls[i]
        call = (
            copy_block_arguments(args, torch.float32),
            copy_block_arguments(kwargs, torch.float32),
        )
        out = replace(block, calls=(call,)).run(
            0, copy_block_arguments(batch.hidden, torch.float32)
        )
        return _drift([out], [wanted[i].hidden.float()], batch.real & parts(i)[is_out])

    def parts(i: int) -> dict[bool, Tensor]:
        """Masks [N, 1] of the texts that are held out (True) and of the others (False)."""
        rows = torch.arange(len(inputs[i].real), device=inputs[i].real.device)[:, None]
        if not holds_out:
            return dict.fromkeys((True, False), torch.ones_like(rows, dtype=torch.bool))
        is_out = (rows + i) % _HELD_OUT == 0
        return {True: is_out, False: ~is_out}

    @torch.no_grad()
    def held_out() -> float:
        sizes = [int(parts(i)[True].sum()) for i in range(len(inputs))]
        errors = [error(i, True).item() * n for i, n in enumerate(sizes) if n]
        return sum(errors) / sum(sizes)

    before = held_out()
    order = random.Random(schedule.seed)
    waiting: list[int] = []
    for step in range(schedule.n_steps):
        if not waiting:
            waiting = [i for i in range(len(inputs)) if parts(i)[False].any()]
            order.shuffle(waiting)
        student.learn_(error(waiting.pop(), False), step)
    tuned = student.better("block", before, held_out())
    return replace(
        tuned,
        weights={f"{original.name}.{name}": weight for name, weight in tuned.weights.items()},
        rest={f"{original.name}.{name}": tensor for name, tensor in tuned.rest.items()},
    )


def estimate_tuning_bytes(n_weights: int, n_other: int, n_layers: int, hidden_size: int) -> int:
    """Estimated bytes that tuning needs beside the variant.

    Args:
        n_weights: weights of the layers that are tuned.
        n_other: number of all other parameters.
        n_layers: transformer blocks.
        hidden_size: features of a hidden state.
    """
    widest = TuningSchedule(n_steps=0)
    n_tokens = widest.batch_size * widest.text_tokens
    activations = 4 * n_tokens * n_layers * hidden_size * _FLOATS_PER_HIDDEN
    return n_weights * _BYTES_PER_WEIGHT + 4 * n_other + activations


def estimate_block_tuning_bytes(n_weights: int, n_other: int, hidden_size: int) -> int:
    """Estimated bytes that tuning one block needs.

    Args:
        n_weights: weights of the block's layers that are tuned.
        n_other: number of the block's other parameters.
        hidden_size: features of a hidden state.
    """
    activations = 4 * BATCH_TOKENS * hidden_size * _FLOATS_PER_HIDDEN
    return n_weights * _FIXED_BYTES_PER_WEIGHT + 4 * n_other + activations


class _Student:
    """A copy of a module whose layers, norms and biases are learned; it shares all other tensors.

    Args:
        original: the module to copy; not changed.
        start: codes and grid of its layers, by name.
        prefix: norms and biases whose names begin with this are learned.
        schedule: number of steps and learning rates.

    Attributes:
        module: the copy.
    """

    def __init__(
        self,
        original: nn.Module,
        start: Mapping[str, QuantizedWeight],
        prefix: str,
        schedule: TuningSchedule,
    ) -> None:
        def learned(name: str, parameter: Tensor) -> bool:
            return name.startswith(prefix) and parameter.ndim == 1

        shared: dict[int, Any] = {
            id(p): p for name, p in original.named_parameters() if not learned(name, p)
        }
        self.module = copy.deepcopy(original, shared)
        self._start, self._schedule = start, schedule
        self._layers: dict[str, TunableLinear] = {}
        for name, weight in start.items():
            parent, _, leaf = name.rpartition(".")
            linear = self.module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self._layers[name] = TunableLinear(linear, weight)
            self._layers[name].latent.requires_grad_(schedule.codes_rate > 0)
            setattr(self.module.get_submodule(parent), leaf, self._layers[name])
        self._rest = {name: p for name, p in self.module.named_parameters() if learned(name, p)}
        self._rest_before = {name: p.detach().clone() for name, p in self._rest.items()}
        for p in self._rest.values():
            p.requires_grad_(True)
        layers = self._layers.values()
        groups: list[tuple[float, list[nn.Parameter]]] = [
            (schedule.codes_rate, [layer.latent for layer in layers]),
            (schedule.scales_rate, [layer.log_scale for layer in layers]),
            (schedule.rest_rate, list(self._rest.values())),
        ]
        self._optimizer = torch.optim.Adam(
            [{"params": parameters, "top": rate} for rate, parameters in groups if rate > 0],
            betas=_BETAS,
        )

    def learn_(self, loss: Tensor, step: int) -> None:
        """Make one step of the optimizer.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"tuning diverged in step {step + 1}; build with effort fast, and report the model"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = group["top"] * _rate(step, self._schedule.n_steps)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def better(self, by: Literal["model", "block"], before: float, after: float) -> TuningResult:
        """The learned values if the error has fallen, else the start."""
        start, kept = self._start, after < before
        weights = {n: layer.export() for n, layer in self._layers.items()} if kept else dict(start)
        n_changed = sum(int((weights[name].codes != start[name].codes).sum()) for name in start)
        n_codes = sum(weight.codes.numel() for weight in start.values())
        rest = {name: p.detach() for name, p in self._rest.items()}
        return TuningResult(
            weights=weights,
            rest=rest if kept else self._rest_before,
            record=TuningRecord(
                by=by,
                n_steps=self._schedule.n_steps,
                error_before=before,
                error_after=min(after, before),
                codes_changed=n_changed / n_codes,
            ),
        )


def _forward(
    teacher: Encoder, module: nn.Module, prefix: str, ids: Tensor, mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Unit vectors [N, D] and each block's output [N, T, H]."""
    outputs: list[Tensor] = []

    def note(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    blocks = module.get_submodule(prefix).children()
    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        hidden = module(input_ids=ids, attention_mask=mask).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return teacher.pooled(hidden, mask), outputs


def _distance(vectors: Tensor, wanted: Tensor) -> Tensor:
    """Mean cosine distance of unit vectors [N, D], and mean squared error of their similarities."""
    n = len(vectors)
    errors = vectors @ vectors.T - wanted @ wanted.T  # [N, N]; the diagonal is 1 - 1
    return 1 - (vectors * wanted).sum(-1).mean() + errors.square().sum() / max(1, n * (n - 1))


def _drift(hidden: Sequence[Tensor], wanted: Sequence[Tensor], real: Tensor) -> Tensor:
    """Mean over blocks and real tokens of |h_s - h_t|^2 / |h_t|^2, of hidden states [N, T, H].

    The error is relative to each token's size, because the norm before the next layer removes the
    size. The outputs of some tokens are a hundred times larger than all others.
    """
    shares = [
        ((f - w)[real].square().sum(-1) / w[real].square().sum(-1)).mean()
        for f, w in zip(hidden, wanted, strict=True)
    ]
    return torch.stack(shares).mean()


def _rate(step: int, n_steps: int) -> float:
    """Factor of the learning rate: a short warm-up, then a cosine down to zero."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / n_steps))


@torch.no_grad()
def _mean_cosine(teacher: Encoder, student: nn.Module, tokens: Sequence[Sequence[int]]) -> float:
    """Mean cosine between the teacher's and the student's vectors of the texts."""
    total = 0.0
    for _, batch in teacher.tokenization.batches(tokens, 32):
        ids, mask = teacher.pad(batch)
        first, second = (
            teacher.pooled(module(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
            for module in (teacher.module, student)
        )
        total += nn.functional.cosine_similarity(first, second).double().sum().item()
    return total / len(tokens)


class _Texts:
    """Makes endless batches from a few texts; the same seed gives the same batches."""

    def __init__(
        self, encoder: Encoder, tokens: Sequence[Sequence[int]], schedule: TuningSchedule
    ) -> None:
        self._random = random.Random(schedule.seed)
        self._schedule = schedule
        self._special = set(encoder.tokenization.tokenizer.all_special_ids)
        embedding = encoder.module.get_input_embeddings()  # type: ignore[operator]
        # The table may have more rows than the tokenizer has tokens, or fewer.
        n_tokens = min(len(encoder.tokenization.tokenizer), embedding.num_embeddings)
        self._vocabulary = [i for i in range(n_tokens) if i not in self._special]
        self._texts = [self._parts(ids) for ids in tokens]
        self._waiting: list[int] = []

    def batch(self) -> list[list[int]]:
        """Token ids of one batch."""
        return [self._text() for _ in range(self._schedule.batch_size)]

    def _text(self) -> list[int]:
        if not self._waiting:
            self._waiting = list(range(len(self._texts)))
            self._random.shuffle(self._waiting)
        head, body, tail = self._texts[self._waiting.pop()]
        if self._random.random() < _SPLICED and body:
            _, second, _ = self._random.choice(self._texts)
            longest = max(len(body), len(second))
            cut = self._random.randint(1, len(body))
            body = (body[:cut] + second[self._random.randint(0, len(second)) :])[:longest]
        if self._random.random() < _SUBSTITUTED:
            share = self._random.uniform(0, _MOST_SUBSTITUTION)
            body = [
                self._random.choice(self._vocabulary) if self._random.random() < share else token
                for token in body
            ]
        return [*head, *body[: self._schedule.text_tokens], *tail]

    def _parts(self, ids: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """The special tokens before the text, the text, and the special tokens after it."""
        start, end = 0, len(ids)
        while start < end and ids[start] in self._special:
            start += 1
        while end > start and ids[end - 1] in self._special:
            end -= 1
        return list(ids[:start]), list(ids[start:end]), list(ids[end:])
