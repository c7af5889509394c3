"""A `Tokenization`: texts in, token ids out, without the model.

Hides: prompts, the tokens around a text, cutting, batches, how a tokenizer is loaded. Refuses to
know: weights, devices, how ids become vectors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gteopt.errors import InputError, UnsupportedError, suggest
from gteopt.model.checkpoint import Checkpoint

Role = Literal["query", "document"]


class Tokens(list[int]):
    """Token ids of one text.

    Attributes:
        n_prompt: tokens at the front that pooling leaves out (NV-Embed's instruction).
        is_cut: whether the text was longer than the limit.
    """

    n_prompt: int = 0
    is_cut: bool = False


class Tokenization:
    """The way from texts to token ids of one model.

    Example:
        >>> from gteopt.model.checkpoint import open_checkpoint
        >>> tokenization = Tokenization(open_checkpoint("nano"))
        >>> tokenization.lengths(["a short text"])
        [4]

    Attributes:
        name: what warnings and errors call the model.
        checkpoint: what the folder says about the model.
        tokenizer: that of transformers.
        max_tokens: longest input; longer texts are cut there.
        n_cut: texts so far that `tokenize` has cut.
        pad_id: the token that fills up shorter texts of a padded batch.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Load the tokenizer of a model.

        Raises:
            InputError: the folder has no tokenizer, or that of another model.
        """
        self.checkpoint = checkpoint
        self.name = checkpoint.manifest.recipe.name if checkpoint.manifest else checkpoint.id
        self.tokenizer = load_tokenizer(checkpoint)
        self.max_tokens = checkpoint.max_tokens
        self.n_cut = 0
        self.pad_id: int = self.tokenizer.pad_token_id or 0
        self._start_ids = _token_ids(self.tokenizer, checkpoint, checkpoint.start_token)
        self._end_ids = _token_ids(self.tokenizer, checkpoint, checkpoint.end_token)
        self._said_cut = False

    @property
    def takes_instructions(self) -> bool:
        """Whether queries carry an instruction."""
        return self.checkpoint.query_template is not None

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
        return template.format(instruction=instruction or self.checkpoint.default_instruction)

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

    def check(self, texts: Sequence[str]) -> None:
        """Refuse what is no list of strings.

        Raises:
            InputError: which position holds what.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of strings, found one string; write [text]")
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts[{position}] is {type(text).__name__}, expected a string")

    def _prompted(
        self, texts: Sequence[str], role: Role, instruction: str | None
    ) -> tuple[str, list[str]]:
        """The prompt, and the texts behind it."""
        self.check(texts)
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
                f"{self.name} takes, and were cut there (tokenization.n_cut counts further ones)",
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


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The folder's tokenizer, without its code."""
    try:
        return import_transformers().AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint.folder} has no tokenizer that can be loaded "
            f"({str(error).splitlines()[0]})"
        ) from error


def import_transformers() -> Any:
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
