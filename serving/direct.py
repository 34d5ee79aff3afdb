"""Plain requests for an answer of the model, without ASGI in between: what the bare port's speed comes from.

uvicorn makes a scope, a task, an event and two messages of every request, which takes longer than a small network.
Here a request is a callback: bytes in, rows queued; answer there, bytes out. That is done for whole HTTP/1.1 requests
of a few targets and for nothing else: at the first request of another kind the connection is handed over to uvicorn,
with all the bytes that it has sent, and is uvicorn's from then on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import httptools
import uvicorn
from uvicorn.server import ServerState

from serving.core import Pending
from serving.entrance import Entrance
from serving.errors import BodyTooLarge
from serving.heads import TimedH11, TimedHttpTools, closing_soon
from serving.observer import Exchange, Observer
from serving.web import GONE, JSON_TYPE, LENGTH_DIGITS, Response, error_response, json_response, read_object

# The longest request that is answered here, in bytes: of a longer one the network takes most of the time anyway.
LONGEST = 2**16
# How long the rest of a request is waited for before uvicorn, where it has limits, is given what there is, in seconds.
PATIENCE_S = 0.05
# Heads of requests that are kept, as clients send the same one over and over, and the longest of them, in bytes.
KEPT_HEADS = 256
LONGEST_KEPT_HEAD = 2**11

_HEAD_END = b"\r\n\r\n"
# What a request may say of itself besides what is looked at; with anything else it is uvicorn's.
_HOST, _LENGTH, _TYPE, _CONNECTION = b"host", b"content-length", b"content-type", b"connection"
_REQUEST_ID, _TRACE = b"x-request-id", b"traceparent"
_OTHERS = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"))
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)

Handler = Callable[[dict[str, Any], bytes, Exchange], Pending[dict[str, Any]]]


class Head(NamedTuple):
    """What stands before a body."""

    path: str
    length: int
    request_id: str | None
    traceparent: str | None


class Direct:
    """What is answered here, for all connections of a port."""

    def __init__(self, handlers: Mapping[str, tuple[str, Handler]], observer: Observer, entrance: Entrance) -> None:
        """handlers: by path, with the operation's name; each one is asked by POST with a JSON object."""
        self.handlers = handlers
        self.observer = observer
        self.entrance = entrance
        self.beginnings = tuple(f"POST {path} HTTP/1.1\r\n".encode() for path in handlers)
        self._heads: dict[bytes, Head] = {}

    def head(self, content: bytes) -> Head | None:
        """A head, with its empty line, which starts with one of the beginnings; None where it is uvicorn's."""
        found = self._heads.get(content)
        if found is None:
            found = _HeadReader().read(content)
            if found is not None and found.request_id is None and found.traceparent is None:
                if len(self._heads) >= KEPT_HEADS:
                    self._heads.clear()
                if len(content) <= LONGEST_KEPT_HEAD:
                    self._heads[content] = found
        return found


class _HeadReader:
    """Reads one head by httptools, which calls the methods."""

    def __init__(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._is_plain = True
        self._is_complete = False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        # Of a header that is there twice somebody else may decide.
        self._is_plain &= name not in _OTHERS and name not in self._headers
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        self._is_complete = True

    def read(self, content: bytes) -> Head | None:
        try:
            httptools.HttpRequestParser(self).feed_data(content)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return None
        headers = self._headers
        length = headers.get(_LENGTH, b"")
        if not (self._is_complete and self._is_plain and length.isdigit() and len(length) <= LENGTH_DIGITS):
            return None
        if _HOST not in headers:
            # Refused, but not here.
            return None
        if headers.get(_CONNECTION, b"keep-alive").lower() != b"keep-alive":
            return None
        if headers.get(_TYPE, JSON_TYPE.encode()) != JSON_TYPE.encode():
            return None
        request_id, trace = headers.get(_REQUEST_ID), headers.get(_TRACE)
        return Head(
            self._url.decode("ascii"),
            int(length),
            None if request_id is None else request_id.decode("latin-1"),
            None if trace is None else trace.decode("latin-1"),
        )


class DirectProtocol(asyncio.Protocol):
    """One connection, one request after the other; uvicorn makes it and ends it as one of its own."""

    _transport: asyncio.Transport

    def __init__(
        self,
        direct: Direct,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._direct = direct
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        # Bytes of requests whose turn has not come, or that are not whole.
        self._held = b""
        self._exchange: Exchange | None = None
        self._pending: Pending[dict[str, Any]] | None = None
        self._is_writable = True
        self._ends = False
        # Set once the client has closed its side: when ours is closed at the latest.
        self._half_closed: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None
        # One timer a connection, which looks how long it has been idle: one a request would cost more. Until the first
        # answer nothing may have come, which nobody keeps a connection open for.
        self._idle_since = self._loop.time()
        self._idle_limit_s = direct.entrance.body_timeout_s
        self._idle: asyncio.TimerHandle | None = None

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._idle = self._loop.call_later(self._idle_limit_s, self._close_if_idle)

    def connection_lost(self, error: Exception | None) -> None:
        self._let_go()
        self._ends = True
        if self._pending is not None:
            # Nobody waits for it: what has not begun never will.
            self._pending.future.cancel()

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
        if self._exchange is None and self._is_writable:
            self._read(data)
            return
        self._hold(data)

    def eof_received(self) -> bool:
        """The client sends no more. Whether the connection stays open, for what is still to be answered."""
        is_asked = self._exchange is not None or (bool(self._held) and self._patience is None)
        if is_asked and self._half_closed is None:
            self._half_closed = closing_soon(self._transport, self._loop)
        return is_asked and self._half_closed is not None

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._go_on()

    # What uvicorn calls.

    def shutdown(self) -> None:
        """The server ends: after the request that is being answered, if there is one."""
        self._ends = True
        if self._exchange is None:
            self._transport.close()

    # A request.

    def _read(self, data: bytes) -> None:
        """Answer the request that the bytes begin with, wait for its rest, or leave it to uvicorn."""
        end = data.find(_HEAD_END) + len(_HEAD_END)
        if end < len(_HEAD_END):
            self._wait(data)
            return
        content = data[:end]
        head = self._direct.head(content) if content.startswith(self._direct.beginnings) else None
        if head is None:
            self._hand_over(data)
            return
        stop = end + head.length
        if len(data) < stop:
            self._wait(data, stop)
            return
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        self._hold(data[stop:])
        self._begin(head, data[end:stop])

    def _hold(self, data: bytes) -> None:
        """Keep what comes after the request that is being answered; with enough of it there, the client waits."""
        self._held = data
        if len(data) > LONGEST:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _wait(self, data: bytes, wanted: int = 0) -> None:
        self._held = data
        if self._half_closed is not None:
            self._transport.close()
        elif max(len(data), wanted) > LONGEST:
            self._hand_over(data)
        elif self._patience is None:
            self._patience = self._loop.call_later(PATIENCE_S, self._hand_over_held)

    def _begin(self, head: Head, body: bytes) -> None:
        direct = self._direct
        operation, handler = direct.handlers[head.path]
        exchange = direct.observer.begin("native", operation, head.path, head.request_id, head.traceparent)
        try:
            direct.entrance.enter()
        except Exception as error:  # every error becomes an answer
            self._write(exchange, error_response(error))
            return
        try:
            if len(body) > direct.entrance.max_body_bytes:
                raise BodyTooLarge(direct.entrance.max_body_bytes)
            pending = handler(read_object(body), body, exchange)
        except Exception as error:  # likewise
            direct.entrance.leave()
            self._write(exchange, error_response(error))
            return
        self._exchange = exchange
        self._pending = pending
        pending.future.add_done_callback(self._finish)

    def _finish(self, future: asyncio.Future[Any]) -> None:
        """The model has answered, or refused."""
        exchange, pending = self._exchange, self._pending
        assert exchange is not None
        assert pending is not None
        self._exchange = self._pending = None
        self._direct.entrance.leave()
        if future.cancelled() or self._transport.is_closing():
            self._direct.observer.end(exchange, GONE, is_error=True)
            return
        try:
            response = json_response(pending.make(future.result()))
        except Exception as error:  # likewise
            response = error_response(error)
        self._write(exchange, response)

    def _write(self, exchange: Exchange, response: Response) -> None:
        self._state.total_requests += 1
        self._transport.write(response.encoded(exchange, self._state.default_headers, self._ends))
        self._direct.observer.end(exchange, str(response.status), is_error=response.status >= 400)
        if self._ends or (self._half_closed is not None and not self._held):
            self._transport.close()
            return
        self._idle_since = self._loop.time()
        self._idle_limit_s = self._config.timeout_keep_alive
        if self._held:
            # Not from here: many requests in a row would be as many calls inside of one another.
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Turn to what has come meanwhile."""
        if self._exchange is not None or not self._is_writable or not self._held:
            return
        if not self._ends and not self._transport.is_closing():
            self._read(self._held)

    # The connection.

    def _hand_over_held(self) -> None:
        self._hand_over(self._held)

    def _hand_over(self, data: bytes) -> None:
        """Leave the connection to uvicorn, as if the bytes had just come."""
        is_half_closed = self._half_closed is not None
        self._let_go()
        head, _, _ = data.partition(_HEAD_END)
        # Of a request that asks for another protocol, as Java's own client does for HTTP/2, httptools loses the body.
        kind = TimedH11 if _UPGRADE.search(head) is not None else TimedHttpTools
        direct = self._direct
        protocol = kind(direct.entrance.heads, direct.observer, self._config, self._state, self._app_state, self._loop)
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()
        protocol.connection_made(self._transport)
        protocol.data_received(data)
        if is_half_closed and not protocol.eof_received():
            self._transport.close()

    def _close_if_idle(self) -> None:
        idle_s = self._loop.time() - self._idle_since
        if self._exchange is not None or self._patience is not None or idle_s < self._idle_limit_s:
            self._idle = self._loop.call_later(max(self._idle_limit_s - idle_s, 1.0), self._close_if_idle)
        else:
            self._transport.close()

    def _let_go(self) -> None:
        self._state.connections.discard(self)
        for timer in (self._patience, self._idle, self._half_closed):
            if timer is not None:
                timer.cancel()
        self._patience = self._idle = self._half_closed = None
        self._held = b""
