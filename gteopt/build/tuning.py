"""Tuning: a quantized model's codes, scales, norms and biases, learned against the original.

A solver minimises each layer's output error, as if every token and feature mattered alike. An
embedding model is used for its pooled vector only. So the variant is trained to reproduce the
vectors of the original, its teacher; no label is needed. In a model that is too large for that,
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

from gteopt.build.replay import BATCH_TOKENS, Block, BlockInput, find_blocks, learnable
from gteopt.config.recipe import Effort
from gteopt.encoder.encoder import Encoder
from gteopt.errors import NumericsError
from gteopt.progress import Progress, quiet
from gteopt.quant.affine import QuantizedWeight
from gteopt.quant.learned_rounding import TunableLinear
from gteopt.records.manifest import TuningRecord

MOST_WEIGHTS = 2_000_000_000
"""Most quantized weights that are tuned at once. The optimiser's state of more fills a large
GPU."""
_FIXED_BYTES_PER_WEIGHT = 4 + 4 + 4 + 4 + 2
"""The teacher's weight, the latent, the rounded weight, its gradient, and the codes kept for it."""
_BYTES_PER_WEIGHT = _FIXED_BYTES_PER_WEIGHT + 8
"""The same with Adam's two moments of the latent."""
_FLOATS_PER_HIDDEN = 40
"""Activations that a block keeps for its backward pass, per token, in multiples of its width."""
_BETAS = (0.9, 0.95)
_WARMUP_STEPS = 20
_SPLICED = 0.5
_SUBSTITUTED = 0.7
_MOST_SUBSTITUTION = 0.5
_HELD_OUT = 8
"""One text in so many is kept out of a block's tuning, to tell whether tuning helped. With fewer
than twice as many texts, none is."""


@dataclass(frozen=True)
class Schedule:
    """How long tuning goes on and how fast.

    Attributes:
        n_steps: batches.
        batch_size: texts a batch; a block takes those of its calibration as they are.
        text_tokens: longer texts are cut here; not for a block.
        codes_rate: Adam's rate for the codes, in steps of the grid; 0 keeps them.
        scales_rate: the rate for scales, relative to the scale.
        rest_rate: the rate for norms and biases.
        drift_weight: weight of the blocks' outputs beside the vectors; unused for a block.
        seed: of the batches.
    """

    n_steps: int
    batch_size: int = 32
    text_tokens: int = 128
    codes_rate: float = 1e-3
    scales_rate: float = 5e-4
    rest_rate: float = 2e-4
    drift_weight: float = 3.0
    seed: int = 0


SCHEDULES: dict[Effort, Schedule | None] = {
    "fast": None,
    "standard": Schedule(n_steps=400),
    "best": Schedule(n_steps=1600),
}
BLOCK_SCHEDULES: dict[Effort, Schedule | None] = {
    "fast": None,
    "standard": Schedule(n_steps=100, codes_rate=0.0, scales_rate=1e-3),
    "best": Schedule(n_steps=400, codes_rate=0.0, scales_rate=1e-3),
}
"""For each block that is tuned by itself. Its codes stay, because few texts overfit them. Measured
on a block of gte-nano after GPTQ, with 3,900 tokens and 100 steps: tuned codes change the error on
these texts by -28 %, on others by +12 %; scales, norms and biases alone by -7 % and -3 %."""


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        weights: codes and grid by layer.
        rest: the blocks' norms and biases by their names, float32.
        record: for the manifest.
    """

    weights: Mapping[str, QuantizedWeight]
    rest: Mapping[str, Tensor]
    record: TuningRecord


def tune(
    teacher: Encoder,
    start: Mapping[str, QuantizedWeight],
    tokens: Sequence[Sequence[int]],
    schedule: Schedule,
    *,
    progress: Progress = quiet,
) -> Tuned:
    """Learn codes, scales, norms and biases that bring the teacher's vectors back.

    Objective, over the N texts of a batch with the teacher's unit vectors t and the variant's s:

        mean(1 - s_i . t_i) + mean_{i != j} (s_i . s_j - t_i . t_j)^2
            + drift_weight * mean over blocks and tokens of |h_s - h_t|^2 / |h_t|^2

    A search depends on the first two terms. The drift of each block's output h gives every layer a
    signal for every token, which prevents overfitting to a few thousand calibration tokens. For the
    same reason, texts are spliced with one another, and random tokens replace some of theirs; the
    teacher answers for any text.

    Tuning never ends farther from the teacher than it began: if the mean cosine on the calibration
    texts has not risen, the start is returned.

    Args:
        teacher: the original in float32; not changed.
        start: the solver's codes and grid by layer name.
        tokens: token ids of the calibration texts, special tokens included.
        schedule: see `Schedule`.
        progress: told after each step.

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
    schedule: Schedule,
) -> Tuned:
    """Learn the scales, norms and biases of one block that reproduce the original's output.

    Objective: the mean over tokens of |f(x) - f0(x0)|^2 / |f0(x0)|^2. f is the tuned block and x
    its input in the partly quantized model; f0 and x0 are those of the original model. (BRECQ, Li
    et al. 2021, arXiv:2102.05426, and SignRound reconstruct blocks likewise.) One text in eight is
    kept out; if the error on those has not fallen, the start is returned.

    Args:
        original: the block with its original weights; not changed.
        start: the solver's codes and grid by layer name.
        inputs: x, batch by batch.
        wanted: f0(x0), batch by batch.
        schedule: its steps and rates; each step takes a batch.

    Raises:
        NumericsError: the objective became NaN or infinite.
    """
    # A float32 copy for the student to share, because tensors from inference mode cannot learn.
    within = len(original.name) + 1
    own = {name[within:]: codes for name, codes in start.items()}
    student = _Student(copy.deepcopy(original.module).float(), own, "", schedule)
    block = replace(original, module=student.module)

    holds_out = sum(len(batch.real) for batch in inputs) >= 2 * _HELD_OUT

    def error(i: int, is_out: bool) -> Tensor:
        """Mean drift over the tokens of one batch's texts that are kept out, or are not."""
        batch, (args, kwargs) = inputs[i], original.calls[i]
        call = learnable(args, torch.float32), learnable(kwargs, torch.float32)
        out = replace(block, calls=(call,)).run(0, learnable(batch.hidden, torch.float32))
        return _drift([out], [wanted[i].hidden.float()], batch.real & parts(i)[is_out])

    def parts(i: int) -> dict[bool, Tensor]:
        """Texts [N, 1] that are kept out (True) and that are not."""
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


def work_bytes(n_weights: int, n_other: int, n_layers: int, hidden_size: int) -> int:
    """About the memory that tuning needs beside the variant.

    Args:
        n_weights: weights of the layers that are tuned.
        n_other: every other parameter.
        n_layers: transformer blocks.
        hidden_size: features a token.
    """
    widest = Schedule(n_steps=0)
    n_tokens = widest.batch_size * widest.text_tokens
    activations = 4 * n_tokens * n_layers * hidden_size * _FLOATS_PER_HIDDEN
    return n_weights * _BYTES_PER_WEIGHT + 4 * n_other + activations


def block_work_bytes(n_weights: int, n_other: int, hidden_size: int) -> int:
    """About the memory that tuning a block by itself needs.

    Args:
        n_weights: weights of the block's layers that are tuned.
        n_other: every other parameter of the block.
        hidden_size: features a token.
    """
    activations = 4 * BATCH_TOKENS * hidden_size * _FLOATS_PER_HIDDEN
    return n_weights * _FIXED_BYTES_PER_WEIGHT + 4 * n_other + activations


class _Student:
    """A copy of a module whose layers, norms and biases learn; it shares all other tensors.

    Args:
        original: a module; not changed.
        start: codes and grid by name of a layer in it.
        prefix: norms and biases whose names begin with this are learned.
        schedule: of the learning.

    Attributes:
        module: the copy.
    """

    def __init__(
        self,
        original: nn.Module,
        start: Mapping[str, QuantizedWeight],
        prefix: str,
        schedule: Schedule,
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
        self._optimiser = torch.optim.Adam(
            [{"params": parameters, "top": rate} for rate, parameters in groups if rate > 0],
            betas=_BETAS,
        )

    def learn_(self, loss: Tensor, step: int) -> None:
        """One step down the gradient.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"tuning diverged in step {step + 1}; build with effort fast, and report the model"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = group["top"] * _rate(step, self._schedule.n_steps)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()

    def better(self, by: Literal["model", "block"], before: float, after: float) -> Tuned:
        """What was learned if the error has fallen, else the start."""
        start, kept = self._start, after < before
        weights = {n: layer.export() for n, layer in self._layers.items()} if kept else dict(start)
        n_changed = sum(int((weights[name].codes != start[name].codes).sum()) for name in start)
        n_codes = sum(weight.codes.numel() for weight in start.values())
        rest = {name: p.detach() for name, p in self._rest.items()}
        return Tuned(
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

    The error is relative to each token, as the norm before the next layer makes it. Some tokens
    have outputs a hundred times larger than all others.
    """
    shares = [
        ((f - w)[real].square().sum(-1) / w[real].square().sum(-1)).mean()
        for f, w in zip(hidden, wanted, strict=True)
    ]
    return torch.stack(shares).mean()


def _rate(step: int, n_steps: int) -> float:
    """Share of the top learning rate: a short warm-up, then a cosine down to zero."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / n_steps))


@torch.no_grad()
def _mean_cosine(teacher: Encoder, student: nn.Module, tokens: Sequence[Sequence[int]]) -> float:
    """Mean cosine between the vectors of both over the texts."""
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
    """An endless supply of texts made from few; the same seed gives the same batches."""

    def __init__(
        self, encoder: Encoder, tokens: Sequence[Sequence[int]], schedule: Schedule
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
            _, other, _ = self._random.choice(self._texts)
            longest = max(len(body), len(other))
            cut = self._random.randint(1, len(body))
            body = (body[:cut] + other[self._random.randint(0, len(other)) :])[:longest]
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
