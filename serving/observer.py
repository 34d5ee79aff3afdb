"""What is known of one request besides its content: for metrics, the access log and traces.

Request ids are taken from the caller (`X-Request-Id`) or made here, and given back. W3C trace context (`traceparent`)
goes into the log, the answer and, where traces are exported, the span. Source: W3C Trace Context, level 1.
"""

from __future__ import annotations

import itertools
import re
import secrets
import time
from typing import Any

from serving.errors import StartError
from serving.logs import AccessLog
from serving.metrics import Metrics
from serving.runtime import Model
from serving.settings import Settings

# What may stand in a log line and a header as it came.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class Exchange:
    """One request, from its head to its answer."""

    # Of whoever answered.
    model: Model | None = None
    # Given back: the caller's trace, this server's span.
    traceparent: str | None = None
    span: Any = None

    def __init__(self, protocol: str, operation: str, path: str, request_id: str) -> None:
        self.protocol = protocol
        self.operation = operation
        self.path = path
        self.request_id = request_id
        self.started = time.perf_counter()


class Observer:
    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises StartError where traces are wanted and cannot be exported."""
        self._metrics = metrics
        self._access = AccessLog()
        self._logged = settings.access_log
        self._tracing = None if settings.otlp_endpoint is None else _tracing(settings.otlp_endpoint)
        # Unique without asking the operating system for each request.
        self._prefix = secrets.token_hex(8)
        self._numbers = itertools.count()

    def begin(
        self, protocol: str, operation: str, path: str, request_id: str | None, traceparent: str | None
    ) -> Exchange:
        """A request's head has been read: its path without a query, and what its caller calls it."""
        if request_id is None or _REQUEST_ID.fullmatch(request_id) is None:
            request_id = f"{self._prefix}-{next(self._numbers):x}"
        if traceparent is not None and _TRACEPARENT.fullmatch(traceparent) is None:
            traceparent = None
        exchange = Exchange(protocol, operation, path, request_id)
        if self._tracing is not None:
            exchange.span, exchange.traceparent = self._tracing.begin(traceparent)
        elif traceparent is not None:
            exchange.traceparent = f"00-{traceparent[3:35]}-{secrets.token_hex(8)}-{traceparent[53:55]}"
        return exchange

    def end(self, exchange: Exchange, code: str, is_error: bool) -> None:
        """The answer has been given. is_error: whoever is to blame."""
        seconds = time.perf_counter() - exchange.started
        model = exchange.model
        self._metrics.request(exchange.protocol, exchange.operation, model, code, seconds)
        if exchange.span is not None and self._tracing is not None:
            attributes = {"url.path": exchange.path, "code": code, "request_id": exchange.request_id}
            if model is not None:
                attributes["model"], attributes["version"] = model.identity
            self._tracing.end(exchange.span, f"{exchange.protocol} {exchange.operation}", attributes, is_error)
        if self._logged == "off" or (self._logged == "errors" and not is_error):
            return
        event = {
            "event": "request",
            "level": "info",
            "request_id": exchange.request_id,
            "protocol": exchange.protocol,
            "operation": exchange.operation,
            "path": exchange.path,
            "code": code,
            # Cut, not rounded: `round` takes as long as writing the line.
            "duration_ms": int(seconds * 1e6) / 1000,
        }
        if model is not None:
            event["model"], event["version"] = model.identity
        if exchange.traceparent is not None:
            event["trace_id"] = exchange.traceparent[3:35]
        self._access.write(event)

    def close(self) -> None:
        self._access.flush()
        if self._tracing is not None:
            self._tracing.close()


def _tracing(endpoint: str) -> Any:
    try:
        from serving.tracing import Tracing
    except ImportError as error:
        raise StartError(
            f"DROPSERVE_OTLP_ENDPOINT={endpoint}: no OpenTelemetry exporter here ({error}); "
            "install it (`pip install 'dropserve[otel]'`), or unset the endpoint"
        ) from error
    return Tracing(endpoint)
