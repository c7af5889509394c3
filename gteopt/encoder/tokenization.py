"""A `Tokenization`: texts in, token ids out, without the model.

Hides: prompts, the tokens around a text, cutting, batches, how a tokenizer is loaded. Refuses to
know: weights, devices, how ids become vectors.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gteopt.errors import InputError, IntegrityError, UnsupportedError, suggest, visible
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
        start_ids, end_ids: what stands around each text where the tokenizer does not see to it.
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
        self.start_ids = _token_ids(self.tokenizer, checkpoint, checkpoint.start_token)
        self.end_ids = _token_ids(self.tokenizer, checkpoint, checkpoint.end_token)
        if not self.end_ids and not checkpoint.is_table:
            self.start_ids, self.end_ids = self._asked_for()
        self._said_cut = False
        self._n_rows = checkpoint.config.get("vocab_size")
        self._special_ids = frozenset(self.tokenizer.all_special_ids)

    def _asked_for(self) -> tuple[list[int], list[int]]:
        """Tokens around a text where the tokenizer's files ask for some that it does not add.

        transformers 5 ignores `add_eos_token` where the tokenizer's own template says otherwise.
        """
        tokenizer, options = self.tokenizer, self.checkpoint.tokenizer_config
        alone, whole = (
            self._call(["a"], add_special_tokens=special)[0] for special in (False, True)
        )
        n = len(alone)
        at = next((i for i in range(len(whole) - n + 1) if whole[i : i + n] == alone), 0)
        start, end = whole[:at], whole[at + n :]
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
                f"{self.name} pools the last token, but its tokenizer puts none behind a text: the "
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
        """What is put before a text of this role.

        Raises:
            InputError: unknown role; an instruction for a document or for a model that takes none.
        """
        if role not in ("query", "document"):
            raise InputError(f"unknown role '{role}': {suggest(str(role), ['query', 'document'])}")
        if instruction is not None and role == "document":
            raise InputError("an instruction goes on queries only; documents are encoded bare")
        template = self.checkpoint.query_template
        if instruction is None:
            own = self.checkpoint.prompt(role)
            if own or template is None or role == "document":
                return own
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
        """Token ids of each text with prompt and end token, cut to `max_tokens` or the model's.

        Args:
            texts: of any length.
            role: which prompt they get.
            instruction: of queries; None is the model's default.
            max_tokens: the longest input, where the model's is longer.
            prompt: instead of the role's.
        """
        prompt, full = self._prompted(texts, role, instruction, prompt)
        limit = min(max_tokens or self.max_tokens, self.limit(role))
        tokens = [self._cut(ids, limit) for ids in self._whole(full)]
        long = [i for i, ids in enumerate(tokens) if ids.is_cut]
        if long and not self.end_ids and not self.checkpoint.is_table:
            # Only the tokenizer knows which of its special tokens have to stay.
            short = self._call([full[i] for i in long], truncation=True, max_length=limit)
            for i, ids in zip(long, short, strict=True):
                tokens[i][:] = ids
        if prompt:
            self._mark_prompt(prompt, tokens)
        self._check_vocabulary(tokens, texts)
        self._report_cut(tokens, limit, is_asked_for=max_tokens is not None)
        return tokens

    def limit(self, role: Role) -> int:
        """The longest input of a role, in tokens; longer texts are cut there."""
        return min(self.max_tokens, self.checkpoint.limit(role))

    def _mark_prompt(self, prompt: str, tokens: Sequence[Tokens]) -> None:
        """Note how many tokens of the prompt pooling leaves out, where it does."""
        if self.checkpoint.pooling == "latent":
            # As its authors count: the prompt's tokens alone, from position 0 on. The start token
            # stands there too, and the prompt's last one, a space, has become part of the text.
            n_prompt = len(self.tokenizer.tokenize(prompt))
        elif self.checkpoint.excludes_prompt:
            # As Sentence Transformers counts: with the start token, without the one at the end.
            (ids,) = self._whole([prompt])
            n_prompt = len(self.start_ids) + len(ids)
            n_prompt -= bool(ids) and not self.end_ids and ids[-1] in self._special_ids
        else:
            return
        for ids in tokens:
            ids.n_prompt = min(n_prompt, len(ids) - 1)

    def _check_vocabulary(self, tokens: Sequence[Tokens], texts: Sequence[str]) -> None:
        """Refuse tokens that the model's table has no row for.

        Raises:
            InputError: the first such token, and its text.
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
            InputError: a text holds half a surrogate pair, which is no Unicode text.
            IntegrityError: the tokenizer fails otherwise.
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
        """Tokens that each text has with prompt and end token before it is cut."""
        _, full = self._prompted(texts, role, instruction)
        around = len(self.start_ids) + len(self.end_ids)
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
        self,
        texts: Sequence[str],
        role: Role,
        instruction: str | None,
        prompt: str | None = None,
    ) -> tuple[str, list[str]]:
        """The prompt, and the texts behind it."""
        self.check(texts)
        own = self.prompt(role, instruction)
        prompt = own if prompt is None else prompt
        full = [prompt + text for text in texts]
        return prompt, [text.lower() for text in full] if self.checkpoint.lower_case else full

    def _whole(self, full: Sequence[str]) -> list[list[int]]:
        """Token ids of texts of any length, without start and end token where they are ours to add.

        The tokenizer's own template is bypassed then, so that they can never be there twice.
        """
        if not full:
            return []
        special = not self.end_ids and not self.checkpoint.is_table
        return self._call(full, add_special_tokens=special, truncation=False)

    def _cut(self, ids: Sequence[int], limit: int) -> Tokens:
        """With start and end token, and room left for them, so that truncation can never cut off
        what pooling reads.
        """
        room = max(0, limit - len(self.start_ids) - len(self.end_ids))
        found = Tokens((*self.start_ids, *ids[:room], *self.end_ids))
        found.is_cut = len(ids) > room
        return found

    def _report_cut(self, tokens: Sequence[Tokens], limit: int, *, is_asked_for: bool) -> None:
        """Count texts that were cut; say so the first time, where nobody asked for a limit."""
        n_cut = sum(each.is_cut for each in tokens)
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
    """The folder's tokenizer, without its code.

    Raises:
        InputError: there is none.
        IntegrityError: its files are broken.
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
    """transformers, imported late (it takes seconds) and quiet about its own progress."""
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
    """Show control characters in what libraries report of a folder: they could move the cursor."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


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
