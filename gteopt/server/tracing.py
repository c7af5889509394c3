"""A span of OpenTelemetry for each request, where its API is installed.

Hides: the library, and how a caller's own trace is continued. Refuses to know: routes, and where
spans go: an OpenTelemetry SDK decides that, which `opentelemetry-instrument` sets up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def span(name: str, headers: Mapping[str, str], facts: Mapping[str, Any]) -> Iterator[None]:
    """A span of what happens inside; nothing without the API, or where nobody set up an SDK.

    Args:
        name: method and route.
        headers: of the request; `traceparent` in them names the caller's trace.
        facts: its attributes, read at the end.
    """
    if find_spec("opentelemetry") is None:
        yield
        return
    from opentelemetry import propagate, trace

    tracer = trace.get_tracer("gteopt.server")
    kind, parent = trace.SpanKind.SERVER, propagate.extract(dict(headers))
    with tracer.start_as_current_span(name, context=parent, kind=kind) as own:
        try:
            yield
        finally:
            own.set_attributes({f"gteopt.{key}": value for key, value in facts.items()})
