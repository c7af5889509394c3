"""An `Encoder`: texts in, unit vectors out.

Hides: tokenization with the end token, prompts, batches, padding, pooling, what computes token
vectors. The only file that knows them. Refuses to know: files (`loading` does), how a variant was
made, measured or judged.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gteopt.encoder.cuda_graphs import Graphs
from gteopt.encoder.forward import (
    operations,
    packed_forward,
    padded_forward,
    reads_one_token,
    to_device,
)
from gteopt.encoder.openvino import Graph
from gteopt.encoder.pooling import LatentAttention, pool
from gteopt.errors import InputError, NumericsError, suggest
from gteopt.kernels import arithmetic
from gteopt.machine import gpu_name
from gteopt.model.checkpoint import Checkpoint
from gteopt.progress import Progress, quiet
from gteopt.records.manifest import Manifest
from gteopt.vectors.transform import VectorTransform

Role = Literal["query", "document"]
Backend = Literal["torch", "openvino"]
Padding = Literal["left", "right"]
_ALONE_TOKENS = 2048
"""A batch with a text beyond this is taken text by text: neither padding nor activations of many
long texts at once."""
_WINDOW_BATCHES = 64
"""Where a GPU computes: enough for batches of nearly equal lengths."""


class Tokens(list[int]):
    """Token ids of one text.

    Attributes:
        n_prompt: positions at the front that are no part of the mean (NV-Embed's instruction).
        is_cut: whether the text was longer than the limit.
    """

    n_prompt: int = 0
    is_cut: bool = False


class Encoder:
    """A loaded embedding model; callers cannot tell whether it is quantized.

    Attributes:
        name: the artifact's recipe name, or what the base was asked for by.
        checkpoint: what the folder says about the model.
        module: the transformer, token ids in, token vectors out; without weights where the backend
            is not torch.
        backend: what computes token vectors.
        full_dims: dimensions of the model's own output.
        vectors: what happens to an embedding after the model.
        n_cut: texts so far that were cut, at `max_tokens` or where `tokenize` was told to.
        streams: whether some weights are in their files until `fill_` asks for them.
        graphs: recordings of the forward pass of one short text; None where there is no GPU, where
            none were asked for, or for an architecture that is not laid out by `runtime`. Whoever
            changes `module` sets it to None.
        window_batches: batches whose texts are tokenized at once, and sorted by length among
            themselves, while those before them are computed; None is all of them, beforehand.

    Example:
        >>> encoder = gteopt.load("nano")
        >>> encoder.encode(["how do plants eat"], role="query").shape
        (1, 256)
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: nn.Module,
        tokenizer: Any,
        dense: nn.Module,
        latent: LatentAttention | None,
        vectors: VectorTransform,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend = "torch",
        graph: Graph | None = None,
        streams: bool = False,
        graphs: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.module = module
        self.tokenizer = tokenizer
        self.vectors = vectors
        self.device = device
        self.dtype = dtype
        self.name = checkpoint.manifest.recipe.name if checkpoint.manifest else checkpoint.id
        self.full_dims = checkpoint.dims
        self.max_tokens = checkpoint.max_tokens
        self.default_instruction = checkpoint.default_instruction
        self._dense = dense
        self._latent = latent
        self._graph = graph
        self.backend = backend
        # Latent pooling reads the vector of every token.
        packs = latent is None and graph is None
        self._packed = (
            packed_forward(checkpoint.config, checkpoint.pooling, device) if packs else None
        )
        padded = padded_forward(checkpoint.config, checkpoint.pooling) if packs else None
        # On a CPU the tokenizer would take from the threads that compute.
        self.window_batches = _WINDOW_BATCHES if device.type == "cuda" else None
        self.graphs: Graphs | None = None
        if graphs and device.type == "cuda" and padded is not None:
            self.graphs = Graphs(
                lambda ids, n_tokens: self._finished(padded(self.module, ids, n_tokens)), device
            )
        self._start_ids = _token_ids(tokenizer, checkpoint, checkpoint.start_token)
        self._end_ids = _token_ids(tokenizer, checkpoint, checkpoint.end_token)
        self.n_cut = 0
        self._said_cut = False
        self.streams = streams
        self._pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @property
    def sha256(self) -> str:
        """Identifies base files or artifact; what caches and reports are keyed by."""
        return self.checkpoint.sha256

    @property
    def manifest(self) -> Manifest | None:
        """The artifact's manifest; None for a base."""
        return self.checkpoint.manifest

    @property
    def dims(self) -> int:
        """Dimensions of what `encode` returns."""
        return self.vectors.dims

    @property
    def takes_instructions(self) -> bool:
        """Whether queries carry an instruction."""
        return self.checkpoint.query_template is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters and buffers of transformer and pooling as they lie in memory."""
        seen: dict[int, int] = {}
        own: list[Tensor] = [] if self._latent is None else list(self._latent.buffers())
        if self._graph is not None:
            return self._graph.weight_bytes + sum(t.numel() * t.element_size() for t in own)
        own += [*self.module.parameters(), *self.module.buffers()]
        for tensor in own:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        hidden = [int(getattr(each, "packed_bytes", 0)) for each in self.module.modules()]
        return sum(seen.values()) + sum(hidden)

    @property
    def block_bytes(self) -> int:
        """`weight_bytes` without the token embeddings, of which a text reads a row a token."""
        if self._graph is not None:
            return self.weight_bytes - self._graph.table_bytes
        table: nn.Module = self.module.get_input_embeddings()  # type: ignore[operator]
        parts = (*table.parameters(), *table.buffers())
        return self.weight_bytes - sum(each.numel() * each.element_size() for each in parts)

    def operations(self, lengths: Sequence[int]) -> float:
        """Floating-point operations that it does for texts of these lengths, padding left out; see
        `gteopt.runtime.operations`.
        """
        config, graph = self.checkpoint.config, self._graph
        alone = self._packed is not None and reads_one_token(config, self.checkpoint.pooling)
        one_token = alone if graph is None else graph.pools
        return operations(self.module, config, lengths, one_token=one_token)

    @property
    def arithmetic(self) -> str:
        """What decides the rounding of products besides weights and dtype."""
        if self.backend == "openvino":
            return f"openvino {version('openvino')}, {arithmetic(self.device)}"
        return arithmetic(self.device)

    @property
    def gpu(self) -> str | None:
        """Name of the GPU that it computes on; None on a CPU, or where this machine has none."""
        return gpu_name(str(self.device))

    @property
    def kernels(self) -> dict[str, int]:
        """How many linear layers run on which kernel."""
        if self._graph is not None:
            return self._graph.kernels
        counts = Counter(
            str(getattr(module, "kernel", "torch.linear"))
            for module in self.module.modules()
            if isinstance(module, nn.Linear) or hasattr(module, "kernel")
        )
        return dict(sorted(counts.items()))

    @property
    def number_type(self) -> str:
        """What most of its linear layers multiply: "int8", "fp8", or a dtype's name."""
        if self._graph is not None:
            return self._graph.number_type
        counts = self.kernels
        most = max(counts, key=counts.__getitem__) if counts else ""
        for short in ("int8", "fp8"):
            if most.startswith(f"{self.device.type}.{short}"):
                return short
        return "float32" if "fp32" in most else str(self.dtype).removeprefix("torch.")

    def prompt(self, role: Role, instruction: str | None = None) -> str:
        """What is put before a text of this role.

        Raises:
            InputError: unknown role; an instruction for a document or for a model that takes none.
        """
        if role not in ("query", "document"):
            raise InputError(f"unknown role '{role}': {suggest(str(role), ['query', 'document'])}")
        if instruction is not None and role == "document":
            raise InputError("an instruction goes on queries only; documents are encoded bare")
        template = self.checkpoint.query_template
        if template is None:
            if instruction is not None:
                raise InputError(f"{self.name} takes no instructions; encode without one")
            return self.checkpoint.prompts.get(role, "")
        if role == "document":
            return ""
        return template.format(instruction=instruction or self.default_instruction)

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        role: Role = "document",
        instruction: str | None = None,
        max_tokens: int | None = None,
    ) -> list[Tokens]:
        """Token ids of each text with prompt and end token, cut to `max_tokens` or the model's."""
        prompt, full = self._prompted(texts, role, instruction)
        limit = min(max_tokens or self.max_tokens, self.max_tokens)
        found = [self._cut(ids, limit) for ids in self._whole(full)]
        long = [i for i, each in enumerate(found) if each.is_cut]
        if long and not self._end_ids:
            # Only the tokenizer knows which of its special tokens have to stay.
            texts = [full[i] for i in long]
            short = self.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
            for i, ids in zip(long, short, strict=True):
                found[i][:] = ids
        if self.checkpoint.pooling == "latent" and prompt:
            # As its authors count: the prompt's tokens alone, from position 0 on. The start token
            # stands there too, and the prompt's last one, a space, has become part of the text.
            n_prompt = len(self.tokenizer.tokenize(prompt))
            for each in found:
                each.n_prompt = min(n_prompt, len(each) - 1)
        self._report_cut(found, limit)
        return found

    def lengths(
        self, texts: Sequence[str], *, role: Role = "document", instruction: str | None = None
    ) -> list[int]:
        """Tokens that each text has with prompt and end token before it is cut."""
        _, full = self._prompted(texts, role, instruction)
        around = len(self._start_ids) + len(self._end_ids)
        return [len(ids) + around for ids in self._whole(full)]

    def _prompted(
        self, texts: Sequence[str], role: Role, instruction: str | None
    ) -> tuple[str, list[str]]:
        """The prompt, and the texts behind it."""
        if isinstance(texts, str):
            raise InputError("texts must be a list of strings, found one string; write [text]")
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts[{position}] is {type(text).__name__}, expected a string")
        prompt = self.prompt(role, instruction)
        full = [prompt + text for text in texts]
        return prompt, [text.lower() for text in full] if self.checkpoint.lower_case else full

    def _whole(self, full: Sequence[str]) -> list[list[int]]:
        """Token ids of texts of any length, without start and end token where they are ours to add.

        The tokenizer's own template is bypassed then, so that they can never be there twice.
        """
        if not full:
            return []
        ids: list[list[int]] = self.tokenizer(
            full, add_special_tokens=not self._end_ids, truncation=False
        )["input_ids"]
        return ids

    def _cut(self, ids: Sequence[int], limit: int) -> Tokens:
        """With start and end token, and room left for them, so that truncation can never cut off
        what pooling reads.
        """
        room = max(0, limit - len(self._start_ids) - len(self._end_ids))
        found = Tokens((*self._start_ids, *ids[:room], *self._end_ids))
        found.is_cut = len(ids) > room
        return found

    def _report_cut(self, tokens: Sequence[Tokens], limit: int) -> None:
        """Count texts that were cut; say so the first time that the model's own limit did it."""
        n_cut = sum(each.is_cut for each in tokens)
        self.n_cut += n_cut
        if n_cut and limit == self.max_tokens and not self._said_cut:
            self._said_cut = True
            warnings.warn(
                f"{n_cut} of {len(tokens)} texts are longer than {limit:,} tokens, the most that "
                f"{self.name} takes, and were cut there (encoder.n_cut counts further ones)",
                stacklevel=3,
            )

    def batches(
        self, tokens: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
        """Positions and token lists of each batch, longest first so that memory peaks early."""
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            yield positions, [tokens[i] for i in positions]

    def pad(
        self, tokens: Sequence[Sequence[int]], *, side: Padding = "right"
    ) -> tuple[Tensor, Tensor]:
        """Token ids [N, T] int64 and attention mask [N, T] int64 of one padded batch."""
        longest = max(len(ids) for ids in tokens)
        # By numpy: assigning a list to a row of torch's takes twice as long.
        ids = np.full((len(tokens), longest), self._pad_id, dtype=np.int64)
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
        """Unit vectors [N, D] float32 of token vectors [N, T, D]; differentiable.

        Args:
            hidden: what the transformer gave out.
            mask: [N, T], of the tokens that count; see `pool_mask`.
        """
        if self._latent is not None:
            hidden = self._latent(hidden)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return self._finished(pool(hidden, mask, self.checkpoint.pooling))

    def _finished(self, vectors: Tensor) -> Tensor:
        """Unit vectors [N, D] float32 of pooled ones of any float dtype."""
        vectors = self._dense(vectors.to(torch.promote_types(vectors.dtype, torch.float32)))
        if self.checkpoint.normalise:
            vectors = nn.functional.normalize(vectors, dim=-1)
        return vectors

    def _all_batches(
        self, texts: Sequence[str], role: Role, instruction: str | None, batch_size: int
    ) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
        """Positions and token lists of each batch of texts.

        While a GPU computes one window of many texts, a thread of the host tokenizes the next.
        """
        size = (self.window_batches or 0) * batch_size
        if not size or len(texts) <= size:
            tokens = self.tokenize(texts, role=role, instruction=instruction)
            yield from self.batches(tokens, batch_size)
            return
        self._prompted(texts, role, instruction)  # what is wrong with any of them shows now
        starts = range(0, len(texts), size)
        with ThreadPoolExecutor(max_workers=1) as thread:

            def tokens_from(start: int) -> Future[list[Tokens]]:
                window = texts[start : start + size]
                return thread.submit(self.tokenize, window, role=role, instruction=instruction)

            coming = tokens_from(0)
            for start in starts:
                tokens = coming.result()
                if start + size < len(texts):
                    coming = tokens_from(start + size)
                for positions, batch in self.batches(tokens, batch_size):
                    yield [start + i for i in positions], batch

    @torch.inference_mode()
    def embed_tokens(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        padding: Padding = "right",
        packed: bool = True,
        texts: Sequence[str] = (),
    ) -> NDArray[np.float32]:
        """Vectors of one batch of token lists at the model's full dimension, [N, full_dims].

        Long texts of different lengths run one by one: padding needs a mask, which takes memory
        with the square of the length, and none is needed without.

        Args:
            tokens: of each text, as `tokenize` makes them.
            padding: where shorter ones are filled up.
            packed: see `embed`.
            texts: what the tokens are of, to be named in an error.

        Raises:
            NumericsError: the model produced NaN or infinity.
        """
        return self._fetched(self._launched(tokens, padding, packed), tokens, texts)

    @torch.inference_mode()
    def _launched(
        self, tokens: Sequence[Sequence[int]], padding: Padding, packed: bool
    ) -> Tensor | NDArray[np.float32]:
        """`embed_tokens` of one batch, which a GPU may still be computing."""
        if self.graphs is not None and len(tokens) == 1 and packed and padding == "right":
            replayed = self._replayed(self.graphs, tokens[0])
            if replayed is not None:
                return replayed
        with _current(self.device):
            if len(tokens) > 1 and max(map(len, tokens)) > _ALONE_TOKENS:
                return torch.cat([self._computed([each], padding, packed) for each in tokens])
            return self._computed(tokens, padding, packed)

    def _computed(self, tokens: Sequence[Sequence[int]], padding: Padding, packed: bool) -> Tensor:
        if self._packed is not None and packed and padding == "right":
            return self._finished(self._packed(self.module, tokens))
        ids, mask = self.pad(tokens, side=padding)
        if self._graph is not None:
            hidden = self._graph(ids, mask)
            if self._graph.pools:
                return self._finished(hidden[:, 0])
        else:
            hidden = self.module(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.pooled(hidden, self.pool_mask(tokens, mask))

    def _replayed(self, graphs: Graphs, ids: Sequence[int]) -> NDArray[np.float32] | None:
        """The vector of a short text through its recording; says once why there is none."""
        was_refused = graphs.refused
        found = graphs(ids)
        if graphs.refused != was_refused:
            warnings.warn(
                f"{self.name}: the forward pass of short texts could not be recorded "
                f"({graphs.refused}); they run kernel by kernel, which is slower",
                stacklevel=4,
            )
        return found

    def _fetched(
        self,
        vectors: Tensor | NDArray[np.float32],
        tokens: Sequence[Sequence[int]],
        texts: Sequence[str],
    ) -> NDArray[np.float32]:
        """What `_launched` has computed, once it is there and is numbers."""
        found = np.asarray(vectors.cpu().numpy() if isinstance(vectors, Tensor) else vectors)
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1)).tolist()
        if bad:
            text = f" (the first: {texts[bad[0]][:80]!r})" if texts else ""
            raise NumericsError(
                f"{self.name} produced NaN or infinity for {len(bad)} of {len(tokens)} texts{text} "
                f"of up to {max(map(len, tokens))} tokens in {self.dtype}; verify the artifact, or "
                f"load it "
                f"with dtype float32 to find out whether its weights are sound"
            )
        return found

    def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role = "document",
        instruction: str | None = None,
        batch_size: int = 32,
        packed: bool = True,
        progress: Progress = quiet,
    ) -> NDArray[np.float32]:
        """Vectors at the model's full dimension, [N, full_dims] float32, in the order given.

        Args:
            texts: of any length.
            role: which prompt they get.
            instruction: of queries; None is the model's default.
            batch_size: texts that run together.
            packed: without padding where the architecture allows; otherwise padded, with the sums
                in the order of Sentence Transformers' forward pass.
            progress: told after each batch.
        """
        out = np.empty((len(texts), self.full_dims), dtype=np.float32)
        done = 0
        for positions, batch, launched in _behind(
            (where, batch, self._launched(batch, "right", packed))
            for where, batch in self._all_batches(texts, role, instruction, batch_size)
        ):
            out[positions] = self._fetched(launched, batch, [texts[i] for i in positions])
            done += len(batch)
            progress(f"encoding with {self.name}", done, len(texts))
        return out

    def encode(
        self,
        texts: Sequence[str],
        *,
        role: Role = "document",
        instruction: str | None = None,
        batch_size: int = 32,
        progress: Progress = quiet,
    ) -> NDArray[np.float32]:
        """Unit vectors [N, dims] float32, shortened as the artifact says.

        What an index stores is `vectors.quantize` of this.

        Args:
            texts: any number of strings.
            role: "query" texts get the instruction, "document" texts stay bare.
            instruction: what the query is for; the family's default when None.
            batch_size: texts computed together.
            progress: told after each batch.
        """
        return self.vectors.project(
            self.embed(
                texts,
                role=role,
                instruction=instruction,
                batch_size=batch_size,
                progress=progress,
            )
        )


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, wherever its operands lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_Item = TypeVar("_Item")


def _behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """Each item when the one after it has been made: a GPU has work while the host awaits one."""
    waiting: list[_Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _token_ids(tokenizer: Any, checkpoint: Checkpoint, token: str | None) -> list[int]:
    """The id of a token that stands around every text, as a list; empty where there is none."""
    if token is None:
        return []
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise InputError(
            f"the tokenizer of {checkpoint.folder} has no token '{token}', which "
            f"{checkpoint.family.name if checkpoint.family else 'the model'} needs around every "
            f"text; its tokenizer files belong to another model"
        )
    return [int(found)]
