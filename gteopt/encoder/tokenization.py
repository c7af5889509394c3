"""Turns texts into token ids without the model: the class `Tokenization`.

Hides: prompts, the tokens around a text, cutting, batches, how a tokenizer is loaded. Refuses to
know: weights, devices, how ids become vectors.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gteopt.errors import (
    InputError,
    IntegrityError,
    UnsupportedError,
    escape_control_characters,
    suggest_names,
)
from gteopt.model.checkpoint import Checkpoint
from gteopt.model.foreign import foreign_errors

Role = Literal["query", "document"]
_VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "source.spm", "tekken.json", "bpe.codes", "prophetnet.tokenizer"),
    *("tokenizer.tiktoken", "tiktoken.model", "spm.model"),
)


class Tokens(list[int]):
    """Token ids of one text.

    Attributes:
        n_prompt: tokens at the front that pooling leaves out (an instruction).
        is_cut: whether the text was longer than the limit.
    """

    n_prompt: int = 0
    is_cut: bool = False


class Tokenization:
    """Turns texts into the token ids that one model reads.

    Example:
        >>> from gteopt.model.checkpoint import open_checkpoint
        >>> tokenization = Tokenization(open_checkpoint("nano"))
        >>> tokenization.lengths(["a short text"])
        [4]

    Attributes:
        name: what warnings and errors call the model.
        checkpoint: what the folder says about the model.
        tokenizer: the tokenizer of transformers.
        max_tokens: longest input in tokens; longer texts are cut.
        n_cut: number of texts that `tokenize` has cut so far.
        pad_id: the token that pads shorter texts of a batch.
        start_ids, end_ids: tokens that gteopt adds around each text if the tokenizer does not.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Load the tokenizer of a model.

        Raises:
            InputError: the folder has no tokenizer, or the tokenizer of another model.
        """
        self.checkpoint = checkpoint
        self.name = checkpoint.manifest.recipe.name if checkpoint.manifest else checkpoint.id
        self.tokenizer = load_tokenizer(checkpoint)
        self.max_tokens = checkpoint.max_tokens
        self.n_cut = 0
        self.pad_id: int = self.tokenizer.pad_token_id or 0
        self.start_ids = _token_ids(self.tokenizer, checkpoint, checkpoint.start_token)
        self.end_ids = _token_ids(self.tokenizer, checkpoint, checkpoint.end_token)
        if not self.end_ids and not checkpoint.is_table:
            self.start_ids, self.end_ids = self._configured_ids()
        self._said_cut = False
        self._n_rows = checkpoint.config.get("vocab_size")
        self._special_ids = frozenset(self.tokenizer.all_special_ids)

    def _configured_ids(self) -> tuple[list[int], list[int]]:
        """Tokens around a text, if tokenizer_config.json requests one that the tokenizer omits.

        transformers 5 ignores `add_eos_token` if the tokenizer's own template says otherwise.
        """
        tokenizer, options = self.tokenizer, self.checkpoint.tokenizer_config
        bare, full = (self._call(["a"], add_special_tokens=special)[0] for special in (False, True))
        n = len(bare)
        at = next((i for i in range(len(full) - n + 1) if full[i : i + n] == bare), 0)
        start, end = full[:at], full[at + n :]
        lacks_start = (
            options.get("add_bos_token") is True
            and tokenizer.bos_token_id is not None
            and tokenizer.bos_token_id not in start
        )
        lacks_end = (
            options.get("add_eos_token") is True
            and tokenizer.eos_token_id is not None
            and tokenizer.eos_token_id not in end
        )
        if lacks_start or lacks_end:
            start = [tokenizer.bos_token_id, *start] if lacks_start else start
            return start, [*end, tokenizer.eos_token_id] if lacks_end else end
        if self.checkpoint.pooling == "lasttoken" and not end:
            warnings.warn(
                f"{self.name} pools the last token, but its tokenizer adds no end token: the "
                f"vector is that of the last word. If the model was trained with an end token, set "
                f"add_eos_token to true in tokenizer_config.json",
                stacklevel=4,
            )
        return [], []

    @property
    def takes_instructions(self) -> bool:
        """Whether queries carry an instruction."""
        return self.checkpoint.query_template is not None

    def prompt(self, role: Role, instruction: str | None = None) -> str:
        """The text to put before a text of this role.

        Raises:
            InputError: the role is unknown, or an instruction is given for a document or for a
                model that takes none.
        """
        if role not in ("query", "document"):
            raise InputError(
                f"unknown role '{role}': {suggest_names(str(role), ['query', 'document'])}"
            )
        if instruction is not None and role == "document":
            raise InputError("an instruction goes on queries only; encode documents without one")
        template = self.checkpoint.query_template
        if instruction is None:
            role_prompt = self.checkpoint.prompt(role)
            if role_prompt or template is None or role == "document":
                return role_prompt
            return template.format(instruction=self.checkpoint.default_instruction)
        if template is None:
            raise InputError(f"{self.name} takes no instructions; encode without one")
        return template.format(instruction=instruction)

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        role: Role = "document",
        instruction: str | None = None,
        max_tokens: int | None = None,
        prompt: str | None = None,
    ) -> list[Tokens]:
        """Token ids of each text with prompt and end token, cut to the limit.

        Args:
            texts: of any length.
            role: which prompt the texts get.
            instruction: what a query is for; None is the model's default.
            max_tokens: a limit below the model's own.
            prompt: text before each text, instead of the role's prompt.
        """
        prompt, full = self._prompted(texts, role, instruction, prompt)
        limit = min(max_tokens or self.max_tokens, self.limit(role))
        tokens = [self._cut(ids, limit) for ids in self._whole(full)]
        long = [i for i, ids in enumerate(tokens) if ids.is_cut]
        if long and not self.end_ids and not self.checkpoint.is_table:
            # Only the tokenizer knows which of its special tokens must stay.
            short = self._call([full[i] for i in long], truncation=True, max_length=limit)
            for i, ids in zip(long, short, strict=True):
                tokens[i][:] = ids
        if prompt:
            self._mark_prompt(prompt, tokens)
        self._check_vocabulary(tokens, texts)
        self._report_cut(tokens, limit, is_asked_for=max_tokens is not None)
        return tokens

    def limit(self, role: Role) -> int:
        """The longest input of a role in tokens; longer texts are cut."""
        return min(self.max_tokens, self.checkpoint.limit(role))

    def _mark_prompt(self, prompt: str, tokens: Sequence[Tokens]) -> None:
        """Set how many tokens of the prompt pooling leaves out, if it does so."""
        if self.checkpoint.pooling == "latent":
            # NV-Embed's authors leave out as many tokens as the bare prompt has. These include the
            # start token, but not the prompt's last token: a space, which merges with the text.
            n_prompt = len(self.tokenizer.tokenize(prompt))
        elif self.checkpoint.excludes_prompt:
            # Sentence Transformers counts the start token, but no end token.
            (ids,) = self._whole([prompt])
            n_prompt = len(self.start_ids) + len(ids)
            n_prompt -= bool(ids) and not self.end_ids and ids[-1] in self._special_ids
        else:
            return
        for ids in tokens:
            ids.n_prompt = min(n_prompt, len(ids) - 1)

    def _check_vocabulary(self, tokens: Sequence[Tokens], texts: Sequence[str]) -> None:
        """Refuse tokens that the model's embedding table has no row for.

        Raises:
            InputError: names the first such token and its text.
        """
        if self._n_rows is None or len(self.tokenizer) <= self._n_rows:
            return
        for ids, text in zip(tokens, texts, strict=True):
            for token in ids:
                if token >= self._n_rows:
                    raise InputError(
                        f"{self.name}: token {self.tokenizer.convert_ids_to_tokens(token)!r} "
                        f"(number {token}) of the text {text[:80]!r} is beyond the model's table "
                        f"of {self._n_rows:,} tokens; the table was not resized when tokens were "
                        f"added to the tokenizer"
                    )

    def _call(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        """The tokenizer's own call.

        Raises:
            InputError: a text holds half a surrogate pair, which is no valid Unicode.
            IntegrityError: the tokenizer fails for another reason.
        """
        try:
            with foreign_errors(self.checkpoint.folder, "tokenizing"):
                ids: list[list[int]] = self.tokenizer(list(texts), **options)["input_ids"]
        except IntegrityError:
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    at = text.encode("ascii", "backslashreplace").decode()[:80]
                    raise InputError(
                        f"the text {at!r} is no Unicode text: position {error.start:,} holds half "
                        f"a surrogate pair (an emoji that was cut in two); remove it"
                    ) from None
            raise
        return ids

    def lengths(
        self, texts: Sequence[str], *, role: Role = "document", instruction: str | None = None
    ) -> list[int]:
        """Number of tokens of each text, with prompt and end token, before it is cut."""
        _, full = self._prompted(texts, role, instruction)
        around = len(self.start_ids) + len(self.end_ids)
        return [len(ids) + around for ids in self._whole(full)]

    def check(self, texts: Sequence[str]) -> None:
        """Refuse anything but a list of strings.

        Raises:
            InputError: says which position holds which type.
        """
        if isinstance(texts, str):
            raise InputError("texts must be a list of strings, found one string; write [text]")
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts[{position}] is {type(text).__name__}, expected a string")

    def _prompted(
        self,
        texts: Sequence[str],
        role: Role,
        instruction: str | None,
        prompt: str | None = None,
    ) -> tuple[str, list[str]]:
        """The prompt, and each text with the prompt before it."""
        self.check(texts)
        role_prompt = self.prompt(role, instruction)  # refuses a wrong role or instruction
        prompt = role_prompt if prompt is None else prompt
        full = [prompt + text for text in texts]
        return prompt, [text.lower() for text in full] if self.checkpoint.lower_case else full

    def _whole(self, full: Sequence[str]) -> list[list[int]]:
        """Token ids of uncut texts, without the start and end tokens that gteopt adds itself.

        The tokenizer's own template is bypassed then, so that no token is added twice.
        """
        if not full:
            return []
        special = not self.end_ids and not self.checkpoint.is_table
        return self._call(full, add_special_tokens=special, truncation=False)

    def _cut(self, ids: Sequence[int], limit: int) -> Tokens:
        """`ids` with start and end token, cut so that both fit: pooling may read them."""
        room = max(0, limit - len(self.start_ids) - len(self.end_ids))
        tokens = Tokens((*self.start_ids, *ids[:room], *self.end_ids))
        tokens.is_cut = len(ids) > room
        return tokens

    def _report_cut(self, tokens: Sequence[Tokens], limit: int, *, is_asked_for: bool) -> None:
        """Count texts that were cut; warn the first time, unless the caller set the limit."""
        n_cut = sum(ids.is_cut for ids in tokens)
        self.n_cut += n_cut
        if n_cut and not is_asked_for and not self._said_cut:
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
    """The folder's tokenizer; code in the folder is not run.

    Raises:
        InputError: the folder has no tokenizer.
        IntegrityError: the tokenizer's files are broken.
    """
    folder = checkpoint.tokenizer_folder
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise InputError(
            f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES)}); download the model "
            f"again, or save its tokenizer there"
        )
    transformers = import_transformers()
    with foreign_errors(folder, "reading the tokenizer"):
        if checkpoint.is_table:
            file = str(folder / "tokenizer.json")
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{folder}: the tokenizer has an empty vocabulary; its files are broken")
    return tokenizer


def import_transformers() -> Any:
    """transformers, imported late because it takes seconds, with its progress bars off."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise UnsupportedError(
            f"transformers {transformers.__version__} ignores `is_causal: false` and would run "
            f"bidirectional models causally; install transformers>=5"
        )
    transformers.utils.logging.disable_progress_bar()
    for handler in (*logging.getLogger("transformers").handlers, logging.lastResort):
        if handler is not None and _escape not in handler.filters:
            handler.addFilter(_escape)
    return transformers


def _escape(record: logging.LogRecord) -> bool:
    """Make control characters in library messages visible: they could move the cursor."""
    record.msg, record.args = escape_control_characters(record.getMessage()), ()
    return True


def _token_ids(tokenizer: Any, checkpoint: Checkpoint, token: str | None) -> list[int]:
    """The id of a token around every text, as a list; empty if there is no such token."""
    if token is None:
        return []
    token_id = tokenizer.convert_tokens_to_ids(token)
    is_unknown = token_id == tokenizer.unk_token_id and token != tokenizer.unk_token
    if token_id is None or is_unknown:
        raise InputError(
            f"the tokenizer of {checkpoint.folder} has no token '{token}', which "
            f"{checkpoint.family.name if checkpoint.family else 'the model'} needs around every "
            f"text; its tokenizer files belong to another model"
        )
    return [int(token_id)]
