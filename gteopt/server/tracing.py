"""Record an OpenTelemetry span for each request, if OpenTelemetry's API is installed.

Hides: the library, and how a caller's trace is continued. Refuses to know: routes, and where spans
go. An OpenTelemetry SDK decides where spans go; `opentelemetry-instrument` sets one up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def record_span(name: str, headers: Mapping[str, str], facts: Mapping[str, Any]) -> Iterator[None]:
    """Record a span around the `with` block; does nothing without the API or without an SDK.

    Args:
        name: method and route.
        headers: headers of the request; `traceparent` names the caller's trace.
        facts: attributes of the span; they are read when the block ends.
    """
    if find_spec("opentelemetry") is None:
        yield
        return
    from opentelemetry import propagate, trace

    tracer = trace.get_tracer("gteopt.server")
    kind, parent = trace.SpanKind.SERVER, propagate.extract(dict(headers))
    with tracer.start_as_current_span(name, context=parent, kind=kind) as current:
        try:
            yield
        finally:
            current.set_attributes({f"gteopt.{key}": value for key, value in facts.items()})
