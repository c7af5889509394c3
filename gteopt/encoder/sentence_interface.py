"""Gives `Encoder` the methods of Sentence Transformers, under the same names.

They behave as in that library; their tests compare with it. Hides: prompts by name, kinds of
arrays. Refuses to know: how vectors are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gteopt.encoder.description import EncoderDescription
from gteopt.encoder.tokenization import Role
from gteopt.errors import InputError, suggest_names
from gteopt.progress import Progress, ignore_progress
from gteopt.records.manifest import Similarity

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
_PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
Vectors = NDArray[Any] | Tensor | list[Tensor]


class SentenceOptions(TypedDict, total=False):
    """Options of `SentenceInterface.encode` apart from the texts and the kind of array."""

    prompt_name: str | None
    prompt: str | None
    batch_size: int
    show_progress_bar: bool | None
    precision: Precision
    normalize_embeddings: bool
    truncate_dim: int | None
    role: Role | None
    instruction: str | None
    progress: Progress


class SentenceInterface(EncoderDescription):
    """Sentence Transformers' methods, computed by the `embed` of the subclass.

    Attributes:
        embed: see `Encoder.embed`.
    """

    embed: Callable[..., NDArray[np.float32]]

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        convert_to_tensor: Literal[False] = ...,
        convert_to_numpy: Literal[True] = ...,
        **options: Unpack[SentenceOptions],
    ) -> NDArray[Any]: ...

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        convert_to_tensor: Literal[True],
        convert_to_numpy: bool = ...,
        **options: Unpack[SentenceOptions],
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        convert_to_tensor: bool = ...,
        convert_to_numpy: bool = ...,
        **options: Unpack[SentenceOptions],
    ) -> Vectors: ...

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        role: Role | None = None,
        instruction: str | None = None,
        progress: Progress = ignore_progress,
    ) -> Vectors:
        """Vectors [N, dims] in the order of the texts, or [dims] of one string.

        They are shortened as the artifact says. Without `prompt`, `prompt_name` and `role`, a text
        gets the model's default prompt, if it has one.

        Args:
            texts: a string, or any number of strings.
            prompt_name: name of a prompt in `prompts`.
            prompt: text before each text; `prompt_name` is ignored then.
            batch_size: texts computed together.
            show_progress_bar: show a bar on standard error.
            precision: "int8" and "uint8" use the ranges that the artifact stores. "binary" and
                "ubinary" are signs, eight a byte, in the artifact's own code if it has one.
            convert_to_numpy: False returns a list of tensors.
            convert_to_tensor: True returns one tensor on the encoder's device.
            normalize_embeddings: scale to unit length, after cutting.
            truncate_dim: number of first dimensions to keep; cutting does not normalize.
            role: "query" texts get the query prompt, "document" texts the document prompt.
            instruction: what a query is for; it sets `role` to "query".
            progress: called after each batch.

        Raises:
            InputError: an argument is invalid, or an element of the list is not a string.
            NumericsError: the model produced NaN or infinity.
        """
        is_single = isinstance(texts, str)
        text_list = [str(texts)] if is_single else _listed(texts)
        if precision not in _PRECISIONS:
            raise InputError(
                f"unknown precision '{precision}': {suggest_names(str(precision), _PRECISIONS)}"
            )
        role = "query" if role is None and instruction is not None else role
        if role is None or prompt is not None or prompt_name is not None:
            prompt = self._named_prompt(prompt_name) if prompt is None else prompt
        self._check_dims(truncate_dim, precision)
        bar: AbstractContextManager[Progress]
        bar = _bar() if show_progress_bar else nullcontext(progress)
        with bar as callback:
            embedded = self.embed(
                text_list,
                role=role or "document",
                instruction=instruction,
                prompt=prompt,
                batch_size=batch_size,
                progress=callback,
            )
        rows: NDArray[np.float32] = self.vectors.project(embedded)[:, :truncate_dim]
        if normalize_embeddings:
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        coded = self._coded(rows, precision)
        if convert_to_tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(coded)).to(self.device)
            return tensor[0] if is_single else tensor
        if convert_to_numpy:
            array: NDArray[Any] = coded[0] if is_single else coded
            return array
        tensors = [torch.from_numpy(row) for row in coded]
        return tensors[0] if is_single else tensors

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the model's query prompt, unless a prompt is given."""
        return self._encode_as("query", texts, options)

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the model's document prompt, unless a prompt is given."""
        return self._encode_as("document", texts, options)

    def similarity(self, a: ArrayLike | Tensor, b: ArrayLike | Tensor) -> Tensor:
        """Scores [N, M] float32 of vectors [N, D] and [M, D] by `similarity_fn_name`.

        Raises:
            InputError: the vectors differ in length, or are codes.
        """
        left, right = _matrix(a), _matrix(b)
        if left.shape[1] != right.shape[1]:
            raise InputError(
                f"vectors of {left.shape[1]} and of {right.shape[1]} dimensions cannot be compared"
            )
        if self.similarity_fn_name == "cosine":
            left, right = (torch.nn.functional.normalize(rows, dim=1) for rows in (left, right))
        return left @ right.to(left.device).T

    @property
    def similarity_fn_name(self) -> Similarity:
        """How the vectors are compared: "cosine" or "dot"."""
        # Euclidean distance is accepted for unit vectors only; it ranks them as the cosine does.
        is_dot = "dot" in (self.vectors.similarity, self.checkpoint.similarity)
        return "dot" if is_dot else "cosine"

    @property
    def prompts(self) -> Mapping[str, str]:
        """The prompts that `prompt_name` names."""
        named = {name: text or "" for name, text in self.checkpoint.st.settings.prompts.items()}
        if self.tokenization.takes_instructions and not named.get("query"):
            named["query"] = self.tokenization.prompt("query")
        # As in Sentence Transformers: a role without its own prompt gets none, not the default.
        return {"query": "", "document": "", **named}

    @property
    def max_seq_length(self) -> int:
        """Same as `max_tokens`."""
        return self.max_tokens

    def get_max_seq_length(self) -> int:
        """Same as `max_tokens`."""
        return self.max_tokens

    def get_embedding_dimension(self) -> int:
        """Same as `dims`."""
        return self.dims

    def get_sentence_embedding_dimension(self) -> int:
        """Same as `dims`."""
        return self.dims

    def _encode_as(self, role: Role, texts: str | Iterable[str], options: dict[str, Any]) -> Any:
        given = [options.get(name) for name in ("prompt", "prompt_name", "instruction", "role")]
        if all(value is None for value in given):
            options = {**options, "role": role, "prompt": self.prompts[role]}
        return self.encode(texts, **options)

    def _named_prompt(self, name: str | None) -> str:
        """The prompt of this name; for None the default prompt."""
        if name is None:
            settings = self.checkpoint.st.settings
            return settings.prompts.get(settings.default_prompt_name or "") or ""
        if name not in self.prompts:
            raise InputError(
                f"{self.name} has no prompt '{name}': {suggest_names(name, list(self.prompts))}"
            )
        return self.prompts[name]

    def _check_dims(self, truncate_dim: int | None, precision: Precision) -> None:
        """Refuse a length outside 1 to `dims`, and int8 codes that were not fitted for it."""
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dims:
            raise InputError(
                f"truncate_dim is {truncate_dim}; vectors of {self.name} have {self.dims} "
                f"dimensions, so use 1 to {self.dims}"
            )
        if precision not in ("int8", "uint8"):
            return
        if self.vectors.code != "int8" or truncate_dim not in (None, self.dims):
            raise InputError(
                f"precision {precision} needs ranges that are fitted once, and {self.name} stores "
                f"{self.vectors.code} vectors of {self.dims} dimensions; make an artifact that "
                f"stores int8: "
                f'gteopt.truncate(artifact, out, dims={truncate_dim or self.dims}, vectors="int8")'
            )

    def _coded(self, rows: NDArray[np.float32], precision: Precision) -> NDArray[Any]:
        """Rows [N, D] in the requested precision."""
        if precision == "float32":
            return rows
        if precision in ("int8", "uint8"):
            codes = self.vectors.quantize(rows)
            return codes if precision == "int8" else codes.view(np.uint8) ^ np.uint8(128)
        has_code = self.vectors.code == "binary" and rows.shape[1] == self.dims
        bits = self.vectors.quantize(rows) if has_code else np.packbits(rows > 0, axis=1)
        return bits if precision == "ubinary" else (bits ^ np.uint8(128)).view(np.int8)


def _listed(texts: Iterable[str]) -> list[str]:
    try:
        return list(texts)
    except TypeError:
        raise InputError(
            f"texts is {type(texts).__name__}, expected a string or a list of strings"
        ) from None


def _matrix(vectors: ArrayLike | Tensor) -> Tensor:
    """Vectors [N, D] float32 from an array, a tensor, a list or a single vector."""
    if isinstance(vectors, (list, tuple)) and vectors and isinstance(vectors[0], Tensor):
        vectors = torch.stack(list(vectors))
    rows = vectors if isinstance(vectors, Tensor) else torch.from_numpy(np.asarray(vectors))
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise InputError(f"vectors have shape {list(rows.shape)}, must be [N, D] or [D]")
    if not rows.is_floating_point():
        raise InputError(
            f"similarity compares vectors, found {rows.dtype} codes; take encoder.vectors."
            f"dequantize(codes), or search them with gteopt.vectors.search"
        )
    return rows.float()


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        task = bars.add_task("encoding", total=None)

        def show(step: str, done: int, total: int) -> None:
            bars.update(task, description=step, completed=done, total=total)

        yield show
