"""Answer requests: from their fields to the bytes of the answer.

Hides: what fields mean, how readiness is checked, how artifacts are swapped. Refuses to know:
routes and headers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gteopt.errors import GteoptError, suggest_names
from gteopt.own_thread import call_in_own_thread
from gteopt.server import answers
from gteopt.server.engine import DeviceDied, Engine, EngineWork, QueueFull
from gteopt.server.keys import ApiKeys
from gteopt.server.metrics import Metrics
from gteopt.server.models import ServedModel, TextPrompt
from gteopt.server.pipeline import Call, InputRules, Pipeline, run_on_thread
from gteopt.server.schema import (
    ApiError,
    EmbeddingRequest,
    OutputDtype,
    SimilarityRequest,
    TeiRequest,
    TokenizeRequest,
    parse_input,
)
from gteopt.server.settings import ServerSettings

Floats = NDArray[np.float32]
_INLINE_BYTES = 64_000
"""Larger answers are encoded on a thread, so that the event loop is not blocked."""
_READY_S = 5.0
"""Time for which a successful readiness check stays valid."""
_CANARY_TIMEOUT_S = 20.0
_WARM_UP_S, _RELOAD_WARM_UP_S = 3.0, 1.0


class Service:
    """Answers the requests of all routes.

    Attributes:
        sources: folder or model of each artifact, by name.
        models: served artifacts, by name.
        engine: computes the vectors.
        metrics: the server's counters.
        settings: the server's settings.
        keys: API keys; None if no key is needed.
        is_draining: new requests are refused, and current requests are finished.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        load: Callable[[str], Any],
        settings: ServerSettings,
        keys: ApiKeys | None = None,
    ) -> None:
        """Create a service; `start` loads its artifacts.

        Args:
            sources: folder or model of each artifact, by the name that requests give.
            load: loads the Encoder of a source.
            settings: see `ServerSettings`.
            keys: API keys; None if no key is needed.
        """
        self.sources = dict(sources)
        self.settings = settings
        self.keys = keys
        self.models: dict[str, ServedModel] = {}
        self.metrics = Metrics(settings.price_per_hour)
        self.engine = Engine(
            self.metrics,
            max_queue_s=settings.max_queue_s,
            weights=keys.weights if keys is not None else {},
        )
        self.is_draining = False
        self._load = load
        self._pipeline = Pipeline(self.engine, self.metrics, settings)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._ready_at = float("-inf")
        self._checking = asyncio.Lock()
        self._reloading = asyncio.Lock()
        self.metrics.watch(
            "gteopt_queued_seconds", "Seconds of waiting work", lambda: self.engine.queued_s
        )
        self.metrics.watch(
            "gteopt_waiting_requests", "Waiting requests", lambda: self.engine.n_waiting
        )
        self.metrics.watch(
            "gteopt_device_alive", "1 while the device works", lambda: self.engine.is_alive
        )
        if (cache := self._pipeline.cache) is not None:
            self.metrics.watch("gteopt_cache_bytes", "Memory of the cache", lambda: cache.n_bytes)

    def start(self) -> None:
        """Start the device thread and load every artifact; returns when all are loaded.

        Raises:
            GteoptError: an artifact cannot be loaded, or gives wrong vectors.
        """
        self.engine.start()
        for name, source in self.sources.items():
            self.models[name] = self._opened(name, source, seconds=_WARM_UP_S)

    def stop(self) -> None:
        """End the threads; waiting requests fail."""
        self.engine.stop()
        self._encoding.shutdown(wait=False, cancel_futures=True)
        for served in self.models.values():
            served.tokenizer.shutdown(wait=False, cancel_futures=True)

    def _opened(self, name: str, source: str, seconds: float) -> ServedModel:
        encoder = call_in_own_thread(lambda: self._load(source))
        served = ServedModel(name, source, encoder)
        served.warm_up(
            lambda step: self.engine.call(step).result(),
            max_batch_tokens=self.settings.max_batch_tokens,
            seconds=seconds,
        )
        return served

    async def reload(self, name: str | None = None) -> dict[str, Any]:
        """Load artifacts beside the served ones, and swap them in; no request is lost.

        Args:
            name: name of one artifact; None for all.

        Raises:
            ApiError: there is no such artifact, or it cannot be loaded. The old one stays served.
        """
        if name is not None:
            self.find(name)
        done = {}
        async with self._reloading:
            for model in [name] if name is not None else list(self.sources):
                try:
                    new = await asyncio.to_thread(
                        self._opened, model, self.sources[model], _RELOAD_WARM_UP_S
                    )
                except GteoptError as error:
                    raise ApiError(
                        500,
                        f"'{model}' could not be reloaded, and the loaded version stays served: "
                        f"{error}",
                        code="reload_failed",
                    ) from error
                # Current requests keep a reference to the old artifact until they end.
                old, self.models = self.models[model], {**self.models, model: new}
                done[model] = {"before": old.encoder.sha256, "now": new.encoder.sha256}
        return {"reloaded": done}

    def find(self, name: str) -> ServedModel:
        """The artifact with this name.

        Raises:
            ApiError: there is none.
        """
        served = self.models.get(name)
        if served is None:
            raise ApiError(
                404,
                f"The model `{name}` does not exist or you do not have access to it: "
                f"{suggest_names(name, self.models)}",
                param="model",
                code="model_not_found",
            )
        return served

    async def not_ready(self) -> str | None:
        """The reason why the server does not give the right vectors now; None if it does."""
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

    async def _canary_problem(self, served: ServedModel) -> str | None:
        tokens = await run_on_thread(
            served.tokenizer, served.tokenization.tokenize, [served.canary_text]
        )
        work = EngineWork.of(served, tokens, key="readiness", dims=served.encoder.dims)
        try:
            async with asyncio.timeout(_CANARY_TIMEOUT_S):
                await asyncio.wrap_future(self.engine.submit(work))
        except QueueFull:
            return None  # the queue is full, so the server is working
        except TimeoutError:
            return f"'{served.name}' gave no vector within {_CANARY_TIMEOUT_S:g} s"
        except DeviceDied:
            return "the device does not answer"
        if work.errors or not served.is_right(work.vectors[0]):
            return f"'{served.name}' gives another vector for a known text than after loading"
        return None

    async def embeddings(self, request: EmbeddingRequest, call: Call) -> bytes:
        """Answer `POST /v1/embeddings`.

        Raises:
            ApiError: a field is wrong, or the vectors cannot be computed.
            ClientGone: the client has closed the connection.
        """
        served = self.find(request.model)
        dtype = self._dtype(request, served)
        dims = self._dims(request.dimensions, served, dtype)
        prompt = self._prompt(served, request.input_type, request.prompt_name, request.instruction)
        embedded = await self._pipeline.embed(
            served,
            request.input,
            prompt,
            call,
            InputRules(
                truncate=request.truncate or "none",
                partial=request.on_error == "null",
                own_ids=request.tokenizer == "model",
            ),
        )
        fields = {"model": request.model, "usage": embedded.usage, **_echo(request)}
        if request.on_error == "null":
            fields["errors"] = [
                {"index": i, **error.body["error"]} for i, error in sorted(embedded.errors.items())
            ]
        encoding = request.encoding_format or "float"

        def encode() -> bytes:
            rows = served.shorten(np.nan_to_num(embedded.rows), dims)
            codes = answers.convert_vectors(rows, dtype, served.encoder.vectors)
            return answers.encode_embedding_list(
                codes, encoding, failed=embedded.errors, about=fields
            )

        return await self._encoded(encode, embedded.rows.shape[0] * dims * 4)

    async def tei(self, request: TeiRequest, call: Call) -> bytes:
        """Answer `POST /embed`; the server must serve one artifact only."""
        if len(self.models) != 1:
            raise ApiError(
                400,
                f"/embed names no model, but this server has {len(self.models)} "
                f"({', '.join(self.models)}); use /v1/embeddings",
            )
        served = next(iter(self.models.values()))
        dims = self._dims(request.dimensions, served, "float")
        prompt = self._prompt(served, None, request.prompt_name, None)
        side = "start" if request.truncation_direction == "left" else "end"
        embedded = await self._pipeline.embed(
            served,
            _texts(request.inputs, "inputs"),
            prompt,
            call,
            InputRules(truncate=side if request.truncate else "none", param="inputs"),
        )
        return await self._encoded(
            lambda: answers.encode_json(served.shorten(embedded.rows, dims)),
            embedded.rows.shape[0] * dims * 4,
        )

    async def similarity(self, request: SimilarityRequest, call: Call) -> bytes:
        """Answer `POST /similarity`."""
        served = self.find(request.model)
        queries = _texts(request.queries, "queries")
        documents = _texts(request.documents, "documents")
        prompt = self._prompt(served, "query", None, request.instruction)
        query_side = await self._pipeline.embed(
            served, queries, prompt, call, InputRules(param="queries")
        )
        document_side = await self._pipeline.embed(
            served, documents, TextPrompt(), call, InputRules(param="documents")
        )
        scores = query_side.rows @ document_side.rows.T
        n_tokens = query_side.n_tokens + document_side.n_tokens
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return answers.encode_json({"model": request.model, "scores": scores, "usage": usage})

    async def tokenize(self, request: TokenizeRequest, call: Call) -> bytes:
        """Answer `POST /tokenize`."""
        served = self.find(request.model)
        texts = _texts(request.input, "input")
        prompt = self._prompt(served, request.input_type, request.prompt_name, request.instruction)
        tokenized = await self._pipeline.tokenized(served, texts, prompt, "end", call)
        return answers.encode_json(
            {
                "model": request.model,
                "tokens": [list(ids) for ids in tokenized.tokens],
                "max_tokens": served.tokenization.max_tokens,
            }
        )

    def _dtype(self, request: EmbeddingRequest, served: ServedModel) -> OutputDtype:
        given = {request.output_dtype, request.embedding_dtype} - {None}
        if len(given) == 2:
            raise ApiError(
                400, "output_dtype and embedding_dtype differ; give one", param="output_dtype"
            )
        dtype = cast("OutputDtype", given.pop() if given else "float")
        if dtype not in served.output_dtypes:
            raise ApiError(
                400,
                f"'{dtype}' needs ranges that were fitted on texts, but the artifact of "
                f"'{served.name}' stores none; use {', '.join(served.output_dtypes)}, or make an "
                f"artifact with ranges by `gteopt truncate --vectors int8`",
                param="output_dtype",
            )
        return dtype

    def _dims(self, wanted: int | None, served: ServedModel, dtype: OutputDtype) -> int:
        dims, allowed = served.encoder.dims, served.supported_dims
        if wanted is None:
            return dims
        if wanted not in allowed:
            raise ApiError(
                400,
                f"'{served.name}' has no vectors of {wanted} dimensions; it supports "
                f"{', '.join(map(str, allowed))}",
                param="dimensions",
            )
        if wanted != dims and served.has_ranges(dtype):
            raise ApiError(
                400,
                f"the stored ranges of {dtype} are for {dims} dimensions, and do not fit shorter "
                f"vectors; leave dimensions out, or serve an artifact of {wanted} dimensions",
                param="dimensions",
            )
        return wanted

    def _prompt(
        self, served: ServedModel, input_type: str | None, name: str | None, instruction: str | None
    ) -> TextPrompt:
        try:
            return served.prompt(input_type, name, instruction)
        except GteoptError as error:
            given = {"prompt_name": name, "instruction": instruction, "input_type": input_type}
            param = next((field for field, value in given.items() if value is not None), None)
            raise ApiError(400, str(error), param=param) from error

    async def _encoded(self, encode: Callable[[], bytes], n_bytes: int) -> bytes:
        return encode() if n_bytes <= _INLINE_BYTES else await run_on_thread(self._encoding, encode)


def _texts(value: object, param: str) -> list[str]:
    inputs = parse_input(value, param=param)
    if not isinstance(inputs[0], str):
        raise ApiError(400, f"'{param}' must be texts, found token ids", param=param)
    return inputs


def _echo(request: EmbeddingRequest) -> dict[str, Any]:
    """The optional fields of a request, which the answer repeats."""
    names = ("dimensions", "input_type", "prompt_name", "instruction", "truncate", "tokenizer")
    fields = {name: value for name in names if (value := getattr(request, name)) is not None}
    dtype = request.output_dtype or request.embedding_dtype
    return fields if dtype is None else {**fields, "output_dtype": dtype}
