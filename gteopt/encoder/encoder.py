"""Computes vectors of texts with a loaded model: the class `Encoder`.

Hides: batches on a device, padding, the order of a GPU's work, which library computes token
vectors. Refuses to know: files (`loading` reads them), how a variant was made, measured or judged.
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
from gteopt.encoder.description import EncoderDescription
from gteopt.encoder.fetch import HostFetch
from gteopt.encoder.forward import (
    BetweenBlocks,
    copy_to_device,
    count_forward_operations,
    padded_forward,
    reads_one_token,
    unpadded_forward,
)
from gteopt.encoder.openvino import OpenVinoModel
from gteopt.encoder.pooling import PoolingHead
from gteopt.encoder.sentence_interface import SentenceInterface
from gteopt.encoder.tokenization import Role, Tokens
from gteopt.errors import InputError, NumericsError
from gteopt.progress import Progress, ignore_progress

Padding = Literal["left", "right"]
_ALONE_TOKENS = 2048
"""A batch with a longer text runs text by text, because padding and activations of several would
take too much memory."""
_WINDOW_BATCHES = 64
"""Batches that are tokenized together for a GPU; enough texts for batches of similar lengths."""
_Batch = tuple[list[int], list[Sequence[int]]]
"""Positions of texts, and their token ids."""
_Tokenize = Callable[[Sequence[str]], list[Tokens]]


class Encoder(SentenceInterface):
    """A loaded embedding model; callers cannot tell whether it is quantized.

    `start` begins to compute a batch and to copy its vectors to the host. `embed_tokens` returns
    the checked vectors of one batch of token ids, and `embed` those of any number of texts.
    `encode` shortens the vectors of `embed`; its arguments and results are those of Sentence
    Transformers.

    Example:
        >>> import gteopt
        >>> encoder = gteopt.load("nano")
        >>> encoder.encode(["how tall is it?"], role="query").shape
        (1, 256)

    Attributes:
        module: the transformer: token ids in, token vectors out. It has no weights if the backend
            is not torch.
        head: turns token vectors into an embedding.
        streams: whether some weights stay in their files until `load_weights_` reads them.
        cuda_graphs: recordings of the forward pass of one short text. None without a GPU, if none
            were requested, or if `gteopt.encoder.forward` lacks the architecture. Code that
            changes `module` must set it to None.
        window_batches: number of batches whose texts are tokenized together and sorted by length,
            while earlier batches are computed. None tokenizes all texts first.
    """

    def __init__(
        self,
        description: EncoderDescription,
        module: nn.Module,
        head: PoolingHead,
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
            openvino_model: computes token vectors instead of the module.
            streams: see `Encoder`.
            cuda_graphs: record short texts if the device and the architecture allow it.
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
        # These poolings read the vectors of all tokens, or leave out some tokens.
        reads_all = pooling in ("latent", "modules") or self.checkpoint.excludes_prompt
        is_plain = not reads_all and openvino_model is None
        self._unpadded = unpadded_forward(config, pooling, self.device) if is_plain else None
        padded = padded_forward(config, pooling) if is_plain else None
        # On a CPU a tokenizer thread would slow down the threads that compute.
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
        """Whether the texts of a batch are padded to the longest."""
        return self._unpadded is None

    @property
    def weight_bytes(self) -> int:
        """Bytes in memory of the parameters and buffers of transformer and pooling."""
        by_address: dict[int, int] = {}  # tied tensors count once
        latent = self.head.latent
        tensors: list[Tensor] = [] if latent is None else list(latent.buffers())
        if self._openvino_model is not None:
            return self._openvino_model.weight_bytes + sum(
                tensor.numel() * tensor.element_size() for tensor in tensors
            )
        tensors += [*self.module.parameters(), *self.module.buffers()]
        for tensor in tensors:
            by_address[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        prepacked = [int(getattr(layer, "packed_bytes", 0)) for layer in self.module.modules()]
        return sum(by_address.values()) + sum(prepacked)

    @property
    def block_bytes(self) -> int:
        """`weight_bytes` without the token embeddings, since a token reads only one row of them."""
        if self._openvino_model is not None:
            return self.weight_bytes - self._openvino_model.table_bytes
        table: nn.Module = self.module.get_input_embeddings()  # type: ignore[operator]
        parts = (*table.parameters(), *table.buffers())
        return self.weight_bytes - sum(part.numel() * part.element_size() for part in parts)

    def operations(self, lengths: Sequence[int]) -> float:
        """Floating-point operations for texts of these lengths in tokens, without padding.

        See `gteopt.encoder.forward.count_forward_operations`.
        """
        config = self.checkpoint.config
        if self._openvino_model is None:
            is_unpadded = self._unpadded is not None
            one_token = is_unpadded and reads_one_token(config, self.checkpoint.pooling)
        else:
            one_token = self._openvino_model.pools
        return count_forward_operations(self.module, config, lengths, one_token=one_token)

    @property
    def kernels(self) -> dict[str, int]:
        """Number of linear layers by the kernel that runs them."""
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
        """Number type that most linear layers multiply: "int8", "fp8", or a dtype's name."""
        if self._openvino_model is not None:
            return self._openvino_model.number_type
        counts = self.kernels
        commonest = max(counts, key=counts.__getitem__) if counts else ""
        for number_type in ("int8", "fp8"):
            if commonest.startswith(f"{self.device.type}.{number_type}"):
                return number_type
        return "float32" if "fp32" in commonest else str(self.dtype).removeprefix("torch.")

    def pad(
        self, tokens: Sequence[Sequence[int]], *, side: Padding = "right"
    ) -> tuple[Tensor, Tensor]:
        """Token ids [N, T] int64 and attention mask [N, T] int64 of one padded batch."""
        longest = max(1, *(len(ids) for ids in tokens))
        # numpy, because assigning a list to a row of a torch tensor takes twice as long.
        ids = np.full((len(tokens), longest), self.tokenization.pad_id, dtype=np.int64)
        mask = np.zeros((len(tokens), longest), dtype=np.int64)
        for row, text_ids in enumerate(tokens):
            start = 0 if side == "right" else longest - len(text_ids)
            ids[row, start : start + len(text_ids)] = text_ids
            mask[row, start : start + len(text_ids)] = 1
        device = self.device
        return copy_to_device(torch.from_numpy(ids), device), copy_to_device(
            torch.from_numpy(mask), device
        )

    def pool_mask(self, tokens: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
        """The attention mask [N, T] without the prompt tokens that pooling leaves out."""
        prompts = [getattr(ids, "n_prompt", 0) for ids in tokens]
        if not any(prompts):
            return mask
        skip = copy_to_device(torch.tensor(prompts), mask.device)
        return mask.masked_fill(mask.cumsum(1) <= skip[:, None], 0)

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [N, D] float32 of token vectors [N, T, D]; differentiable.

        Args:
            hidden: the transformer's output.
            mask: [N, T], which tokens are pooled; see `pool_mask`.
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

        Long texts run one by one. Padding needs a mask, whose memory grows with the square of the
        length; a single text needs none.

        Args:
            tokens: token ids of each text, from `Tokenization.tokenize`.
            padding: the side on which shorter texts are padded, if texts are padded.
            unpadded: see `embed`.
            between_blocks: called before each block if nothing is padded; it may embed other
                texts.
        """
        with _current(self.device):
            if len(tokens) > 1 and max(map(len, tokens)) > _ALONE_TOKENS:
                vectors = [
                    self.forward(
                        [ids], padding=padding, unpadded=unpadded, between_blocks=between_blocks
                    )
                    for ids in tokens
                ]
                return torch.cat(vectors)
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

    def start(self, tokens: Sequence[Sequence[int]], *, unpadded: bool = True) -> HostFetch:
        """Begin `forward` of one batch, and on a GPU the copy of its vectors to the host."""
        return HostFetch(self.forward(tokens, unpadded=unpadded))

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
            tokens: token ids of each text, from `Tokenization.tokenize`.
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
        progress: Progress = ignore_progress,
    ) -> NDArray[np.float32]:
        """Vectors [N, full_dims] float32 in the order of the texts, before they are shortened.

        Args:
            texts: of any length.
            role: which prompt the texts get.
            instruction: what a query is for; None is the model's default.
            prompt: text before each text, instead of the role's prompt.
            batch_size: texts that run together.
            unpadded: compute without padding if the architecture allows it. False pads, and sums
                in the order of Sentence Transformers' forward pass.
            progress: called after each batch.

        Raises:
            InputError: `texts` is not a list of strings, the role or the instruction is invalid,
                or `batch_size` is below 1.
            NumericsError: the model produced NaN or infinity.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, must be a whole number of at least 1")
        tokenize = partial(
            self.tokenization.tokenize, role=role, instruction=instruction, prompt=prompt
        )
        out = np.empty((len(texts), self.full_dims), dtype=np.float32)
        done = 0
        waiting: tuple[list[int], Sequence[Sequence[int]], HostFetch] | None = None

        def keep(positions: list[int], batch: Sequence[Sequence[int]], fetch: HostFetch) -> None:
            nonlocal done
            out[positions] = self._to_numpy(fetch.wait(), batch, [texts[i] for i in positions])
            done += len(batch)
            progress(f"encoding with {self.name}", done, len(texts))

        # The next batch starts before the vectors of this one are awaited, so no GPU idles.
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

        While a GPU computes one window of texts, a thread on the host tokenizes the next window.
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

            next_tokens = tokens_from(0)
            for start in starts:
                tokens = next_tokens.result()
                if start + size < len(texts):
                    next_tokens = tokens_from(start + size)
                for positions, batch in tokenization.batches(tokens, batch_size):
                    yield [start + i for i in positions], batch

    def _replay(self, cuda_graphs: CudaGraphs, ids: Sequence[int]) -> Tensor | None:
        """The vector [1, D] of a short text by its recording; warns once if recording fails."""
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
        """The vectors of `forward` on the host, checked; an error quotes the first of `texts`."""
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
            return f"its own weights are not finite ({', '.join(bad[:5])}); download it again"
        return "verify the artifact, or load it with dtype float32"


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: Triton launches there, wherever its operands are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
