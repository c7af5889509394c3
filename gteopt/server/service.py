"""What the server does with a request, from its fields to the bytes of the answer.

Hides: the order of tokenization, limits, cache, queue and encoding, and how artifacts are swapped.
Refuses to know: routes and headers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gteopt.encoder import Tokens
from gteopt.errors import GteoptError, InputError, NumericsError, is_out_of_memory, suggest
from gteopt.server import answers
from gteopt.server.cache import VectorCache
from gteopt.server.engine import DeviceDied, Engine, Refused, Work
from gteopt.server.keys import ANYBODY, Allowances, Key, Keys
from gteopt.server.metrics import Metrics
from gteopt.server.models import CANARY, Prompt, Served, Tokenized
from gteopt.server.schema import (
    ApiError,
    EmbeddingRequest,
    OutputDtype,
    SimilarityRequest,
    TeiRequest,
    TokenizeRequest,
    parse_input,
)

Floats = NDArray[np.float32]
_INLINE_BYTES = 64_000
"""Answers above this are encoded off the event loop."""
_READY_S = 5.0
_CANARY_TIMEOUT_S = 20.0
_WARM_UP_S, _RELOAD_WARM_UP_S = 3.0, 1.0
_OWN_IDS = 'send extra_body={"tokenizer": "model"} if they are of the served model\'s tokenizer'
_FOREIGN_IDS = (
    "are token ids, and nothing says of which tokenizer; another one's would give wrong vectors. "
    "With LangChain write OpenAIEmbeddings(check_embedding_ctx_length=False), which sends text; "
    f"{_OWN_IDS}; or start the server with --decode-tokens cl100k_base to have them read as OpenAI "
    "does"
)


class Decoder(Protocol):
    """Token ids of another tokenizer back to text."""

    name: str

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; an error of any kind where some are unknown."""
        ...


@dataclass(frozen=True)
class Settings:
    """What the user decides.

    Attributes:
        max_queue_s: seconds of work that may wait.
        max_body_bytes: of a request.
        max_request_tokens: of all inputs of a request together.
        max_batch_tokens: of a pass; measured when None.
        body_timeout_s: until a body is there.
        cache_bytes: of vectors that are kept; 0 keeps none.
        price_per_hour: of the machine in dollars, for the cost in the metrics.
        decoder: reads token ids as another tokenizer's.
        log_requests: a line a request.
        cors_origins: web pages that may ask from a browser; none.
    """

    max_queue_s: float = 30.0
    max_body_bytes: int = 8 << 20
    max_request_tokens: int = 300_000
    max_batch_tokens: int | None = None
    body_timeout_s: float = 60.0
    cache_bytes: int = 0
    price_per_hour: float | None = None
    decoder: Decoder | None = None
    log_requests: bool = False
    cors_origins: tuple[str, ...] = ()


@dataclass
class Call:
    """One request on its way.

    Attributes:
        key: whose it is.
        gone: done when the client has hung up; None where nobody looks.
        facts: what the log line says.
    """

    key: Key = ANYBODY
    gone: asyncio.Future[None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Gone(Exception):
    """The client has hung up; there is nobody to answer."""


@dataclass
class Embedded:
    """Vectors of a request's texts.

    Attributes:
        rows: [N, D]; NaN where there is an error.
        errors: by position.
        n_tokens: of all texts that were computed or found.
        n_truncated: texts that were cut.
    """

    rows: Floats
    errors: dict[int, ApiError]
    n_tokens: int
    n_truncated: int

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's counts; texts that were cut are counted too, where there are any."""
        found = {"prompt_tokens": self.n_tokens, "total_tokens": self.n_tokens}
        return {**found, "truncated_inputs": self.n_truncated} if self.n_truncated else found


Result = TypeVar("Result")


class Service:
    """Everything behind the routes.

    Attributes:
        models: served artifacts by name.
        engine: what computes.
        metrics: what is counted.
        settings: what the user decided.
        keys: None where everybody may ask.
        is_draining: no new requests, those at work are finished.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        load: Callable[[str], Any],
        settings: Settings,
        keys: Keys | None = None,
    ) -> None:
        """A service whose artifacts `start` loads.

        Args:
            sources: what to load, by the name that requests give.
            load: source -> Encoder.
            settings: see there.
            keys: who may ask.
        """
        self.sources = dict(sources)
        self.settings = settings
        self.keys = keys
        self.models: dict[str, Served] = {}
        self.metrics = Metrics(settings.price_per_hour)
        self.engine = Engine(
            self.metrics,
            max_queue_s=settings.max_queue_s,
            weights=keys.weights if keys is not None else {},
        )
        self.is_draining = False
        self._load = load
        self._allowances = Allowances()
        self._cache = VectorCache(settings.cache_bytes) if settings.cache_bytes else None
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._ready_at = float("-inf")
        self._checking = asyncio.Lock()
        self._reloading = asyncio.Lock()
        self.metrics.watch(
            "gteopt_queued_seconds", "Work that waits", lambda: self.engine.queued_s
        )
        self.metrics.watch(
            "gteopt_waiting_requests", "Requests that wait", lambda: self.engine.n_waiting
        )
        self.metrics.watch(
            "gteopt_device_alive", "Whether the device works", lambda: self.engine.is_alive
        )
        if self._cache is not None:
            self.metrics.watch(
                "gteopt_cache_bytes", "Memory of the cache", lambda: self._cache.n_bytes  # type: ignore[union-attr]
            )

    def start(self) -> None:
        """Start the device thread and load every artifact; takes as long as that does.

        Raises:
            GteoptError: one cannot be loaded or gives no vectors.
        """
        self.engine.start()
        for name, source in self.sources.items():
            self.models[name] = self._opened(name, source, seconds=_WARM_UP_S)

    def stop(self) -> None:
        """End the threads; what still waits fails."""
        self.engine.stop()
        self._encoding.shutdown(wait=False, cancel_futures=True)
        for served in self.models.values():
            served.tokenizer.shutdown(wait=False, cancel_futures=True)

    def _opened(self, name: str, source: str, seconds: float) -> Served:
        served = Served(name, source, self._load(source))
        served.warm_up(
            lambda step: self.engine.call(step).result(),
            max_batch_tokens=self.settings.max_batch_tokens,
            seconds=seconds,
        )
        return served

    async def reload(self, name: str | None = None) -> dict[str, Any]:
        """Load artifacts beside those that serve, and swap them in; no request is lost.

        Args:
            name: of one; None is all.

        Raises:
            ApiError: there is none of that name, or it cannot be loaded; what served goes on.
        """
        if name is not None:
            self.find(name)
        done = {}
        async with self._reloading:
            for each in [name] if name is not None else list(self.sources):
                try:
                    new = await asyncio.to_thread(
                        self._opened, each, self.sources[each], _RELOAD_WARM_UP_S
                    )
                except GteoptError as error:
                    raise ApiError(
                        500,
                        f"'{each}' could not be loaded anew, the one before goes on: {error}",
                        code="reload_failed",
                    ) from error
                # Requests that hold the old one end with it; it goes when the last of them does.
                old, self.models = self.models[each], {**self.models, each: new}
                done[each] = {"before": old.encoder.sha256, "now": new.encoder.sha256}
        return {"reloaded": done}

    def find(self, name: str) -> Served:
        """The artifact of a name.

        Raises:
            ApiError: there is none.
        """
        found = self.models.get(name)
        if found is None:
            raise ApiError(
                404,
                f"The model `{name}` does not exist or you do not have access to it: "
                f"{suggest(name, self.models)}",
                param="model",
                code="model_not_found",
            )
        return found

    async def not_ready(self) -> str | None:
        """Why requests are not answered with the right vectors now; None where they are."""
        if self.is_draining:
            return "the server is draining"
        if not self.engine.is_alive:
            return "the device does not answer"
        if not self.models:
            return "artifacts are loading"
        async with self._checking:
            if time.monotonic() - self._ready_at < _READY_S:
                return None
            for served in list(self.models.values()):
                if (problem := await self._canary_problem(served)) is not None:
                    return problem
            self._ready_at = time.monotonic()
        return None

    async def _canary_problem(self, served: Served) -> str | None:
        tokens = await self._on(served.tokenizer, served.encoder.tokenize, [CANARY])
        work = Work.of(served, tokens, key="readiness", dims=served.encoder.dims)
        try:
            async with asyncio.timeout(_CANARY_TIMEOUT_S):
                await asyncio.wrap_future(self.engine.submit(work))
        except Refused:
            return None  # busy with answers
        except TimeoutError:
            return f"'{served.name}' gave no vector within {_CANARY_TIMEOUT_S:g} s"
        except DeviceDied:
            return "the device does not answer"
        if work.errors or not served.is_right(work.vectors[0]):
            return f"'{served.name}' gives another vector than right after loading"
        return None

    async def embeddings(self, request: EmbeddingRequest, call: Call) -> bytes:
        """`POST /v1/embeddings`.

        Raises:
            ApiError: for the client.
            Gone: there is none any more.
        """
        served = self.find(request.model)
        dtype = self._dtype(request, served)
        dims = self._dims(request.dimensions, served, dtype)
        prompt = self._prompt(served, request.input_type, request.prompt_name, request.instruction)
        found = await self._embed(
            served,
            request.input,
            prompt,
            call,
            truncate=request.truncate or "none",
            partial=request.on_error == "null",
            own_ids=request.tokenizer == "model",
        )
        about = {"model": request.model, "usage": found.usage, **_echo(request)}
        if request.on_error == "null":
            about["errors"] = [
                {"index": i, **error.body["error"]} for i, error in sorted(found.errors.items())
            ]
        encoding = request.encoding_format or "float"

        def encode() -> bytes:
            rows = answers.shorten(np.nan_to_num(found.rows), dims)
            codes = answers.code(rows, dtype, served.encoder.vectors)
            return answers.encode_list(codes, encoding, failed=found.errors, about=about)

        return await self._encoded(encode, found.rows.shape[0] * dims * 4)

    async def tei(self, request: TeiRequest, call: Call) -> bytes:
        """`POST /embed`, of the one artifact that is served."""
        if len(self.models) != 1:
            raise ApiError(
                400,
                f"/embed names no model, and this server has {len(self.models)} "
                f"({', '.join(self.models)}); use /v1/embeddings",
            )
        served = next(iter(self.models.values()))
        dims = self._dims(request.dimensions, served, "float")
        prompt = self._prompt(served, None, request.prompt_name, None)
        side = "start" if request.truncation_direction == "left" else "end"
        found = await self._embed(
            served,
            _texts(request.inputs, "inputs"),
            prompt,
            call,
            truncate=side if request.truncate else "none",
            param="inputs",
        )
        return await self._encoded(
            lambda: answers.dump(answers.shorten(found.rows, dims)), found.rows.shape[0] * dims * 4
        )

    async def similarity(self, request: SimilarityRequest, call: Call) -> bytes:
        """`POST /similarity`."""
        served = self.find(request.model)
        queries = _texts(request.queries, "queries")
        documents = _texts(request.documents, "documents")
        asked = self._prompt(served, "query", None, request.instruction)
        left = await self._embed(served, queries, asked, call, param="queries")
        right = await self._embed(served, documents, Prompt(), call, param="documents")
        scores = left.rows @ right.rows.T
        n_tokens = left.n_tokens + right.n_tokens
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return answers.dump({"model": request.model, "scores": scores, "usage": usage})

    async def tokenize(self, request: TokenizeRequest, call: Call) -> bytes:
        """`POST /tokenize`."""
        served = self.find(request.model)
        texts = _texts(request.input, "input")
        prompt = self._prompt(served, request.input_type, request.prompt_name, request.instruction)
        found = await self._tokenized(served, texts, prompt, "end", call)
        return answers.dump(
            {
                "model": request.model,
                "tokens": [list(each) for each in found.tokens],
                "max_tokens": served.encoder.max_tokens,
            }
        )

    def _dtype(self, request: EmbeddingRequest, served: Served) -> OutputDtype:
        given = {request.output_dtype, request.embedding_dtype} - {None}
        if len(given) == 2:
            raise ApiError(
                400, "output_dtype and embedding_dtype differ; give one", param="output_dtype"
            )
        dtype = cast("OutputDtype", given.pop() if given else "float")
        if dtype not in served.output_dtypes:
            raise ApiError(
                400,
                f"'{dtype}' needs ranges that were fitted on texts, and the artifact of "
                f"'{served.name}' stores none; use {', '.join(served.output_dtypes)}, or make one "
                f"that does with `gteopt truncate --vectors int8`",
                param="output_dtype",
            )
        return dtype

    def _dims(self, wanted: int | None, served: Served, dtype: OutputDtype) -> int:
        own, allowed = served.encoder.dims, served.supported_dims
        if wanted is None:
            return own
        if wanted not in allowed:
            raise ApiError(
                400,
                f"'{served.name}' has no vectors of {wanted} dimensions; it supports "
                f"{', '.join(map(str, allowed))}",
                param="dimensions",
            )
        if wanted != own and dtype in ("int8", "uint8"):
            raise ApiError(
                400,
                f"the stored ranges of {dtype} are for {own} dimensions, and a shorter vector is "
                f"scaled anew; leave dimensions out, or serve an artifact of {wanted} dimensions",
                param="dimensions",
            )
        return wanted

    def _prompt(
        self, served: Served, input_type: str | None, name: str | None, instruction: str | None
    ) -> Prompt:
        try:
            return served.prompt(input_type, name, instruction)
        except GteoptError as error:
            given = {"prompt_name": name, "instruction": instruction, "input_type": input_type}
            param = next((each for each, value in given.items() if value is not None), None)
            raise ApiError(400, str(error), param=param) from error

    async def _embed(
        self,
        served: Served,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        prompt: Prompt,
        call: Call,
        *,
        truncate: str = "none",
        partial: bool = False,
        own_ids: bool = False,
        param: str = "input",
    ) -> Embedded:
        """Vectors of texts or token lists; see `Embedded`."""
        call.facts |= {"model": served.name, "inputs": len(inputs)}
        if (wait := self._allowances.take(call.key, requests=1)) is not None:
            raise self._over_limit(call.key, "requests", wait)
        if isinstance(inputs[0], str):
            texts = cast("Sequence[str]", inputs)
            found = await self._tokenized(served, texts, prompt, truncate, call)
        else:
            ids = cast("Sequence[Sequence[int]]", inputs)
            found = await self._from_ids(served, ids, prompt, truncate, call, own_ids=own_ids)
        errors = {
            i: ApiError(
                400,
                f"'{param}[{i}]' has {n:,} tokens, and '{served.name}' takes at most "
                f"{served.encoder.max_tokens:,}; shorten it, or send truncate: \"end\"",
                param=f"{param}[{i}]",
                code="context_length_exceeded",
            )
            for i, n in found.too_long.items()
        }
        if errors and not partial:
            raise _first(errors)
        wanted = [i for i in range(len(inputs)) if i not in errors]
        n_tokens = sum(len(found.tokens[i]) for i in wanted)
        if n_tokens > self.settings.max_request_tokens:
            raise ApiError(
                400,
                f"Requested {n_tokens:,} tokens, max {self.settings.max_request_tokens:,} tokens "
                f"per request; split the list",
                param=param,
                code="max_tokens_per_request",
            )
        call.facts["tokens"] = n_tokens
        self.metrics.truncated.inc(found.n_truncated)
        if (wait := self._allowances.take(call.key, tokens=n_tokens)) is not None:
            raise self._over_limit(call.key, "tokens", wait)
        rows = np.full((len(inputs), served.encoder.dims), np.nan, np.float32)
        failed = await self._computed(served, found.tokens, wanted, rows, call)
        errors |= {i: _as_api_error(error, f"{param}[{i}]") for i, error in failed.items()}
        if errors and not partial:
            raise _first(errors)
        return Embedded(rows, errors, n_tokens, found.n_truncated)

    async def _computed(
        self,
        served: Served,
        tokens: Sequence[Tokens],
        wanted: Sequence[int],
        rows: Floats,
        call: Call,
    ) -> dict[int, Exception]:
        """Fill the wanted rows from the cache or the device; the errors of those that failed."""
        keys: dict[int, bytes] = {}
        if self._cache is not None:
            for i in wanted:
                keys[i] = VectorCache.key(served.sha256, tokens[i], tokens[i].n_prompt)
                if (known := self._cache.get(keys[i])) is not None:
                    rows[i] = known
            hits = [i for i in wanted if not np.isnan(rows[i, 0])]
            self.metrics.cache_lookups.labels("hit").inc(len(hits))
            self.metrics.cache_lookups.labels("miss").inc(len(wanted) - len(hits))
            wanted = [i for i in wanted if np.isnan(rows[i, 0])]
        if not wanted:
            return {}
        own = [tokens[i] for i in wanted]
        work = Work.of(served, own, key=call.key.name, dims=served.encoder.dims)
        await self._done(work, call)
        rows[wanted] = work.vectors
        failed = {wanted[position]: error for position, error in work.errors.items()}
        if self._cache is not None:
            for i in wanted:
                if i not in failed:
                    self._cache.put(keys[i], rows[i])
        return failed

    async def _done(self, work: Work, call: Call) -> None:
        """Wait until the device has computed it.

        Raises:
            ApiError: there is no room, or no device.
            Gone: the client has hung up; the work is dropped.
        """
        try:
            future = self.engine.submit(work)
            answer = asyncio.wrap_future(future)
            try:
                waited: set[asyncio.Future[Any]] = {answer}
                if call.gone is not None:
                    waited.add(call.gone)
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise Gone
                answer.result()
            finally:
                if not future.done():
                    self.engine.drop(work)
        except Refused as refused:
            self.metrics.rejected.labels("queue_full").inc()
            raise ApiError(
                429,
                f"the queue is full: {self.engine.queued_s:.0f} s of work wait; try again in "
                f"{refused.retry_after_s:.0f} s",
                code="queue_full",
                retry_after_s=refused.retry_after_s,
            ) from refused
        except DeviceDied as died:
            raise ApiError(503, f"not ready: {died or 'the device does not answer'}") from died
        if work.queue_s is not None:
            call.facts["queue_ms"] = round(1000 * work.queue_s, 1)

    async def _tokenized(
        self, served: Served, texts: Sequence[str], prompt: Prompt, truncate: str, call: Call
    ) -> Tokenized:
        found = Tokenized()
        for part in served.chunks(texts):
            if call.gone is not None and call.gone.done():
                raise Gone
            await self._on(served.tokenizer, served.tokenize, part, prompt, truncate, found)
        return found

    async def _from_ids(
        self,
        served: Served,
        lists: Sequence[Sequence[int]],
        prompt: Prompt,
        truncate: str,
        call: Call,
        *,
        own_ids: bool,
    ) -> Tokenized:
        """Tokens of token ids, which are the model's own or another tokenizer's."""
        decoder = self.settings.decoder
        if not own_ids:
            if decoder is None:
                raise ApiError(400, f"'input' {_FOREIGN_IDS}.", param="input", code="token_ids")
            texts = [_decoded(decoder, ids, i) for i, ids in enumerate(lists)]
            return await self._tokenized(served, texts, prompt, truncate, call)
        if prompt != Prompt():
            raise ApiError(
                400,
                "token ids carry their prompt already; leave out input_type, prompt_name and "
                "instruction",
                param="input",
            )
        found, limit = Tokenized(), served.encoder.max_tokens
        for i, ids in enumerate(lists):
            try:
                tokens = served.own_tokens(ids)
            except InputError as error:
                raise ApiError(400, f"'input[{i}]' {error}", param=f"input[{i}]") from error
            if len(tokens) > limit:
                if truncate != "none":
                    raise ApiError(
                        400, "truncate is for texts; cut token ids yourself", param="truncate"
                    )
                found.too_long[i] = len(tokens)
            found.tokens.append(tokens)
        return found

    def _over_limit(self, key: Key, what: str, wait: float) -> ApiError:
        self.metrics.rejected.labels(f"key_{what}").inc()
        return ApiError(
            429,
            f"Rate limit reached for key '{key.name}' on {what} per minute; try again in "
            f"{wait:.1f} s",
            code="rate_limit_exceeded",
            retry_after_s=wait,
        )

    async def _encoded(self, encode: Callable[[], bytes], n_bytes: int) -> bytes:
        return encode() if n_bytes <= _INLINE_BYTES else await self._on(self._encoding, encode)

    @staticmethod
    def _on(
        pool: ThreadPoolExecutor, task: Callable[..., Result], *arguments: Any
    ) -> Awaitable[Result]:
        return asyncio.wrap_future(pool.submit(task, *arguments))


def _texts(value: object, param: str) -> list[str]:
    found = parse_input(value, param=param)
    if not isinstance(found[0], str):
        raise ApiError(400, f"'{param}' must be texts, found token ids", param=param)
    return cast("list[str]", found)


def _decoded(decoder: Decoder, ids: Sequence[int], i: int) -> str:
    try:
        return decoder.decode(ids)
    except Exception as error:  # each vocabulary has its own
        raise ApiError(
            400,
            f"'input[{i}]' holds ids that {decoder.name} does not know: {error}",
            param=f"input[{i}]",
        ) from error


def _echo(request: EmbeddingRequest) -> dict[str, Any]:
    """The extensions that a request used, as they were understood."""
    names = ("dimensions", "input_type", "prompt_name", "instruction", "truncate", "tokenizer")
    found = {n: value for n in names if (value := getattr(request, n)) is not None}
    dtype = request.output_dtype or request.embedding_dtype
    return found if dtype is None else {**found, "output_dtype": dtype}


def _first(errors: Mapping[int, ApiError]) -> ApiError:
    first = errors[min(errors)]
    if len(errors) > 1:
        first.message += f" ({len(errors)} inputs in all are refused for a reason of their own)"
    return first


def _as_api_error(error: Exception, param: str) -> ApiError:
    """What a client is told of a text that failed on the device."""
    if isinstance(error, NumericsError):
        return ApiError(
            500,
            f"the model gave NaN or infinity for '{param}'; the other inputs are not at fault",
            param=param,
            code="non_finite",
        )
    if is_out_of_memory(error):
        return ApiError(
            500, f"'{param}' does not fit the device's memory", param=param, code="out_of_memory"
        )
    return ApiError(
        500,
        f"the model failed on '{param}' ({type(error).__name__}); the other inputs are not at fault",
        param=param,
        code="inference_failed",
    )
