"""Hold a served artifact: its encoder, the cost of its passes, and what it supports.

Hides: tokenization with a prompt, truncation at either end, warm-up, how an artifact's results are
read. Refuses to know: HTTP and the queue.
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

from gteopt.cores import n_cores
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.forward import pass_padding
from gteopt.encoder.tokenization import Role, Tokens
from gteopt.errors import GteoptError, InputError, NumericsError, UnsupportedError, suggest_names
from gteopt.records.canary import CANARY, LEAST_COSINE, CanaryRecord
from gteopt.records.results_folder import read_results
from gteopt.server import answers
from gteopt.server.batching import CostModel, PassBudget

Floats = NDArray[np.float32]
_SAME_COSINE = 0.999
"""Least cosine of two vectors of a text, computed by one process in different batches."""
_TOKENIZE_CHARACTERS = 50_000
"""Characters that are tokenized for a request before another request has its turn."""
_HOST_S = 0.5e-3
"""Seconds of the host per pass: composing it and handing out its rows."""
_LEAST_BUDGET_S = 0.02
_MOST_BUDGET_S = {"cpu": 0.1, "cuda": 0.2}
"""Limit of a pass's budget by device; a query waits for about one pass."""
_MOST_BLOCK_S = 0.025
"""The same limit for one of the model's blocks, where a query runs between two blocks."""
_MOST_TOKENS = {"cpu": 8192, "cuda": 32768}
_SIMILAR = 0.75
"""With padding, texts run together only if the shortest has this share of the longest's tokens."""
_SHAPES = ((1, 8), (1, 32), (8, 16), (1, 128), (32, 16), (4, 128), (2, 384), (16, 64), (8, 128))
"""Passes whose time is measured: (number of texts, tokens of each)."""


@dataclass(frozen=True)
class TextPrompt:
    """The prompt of a text.

    Attributes:
        role: the role of `Encoder.encode`.
        instruction: instruction of a query.
        prefix: text of a further prompt of the model's folder.
    """

    role: Role = "document"
    instruction: str | None = None
    prefix: str = ""


class TokenizedRequest:
    """Tokenized texts of a request.

    Attributes:
        tokens: token ids of each text.
        n_truncated: texts that were cut, as the request allows.
        too_long: number of tokens of each text that is too long and may not be cut, by position.
    """

    def __init__(self) -> None:
        self.tokens: list[Tokens] = []
        self.n_truncated = 0
        self.too_long: dict[int, int] = {}


class ServedModel:
    """An artifact in memory, with a name that requests give.

    Attributes:
        name: name in requests.
        source: folder or model that it was loaded from.
        encoder: computes its vectors.
        tokenization: turns texts into tokens.
        cost: predicts the seconds of a pass.
        budget: limits of a pass.
        tokenizer: the only thread that may use the tokenizer, which is not thread-safe.
        loaded_at: Unix time of loading.
        canary_text: text that readiness is checked with; the artifact may state it.
        canary: vector of that text, computed right after loading.
    """

    def __init__(self, name: str, source: str, encoder: Encoder) -> None:
        self.name = name
        self.source = source
        self.encoder = encoder
        self.tokenization = encoder.tokenization
        self.cost = CostModel(0.0, 0.0, 1e-5, 0.0)
        self.budget = PassBudget(_MOST_BUDGET_S["cpu"], _MOST_TOKENS["cpu"])
        self.tokenizer = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.loaded_at = int(time.time())
        self.canary_text = self._stored.text if self._stored else CANARY
        self.canary: Floats = np.zeros(encoder.dims, np.float32)
        self._pads = encoder.pads
        self._pads_pass = not encoder.pads and encoder.runtime.device.type == "cpu"

    def warm_up(
        self,
        on_device: Callable[[Callable[[], Any]], Any] = lambda step: step(),
        *,
        max_batch_tokens: int | None = None,
        seconds: float = 3.0,
    ) -> None:
        """Measure the cost of passes, set the budget, and compute the canary.

        Args:
            on_device: runs a function on the device thread, so that kernels and buffers of that
                thread are ready, and returns the function's result.
            max_batch_tokens: most tokens of a pass; measured when None.
            seconds: time after which no further shape is measured.

        Raises:
            NumericsError: the canary's vector is zero or too long, or differs from the vector that
                the artifact stores.
        """
        self.canary = on_device(lambda: self.encoder.encode([self.canary_text])[0])
        if not 0 < float(np.linalg.norm(self.canary)) <= 1 + 1e-3:
            raise NumericsError(
                f"{self.name}: the vector of the text for the readiness check has length "
                f"{np.linalg.norm(self.canary):.3g}, expected above 0 and at most 1; verify the "
                f"artifact"
            )
        cosine = self._stored.cosine(self.canary) if self._stored else 1.0
        if cosine < LEAST_COSINE:
            raise NumericsError(
                f"{self.name}: the vector of the text for the readiness check has cosine "
                f"{cosine:.4f} to the vector that the artifact stores, expected at least "
                f"{LEAST_COSINE:g}; verify the artifact, or try another backend or number type"
            )

        device = self.encoder.runtime.device.type

        def timed(n_texts: int, n_tokens: int) -> float:
            tokens = [self._shape_tokens(n_tokens)] * n_texts
            return float(on_device(lambda: pass_seconds(lambda: self.compute(tokens), device)))

        self.cost = measure_cost(timed, seconds)
        if max_batch_tokens is not None:
            self.budget = PassBudget(float("inf"), max_batch_tokens)
            return
        wanted = CostModel(self.cost.overhead_s + _HOST_S, 0, 0, 0).budget_s()
        seconds = min(self._most_budget_s(), max(_LEAST_BUDGET_S, wanted))
        self.budget = PassBudget(seconds, _MOST_TOKENS[device])

    def _most_budget_s(self) -> float:
        most = _MOST_BUDGET_S[self.encoder.runtime.device.type]
        if not self._pads_pass:
            return most
        n_blocks = int(self.encoder.checkpoint.config.get("num_hidden_layers", 1))
        return max(most, _MOST_BLOCK_S * n_blocks)

    def _shape_tokens(self, n_tokens: int) -> Tokens:
        ids = self.tokenization.tokenize([CANARY * (1 + n_tokens // 8)])[0]
        return Tokens(ids[: min(n_tokens, self.tokenization.max_tokens)])

    def compute(
        self,
        tokens: Sequence[Sequence[int]],
        between_blocks: Callable[[], None] | None = None,
    ) -> Floats:
        """Unit vectors [N, dims] of token lists, shortened as by `Encoder.encode`.

        Args:
            tokens: token ids of each text.
            between_blocks: function to call between the model's blocks; it may compute other
                texts. It is not called where texts are padded.
        """
        if between_blocks is not None and self.encoder.runtime.device.type == "cuda":
            between_blocks = self._after_block(between_blocks)
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        rows = np.empty((len(tokens), self.encoder.dims), np.float32)
        for group in self._groups(order, [len(ids) for ids in tokens]):
            texts = [tokens[i] for i in group]
            vectors = self.encoder.embed_tokens(texts, between_blocks=between_blocks)
            rows[group] = self.encoder.vectors.project(vectors)
        return rows

    def _after_block(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run the step when the GPU has finished the block; the host alone is ahead of the GPU."""
        import torch

        def wait_and_step() -> None:
            torch.cuda.current_stream(self.encoder.runtime.device).synchronize()
            step()

        return wait_and_step

    def padding(self, lengths: Sequence[int]) -> int:
        """Number of padding tokens in a pass over texts of these lengths; 0 without padding."""
        if self._pads_pass:
            return sum(pass_padding(lengths))
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups = self._groups(order, lengths) if self._pads else []
        return sum(lengths[group[0]] - lengths[i] for group in groups for i in group)

    def _groups(self, order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Indices of texts to compute together: all texts, or with padding those of like length."""
        groups: list[list[int]] = []
        for i in order:
            if groups and (not self._pads or lengths[i] > _SIMILAR * lengths[groups[-1][0]]):
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    @property
    def _stored(self) -> CanaryRecord | None:
        """The canary that the build stored; None for base models and artifacts without one."""
        manifest = self.encoder.manifest
        return manifest.canary if manifest is not None else None

    def is_right(self, canary: Floats) -> bool:
        """Whether a new vector of the canary equals the one computed at load, within rounding."""
        norms = np.linalg.norm(canary) * np.linalg.norm(self.canary)
        return bool(canary @ self.canary >= _SAME_COSINE * norms > 0)

    def shorten(self, rows: Floats, dims: int) -> Floats:
        """Cut vectors [N, D] to a supported length; normalise them for artifacts with cosine."""
        normalise = self.encoder.vectors.similarity == "cosine"
        return answers.shorten_vectors(rows, dims, normalise=normalise)

    def has_ranges(self, dtype: str) -> bool:
        """Whether codes of a number type need ranges or a mean that the artifact stores."""
        vectors = self.encoder.vectors
        if dtype in ("binary", "ubinary"):
            return vectors.code == "binary" and vectors.low is not None
        return dtype in ("int8", "uint8")

    @property
    def sha256(self) -> str:
        """Identifies weights, vector transform and arithmetic; part of the cache's keys."""
        return f"{self.encoder.sha256}:{self.encoder.vectors.sha256()}:{self.encoder.arithmetic}"

    @cached_property
    def supported_dims(self) -> tuple[int, ...]:
        """Lengths that vectors can have: the artifact's length, and shorter trained ones."""
        checkpoint = self.encoder.checkpoint
        trained = checkpoint.matryoshka_dims
        if checkpoint.manifest is not None:
            trained = checkpoint.manifest.vectors.still_trained(trained)
        dims = self.encoder.dims
        return (dims, *sorted((n for n in set(trained) if n < dims), reverse=True))

    def prompt(
        self,
        input_type: str | None = None,
        prompt_name: str | None = None,
        instruction: str | None = None,
    ) -> TextPrompt:
        """The prompt that a request's fields ask for.

        Raises:
            InputError: two fields contradict each other, or the model has no such prompt.
            UnsupportedError: the model's prompts cannot be used alone.
        """
        if prompt_name is not None and (input_type is not None or instruction is not None):
            raise InputError("give prompt_name, or input_type and instruction, not both")
        if instruction is not None and input_type == "document":
            raise InputError("only queries take an instruction; leave out input_type document")
        role: Role = "query" if instruction is not None or input_type == "query" else "document"
        if prompt_name in ("query", "document"):
            return TextPrompt(role="query" if prompt_name == "query" else "document")
        if prompt_name is not None:
            checkpoint = self.encoder.checkpoint
            prompts = checkpoint.st.settings.prompts
            if prompt_name not in prompts:
                known = {"query", "document", *prompts}
                raise InputError(
                    f"unknown prompt '{prompt_name}': {suggest_names(prompt_name, known)}"
                )
            if self.tokenization.prompt("document") or checkpoint.excludes_prompt:
                raise UnsupportedError(
                    f"{self.name} has a prompt for documents or leaves prompts out of the mean, so "
                    f"that '{prompt_name}' cannot be used alone; use query or document"
                )
            return TextPrompt(prefix=prompts[prompt_name] or "")
        self.tokenization.prompt(role, instruction)
        return TextPrompt(role, instruction)

    def tokenize(
        self, texts: Sequence[str], prompt: TextPrompt, truncate: str, into: TokenizedRequest
    ) -> None:
        """Tokenize further texts; runs on the tokenizer's thread.

        Args:
            texts: texts without their prompt.
            prompt: prompt of the texts.
            truncate: "none", "start" or "end".
            into: the results are appended to it.
        """
        full = [prompt.prefix + text for text in texts] if prompt.prefix else list(texts)
        tokenized = self.tokenization.tokenize(
            full, role=prompt.role, instruction=prompt.instruction
        )
        cut = [i for i, tokens in enumerate(tokenized) if tokens.is_cut]
        for i in cut:
            if truncate == "none":
                into.too_long[len(into.tokens) + i] = self._n_tokens(full[i], prompt)
            elif truncate == "start":
                kept = prompt.prefix + self._fitting_end(texts[i], prompt)
                tokenized[i] = self.tokenization.tokenize(
                    [kept], role=prompt.role, instruction=prompt.instruction
                )[0]
        if truncate != "none":
            into.n_truncated += len(cut)
        into.tokens += tokenized

    def _n_tokens(self, text: str, prompt: TextPrompt) -> int:
        role, instruction = prompt.role, prompt.instruction
        return self.tokenization.lengths([text], role=role, instruction=instruction)[0]

    def _fitting_end(self, text: str, prompt: TextPrompt) -> str:
        """The longest end of a text that fits after its prompt, cut between two tokens."""
        tokenizer = self.tokenization.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"the tokenizer of {self.name} does not tell where its tokens begin in the text, "
                f"so that the start cannot be cut; use truncate end"
            )
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoding["offset_mapping"]]
        n_excess = self._n_tokens(prompt.prefix + text, prompt) - self.tokenization.max_tokens
        while 0 < n_excess < len(starts):
            kept = text[starts[n_excess] :]
            still = self._n_tokens(prompt.prefix + kept, prompt) - self.tokenization.max_tokens
            if still <= 0:
                return kept
            n_excess += still
        return ""

    def chunks(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Split texts into parts, so that another request can be tokenized between two parts."""
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
        """Add missing start and end tokens to ids of the model's own tokenizer.

        Raises:
            InputError: an id is beyond the vocabulary.
        """
        n_known = len(self.tokenization.tokenizer)
        if max(ids) >= n_known:
            raise InputError(
                f"holds {max(ids)}, but the tokenizer of {self.name} has {n_known} tokens"
            )
        # The empty text has only start and end tokens. They differ from the tokens of "a" where
        # the end begins.
        empty = self.tokenization.tokenize([""])[0]
        letter = self.tokenization.tokenize(["a"])[0]
        differing = (i for i, (x, y) in enumerate(zip(empty, letter, strict=False)) if x != y)
        n_start = next(differing, len(empty))
        start, end = empty[:n_start], empty[n_start:]
        if start and list(ids[: len(start)]) == start:
            start = []
        if end and list(ids[-len(end) :]) == end:
            end = []
        return Tokens((*start, *ids, *end))

    @cached_property
    def about(self) -> dict[str, Any]:
        """The facts that `/info` answers."""
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
        """Number types that vectors can be sent in; int8 needs the artifact's ranges."""
        if self.encoder.vectors.code == "int8":
            return ("float", "int8", "uint8", "binary", "ubinary")
        return ("float", "binary", "ubinary")

    @property
    def batch_tokens(self) -> int:
        """Approximate number of tokens in a pass over texts of 128 tokens."""
        per_token = self.cost.text_s(128) / 128
        return min(self.budget.tokens, int(min(self.budget.seconds, 1e6) / per_token))

    @cached_property
    def quality(self) -> list[dict[str, Any]]:
        """Evaluations of the artifact in its results folder; empty without such a folder."""
        try:
            results = read_results(_results_folder(Path(self.source).resolve()))
        except GteoptError:
            return []
        rows: list[dict[str, Any]] = []
        for report in results.evals.values():
            if report.artifact_sha256 == self.encoder.sha256:
                rows.append(
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
        return rows


def _results_folder(artifact: Path) -> Path:
    """The folder that holds an artifact; for OUT/variants/NAME, as `run` writes it, OUT."""
    folder = artifact.parent
    return folder.parent if folder.name == "variants" else folder


def pass_seconds(run: Callable[[], object], device: str) -> float:
    """Seconds that a call takes where no other process uses the CPU.

    On a CPU, this is the CPU time of all threads divided by the cores that they share. It is at
    least the CPU time of the calling thread, which alone computes some of the steps. It is at most
    the time of the wall clock, because threads that wait for each other use CPU time too. On a GPU,
    it is the time of the wall clock.
    """
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    began = [clock() for clock in clocks]
    run()
    wall_s, all_threads_s, this_thread_s = (
        clock() - start for clock, start in zip(clocks, began, strict=True)
    )
    if device != "cpu":
        return wall_s
    import torch

    n_shared = min(torch.get_num_threads(), n_cores())
    return min(wall_s, max(this_thread_s, all_threads_s / n_shared))


def measure_cost(run: Callable[[int, int], float], seconds: float) -> CostModel:
    """Time passes of several shapes, from small to large, and fit the cost model.

    Args:
        run: runs a pass of (number of texts, tokens of each), and returns its seconds.
        seconds: time after which no further shape is measured.
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
