"""OpenTelemetry spans, one for each request: imported only where an endpoint is configured (extra `otel`)."""

from __future__ import annotations

from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator


class Tracing:
    """Spans are sent in the background, on a thread of the exporter's."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: of OTLP over HTTP, without the path. Sampling is OpenTelemetry's own: OTEL_TRACES_SAMPLER."""
        self._provider = TracerProvider(resource=Resource.create({"service.name": "dropserve"}))
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dropserve")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, parent: str | None) -> tuple[Any, str]:
        """A span, and its traceparent; parent: the caller's traceparent."""
        context = Context()
        if parent is not None:
            context = self._propagator.extract({"traceparent": parent}, context)
        span = self._tracer.start_span("request", context, SpanKind.SERVER)
        ids = span.get_span_context()
        return span, f"00-{format_trace_id(ids.trace_id)}-{format_span_id(ids.span_id)}-{ids.trace_flags:02x}"

    def end(self, span: Any, name: str, attributes: dict[str, str], is_error: bool) -> None:
        span.update_name(name)
        span.set_attributes(attributes)
        if is_error:
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
