"""A `SentenceInterface`: the methods of `Encoder` that Sentence Transformers has under these names.

They behave as they do there; their tests compare with it. Hides: prompts by name, kinds of arrays.
Refuses to know: how vectors are computed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gteopt.encoder.description import Description
from gteopt.encoder.tokenization import Role
from gteopt.errors import InputError, suggest
from gteopt.progress import Progress, quiet
from gteopt.records.manifest import Similarity

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
_PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
Vectors = NDArray[Any] | Tensor | list[Tensor]


class EncodeOptions(TypedDict, total=False):
    """What `SentenceInterface.encode` takes besides the texts and the kind of array."""

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


class SentenceInterface(Description):
    """Texts to vectors by the names of Sentence Transformers."""

    @abstractmethod
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
        """Vectors [N, full_dims]; see `Encoder.embed`."""

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        convert_to_tensor: Literal[False] = ...,
        convert_to_numpy: Literal[True] = ...,
        **options: Unpack[EncodeOptions],
    ) -> NDArray[Any]: ...

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        convert_to_tensor: Literal[True],
        convert_to_numpy: bool = ...,
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        convert_to_tensor: bool = ...,
        convert_to_numpy: bool = ...,
        **options: Unpack[EncodeOptions],
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
        progress: Progress = quiet,
    ) -> Vectors:
        """Vectors [N, dims] in the order given, shortened as the artifact says; [dims] of a string.

        Without a prompt, a name or a role, a text gets the model's default prompt, if it has one.

        Args:
            texts: a string, or any number of them.
            prompt_name: of a prompt in `prompts`.
            prompt: what stands before each text; `prompt_name` is ignored then.
            batch_size: texts computed together.
            show_progress_bar: on standard error.
            precision: "int8" and "uint8" by the ranges that the artifact stores; "binary" and
                "ubinary" are signs, eight a byte, by the artifact's own code where it has one.
            convert_to_numpy: False gives a list of tensors.
            convert_to_tensor: gives one tensor on the encoder's device.
            normalize_embeddings: to unit length, after cutting.
            truncate_dim: keep the first dimensions only; they are not normalised unless asked.
            role: "query" texts get the query prompt, "document" texts the document prompt.
            instruction: what a query is for; it makes `role` "query".
            progress: told after each batch.

        Raises:
            InputError: an argument that cannot be used, or something in the list is no string.
            NumericsError: the model produced NaN or infinity.
        """
        alone = isinstance(texts, str)
        several = [str(texts)] if alone else _listed(texts)
        if precision not in _PRECISIONS:
            raise InputError(
                f"unknown precision '{precision}': {suggest(str(precision), _PRECISIONS)}"
            )
        role = "query" if role is None and instruction is not None else role
        if role is None or prompt is not None or prompt_name is not None:
            prompt = self._named_prompt(prompt_name) if prompt is None else prompt
        self._check_dims(truncate_dim, precision)
        with _bar() if show_progress_bar else _same(progress) as told:
            embedded = self.embed(
                several,
                role=role or "document",
                instruction=instruction,
                prompt=prompt,
                batch_size=batch_size,
                progress=told,
            )
        rows: NDArray[np.float32] = self.vectors.project(embedded)[:, :truncate_dim]
        if normalize_embeddings:
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        coded = self._coded(rows, precision)
        if convert_to_tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(coded)).to(self.device)
            return tensor[0] if alone else tensor
        if convert_to_numpy:
            array: NDArray[Any] = coded[0] if alone else coded
            return array
        tensors = [torch.from_numpy(row) for row in coded]
        return tensors[0] if alone else tensors

    def encode_query(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the model's query prompt, unless a prompt is given."""
        return self._encode_as("query", texts, options)

    def encode_document(self, texts: str | Iterable[str], **options: Any) -> Any:
        """`encode` with the model's document prompt, unless a prompt is given."""
        return self._encode_as("document", texts, options)

    def similarity(self, a: ArrayLike | Tensor, b: ArrayLike | Tensor) -> Tensor:
        """Scores [N, M] float32 of vectors [N, D] and [M, D] by `similarity_fn_name`.

        Raises:
            InputError: vectors of different length, or codes instead of vectors.
        """
        left, right = _matrix(a), _matrix(b)
        if left.shape[1] != right.shape[1]:
            raise InputError(
                f"vectors of {left.shape[1]} and of {right.shape[1]} dimensions cannot be compared"
            )
        if self.similarity_fn_name == "cosine":
            left, right = (torch.nn.functional.normalize(each, dim=1) for each in (left, right))
        return left @ right.to(left.device).T

    @property
    def similarity_fn_name(self) -> Similarity:
        """How its vectors are compared: "cosine" or "dot"."""
        # Euclidean distance is taken of unit vectors only, whose order is that of the cosine.
        is_dot = "dot" in (self.vectors.similarity, self.checkpoint.similarity)
        return "dot" if is_dot else "cosine"

    @property
    def prompts(self) -> Mapping[str, str]:
        """The prompts that `prompt_name` names."""
        named = {name: text or "" for name, text in self.checkpoint.st.settings.prompts.items()}
        if self.tokenization.takes_instructions and not named.get("query"):
            named["query"] = self.tokenization.prompt("query")
        # As there: a role without a prompt of its own gets none, not the default one.
        return {"query": "", "document": "", **named}

    @property
    def max_seq_length(self) -> int:
        """`max_tokens` by its other name."""
        return self.max_tokens

    def get_max_seq_length(self) -> int:
        """`max_tokens` by its other name."""
        return self.max_tokens

    def get_embedding_dimension(self) -> int:
        """`dims` by its other name."""
        return self.dims

    def get_sentence_embedding_dimension(self) -> int:
        """`dims` by its other name."""
        return self.dims

    def _encode_as(self, role: Role, texts: str | Iterable[str], options: dict[str, Any]) -> Any:
        given = [options.get(name) for name in ("prompt", "prompt_name", "instruction", "role")]
        if all(each is None for each in given):
            options = {**options, "role": role, "prompt": self.prompts[role]}
        return self.encode(texts, **options)

    def _named_prompt(self, name: str | None) -> str:
        """The prompt of this name; the default one for None."""
        if name is None:
            settings = self.checkpoint.st.settings
            return settings.prompts.get(settings.default_prompt_name or "") or ""
        if name not in self.prompts:
            raise InputError(
                f"{self.name} has no prompt '{name}': {suggest(name, list(self.prompts))}"
            )
        return self.prompts[name]

    def _check_dims(self, truncate_dim: int | None, precision: Precision) -> None:
        """Refuse a length that there is not, and codes that were fitted for another one."""
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dims:
            raise InputError(
                f"truncate_dim is {truncate_dim}; vectors of {self.name} have {self.dims} "
                f"dimensions, so use 1 to {self.dims}"
            )
        if precision not in ("int8", "uint8"):
            return
        if self.vectors.code != "int8" or truncate_dim not in (None, self.dims):
            found = f"{self.vectors.code} vectors of {self.dims} dimensions"
            raise InputError(
                f"precision {precision} needs ranges that are fitted once, and {self.name} stores "
                f"{found}; make an artifact that stores int8: "
                f'gteopt.truncate(artifact, out, dims={truncate_dim or self.dims}, vectors="int8")'
            )

    def _coded(self, rows: NDArray[np.float32], precision: Precision) -> NDArray[Any]:
        """Rows [N, D] in the precision asked for."""
        if precision == "float32":
            return rows
        if precision in ("int8", "uint8"):
            codes = self.vectors.quantize(rows)
            return codes if precision == "int8" else codes.view(np.uint8) ^ np.uint8(128)
        own = self.vectors.code == "binary" and rows.shape[1] == self.dims
        bits = self.vectors.quantize(rows) if own else np.packbits(rows > 0, axis=1)
        return bits if precision == "ubinary" else (bits ^ np.uint8(128)).view(np.int8)


def _listed(texts: Iterable[str]) -> list[str]:
    try:
        return list(texts)
    except TypeError:
        raise InputError(
            f"texts is {type(texts).__name__}, expected a string or a list of strings"
        ) from None


def _matrix(vectors: ArrayLike | Tensor) -> Tensor:
    """Vectors [N, D] float32 of what a user holds: an array, a tensor, a list, a single vector."""
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
def _same(progress: Progress) -> Iterator[Progress]:
    yield progress


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        task = bars.add_task("encoding", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield show
