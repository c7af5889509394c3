"""An `Encoder`: texts in, unit vectors out.

Hides: batches on a device, padding, the order of a GPU's work, what computes token vectors.
Refuses to know: files (`loading` does), how a variant was made, measured or judged.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gteopt.encoder.cuda_graphs import CudaGraphs
from gteopt.encoder.description import Description
from gteopt.encoder.fetch import Fetch
from gteopt.encoder.forward import (
    BetweenBlocks,
    operations,
    padded_forward,
    reads_one_token,
    to_device,
    unpadded_forward,
)
from gteopt.encoder.openvino import OpenVinoModel
from gteopt.encoder.pooling import Head
from gteopt.encoder.sentence_interface import SentenceInterface
from gteopt.encoder.tokenization import Role, Tokens
from gteopt.errors import InputError, NumericsError
from gteopt.progress import Progress, quiet

Padding = Literal["left", "right"]
_ALONE_TOKENS = 2048
"""A batch with a longer text runs text by text: padding and activations of several would take too
much memory."""
_WINDOW_BATCHES = 64
"""On a GPU: enough texts for batches of nearly equal lengths."""
_Batch = tuple[list[int], list[Sequence[int]]]
"""Positions of texts, and their token ids."""
_Tokenize = Callable[[Sequence[str]], list[Tokens]]


class Encoder(SentenceInterface):
    """A loaded embedding model; callers cannot tell whether it is quantized.

    A batch takes three steps: `start` begins to compute and to fetch it, `embed_tokens` waits for
    the vectors and checks them, `embed` does so for texts. `encode` shortens what `embed` returns,
    and takes and gives what that of Sentence Transformers does.

    Example:
        >>> import gteopt
        >>> encoder = gteopt.load("nano")
        >>> encoder.encode(["how tall is it?"], role="query").shape
        (1, 256)

    Attributes:
        module: the transformer, token ids in, token vectors out; without weights where the backend
            is not torch.
        head: from token vectors to an embedding.
        streams: whether some weights are in their files until `fill_` asks for them.
        cuda_graphs: recordings of the forward pass of one short text; None where there is no GPU,
            where none were asked for, or for an architecture that gteopt does not lay out itself.
            Whoever changes `module` sets it to None.
        window_batches: batches whose texts are tokenized at once, and sorted by length among
            themselves, while those before them are computed; None is all of them, beforehand.
    """

    def __init__(
        self,
        description: Description,
        module: nn.Module,
        head: Head,
        *,
        openvino_model: OpenVinoModel | None = None,
        streams: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        """Put the parts together.

        Args:
            description: its tokenization is shared, not copied.
            module: the transformer on the description's device.
            head: on the same device.
            openvino_model: what computes token vectors instead of the module.
            streams: see `Encoder`.
            cuda_graphs: record short texts, where the device and the architecture allow.
        """
        self.checkpoint = description.checkpoint
        self.runtime = description.runtime
        self.vectors = description.vectors
        self.tokenization = description.tokenization
        self.module = module
        self.head = head
        self.streams = streams
        self._openvino_model = openvino_model
        config, pooling = self.checkpoint.config, self.checkpoint.pooling
        # These read the vector of every token, or leave some out.
        reads_all = pooling in ("latent", "modules") or self.checkpoint.excludes_prompt
        is_plain = not reads_all and openvino_model is None
        self._unpadded = unpadded_forward(config, pooling, self.device) if is_plain else None
        padded = padded_forward(config, pooling) if is_plain else None
        # On a CPU the tokenizer would take from the threads that compute.
        self.window_batches = _WINDOW_BATCHES if self.device.type == "cuda" else None
        self.cuda_graphs: CudaGraphs | None = None
        if cuda_graphs and self.device.type == "cuda" and padded is not None:
            self.cuda_graphs = CudaGraphs(
                lambda ids, n_tokens: head.finish(padded(self.module, ids, n_tokens)), self.device
            )

    def __repr__(self) -> str:
        """Name, dimensions, limit, and where it computes."""
        stored = "" if self.vectors.code == "float32" else f", {self.vectors.code} when stored"
        architecture = ", ".join(self.checkpoint.config.get("architectures") or ["embedding model"])
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"<gteopt encoder {self.name}: {architecture}, {self.dims} dimensions{stored}, "
            f"{self.max_tokens:,} tokens at most, {self.weight_bytes / 1e6:,.1f} MB of weights, "
            f"{dtype} by {self.backend} on {self.device}>"
        )

    @property
    def pads(self) -> bool:
        """Whether texts of a batch are filled up to the longest; otherwise they are packed."""
        return self._unpadded is None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters and buffers of transformer and pooling as they lie in memory."""
        seen: dict[int, int] = {}
        latent = self.head.latent
        own: list[Tensor] = [] if latent is None else list(latent.buffers())
        if self._openvino_model is not None:
            return self._openvino_model.weight_bytes + sum(
                t.numel() * t.element_size() for t in own
            )
        own += [*self.module.parameters(), *self.module.buffers()]
        for tensor in own:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        prepacked = [int(getattr(each, "packed_bytes", 0)) for each in self.module.modules()]
        return sum(seen.values()) + sum(prepacked)

    @property
    def block_bytes(self) -> int:
        """`weight_bytes` without the token embeddings, of which a text reads a row a token."""
        if self._openvino_model is not None:
            return self.weight_bytes - self._openvino_model.table_bytes
        table: nn.Module = self.module.get_input_embeddings()  # type: ignore[operator]
        parts = (*table.parameters(), *table.buffers())
        return self.weight_bytes - sum(each.numel() * each.element_size() for each in parts)

    def operations(self, lengths: Sequence[int]) -> float:
        """Floating-point operations that it does for texts of these lengths, padding left out; see
        `gteopt.encoder.forward.operations`.
        """
        config, other = self.checkpoint.config, self._openvino_model
        alone = self._unpadded is not None and reads_one_token(config, self.checkpoint.pooling)
        one_token = alone if other is None else other.pools
        return operations(self.module, config, lengths, one_token=one_token)

    @property
    def kernels(self) -> dict[str, int]:
        """How many linear layers run on which kernel."""
        if self._openvino_model is not None:
            return self._openvino_model.kernels
        counts = Counter(
            str(getattr(module, "kernel", "torch.linear"))
            for module in self.module.modules()
            if isinstance(module, nn.Linear) or hasattr(module, "kernel")
        )
        return dict(sorted(counts.items()))

    @property
    def number_type(self) -> str:
        """What most of its linear layers multiply: "int8", "fp8", or a dtype's name."""
        if self._openvino_model is not None:
            return self._openvino_model.number_type
        counts = self.kernels
        most = max(counts, key=counts.__getitem__) if counts else ""
        for short in ("int8", "fp8"):
            if most.startswith(f"{self.device.type}.{short}"):
                return short
        return "float32" if "fp32" in most else str(self.dtype).removeprefix("torch.")

    def pad(
        self, tokens: Sequence[Sequence[int]], *, side: Padding = "right"
    ) -> tuple[Tensor, Tensor]:
        """Token ids [N, T] int64 and attention mask [N, T] int64 of one padded batch."""
        longest = max(1, *(len(ids) for ids in tokens))
        # By numpy: assigning a list to a row of torch's takes twice as long.
        ids = np.full((len(tokens), longest), self.tokenization.pad_id, dtype=np.int64)
        mask = np.zeros((len(tokens), longest), dtype=np.int64)
        for row, each in enumerate(tokens):
            where = slice(0, len(each)) if side == "right" else slice(longest - len(each), longest)
            ids[row, where] = each
            mask[row, where] = 1
        device = self.device
        return to_device(torch.from_numpy(ids), device), to_device(torch.from_numpy(mask), device)

    def pool_mask(self, tokens: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
        """The mask [N, T] of what is pooled: `pad`'s without prompts that pooling leaves out."""
        prompts = [getattr(ids, "n_prompt", 0) for ids in tokens]
        if not any(prompts):
            return mask
        skip = to_device(torch.tensor(prompts), mask.device)
        return mask.masked_fill(mask.cumsum(1) <= skip[:, None], 0)

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [N, D] float32 of token vectors [N, T, D]; differentiable.

        Args:
            hidden: what the transformer gave out.
            mask: [N, T], of the tokens that count; see `pool_mask`.
        """
        pooled: Tensor = self.head(hidden, mask)
        return pooled

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        padding: Padding = "right",
        unpadded: bool = True,
        between_blocks: BetweenBlocks | None = None,
    ) -> Tensor:
        """Embeddings [N, full_dims] float32 of one batch; a GPU may still be computing them.

        Long texts of different lengths run one by one: padding needs a mask, which takes memory
        with the square of the length, and none is needed without.

        Args:
            tokens: of each text, as `Tokenization.tokenize` makes them.
            padding: where shorter texts are filled up, if they have to be.
            unpadded: see `embed`.
            between_blocks: called before each block where nothing is padded; it may embed other
                texts.
        """
        with _current(self.device):
            if len(tokens) > 1 and max(map(len, tokens)) > _ALONE_TOKENS:
                alone = [
                    self.forward(
                        [ids], padding=padding, unpadded=unpadded, between_blocks=between_blocks
                    )
                    for ids in tokens
                ]
                return torch.cat(alone)
            if unpadded and padding == "right":
                if self.cuda_graphs is not None and len(tokens) == 1:
                    replayed = self._replay(self.cuda_graphs, tokens[0])
                    if replayed is not None:
                        return replayed
                if self._unpadded is not None:
                    pooled = self._unpadded(self.module, tokens, between_blocks)
                    return self.head.finish(pooled)
            ids, mask = self.pad(tokens, side=padding)
            if self._openvino_model is not None:
                hidden = self._openvino_model(ids, mask)
                if self._openvino_model.pools:
                    return self.head.finish(hidden[:, 0])
            else:
                hidden = self.module(input_ids=ids, attention_mask=mask).last_hidden_state
            return self.pooled(hidden, self.pool_mask(tokens, mask))

    def start(self, tokens: Sequence[Sequence[int]], *, unpadded: bool = True) -> Fetch:
        """`forward` of one batch, and behind it on a GPU the copy of its vectors to the host."""
        return Fetch(self.forward(tokens, unpadded=unpadded))

    def embed_tokens(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        padding: Padding = "right",
        unpadded: bool = True,
        between_blocks: BetweenBlocks | None = None,
    ) -> NDArray[np.float32]:
        """Vectors [N, full_dims] float32 of one batch of token ids.

        Args:
            tokens: of each text, as `Tokenization.tokenize` makes them.
            padding: see `forward`.
            unpadded: see `embed`.
            between_blocks: see `forward`.

        Raises:
            NumericsError: the model produced NaN or infinity.
        """
        vectors = self.forward(
            tokens, padding=padding, unpadded=unpadded, between_blocks=between_blocks
        )
        return self._to_numpy(vectors, tokens)

    def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role = "document",
        instruction: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        unpadded: bool = True,
        progress: Progress = quiet,
    ) -> NDArray[np.float32]:
        """Vectors [N, full_dims] float32 at the model's full dimension, in the order given.

        Args:
            texts: of any length.
            role: which prompt they get.
            instruction: of queries; None is the model's default.
            prompt: instead of the role's.
            batch_size: texts that run together.
            unpadded: without padding where the architecture allows; otherwise padded, with the
                sums in the order of Sentence Transformers' forward pass.
            progress: told after each batch.

        Raises:
            InputError: something in the list is no string, an unknown role or instruction, or a
                batch size below 1.
            NumericsError: the model produced NaN or infinity.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, must be a whole number from 1 on")
        tokenize = partial(
            self.tokenization.tokenize, role=role, instruction=instruction, prompt=prompt
        )
        out = np.empty((len(texts), self.full_dims), dtype=np.float32)
        done = 0
        waiting: tuple[list[int], Sequence[Sequence[int]], Fetch] | None = None

        def keep(positions: list[int], batch: Sequence[Sequence[int]], fetch: Fetch) -> None:
            nonlocal done
            out[positions] = self._to_numpy(fetch.wait(), batch, [texts[i] for i in positions])
            done += len(batch)
            progress(f"encoding with {self.name}", done, len(texts))

        # One batch is waited for after the next one is started, so that a GPU never waits.
        for positions, batch in self._batches(texts, tokenize, batch_size):
            started = (positions, batch, self.start(batch, unpadded=unpadded))
            if waiting is not None:
                keep(*waiting)
            waiting = started
        if waiting is not None:
            keep(*waiting)
        return out

    def _batches(
        self, texts: Sequence[str], tokenize: _Tokenize, batch_size: int
    ) -> Iterator[_Batch]:
        """Positions and token lists of each batch of texts.

        While a GPU computes one window of many texts, a thread of the host tokenizes the next.
        """
        tokenization = self.tokenization
        size = (self.window_batches or 0) * batch_size
        if not size or len(texts) <= size:
            tokens = tokenize(texts)
            yield from tokenization.batches(tokens, batch_size)
            return
        tokenization.check(texts)
        starts = range(0, len(texts), size)
        with ThreadPoolExecutor(max_workers=1) as thread:

            def tokens_from(start: int) -> Future[list[Tokens]]:
                window = texts[start : start + size]
                return thread.submit(tokenize, window)

            coming = tokens_from(0)
            for start in starts:
                tokens = coming.result()
                if start + size < len(texts):
                    coming = tokens_from(start + size)
                for positions, batch in tokenization.batches(tokens, batch_size):
                    yield [start + i for i in positions], batch

    def _replay(self, cuda_graphs: CudaGraphs, ids: Sequence[int]) -> Tensor | None:
        """The vector [1, D] of a short text by its recording; warns once where there is none."""
        was_refused = cuda_graphs.refused
        replayed = cuda_graphs(ids)
        if cuda_graphs.refused != was_refused:
            warnings.warn(
                f"{self.name}: the forward pass of short texts could not be recorded "
                f"({cuda_graphs.refused}); they run kernel by kernel, which is slower",
                stacklevel=4,
            )
        return None if replayed is None else torch.from_numpy(replayed)

    def _to_numpy(
        self, vectors: Tensor, tokens: Sequence[Sequence[int]], texts: Sequence[str] = ()
    ) -> NDArray[np.float32]:
        """What `forward` has computed, once it is there and is numbers; `texts` are for errors."""
        array: NDArray[np.float32] = vectors.cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1)).tolist()
        if bad:
            text = f" (the first: {texts[bad[0]][:80]!r})" if texts else ""
            raise NumericsError(
                f"{self.name} produced NaN or infinity for {len(bad)} of {len(tokens)} texts{text} "
                f"of up to {max(map(len, tokens))} tokens in {self.dtype}; {self._why_not_finite()}"
            )
        return array

    def _why_not_finite(self) -> str:
        """What a user can do about vectors with NaN or infinity."""
        weights = [*self.module.named_parameters(), *self.module.named_buffers()]
        bad = [
            name
            for name, tensor in weights
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
        ]
        if bad:
            return f"its weights hold some themselves ({', '.join(bad[:5])}); download it again"
        return "verify the artifact, or load it with dtype float32"


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, wherever its operands lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
