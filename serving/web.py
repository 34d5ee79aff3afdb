"""HTTP on plain ASGI: reading a request, sending an answer, and the one place where errors become status codes.

A request to the model costs tens of microseconds; a framework's request and response objects would double it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any, TypeVar

import orjson
import structlog
from starlette.types import Receive, Scope, Send

from serving import errors
from serving.entrance import Entrance
from serving.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientGone,
    InvalidField,
    InvalidRequest,
    ModelFailed,
    ServingError,
    UnsupportedContentEncoding,
    UnsupportedContentType,
    quote,
)
from serving.observer import Exchange

log = structlog.get_logger()

JSON_TYPE = "application/json"

STATUS: dict[type[ServingError], int] = {
    errors.InvalidRequest: 400,
    errors.Unauthenticated: 401,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.HeadTimeout: 408,
    errors.BodyTimeout: 408,
    errors.BodyTooLarge: 413,
    errors.UnsupportedContentType: 415,
    errors.UnsupportedContentEncoding: 415,
    errors.QueueFull: 429,
    errors.HeadTooLarge: 431,
    errors.ClientGone: 499,
    errors.ModelFailed: 500,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
}

Header = tuple[bytes, bytes]

# The status of a request whose client went away, for logs: nobody reads it.
GONE = "499"
# Of a body's length that are read: Python reads no more than 4,300 of them.
LENGTH_DIGITS = 19

Outcome = TypeVar("Outcome")

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}

# For a browser that is led here: answers are not pages, and nobody frames them or keeps them.
_SECURITY: tuple[Header, ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class Response:
    """Status, headers and a whole body."""

    __slots__ = ("body", "content_type", "headers", "security", "status")

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        content_type: str = JSON_TYPE,
        headers: Iterable[Header] = (),
        security: Iterable[Header] | None = None,
    ) -> None:
        """security: headers for browsers, where the usual ones do not fit."""
        self.security = security
        self.body = body
        self.status = status
        self.content_type = content_type
        self.headers = headers

    def all_headers(self, exchange: Exchange) -> list[Header]:
        """Those of the answer, and the names under which its request is known."""
        headers = [
            (b"content-type", self.content_type.encode()),
            (b"content-length", b"%d" % len(self.body)),
            *(_SECURITY if self.security is None else self.security),
            *self.headers,
            (b"x-request-id", exchange.request_id.encode()),
        ]
        if exchange.traceparent is not None:
            headers.append((b"traceparent", exchange.traceparent.encode()))
        return headers

    def encoded(self, exchange: Exchange, before: Iterable[Header], closes: bool) -> bytes:
        """As HTTP/1.1, for who writes to a connection. before: headers that come first. closes: and tells so."""
        parts = [_STATUS_LINES[self.status]]
        for name, value in (*before, *self.all_headers(exchange)):
            parts += (name, b": ", value, b"\r\n")
        if closes:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", self.body)
        return b"".join(parts)

    async def send(self, send: Send, exchange: Exchange, with_body: bool = True) -> None:
        headers = self.all_headers(exchange)
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body if with_body else b""})


def json_response(content: Any, status: int = 200, headers: Iterable[Header] = ()) -> Response:
    """Any JSON content; NumPy scalars and contiguous arrays are written as numbers."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, JSON_TYPE, headers)


def error_response(error: Exception) -> Response:
    """`{"error": "...", "details": ...}` with the status of the error's class; an unknown error is a 500."""
    if not isinstance(error, ServingError):
        log.error("unexpected error", exc_info=error)
        return json_response({"error": "unexpected error; the cause is in the server's log"}, 500)
    if isinstance(error, ModelFailed):
        log.error("model failed", cause=error.cause)
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    content: dict[str, Any] = {"error": str(error)}
    details = error.details()
    if details is not None:
        content["details"] = details
    headers: list[Header] = []
    if isinstance(error, errors.QueueFull | errors.Unavailable):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if isinstance(error, errors.Unauthenticated):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, UnsupportedContentEncoding):
        # RFC 9110, 15.5.16.
        headers.append((b"accept-encoding", b"identity"))
    if isinstance(error, errors.BodyTimeout):
        headers.append((b"connection", b"close"))
    if isinstance(error, errors.MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    return json_response(content, status, headers)


class Request:
    """One HTTP request."""

    __slots__ = ("_entrance", "_receive", "exchange", "headers", "method", "path", "scope")

    def __init__(self, scope: Scope, receive: Receive, entrance: Entrance) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.exchange: Exchange
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._entrance = entrance
        self._receive = receive

    def header(self, name: bytes) -> str | None:
        """The header of this (lower-case) name; the last one, where there are several."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def require_host(self) -> None:
        """Raise InvalidRequest unless it says once for which host it is, as HTTP/1.1 has it. Source: RFC 9112, 3.2."""
        found = sum(name == b"host" for name, _ in self.scope["headers"])
        if found > 1 or (found == 0 and self.scope["http_version"] == "1.1"):
            raise InvalidRequest(f"found {found or 'no'} Host headers, wanted one")

    async def body(self) -> bytes:
        """The whole body.

        Raises UnsupportedContentEncoding where it is compressed, BodyTooLarge where it says that it is over the limit
        or once it is, BodyTimeout where it takes too long, ClientGone on a broken connection.
        """
        encoding = self.header(b"content-encoding") or ""
        if encoding.lower() not in ("", "identity"):
            raise UnsupportedContentEncoding(encoding)
        declared = self.header(b"content-length") or ""
        if declared.isdecimal() and int(declared[:LENGTH_DIGITS]) > self._entrance.max_body_bytes:
            raise BodyTooLarge(self._entrance.max_body_bytes)
        reading = _Reading(asyncio.current_task(self._entrance.loop))
        self._entrance.bodies.begin(reading, reading.give_up)
        try:
            body = await self._body(self._entrance.max_body_bytes)
        except asyncio.CancelledError:
            if reading.is_late and reading.task is not None and reading.task.uncancel() == 0:
                raise BodyTimeout(self._entrance.body_timeout_s) from None
            raise
        finally:
            self._entrance.bodies.end(reading)
        if not body and b"upgrade" in self.headers and self.header(b"content-length") not in (None, "0"):
            raise InvalidRequest(
                "the body of a request that asks for another protocol (upgrade) is lost on this port: send it as "
                "HTTP/1.1 and nothing else, or to the REST port"
            )
        return body

    async def _body(self, limit: int) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            parts, size = [body], len(body)
            while message.get("more_body", False):
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise BodyTooLarge(limit)
            body = b"".join(parts)
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body

    def require_json(self) -> None:
        """Raise UnsupportedContentType unless the body is said to be JSON, or nothing is said of it."""
        found = self.header(b"content-type")
        if found is None or found == JSON_TYPE:
            return
        kind = found.partition(";")[0].strip().lower()
        if kind != JSON_TYPE and not kind.endswith("+json"):
            raise UnsupportedContentType(found, JSON_TYPE)

    async def outcome(self, work: Awaitable[Outcome]) -> Outcome:
        """The result of work; where it is long and the client goes away first, it is given up and ClientGone raised.

        The work runs in this task: short work, the usual, costs no second task.
        """
        task = asyncio.current_task(self._entrance.loop)
        if task is None:
            raise RuntimeError("a request is answered in a task")
        watch = _Watch(self._receive, task)
        self._entrance.work.begin(watch, watch.begin)
        try:
            return await work
        except asyncio.CancelledError:
            if watch.is_gone and task.uncancel() == 0:
                raise ClientGone from None
            raise
        finally:
            self._entrance.work.end(watch)
            watch.end()


class _Reading:
    """A body that is being read by a task, which is cancelled when it takes too long."""

    __slots__ = ("is_late", "task")

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self.task = task
        self.is_late = False

    def give_up(self) -> None:
        self.is_late = True
        if self.task is not None:
            self.task.cancel()


class _Watch:
    """Cancels a request's task when its client closes the connection. Only after the whole body has been read."""

    __slots__ = ("_receive", "_task", "_watching", "is_gone")

    def __init__(self, receive: Receive, task: asyncio.Task[Any]) -> None:
        self._receive = receive
        self._task = task
        self._watching: asyncio.Task[None] | None = None
        self.is_gone = False

    def begin(self) -> None:
        self._watching = asyncio.ensure_future(self._until_gone())

    def end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        self._task.cancel()


Handler = Callable[[Request], Awaitable[Response]]


def read_json(body: bytes) -> Any:
    """The body as JSON; raises InvalidRequest.

    NaN, Infinity and numbers too large for a double are no JSON, but they are read here, so that the refusal can say
    in which row and feature they stand.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error)
    if not body:
        raise InvalidRequest("the body is empty, wanted a JSON object")
    try:
        # ValueError: not JSON for this reader either, not UTF-8, or an integer of thousands of digits.
        content = json.loads(body.decode("utf-8"))
        # This reader takes half of a surrogate pair for text, which no answer could quote.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
        return content
    except (ValueError, RecursionError):
        raise InvalidRequest(f"the body is not JSON: {reason}") from None


def read_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; raises InvalidRequest."""
    content = read_json(body)
    if type(content) is not dict:
        raise InvalidField("the body", quote(content), "a JSON object")
    return content
