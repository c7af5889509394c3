"""Load a base or an artifact into an `Encoder`: texts in, unit vectors out.

Hides: Hugging Face loading, attention direction, tokenization with the end token, prompts, padding,
pooling, and whether layers are quantized. The only file that knows them. Refuses to know: how a
variant was made, measured or judged.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from gteopt.checkpoint import (
    LATENT_FILE,
    LATENT_PREFIX,
    VECTORS_FILE,
    Checkpoint,
    open_checkpoint,
)
from gteopt.errors import InputError, IntegrityError, NumericsError, UnsupportedError, suggest
from gteopt.formats import ReadLayer, Shape, format_of
from gteopt.graphs import Graphs
from gteopt.kernels import arithmetic, make_linear, speed_up_linears_
from gteopt.kernels.reference import PackedEmbedding
from gteopt.machine import give_back, gpu_name
from gteopt.openvino import Graph, Weights
from gteopt.pooling import LatentAttention, pool
from gteopt.quant.affine import PackedWeight
from gteopt.quant.vectors import VectorTransform, identity
from gteopt.recipe import Progress, quiet
from gteopt.records import Manifest
from gteopt.runtime import packed_forward, padded_forward, to_device

Role = Literal["query", "document"]
Backend = Literal["torch", "openvino"]
Padding = Literal["left", "right"]
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_Held = TypeVar("_Held")
_ALONE_TOKENS = 2048
"""A batch with a text beyond this is taken text by text: neither padding nor activations of many
long texts at once."""
_WINDOW_BATCHES = 64
"""Where a GPU computes: enough for batches of nearly equal lengths."""
_TRIM_BYTES = 64 << 20
"""Packed weights after which a load returns what making their layers took: several times their own
size, which the allocator would keep (294 MB after three blocks of gte-Qwen2-1.5B in int8)."""


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
        ids = torch.full((len(tokens), longest), self._pad_id, dtype=torch.int64)
        mask = torch.zeros((len(tokens), longest), dtype=torch.int64)
        for row, each in enumerate(tokens):
            where = slice(0, len(each)) if side == "right" else slice(longest - len(each), longest)
            ids[row, where] = torch.tensor(each, dtype=torch.int64)
            mask[row, where] = 1
        return to_device(ids, self.device), to_device(mask, self.device)

    def pool_mask(self, tokens: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
        """The mask [N, T] of what is pooled: `pad`'s without prompts that pooling leaves out."""
        prompts = torch.tensor([getattr(ids, "n_prompt", 0) for ids in tokens])
        skip = to_device(prompts, mask.device)
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


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: Backend = "torch",
    graphs: bool = True,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
) -> Encoder:
    """Load a base model or an artifact.

    Args:
        source: "nano", a folder, an artifact folder, or `<org>/<name>`.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" is bfloat16 for a base and the dtype it was built in for an artifact;
            also "bfloat16", "float32", "float64".
        backend: "torch", or "openvino", the faster one on a CPU for the architectures and layers
            that it knows; activations of quantized products are then rounded to 8 bits.
        graphs: on a GPU, record the forward pass of single short texts and replay it, which takes
            some memory and, for the first text of each of a few lengths, some time; see
            `Encoder.graphs`.
        hub_dir: folder in the Hub's layout; given, the network is never touched.
        revision: commit, branch or tag on the Hub.
        family: see `open_checkpoint`.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint` and `load_checkpoint`.
    """
    checkpoint = open_checkpoint(source, hub_dir=hub_dir, revision=revision, family=family)
    return load_checkpoint(checkpoint, device=device, dtype=dtype, backend=backend, graphs=graphs)


def describe(
    source: str | Path,
    *,
    device: str,
    dtype: str = "auto",
    backend: Backend = "torch",
    hub_dir: Path | None = None,
    revision: str | None = None,
) -> Encoder:
    """An encoder without weights: it knows everything about itself, and others encode for it.

    Its parameters are on the meta device; to embed with it is an error of ours.

    Args:
        source: see `load`, as for the others.
        device: kind of device that encodes for it, which this machine may lack.
        dtype: see `load`.
        backend: see `load`.
        hub_dir: see `load`.
        revision: see `load`.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source, hub_dir=hub_dir, revision=revision)
    return Encoder(
        checkpoint=checkpoint,
        module=build_skeleton(checkpoint),
        tokenizer=load_tokenizer(checkpoint),
        dense=nn.Identity(),
        latent=None,
        vectors=_load_vectors(checkpoint),
        device=torch.device(device),
        dtype=parse_dtype(_dtype_of(checkpoint, dtype)),
        backend=backend,
    )


def _dtype_of(checkpoint: Checkpoint, dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return checkpoint.manifest.base.dtype if checkpoint.manifest else "bfloat16"


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: Backend = "torch",
    later: str | None = None,
    graphs: bool = False,
) -> Encoder:
    """Load what `open_checkpoint` has described.

    Args:
        checkpoint: a base or an artifact.
        device: see `load`.
        dtype: see `load`.
        backend: see `load`.
        later: a submodule of a base (its list of blocks) whose weights stay in their files until
            `fill_` asks for them; where the files name weights in another way than the
            architecture does, everything is read at once all the same.
        graphs: see `load`; not for who changes the module.

    Raises:
        InputError: an unknown backend.
        UnsupportedError: a backend that cannot compute this model, or not on this device.
    """
    where = _openvino_device(device) if backend == "openvino" else _device(device)
    kind = parse_dtype(_dtype_of(checkpoint, dtype))
    graph, streams = None, False
    if backend == "openvino":
        module = build_skeleton(checkpoint)
        weights = openvino_weights(checkpoint, module, kind)
        graph = Graph(whole_config(checkpoint), weights, dtype=kind)
        give_back()
    elif backend != "torch":
        raise InputError(
            f"unknown backend '{backend}': {suggest(str(backend), ['torch', 'openvino'])}"
        )
    elif checkpoint.is_quantized:
        module = _load_packed(checkpoint, where, kind)
    else:
        module, streams = _load_unquantized(checkpoint, where, kind, later)
    module.eval().requires_grad_(False)
    if graph is None:
        speed_up_linears_(module, where)
    dense = nn.Sequential(*(_load_dense(path) for path in checkpoint.dense)).to(where)
    return Encoder(
        checkpoint=checkpoint,
        module=module,
        tokenizer=load_tokenizer(checkpoint),
        dense=dense.eval().requires_grad_(False),
        latent=_load_latent(checkpoint, where, kind),
        vectors=_load_vectors(checkpoint),
        device=where,
        dtype=kind,
        backend=backend,
        graph=graph,
        streams=streams,
        graphs=graphs,
    )


def fill_(encoder: Encoder, name: str, dtype: torch.dtype | None = None) -> None:
    """Read those weights of the submodule `name` that were left in their files.

    Args:
        encoder: as `load_checkpoint` returned it, given `later`.
        name: a block, say.
        dtype: of all its weights from here on; the model's own when None.
    """
    part = encoder.module.get_submodule(name)
    kind = dtype or encoder.dtype
    wanted = [each for each, p in part.named_parameters() if p.is_meta]
    names = {f"{name}.{each}": each for each in wanted}
    stored = _stored_names(encoder.checkpoint, encoder.module, names)
    tensors = {each: p.to(kind) for each, p in part.named_parameters() if not p.is_meta}
    tensors |= _read(
        encoder.checkpoint,
        {stored[full]: each for full, each in names.items()},
        encoder.device,
        kind,
    )
    part.load_state_dict(tensors, strict=False, assign=True)
    part.requires_grad_(False)


def empty_(encoder: Encoder, name: str) -> None:
    """Free the memory of the submodule `name`; shapes stay, packed layers do not."""
    part = encoder.module.get_submodule(name)
    for parent in list(part.modules()):
        for leaf, child in list(parent.named_children()):
            # What a library holds in an order of its own is in no buffer that could be moved.
            if hasattr(child, "kernel") and not isinstance(child, nn.Linear):
                setattr(parent, leaf, nn.Identity())
        for leaf, parameter in list(parent.named_parameters(recurse=False)):
            setattr(parent, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        InputError: unknown, or float16, which overflows in gte-Qwen2 where bfloat16 does not.
    """
    if name == "float16":
        raise InputError(
            "dtype float16 is refused: activations of gte-Qwen2 overflow it; use bfloat16"
        )
    if name not in _DTYPES:
        raise InputError(f"unknown dtype '{name}': {suggest(name, _DTYPES)}")
    return _DTYPES[name]


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The transformer with every parameter on the meta device and its buffers real."""
    from accelerate import init_empty_weights

    transformers = _transformers()
    with init_empty_weights(include_buffers=False):
        module: nn.Module = transformers.AutoModel.from_config(
            _hf_config(checkpoint), attn_implementation="sdpa"
        )
    return module


def tokenizing(checkpoint: Checkpoint) -> Encoder:
    """An encoder that only tokenizes: nothing of the model is loaded."""
    return Encoder(
        checkpoint=checkpoint,
        module=nn.Module(),
        tokenizer=load_tokenizer(checkpoint),
        dense=nn.Identity(),
        latent=None,
        vectors=identity(checkpoint.dims),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The folder's tokenizer, without its code."""
    try:
        return _transformers().AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint.folder} has no tokenizer that can be loaded "
            f"({str(error).splitlines()[0]})"
        ) from error


def _transformers() -> Any:
    """transformers, imported late (it takes seconds) and quiet about its own progress."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise UnsupportedError(
            f"transformers {transformers.__version__} ignores `is_causal: false` and would run "
            f"bidirectional models causally; install transformers>=5"
        )
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _hf_config(checkpoint: Checkpoint) -> Any:
    fields = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in ("model_type", "quantization_config")  # the latter is ours to apply
    }
    window = fields.get("sliding_window")
    if isinstance(window, int) and window >= checkpoint.max_tokens:
        fields["sliding_window"] = (
            None  # never reached; transformers would make a mask all the same
        )
    kind = str(checkpoint.config["model_type"])
    try:
        return _transformers().AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise UnsupportedError(
            f"{checkpoint.folder}: transformers has no architecture '{kind}' of its own"
        ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {name} was asked for, but torch sees no GPU; use cpu")
    return device


def _load_unquantized(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, later: str | None = None
) -> tuple[nn.Module, bool]:
    """The transformer, and whether the weights of `later` are still in their files."""
    if later is not None or checkpoint.prefix:  # which from_pretrained does not know
        frame = _load_frame(checkpoint, device, dtype, later)
        if frame is not None:
            return frame, later is not None
    return _load_plain(checkpoint, device, dtype), False


def _load_plain(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    module, info = _transformers().AutoModel.from_pretrained(
        checkpoint.folder,
        config=_hf_config(checkpoint),
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    # A pooler head is no part of the embedding; anything else missing would be random numbers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise _missing(checkpoint, missing)
    loaded: nn.Module = module.to(device)
    return loaded


def _missing(checkpoint: Checkpoint, names: Sequence[str]) -> IntegrityError:
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return IntegrityError(
        f"{checkpoint.folder}: {len(names)} tensors of the architecture are not in its "
        f"weight files ({shown}); the download is incomplete or config.json belongs to "
        f"another model"
    )


def _load_frame(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, later: str | None
) -> nn.Module | None:
    """The transformer without the weights of `later`; None where names in the files differ."""
    module = build_skeleton(checkpoint)
    names = [name for name, _ in module.named_parameters()]
    stored = _stored_names(checkpoint, module, names)
    if lacking := [name for name in names if name not in stored]:
        if not _drop_pooler_(module, lacking):
            if checkpoint.prefix:
                raise _missing(checkpoint, lacking)
            return None
        names = list(stored)
    behind = f"{later}." if later is not None else None
    now = {stored[n]: n for n in names if behind is None or not n.startswith(behind)}
    tensors = _read(checkpoint, now, device, dtype)
    module.load_state_dict(tensors, strict=False, assign=True)
    for name, buffer in module.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, buffer.to(device))
    return module


def _stored_names(
    checkpoint: Checkpoint, module: nn.Module, names: Iterable[str]
) -> dict[str, str]:
    """What the weight files call each parameter, as far as they have it; see `_bare_names`."""
    prefix = f"{checkpoint.prefix}{getattr(module, 'base_model_prefix', '')}."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        prefix = checkpoint.prefix
    stored = {name: f"{prefix}{name}" for name in names}
    return {name: each for name, each in stored.items() if each in checkpoint.tensors}


def _read(
    checkpoint: Checkpoint, wanted: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Copies of some of the tensors in the weight files, under new names, one after the other.

    Copies, so that the mapped files leave memory when the tensors do.
    """
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as handle:
            for stored in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if stored in wanted:
                    mapped = handle.get_tensor(stored)
                    tensors[wanted[stored]] = mapped.to(device, dtype, copy=True)
    return tensors


@dataclass(frozen=True)
class _Stored:
    """The weights of a quantized checkpoint as they lie in its files, by the module's names.

    Attributes:
        layers: name, weight and bias of each quantized linear layer.
        table: the token embeddings with their name; None where they are not quantized.
        plain: everything else in the model's dtype.
    """

    layers: list[tuple[str, ReadLayer, Tensor | None]]
    table: tuple[str, PackedWeight] | None
    plain: dict[str, Tensor]


def _read_packed(
    checkpoint: Checkpoint, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> _Stored:
    """No full-precision copy of a quantized weight ever exists."""
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt", device=str(device)) as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                tensors[name] = handle.get_tensor(name)
    tensors = _bare_names(tensors, module)
    embedding = checkpoint.manifest.embedding if checkpoint.manifest is not None else None
    table = None
    if embedding is not None:
        own = {n: tensors.pop(n) for n in list(tensors) if n.startswith(f"{embedding.name}.")}
        parts = {n.removeprefix(f"{embedding.name}."): tensor for n, tensor in own.items()}
        packed = PackedWeight.from_tensors(embedding.scheme, embedding.in_features, parts)
        table = (embedding.name, packed)
    layers = list(_take_layers(checkpoint, module, tensors))
    plain = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    return _Stored(layers, table, plain)


def _load_packed(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with packed layers in place."""
    module = build_skeleton(checkpoint)
    stored = _read_packed(checkpoint, module, device, dtype)
    if stored.table is not None:
        swap_embedding_(module, *stored.table, device, dtype)
    since = 0
    stored.layers.reverse()
    while stored.layers:  # each is freed once its layer is made
        name, layer, bias = stored.layers.pop()
        swap_linear_(module, name, layer.weight, bias, device, dtype, order=layer.order)
        since += layer.weight.n_bytes
        if since > _TRIM_BYTES:
            give_back()
            since = 0
    give_back()
    plain = stored.plain
    unexpected = module.load_state_dict(plain, strict=False, assign=True).unexpected_keys
    buffers = {name for name, _ in module.named_buffers()}
    unexpected = [name for name in unexpected if name not in buffers]
    left = [name for name, p in module.named_parameters() if p.is_meta]
    if left and _drop_pooler_(module, left):
        left = []
    if left or unexpected:
        raise IntegrityError(
            f"{checkpoint.folder}: weights do not fit the architecture (missing: "
            f"{', '.join(left[:5]) or 'none'}; unexpected: {', '.join(unexpected[:5]) or 'none'})"
        )
    return module.to(device)


def _openvino_device(name: str) -> torch.device:
    if name not in ("auto", "cpu"):
        raise UnsupportedError(f"backend openvino runs on the CPU, not on {name}; leave device out")
    return torch.device("cpu")


def whole_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's config with what config.json leaves to defaults."""
    return {**checkpoint.config, **_hf_config(checkpoint).to_dict()}


class _Once(dict[str, _Held]):
    """Gives each value away: whoever asks for it holds the only one."""

    def __getitem__(self, name: str) -> _Held:
        return self.pop(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.pop(name, default)


def openvino_weights(checkpoint: Checkpoint, skeleton: nn.Module, dtype: torch.dtype) -> Weights:
    """What OpenVINO's graph of a checkpoint is made of; the skeleton is `build_skeleton`'s.

    Each weight can be read once: the graph has a copy, and the original is freed when that is made.
    """
    cpu = torch.device("cpu")
    if not checkpoint.is_quantized:
        module, _ = _load_unquantized(checkpoint, cpu, dtype)
        return Weights(_Once(module.state_dict()))
    stored = _read_packed(checkpoint, skeleton, cpu, dtype)
    biases = {f"{name}.bias": bias.to(dtype) for name, _, bias in stored.layers if bias is not None}
    return Weights(
        plain=_Once({**stored.plain, **biases}),
        packed=_Once({name: layer.weight for name, layer, _ in stored.layers}),
        orders={n: layer.order for n, layer, _ in stored.layers if layer.order is not None},
        table=None if stored.table is None else stored.table[1],
    )


def _drop_pooler_(module: nn.Module, lacking: Sequence[str]) -> bool:
    """Take out a head of other tasks where only its weights are lacking; some files have none."""
    if not all(name.startswith("pooler.") for name in lacking):
        return False
    setattr(module, "pooler", None)  # noqa: B010 - modules declare no such attribute
    return True


def _bare_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Tensors named as in the bare transformer, where a checkpoint has it inside a model with a
    head (`model.layers.0...` beside `lm_head`); the head is no part of the embedding.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return inside or tensors


def _take_layers(
    checkpoint: Checkpoint, module: nn.Module, tensors: dict[str, Tensor]
) -> Iterator[tuple[str, ReadLayer, Tensor | None]]:
    """Each quantized layer with its bias, its tensors taken out of `tensors`."""
    config, manifest = checkpoint.quantization, checkpoint.manifest
    records = {each.name: each for each in manifest.layers} if manifest is not None else {}
    for name in list(records) if config is None else format_of(config).layers_in(tensors):
        prefix = f"{name}."
        own = {each: tensors.pop(each) for each in list(tensors) if each.startswith(prefix)}
        parts = {each.removeprefix(prefix): tensor for each, tensor in own.items()}
        bias = parts.pop("bias", None)
        if config is None:
            scheme, in_features = records[name].scheme, records[name].in_features
            yield name, ReadLayer(PackedWeight.from_tensors(scheme, in_features, parts)), bias
            continue
        linear = dict(module.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise IntegrityError(
                f"{checkpoint.folder}: the quantized layer {name} is no linear layer of the "
                f"architecture; config.json belongs to another model"
            )
        shape = Shape(linear.out_features, linear.in_features)
        yield name, format_of(config).from_tensors(config, name, shape, parts), bias


def swap_embedding_(
    module: nn.Module, name: str, table: PackedWeight, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace the embedding `name` inside `module` by its packed form."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, PackedEmbedding(table, dtype).to(device))


def swap_linear_(
    module: nn.Module,
    name: str,
    packed: PackedWeight,
    bias: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    order: Tensor | None = None,
) -> None:
    """Replace the linear layer `name` inside `module` by its packed form; see `make_linear`."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    setattr(parent, leaf, make_linear(packed, bias, device=device, dtype=dtype, order=order))


def _load_dense(folder: Path) -> nn.Module:
    """A Sentence Transformers `Dense` module as a function of the vector alone, in float32."""
    from sentence_transformers.models import Dense

    dense = Dense.load(str(folder))
    return nn.Sequential(dense.linear.float(), dense.activation_function)


def latent_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the latent-attention pooling by their published names, in `dtype`.

    Raises:
        IntegrityError: some are missing.
    """
    own = checkpoint.folder / LATENT_FILE
    files = [own] if own.is_file() else checkpoint.weight_files
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.startswith(LATENT_PREFIX):
                    short = name.removeprefix(LATENT_PREFIX)
                    tensors[short] = handle.get_tensor(name).to(dtype, copy=True)
    return tensors


def _load_latent(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> LatentAttention | None:
    if checkpoint.latent is None:
        return None
    try:
        latent = LatentAttention(checkpoint.latent, latent_tensors(checkpoint, dtype))
    except KeyError as error:
        raise _missing(checkpoint, [f"{LATENT_PREFIX}{error.args[0]}"]) from error
    return latent.to(device)


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


def _load_vectors(checkpoint: Checkpoint) -> VectorTransform:
    if checkpoint.manifest is None:
        return identity(checkpoint.dims)
    path = checkpoint.folder / VECTORS_FILE
    tensors: dict[str, NDArray[Any]] = {}
    if path.is_file():
        with safe_open(path, framework="numpy") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return VectorTransform.from_tensors(checkpoint.manifest.vectors, checkpoint.dims, tensors)
