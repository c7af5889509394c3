"""A request is a span of the caller's trace, with the facts that the log gives."""

from __future__ import annotations

import pytest

from tests.server.running_server import Running

REASON = "run by hand: pip install opentelemetry-sdk"


def test_a_request_is_a_span_of_the_callers_trace(server: Running) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=REASON)
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason=REASON)
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=REASON
    ).InMemorySpanExporter()
    trace = pytest.importorskip("opentelemetry.trace", reason=REASON)
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    trace.set_tracer_provider(provider)
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"traceparent": caller}
    body = {"model": "nano", "input": ["a text", "another"]}
    assert server.client.post("/v1/embeddings", json=body, headers=headers).status_code == 200
    assert server.client.get("/v1/models/nobody", headers=headers).status_code == 404
    succeeded, failed = memory.get_finished_spans()
    assert succeeded.name == "POST /v1/embeddings"
    assert f"{succeeded.context.trace_id:032x}" == caller.split("-")[1]
    assert (succeeded.attributes["gteopt.model"], succeeded.attributes["gteopt.inputs"]) == (
        "nano",
        2,
    )
    assert succeeded.attributes["gteopt.tokens"] > 2
    assert failed.status.is_ok is False
