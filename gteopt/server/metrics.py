"""Count requests, tokens and times for Prometheus.

Hides: the registry and the names of the series. Refuses to know: HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The time series of one server; every name begins with `gteopt_`."""

    def __init__(self, price_per_hour: float | None = None) -> None:
        """Create the series, all at zero.

        Args:
            price_per_hour: price of the machine in dollars; None leaves out the cost. An hour is
                one of the wall clock, as in `passed`.
        """
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter(
            "gteopt_requests", "Requests answered", ["route", "status"], registry=to
        )
        self.request_seconds = Histogram(
            "gteopt_request_seconds",
            "Seconds from request to answer",
            ["route"],
            buckets=_SECONDS,
            registry=to,
        )
        self.queue_seconds = Histogram(
            "gteopt_queue_seconds",
            "Seconds from admission to the first pass",
            buckets=_SECONDS,
            registry=to,
        )
        self.batch_tokens = Histogram(
            "gteopt_batch_tokens", "Tokens per pass", buckets=_TOKENS, registry=to
        )
        self.batch_texts = Histogram(
            "gteopt_batch_texts", "Texts per pass", buckets=_TEXTS, registry=to
        )
        self.tokens = Counter("gteopt_tokens", "Tokens computed", ["model"], registry=to)
        self.padding = Counter(
            "gteopt_padding_tokens", "Padding tokens computed", ["model"], registry=to
        )
        self.device_seconds = Counter(
            "gteopt_device_seconds", "Seconds that the device computed", ["model"], registry=to
        )
        self.truncated = Counter("gteopt_truncated_inputs", "Texts that were cut", registry=to)
        self.failed_inputs = Counter(
            "gteopt_failed_inputs", "Texts on which the model failed", ["kind"], registry=to
        )
        self.rejected = Counter("gteopt_rejected", "Requests refused", ["reason"], registry=to)
        self.dropped_requests = Counter(
            "gteopt_dropped_requests", "Requests whose client hung up", registry=to
        )
        self.cache_lookups = Counter(
            "gteopt_cache_lookups", "Texts looked up in the cache", ["result"], registry=to
        )
        for kind in ("non_finite", "exception"):
            self.failed_inputs.labels(kind)
        self._price_per_hour = price_per_hour
        self._device_s = self._n_tokens = 0.0
        if price_per_hour is not None:
            self.watch(
                "gteopt_cost_dollars_per_million_tokens",
                "Dollars per million tokens, for the time that the device computed",
                self._cost,
            )

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed when the metrics are read."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def page(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    def passed(self, lane: str, lengths: Sequence[int], padding: int, seconds: float) -> None:
        """Count a computed pass; this and the next three methods are those of `EngineObserver`.

        Seconds are those of the wall clock, also while other processes use the device.
        """
        n_tokens = sum(lengths)
        self.batch_tokens.observe(n_tokens)
        self.batch_texts.observe(len(lengths))
        self.tokens.labels(lane).inc(n_tokens)
        self.padding.labels(lane).inc(padding)
        self.device_seconds.labels(lane).inc(seconds)
        self._device_s += seconds
        self._n_tokens += n_tokens

    def waited(self, seconds: float) -> None:
        """Count how long a request waited for its first pass."""
        self.queue_seconds.observe(seconds)

    def failed(self, kind: str) -> None:
        """Count a text on which the model failed."""
        self.failed_inputs.labels(kind).inc()

    def dropped(self) -> None:
        """Count a request that was dropped."""
        self.dropped_requests.inc()

    def _cost(self) -> float:
        assert self._price_per_hour is not None
        if not self._n_tokens:
            return 0.0
        return self._price_per_hour / 3600 * self._device_s / self._n_tokens * 1e6
