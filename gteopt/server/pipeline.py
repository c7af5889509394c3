"""Turn texts or token ids of a request into vectors: limits, tokenization, cache, queue.

Hides: the order of these steps, and the error message of each. Refuses to know: which fields a
request has, how vectors are sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gteopt.encoder.tokenization import Tokens
from gteopt.errors import InputError, NumericsError, is_out_of_memory
from gteopt.server.cache import RequestCache
from gteopt.server.engine import DeviceDied, Engine, EngineWork, QueueFull
from gteopt.server.keys import ANYBODY, Allowances, ApiKey
from gteopt.server.metrics import Metrics
from gteopt.server.models import ServedModel, TextPrompt, TokenizedRequest
from gteopt.server.schema import ApiError
from gteopt.server.settings import Decoder, ServerSettings

Floats = NDArray[np.float32]
Result = TypeVar("Result")
_OWN_IDS = 'send extra_body={"tokenizer": "model"} if they are of the served model\'s tokenizer'
_FOREIGN_IDS = (
    "are token ids, but the request does not name their tokenizer; ids of another tokenizer would "
    "give wrong vectors. With LangChain, write OpenAIEmbeddings(check_embedding_ctx_length=False), "
    f"which sends text; {_OWN_IDS}; or start the server with --decode-tokens cl100k_base, which "
    "reads ids of OpenAI's tokenizer"
)


@dataclass
class Call:
    """The state of one HTTP request.

    Attributes:
        key: key of the caller.
        gone: done when the client has closed the connection; None while nobody watches it.
        facts: fields of the log line.
    """

    key: ApiKey = ANYBODY
    gone: asyncio.Future[None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class ClientGone(Exception):
    """The client has closed the connection, so that no answer is needed."""


@dataclass
class EmbeddedRequest:
    """Vectors of a request's texts.

    Attributes:
        rows: [N, D]; rows of failed texts are NaN.
        errors: errors of failed texts, by position.
        n_tokens: tokens of all texts that are not too long.
        n_truncated: texts that were cut.
    """

    rows: Floats
    errors: dict[int, ApiError]
    n_tokens: int
    n_truncated: int

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's counts, and the number of texts that were cut if it is not 0."""
        counts = {"prompt_tokens": self.n_tokens, "total_tokens": self.n_tokens}
        return {**counts, "truncated_inputs": self.n_truncated} if self.n_truncated else counts


@dataclass(frozen=True)
class InputRules:
    """How the inputs of a request are treated.

    Attributes:
        truncate: the end at which long texts are cut, "start" or "end"; "none" refuses them.
        partial: whether the other texts get vectors when some texts fail.
        own_ids: whether token ids are of the served model's tokenizer.
        param: name of the inputs' field, for errors.
    """

    truncate: str = "none"
    partial: bool = False
    own_ids: bool = False
    param: str = "input"


_INPUT_RULES = InputRules()


class Pipeline:
    """Turns inputs into vectors; only the event loop's thread may use it.

    Attributes:
        cache: the vector cache; None if it is off.
    """

    def __init__(self, engine: Engine, metrics: Metrics, settings: ServerSettings) -> None:
        self._engine = engine
        self._metrics = metrics
        self._settings = settings
        self._allowances = Allowances()
        self.cache = RequestCache(settings.cache_bytes) if settings.cache_bytes else None

    async def embed(
        self,
        served: ServedModel,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: TextPrompt,
        call: Call,
        rules: InputRules = _INPUT_RULES,
    ) -> EmbeddedRequest:
        """Embed texts or token lists.

        Raises:
            ApiError: the request is over a limit, the queue is full, or a text fails.
            ClientGone: the client has closed the connection.
        """
        partial, param = rules.partial, rules.param
        call.facts |= {"model": served.name, "inputs": len(inputs)}
        if (wait := self._allowances.take(call.key, requests=1)) is not None:
            raise self._over_limit(call.key, "requests", wait)
        if isinstance(inputs[0], str):
            texts = cast("Sequence[str]", inputs)
            tokenized = await self.tokenized(served, texts, prompt, rules.truncate, call)
        else:
            ids = cast("Sequence[Sequence[int]]", inputs)
            tokenized = await self._from_ids(served, ids, prompt, call, rules)
        errors = {
            i: ApiError(
                400,
                f"'{param}[{i}]' has {n:,} tokens, but '{served.name}' takes at most "
                f'{served.tokenization.max_tokens:,}; shorten the text, or send truncate: "end"',
                param=f"{param}[{i}]",
                code="context_length_exceeded",
            )
            for i, n in tokenized.too_long.items()
        }
        if errors and not partial:
            raise _first(errors)
        wanted = [i for i in range(len(inputs)) if i not in errors]
        n_tokens = sum(len(tokenized.tokens[i]) for i in wanted)
        if n_tokens > self._settings.max_request_tokens:
            raise ApiError(
                400,
                f"Requested {n_tokens:,} tokens, max {self._settings.max_request_tokens:,} tokens "
                f"per request; split the list",
                param=param,
                code="max_tokens_per_request",
            )
        call.facts["tokens"] = n_tokens
        self._metrics.truncated.inc(tokenized.n_truncated)
        if (wait := self._allowances.take(call.key, tokens=n_tokens)) is not None:
            raise self._over_limit(call.key, "tokens", wait)
        rows = np.full((len(inputs), served.encoder.dims), np.nan, np.float32)
        failed = await self._computed(served, tokenized.tokens, wanted, rows, call)
        errors |= {i: _as_api_error(error, f"{param}[{i}]") for i, error in failed.items()}
        if errors and not partial:
            raise _first(errors)
        return EmbeddedRequest(rows, errors, n_tokens, tokenized.n_truncated)

    async def _computed(
        self,
        served: ServedModel,
        tokens: Sequence[Tokens],
        wanted: Sequence[int],
        rows: Floats,
        call: Call,
    ) -> dict[int, Exception]:
        """Fill the wanted rows from the cache or the device, and return errors by position."""
        keys: dict[int, bytes] = {}
        if self.cache is not None:
            for i in wanted:
                keys[i] = RequestCache.key(served.sha256, tokens[i], tokens[i].n_prompt)
                if (cached := self.cache.get(keys[i])) is not None:
                    rows[i] = cached
            hits = [i for i in wanted if not np.isnan(rows[i, 0])]
            self._metrics.cache_lookups.labels("hit").inc(len(hits))
            self._metrics.cache_lookups.labels("miss").inc(len(wanted) - len(hits))
            wanted = [i for i in wanted if np.isnan(rows[i, 0])]
        if not wanted:
            return {}
        missing = [tokens[i] for i in wanted]
        work = EngineWork.of(served, missing, key=call.key.name, dims=served.encoder.dims)
        await self._done(work, call)
        rows[wanted] = work.vectors
        failed = {wanted[position]: error for position, error in work.errors.items()}
        if self.cache is not None:
            for i in wanted:
                if i not in failed:
                    self.cache.put(keys[i], rows[i])
        return failed

    async def _done(self, work: EngineWork, call: Call) -> None:
        """Submit the work and wait until the device has computed it.

        Raises:
            ApiError: the queue is full, or the device has failed.
            ClientGone: the client has closed the connection; the work is dropped.
        """
        try:
            future = self._engine.submit(work)
            answer = asyncio.wrap_future(future)
            try:
                waited: set[asyncio.Future[Any]] = {answer}
                if call.gone is not None:
                    waited.add(call.gone)
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise ClientGone
                answer.result()
            finally:
                if not future.done():
                    self._engine.drop(work)
        except QueueFull as refused:
            self._metrics.rejected.labels("queue_full").inc()
            raise ApiError(
                429,
                f"the queue is full with {self._engine.queued_s:.0f} s of work; try again in "
                f"{refused.retry_after_s:.0f} s",
                code="queue_full",
                retry_after_s=refused.retry_after_s,
            ) from refused
        except DeviceDied as died:
            raise ApiError(503, f"not ready: {died or 'the device does not answer'}") from died
        if work.queue_s is not None:
            call.facts["queue_ms"] = round(1000 * work.queue_s, 1)

    async def tokenized(
        self,
        served: ServedModel,
        texts: Sequence[str],
        prompt: TextPrompt,
        truncate: str,
        call: Call,
    ) -> TokenizedRequest:
        """Tokenize texts in parts, on the tokenizer's thread.

        Raises:
            ClientGone: the client has closed the connection.
        """
        tokenized = TokenizedRequest()
        for part in served.chunks(texts):
            if call.gone is not None and call.gone.done():
                raise ClientGone
            await run_on_thread(
                served.tokenizer, served.tokenize, part, prompt, truncate, tokenized
            )
        return tokenized

    async def _from_ids(
        self,
        served: ServedModel,
        lists: Sequence[Sequence[int]],
        prompt: TextPrompt,
        call: Call,
        rules: InputRules,
    ) -> TokenizedRequest:
        """Tokens from ids of the model's own tokenizer, or of the tokenizer of `decoder`."""
        decoder = self._settings.decoder
        if not rules.own_ids:
            if decoder is None:
                raise ApiError(400, f"'input' {_FOREIGN_IDS}.", param="input", code="token_ids")
            texts = [_decoded(decoder, ids, i) for i, ids in enumerate(lists)]
            return await self.tokenized(served, texts, prompt, rules.truncate, call)
        if prompt != TextPrompt():
            raise ApiError(
                400,
                "token ids already include the prompt; leave out input_type, prompt_name and "
                "instruction",
                param="input",
            )
        tokenized, limit = TokenizedRequest(), served.tokenization.max_tokens
        for i, ids in enumerate(lists):
            try:
                tokens = served.own_tokens(ids)
            except InputError as error:
                raise ApiError(400, f"'input[{i}]' {error}", param=f"input[{i}]") from error
            if len(tokens) > limit:
                if rules.truncate != "none":
                    raise ApiError(
                        400,
                        "truncate works only on texts; shorten token ids yourself",
                        param="truncate",
                    )
                tokenized.too_long[i] = len(tokens)
            tokenized.tokens.append(tokens)
        return tokenized

    def _over_limit(self, key: ApiKey, unit: str, wait_s: float) -> ApiError:
        self._metrics.rejected.labels(f"key_{unit}").inc()
        return ApiError(
            429,
            f"Rate limit reached for key '{key.name}' on {unit} per minute; try again in "
            f"{wait_s:.1f} s",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )


def run_on_thread(
    pool: ThreadPoolExecutor, task: Callable[..., Result], *arguments: Any
) -> Awaitable[Result]:
    """Run a task on a thread of a pool, and await its result."""
    return asyncio.wrap_future(pool.submit(task, *arguments))


def _decoded(decoder: Decoder, ids: Sequence[int], i: int) -> str:
    try:
        return decoder.decode(ids)
    except Exception as error:  # each tokenizer library raises its own type
        raise ApiError(
            400,
            f"'input[{i}]' has ids that {decoder.name} does not know: {error}",
            param=f"input[{i}]",
        ) from error


def _first(errors: Mapping[int, ApiError]) -> ApiError:
    first = errors[min(errors)]
    if len(errors) > 1:
        first.message += f" ({len(errors)} inputs have an error; this is the first)"
    return first


def _as_api_error(error: Exception, param: str) -> ApiError:
    """The answer for a text on which the model failed."""
    if isinstance(error, NumericsError):
        return ApiError(
            500,
            f"the model gave NaN or infinity for '{param}'; send the other inputs without it",
            param=param,
            code="non_finite",
        )
    if is_out_of_memory(error):
        return ApiError(
            500,
            f"the device has too little memory for '{param}'; shorten the text",
            param=param,
            code="out_of_memory",
        )
    return ApiError(
        500,
        f"the model failed on '{param}' ({type(error).__name__}); send the other inputs without it",
        param=param,
        code="inference_failed",
    )
