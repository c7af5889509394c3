"""A served artifact: its encoder, what its passes cost, what it supports.

Hides: tokenization under a prompt, truncation at either end, warm-up, what an artifact's results
say. Refuses to know: HTTP and the queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gteopt.encoder.encoder import Encoder
from gteopt.encoder.tokenization import Role, Tokens
from gteopt.errors import GteoptError, InputError, NumericsError, UnsupportedError, suggest
from gteopt.records.canary import CANARY, LEAST_COSINE, CanaryRecord
from gteopt.records.results_folder import read_results
from gteopt.server import answers
from gteopt.server.batching import Budget, CostModel

Floats = NDArray[np.float32]
_OWN_COSINE = 0.999
"""Of a vector to the one that the same process computed; only the rest of the batch differs."""
_TOKENIZE_CHARACTERS = 50_000
"""Of texts that are tokenized before another request's turn."""
_HOST_S = 0.5e-3
"""Composing a pass and handing out its rows."""
_LEAST_BUDGET_S = 0.02
_MOST_BUDGET_S = {"cpu": 0.1, "cuda": 0.2}
"""A query waits for about one pass, whatever throughput a longer one would gain."""
_MOST_TOKENS = {"cpu": 8192, "cuda": 32768}
_SIMILAR = 0.75
"""A backend that pads computes texts together whose lengths differ by less than this ratio."""
_SHAPES = ((1, 8), (1, 32), (8, 16), (1, 128), (32, 16), (4, 128), (2, 384), (16, 64), (8, 128))


@dataclass(frozen=True)
class Prompt:
    """What is put before a text.

    Attributes:
        role: as `Encoder.encode` has it.
        instruction: of a query.
        prefix: a further prompt of the model's folder, by its text.
    """

    role: Role = "document"
    instruction: str | None = None
    prefix: str = ""


class Tokenized:
    """Texts as they go to the device.

    Attributes:
        tokens: of each text.
        n_truncated: texts that were cut, as the request allowed.
        too_long: of texts that may not be cut, by position, how many tokens they have.
    """

    def __init__(self) -> None:
        self.tokens: list[Tokens] = []
        self.n_truncated = 0
        self.too_long: dict[int, int] = {}


class Served:
    """An artifact in memory, under the name that requests give.

    Attributes:
        name: see above.
        source: what it was loaded from.
        encoder: what computes it.
        tokenization: its way from texts to tokens.
        cost: what its passes take.
        budget: what one of them holds.
        tokenizer: the one thread that may use its tokenizer, whose state is shared.
        loaded_at: Unix time.
        canary_text: the text that readiness is checked with, as the artifact states it.
        canary: its vector, computed right after loading.
    """

    def __init__(self, name: str, source: str, encoder: Encoder) -> None:
        self.name = name
        self.source = source
        self.encoder = encoder
        self.tokenization = encoder.tokenization
        self.cost = CostModel(0.0, 0.0, 1e-5, 0.0)
        self.budget = Budget(_MOST_BUDGET_S["cpu"], _MOST_TOKENS["cpu"])
        self.tokenizer = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.loaded_at = int(time.time())
        self.canary_text = self._stored.text if self._stored else CANARY
        self.canary: Floats = np.zeros(encoder.dims, np.float32)
        self._pads = encoder.pads

    def warm_up(
        self,
        on_device: Callable[[Callable[[], Any]], Any] = lambda step: step(),
        *,
        max_batch_tokens: int | None = None,
        seconds: float = 3.0,
    ) -> None:
        """Measure what passes cost, set the budget, and compute the canary.

        Args:
            on_device: runs a step on the thread that computes, so that its kernels and buffers are
                ready, and returns what the step does.
            max_batch_tokens: of a pass; measured when None.
            seconds: after which no further shape is measured.

        Raises:
            NumericsError: the canary's vector is no direction, or not the one that the artifact
                stores.
        """
        self.canary = on_device(lambda: self.encoder.encode([self.canary_text])[0])
        if not 0 < float(np.linalg.norm(self.canary)) <= 1 + 1e-3:
            raise NumericsError(
                f"{self.name}: the vector of the text that readiness is checked with has length "
                f"{np.linalg.norm(self.canary):.3g}; verify the artifact"
            )
        cosine = self._stored.cosine(self.canary) if self._stored else 1.0
        if cosine < LEAST_COSINE:
            raise NumericsError(
                f"{self.name}: the text that readiness is checked with has cosine {cosine:.4f} to "
                f"the vector that the artifact stores, and {LEAST_COSINE:g} is the least; verify "
                f"the artifact, or try another backend or number type"
            )

        # What this thread computes, so that another process on the same cores is not measured too.
        own_thread = (
            self.encoder.runtime.device.type == "cpu" and self.encoder.runtime.backend == "torch"
        )
        clock = time.thread_time if own_thread else time.perf_counter

        def timed(n_texts: int, n_tokens: int) -> float:
            tokens = [self._shape_tokens(n_tokens)] * n_texts

            def step() -> float:
                began = clock()
                self.compute(tokens)
                return clock() - began

            return float(on_device(step))

        self.cost = measure_cost(timed, seconds)
        device = self.encoder.runtime.device.type
        if max_batch_tokens is not None:
            self.budget = Budget(float("inf"), max_batch_tokens)
            return
        wanted = CostModel(self.cost.overhead_s + _HOST_S, 0, 0, 0).budget_s()
        seconds = min(_MOST_BUDGET_S[device], max(_LEAST_BUDGET_S, wanted))
        self.budget = Budget(seconds, _MOST_TOKENS[device])

    def _shape_tokens(self, n_tokens: int) -> Tokens:
        ids = self.tokenization.tokenize([CANARY * (1 + n_tokens // 8)])[0]
        return Tokens(ids[: min(n_tokens, self.tokenization.max_tokens)])

    def compute(
        self,
        tokens: Sequence[Sequence[int]],
        between_blocks: Callable[[], None] | None = None,
    ) -> Floats:
        """Unit vectors [N, dims] of token lists, as `Encoder.encode` shortens them.

        Args:
            tokens: of each text.
            between_blocks: called between the model's blocks, where it packs texts; it may compute
                other texts meanwhile.
        """
        if between_blocks is not None and self.encoder.runtime.device.type == "cuda":
            between_blocks = self._behind_the_device(between_blocks)
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        rows = np.empty((len(tokens), self.encoder.dims), np.float32)
        for group in self._groups(order, [len(each) for each in tokens]):
            found = self.encoder.embed_tokens(
                [tokens[i] for i in group], between_blocks=between_blocks
            )
            rows[group] = self.encoder.vectors.project(found)
        return rows

    def _behind_the_device(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step once a GPU has computed the block; the host would hand it the whole pass."""
        import torch

        def wait_and_step() -> None:
            torch.cuda.current_stream(self.encoder.runtime.device).synchronize()
            step()

        return wait_and_step

    def padding(self, lengths: Sequence[int]) -> int:
        """Tokens of padding in a pass over texts of these lengths; none where they are packed."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups = self._groups(order, lengths) if self._pads else []
        return sum(lengths[group[0]] - lengths[i] for group in groups for i in group)

    def _groups(self, order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """What is computed together: all texts, or where they are padded those of like length."""
        groups: list[list[int]] = []
        for i in order:
            if groups and (not self._pads or lengths[i] > _SIMILAR * lengths[groups[-1][0]]):
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    @property
    def _stored(self) -> CanaryRecord | None:
        """What the build stored; None in older artifacts and in models that are none."""
        manifest = self.encoder.manifest
        return manifest.canary if manifest is not None else None

    def is_right(self, canary: Floats) -> bool:
        """Whether a vector of the canary is the one computed at load, within rounding."""
        norms = np.linalg.norm(canary) * np.linalg.norm(self.canary)
        return bool(canary @ self.canary >= _OWN_COSINE * norms > 0)

    def shorten(self, rows: Floats, dims: int) -> Floats:
        """Vectors [N, D] cut to a supported length, and normalised again unless by dot products."""
        normalise = self.encoder.vectors.similarity == "cosine"
        return answers.shorten(rows, dims, normalise=normalise)

    def has_ranges(self, dtype: str) -> bool:
        """Whether a number type depends on what was fitted for all dimensions of the artifact."""
        vectors = self.encoder.vectors
        if dtype in ("binary", "ubinary"):
            return vectors.code == "binary" and vectors.low is not None
        return dtype in ("int8", "uint8")

    @property
    def sha256(self) -> str:
        """Identifies weights and vectors."""
        return f"{self.encoder.sha256}:{self.encoder.vectors.sha256()}:{self.encoder.arithmetic}"

    @cached_property
    def supported_dims(self) -> tuple[int, ...]:
        """Lengths that vectors can be cut to: the artifact's own and shorter trained ones."""
        checkpoint = self.encoder.checkpoint
        trained = checkpoint.matryoshka_dims
        if checkpoint.manifest is not None:
            trained = checkpoint.manifest.vectors.still_trained(trained)
        own = self.encoder.dims
        return (own, *sorted((n for n in set(trained) if n < own), reverse=True))

    def prompt(
        self,
        input_type: str | None = None,
        prompt_name: str | None = None,
        instruction: str | None = None,
    ) -> Prompt:
        """The prompt that a request's fields ask for.

        Raises:
            InputError: two of them contradict each other, or the model has no such prompt.
        """
        if prompt_name is not None and (input_type is not None or instruction is not None):
            raise InputError("give prompt_name, or input_type and instruction, not both")
        if instruction is not None and input_type == "document":
            raise InputError("an instruction goes on queries only; leave out input_type document")
        role: Role = "query" if instruction is not None or input_type == "query" else "document"
        if prompt_name in ("query", "document"):
            return Prompt(role="query" if prompt_name == "query" else "document")
        if prompt_name is not None:
            checkpoint = self.encoder.checkpoint
            prompts = checkpoint.st.settings.prompts
            if prompt_name not in prompts:
                known = {"query", "document", *prompts}
                raise InputError(f"unknown prompt '{prompt_name}': {suggest(prompt_name, known)}")
            if self.tokenization.prompt("document") or checkpoint.excludes_prompt:
                raise UnsupportedError(
                    f"{self.name} puts a prompt before every document or leaves prompts out of the "
                    f"mean, so '{prompt_name}' cannot stand alone; use query or document"
                )
            return Prompt(prefix=prompts[prompt_name] or "")
        self.tokenization.prompt(role, instruction)
        return Prompt(role, instruction)

    def tokenize(
        self, texts: Sequence[str], prompt: Prompt, truncate: str, into: Tokenized
    ) -> None:
        """Add the tokens of more texts; on the tokenizer's thread.

        Args:
            texts: without their prompt.
            prompt: what goes before them.
            truncate: "none", "start" or "end".
            into: what they are added to.
        """
        full = [prompt.prefix + text for text in texts] if prompt.prefix else list(texts)
        found = self.tokenization.tokenize(full, role=prompt.role, instruction=prompt.instruction)
        cut = [i for i, tokens in enumerate(found) if tokens.is_cut]
        for i in cut:
            if truncate == "none":
                into.too_long[len(into.tokens) + i] = self._n_tokens(full[i], prompt)
            elif truncate == "start":
                kept = prompt.prefix + self._fitting_end(texts[i], prompt)
                found[i] = self.tokenization.tokenize(
                    [kept], role=prompt.role, instruction=prompt.instruction
                )[0]
        if truncate != "none":
            into.n_truncated += len(cut)
        into.tokens += found

    def _n_tokens(self, text: str, prompt: Prompt) -> int:
        return self.tokenization.lengths([text], role=prompt.role, instruction=prompt.instruction)[
            0
        ]

    def _fitting_end(self, text: str, prompt: Prompt) -> str:
        """The longest end of a text that fits behind its prompt, cut between two tokens."""
        tokenizer = self.tokenization.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"the tokenizer of {self.name} does not say where its tokens begin in the text; "
                f"use truncate end"
            )
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in found["offset_mapping"]]
        n_over = self._n_tokens(prompt.prefix + text, prompt) - self.tokenization.max_tokens
        while 0 < n_over < len(starts):
            kept = text[starts[n_over] :]
            more = self._n_tokens(prompt.prefix + kept, prompt) - self.tokenization.max_tokens
            if more <= 0:
                return kept
            n_over += more
        return ""

    def chunks(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Texts in parts; another request may have its turn between two of them."""
        parts: list[Sequence[str]] = []
        start = n_characters = 0
        for i, text in enumerate(texts):
            if i > start and n_characters + len(text) > _TOKENIZE_CHARACTERS:
                parts.append(texts[start:i])
                start, n_characters = i, 0
            n_characters += len(text)
        parts.append(texts[start:])
        return parts

    def own_tokens(self, ids: Sequence[int]) -> Tokens:
        """Token ids of the model's own tokenizer, with start and end token where they lack.

        Raises:
            InputError: some are beyond its vocabulary.
        """
        n_known = len(self.tokenization.tokenizer)
        if max(ids) >= n_known:
            raise InputError(
                f"holds {max(ids)}, but the tokenizer of {self.name} has {n_known} tokens"
            )
        around = self.tokenization.tokenize([""])[0]
        middle = self.tokenization.tokenize(["a"])[0]
        differing = (i for i, (x, y) in enumerate(zip(around, middle, strict=False)) if x != y)
        front = next(differing, len(around))
        start, end = around[:front], around[front:]
        if start and list(ids[: len(start)]) == start:
            start = []
        if end and list(ids[-len(end) :]) == end:
            end = []
        return Tokens((*start, *ids, *end))

    @cached_property
    def about(self) -> dict[str, Any]:
        """What `/info` says of it."""
        encoder, manifest = self.encoder, self.encoder.manifest
        checkpoint = encoder.checkpoint
        return {
            "id": self.name,
            "artifact": encoder.name,
            "sha256": encoder.sha256,
            "base": manifest.base.id if manifest else checkpoint.id,
            "license": manifest.base.license if manifest else checkpoint.license,
            "number_type": encoder.number_type,
            "backend": encoder.runtime.backend,
            "device": str(encoder.runtime.device),
            "weight_bytes": encoder.weight_bytes,
            "dims": encoder.dims,
            "dimensions": list(self.supported_dims),
            "output_dtypes": list(self.output_dtypes),
            "max_tokens": self.tokenization.max_tokens,
            "query_prompt": self.tokenization.prompt("query"),
            "document_prompt": self.tokenization.prompt("document"),
            "takes_instructions": self.tokenization.takes_instructions,
            "prompts": sorted(checkpoint.st.settings.prompts),
            "batch_tokens": self.batch_tokens,
            "quality": self.quality,
        }

    @property
    def output_dtypes(self) -> tuple[str, ...]:
        """Number types that vectors can be sent in."""
        if self.encoder.vectors.code == "int8":
            return ("float", "int8", "uint8", "binary", "ubinary")
        return ("float", "binary", "ubinary")

    @property
    def batch_tokens(self) -> int:
        """About how many tokens of short texts a pass holds."""
        per_token = self.cost.text_s(128) / 128
        return min(self.budget.tokens, int(min(self.budget.seconds, 1e6) / per_token))

    @cached_property
    def quality(self) -> list[dict[str, Any]]:
        """What the results folder that the artifact lies in says of it; empty without one."""
        folder = Path(self.source).resolve().parent
        try:
            results = read_results(folder)
        except GteoptError:
            return []
        found: list[dict[str, Any]] = []
        for report in results.evals.values():
            if report.artifact_sha256 == self.encoder.sha256:
                found.append(
                    {
                        "suite": report.suite,
                        "score": report.score,
                        "baseline": report.baseline,
                        "retention": report.retention,
                        "retention_low": report.retention_low,
                        "retention_high": report.retention_high,
                        "partial": report.partial,
                        "mean_cosine": report.fidelity.mean_cosine,
                        "neighbour_overlap": report.fidelity.neighbour_overlap,
                    }
                )
        return found


def measure_cost(run: Callable[[int, int], float], seconds: float) -> CostModel:
    """Time passes of several shapes, small ones first, and fit their cost.

    Args:
        run: seconds that a pass of (number of texts, tokens of each) takes.
        seconds: after which no further shape is begun; slow machines see only the small ones.
    """
    passes: list[tuple[list[int], float]] = []
    spent = 0.0
    for n_texts, n_tokens in _SHAPES:
        times = []
        for _ in range(3):  # the first run of a shape also prepares kernels
            times.append(run(n_texts, n_tokens))
            spent += times[-1]
            if spent > seconds:
                break
        passes.append(([n_tokens] * n_texts, min(times)))
        if spent > seconds and len(passes) >= 2:
            break
    return CostModel.fit(passes)
