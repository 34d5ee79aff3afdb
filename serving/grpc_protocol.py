"""gRPC over HTTP/2 on the worker's event loop: what the gRPC port's speed comes from.

grpcio's own server hands calls to the event loop one by one, from a thread of its own, so that no two of them are ever
there to share a batch. Here a call is bytes of a connection like any other: all that came in one turn of the loop are
one batch. Services are registered by the code that grpcio generates.
Source: gRPC's PROTOCOL-HTTP2.md; RFC 9113.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import string
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from socket import socket
from typing import Any, Protocol, cast
from urllib.parse import quote

import grpc
import structlog

from serving.http2 import Code, ConnectionFailed, Http2, encoded
from serving.overdue import Overdue

log = structlog.get_logger()

# Messages of a stream that wait for their turn, at most.
WAITING_MESSAGES = 100
# Bytes of a stream's answers that the client has not made room for, at most.
UNREAD_BYTES = 2**20
# The longest deadline that is kept, in seconds: a later one is none.
LONGEST_TIMEOUT_S = 86_400.0
# Of a refusal's words: more of them would not fit into the trailers that clients take.
LONGEST_DETAILS = 1000
BACKLOG = 1024

# Probes are answered when no other call has a place: an overload is no reason to be started anew.
_PROBE = b"/grpc.health.v1.Health/Check"
_PREFIX_BYTES = 5
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_CONTENT_TYPE = re.compile(rb"application/grpc(?:[+;].*)?")
# zlib's window sizes of the two formats.
_COMPRESSIONS = {b"gzip": 31, b"deflate": 15}
_READABLE = "".join(sorted(set(string.printable) - set(string.whitespace) - {"%"})) + " "
# Headers that are gRPC's own and no metadata of the caller's.
_OWN_HEADERS = frozenset((b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"))

_BEGINNING = encoded(
    [
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-accept-encoding", b"identity, deflate, gzip"),
    ]
)
_OK = encoded([(b"grpc-status", b"0")])

Metadata = Iterable[tuple[str, str]]
# What is told of a call that no handler was given: its headers, when it began (`perf_counter`), its status.
Refused = Callable[[Mapping[bytes, bytes], float, grpc.StatusCode], None]


class Handler(Protocol):
    """A method as grpcio's generated code registers it."""

    request_streaming: bool
    response_streaming: bool
    request_deserializer: Callable[[bytes], Any]
    response_serializer: Callable[[Any], bytes]
    unary_unary: Callable[[Any, Context], Any]
    unary_stream: Callable[[Any, Context], Any]
    stream_unary: Callable[[Any, Context], Any]
    stream_stream: Callable[[Any, Context], Any]


class _Ended(Exception):
    """A call ends with this status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Context:
    """What a handler knows of its call: what is used of `grpc.aio.ServicerContext`."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    def invocation_metadata(self) -> list[tuple[str, str]]:
        """What the caller says of itself and of its call; binary values are left out."""
        return [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._call.headers.items()
            if name not in _OWN_HEADERS and not name.startswith(b":") and not name.endswith(b"-bin")
        ]

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._call.trailing = encoded([(name.encode("latin-1"), value.encode("latin-1")) for name, value in metadata])

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        raise _Ended(code, details)

    async def write(self, message: Any) -> None:
        """One message of a stream, handed to the connection."""
        self._call.write(message)


class _Call:
    """One stream of a connection."""

    def __init__(self, connection: Connection, stream: int, headers: dict[bytes, bytes]) -> None:
        self.connection = connection
        self.stream = stream
        self.headers = headers
        self.begun = time.perf_counter()
        self.is_probe = headers.get(b":path") == _PROBE
        self.trailing = b""
        self.method: Handler | None = None
        self.task: asyncio.Task[None] | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.has_begun = False
        # The answer's bytes that flow control has not let through, and the trailers that follow.
        self.outgoing = b""
        self.trailers: bytes | None = None
        self._received = bytearray()
        self._messages: list[bytes] = []
        # Where the request is a stream: the same messages as they come, and None at their end.
        self._stream: asyncio.Queue[bytes | None] | None = None

    def start(self, method: Handler) -> None:
        self.method = method
        if method.request_streaming:
            self._stream = asyncio.Queue(WAITING_MESSAGES + 1)

    def receive(self, data: memoryview, max_bytes: int) -> None:
        """Raises _Ended for a message that is too long, or not to be had as it is compressed."""
        waiting = self._received
        whole: memoryview | bytearray = data
        if waiting:
            waiting += data
            whole = waiting
        start = 0
        while len(whole) - start >= _PREFIX_BYTES:
            body = start + _PREFIX_BYTES
            length = int.from_bytes(whole[start + 1 : body], "big")
            if length > max_bytes:
                raise _too_long(length, max_bytes)
            if len(whole) < body + length:
                break
            with memoryview(whole) as view:
                message = bytes(view[body : body + length])
            if whole[start]:
                message = _decompressed(message, self.headers.get(b"grpc-encoding", b"identity"), max_bytes)
            start = body + length
            self._take(message)
        if whole is waiting:
            del waiting[:start]
        else:
            waiting += whole[start:]

    def _take(self, message: bytes) -> None:
        if self._stream is None:
            if self._messages:
                raise _Ended(grpc.StatusCode.INTERNAL, "a second message, wanted one")
            self._messages.append(message)
        elif self._stream.qsize() < WAITING_MESSAGES:
            self._stream.put_nowait(message)
        else:
            raise _Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {WAITING_MESSAGES} messages wait")

    def complete(self) -> None:
        """The caller has said all; raises _Ended where that is less or more than it should be."""
        if self._received:
            raise _Ended(grpc.StatusCode.INTERNAL, f"the last message ends after {len(self._received)} bytes")
        if self._stream is not None:
            self._stream.put_nowait(None)
        elif not self._messages:
            raise _Ended(grpc.StatusCode.INTERNAL, "no message, wanted one")

    async def run(self) -> None:
        """The handler's work, and its end."""
        method = self.method
        assert method is not None
        context = Context(self)
        try:
            if self._stream is not None:
                given: Any = self._requests(method, self._stream)
                handle = method.stream_stream if method.response_streaming else method.stream_unary
            else:
                given = method.request_deserializer(self._messages.pop())
                handle = method.unary_stream if method.response_streaming else method.unary_unary
            if not method.response_streaming:
                answer = method.response_serializer(await handle(given, context))
                self.connection.finish(self, grpc.StatusCode.OK, "", _message(answer))
                return
            answers = handle(given, context)
            if isinstance(answers, AsyncIterator):
                async for answer in answers:
                    self.write(answer)
            else:
                await answers
            self.connection.finish(self, grpc.StatusCode.OK, "")
        except _Ended as end:
            self.connection.finish(self, end.code, end.details)
        except asyncio.CancelledError:
            self.connection.finish(self, grpc.StatusCode.CANCELLED, "")
            raise
        except Exception as error:  # a defect of ours
            log.error("unexpected error", exc_info=error)
            self.connection.finish(self, grpc.StatusCode.UNKNOWN, "unexpected error; the cause is in the server's log")

    def write(self, message: Any) -> None:
        assert self.method is not None
        self.connection.write(self, _message(self.method.response_serializer(message)))

    async def _requests(self, method: Handler, stream: asyncio.Queue[bytes | None]) -> AsyncIterator[Any]:
        while (message := await stream.get()) is not None:
            yield method.request_deserializer(message)


class Connection(asyncio.Protocol):
    """One client's connection, with all its calls."""

    _transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self._server = server
        self._calls: dict[int, _Call] = {}
        self._http = Http2(self)
        self._is_reading = False

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)
        self._server.slow.begin(self, self._transport.close)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._is_reading = True
        is_broken = False
        try:
            self._http.receive(data)
        except ConnectionFailed:
            is_broken = True
        finally:
            self._is_reading = False
        self._flush()
        if is_broken:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.slow.end(self)
        for call in list(self._calls.values()):
            self._give_up(call)

    def pause_writing(self) -> None:
        # Whoever does not read its answers gets no more of them.
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    # What a call's handler calls.

    def write(self, call: _Call, message: bytes) -> None:
        """More of an answer."""
        if call.stream not in self._calls:
            return
        call.outgoing += message
        self._pump(call)
        if len(call.outgoing) > UNREAD_BYTES and call.trailers is None:
            self._reset(call)
        self._flush()

    def finish(self, call: _Call, code: grpc.StatusCode, details: str, message: bytes = b"") -> None:
        """The rest of an answer, with its status: for one that has ended, nothing happens."""
        if call.stream not in self._calls or call.trailers is not None:
            return
        call.trailers = (_OK if code is grpc.StatusCode.OK else _status(code, details)) + call.trailing
        call.outgoing += message
        self._pump(call)
        self._flush()

    # What the server calls.

    def stop(self) -> None:
        """Take no more calls, and close when the last one has ended. Streams, which may last for ever, end at once."""
        self._http.leave()
        self._flush()
        for call in list(self._calls.values()):
            if call.method is not None and call.method.response_streaming:
                self._end_early(call, grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        self._close_if_done()

    def cut(self) -> None:
        """Close, whatever is running."""
        for call in list(self._calls.values()):
            self._end_early(call, grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        self._transport.close()

    # What the client does: Http2's handler.

    def begin(self, stream: int, headers: dict[bytes, bytes]) -> None:
        server = self._server
        server.slow.end(self)
        is_post = headers.get(b":method") == b"POST"
        if not is_post or _CONTENT_TYPE.fullmatch(headers.get(b"content-type", b"")) is None:
            self._http.send_headers(stream, encoded([(b":status", b"415" if is_post else b"405")]), is_end=True)
            return
        call = _Call(self, stream, headers)
        self._calls[stream] = call
        server.open_calls += 1
        server.open_probes += call.is_probe
        try:
            method = server.method(headers.get(b":path", b""))
            timeout_s = _timeout_s(headers.get(b"grpc-timeout"))
        except _Ended as end:
            self._end_early(call, end.code, end.details)
            return
        if timeout_s is not None:
            call.deadline = server.loop.call_later(timeout_s, self._expire, call)
        call.start(method)
        if method.request_streaming:
            self._run(call)
        else:
            server.slow.begin(call, lambda: self._expire_slow(call))

    def data(self, stream: int, content: memoryview) -> None:
        call = self._calls.get(stream)
        if call is None or call.trailers is not None:
            return
        try:
            call.receive(content, self._server.max_message_bytes)
        except _Ended as end:
            self._end_early(call, end.code, end.details)

    def end(self, stream: int) -> None:
        call = self._calls.get(stream)
        if call is None or call.trailers is not None:
            return
        self._server.slow.end(call)
        try:
            call.complete()
        except _Ended as end:
            self._end_early(call, end.code, end.details)
            return
        if call.task is None:
            self._run(call)

    def reset(self, stream: int) -> None:
        call = self._calls.get(stream)
        if call is not None:
            self._give_up(call)

    def room(self) -> None:
        for call in [call for call in self._calls.values() if call.outgoing]:
            self._pump(call)

    # A call's way.

    def _run(self, call: _Call) -> None:
        call.task = self._server.loop.create_task(call.run())

    def _expire(self, call: _Call) -> None:
        self._end_early(call, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _expire_slow(self, call: _Call) -> None:
        waited_s = self._server.patience_s
        self._end_early(call, grpc.StatusCode.DEADLINE_EXCEEDED, f"the request was not whole after {waited_s:g} s")

    def _end_early(self, call: _Call, code: grpc.StatusCode, details: str) -> None:
        """Answer before the handler does, which is cancelled, or never begins."""
        if call.task is None and call.trailers is None:
            self._server.refused(call.headers, call.begun, code)
        self.finish(call, code, details)
        if call.task is not None:
            call.task.cancel()

    def _reset(self, call: _Call) -> None:
        """The client does not read its answer."""
        self._http.send_reset(call.stream, Code.CANCEL)
        self._give_up(call)
        self._flush()

    def _give_up(self, call: _Call) -> None:
        """Nobody waits for it any more."""
        self._forget(call)
        if call.task is not None:
            call.task.cancel()

    def _pump(self, call: _Call) -> None:
        """Send as much of an answer as the client's windows allow."""
        http, stream = self._http, call.stream
        if not call.has_begun:
            call.has_begun = True
            if call.trailers is not None and not call.outgoing:
                self._forget(call)
                http.send_headers(stream, _BEGINNING + call.trailers, is_end=True)
                return
            http.send_headers(stream, _BEGINNING)
        slow = self._server.slow
        sent = http.send_data(stream, call.outgoing)
        call.outgoing = call.outgoing[sent:]
        if call.outgoing:
            # It holds its place until the client has read the rest, which it has some time for: from when it last read
            # something of it, whatever else it has said.
            if sent or call not in slow:
                slow.end(call)
                slow.begin(call, lambda: self._reset(call))
        elif call.trailers is not None:
            self._forget(call)
            http.send_headers(stream, call.trailers, is_end=True)
        else:
            slow.end(call)

    def _forget(self, call: _Call) -> None:
        server = self._server
        if self._calls.pop(call.stream, None) is None:
            return
        server.open_calls -= 1
        server.open_probes -= call.is_probe
        server.slow.end(call)
        if call.deadline is not None:
            call.deadline.cancel()
        if server.is_stopping:
            self._close_if_done()

    def _close_if_done(self) -> None:
        if not self._calls and not self._transport.is_closing():
            # What is being sent comes first.
            self._server.loop.call_soon(self._transport.close)

    def _flush(self) -> None:
        """Write what is to be sent: once for all that has been read, or at the end of a call."""
        if not self._is_reading:
            data = self._http.take()
            if data and not self._transport.is_closing():
                self._transport.write(data)


class Server:
    """Services on a socket; generated code registers them as with grpcio's server. On one event loop."""

    def __init__(
        self, max_message_bytes: int, max_calls: int, patience_s: float, refused: Refused = lambda *_: None
    ) -> None:
        """max_calls: how many may be open at one time, health checks apart, which are never refused and take no
        place. patience_s: how long a request may take to come. refused: is told of calls that no handler was given.
        """
        self.refused = refused
        self.max_message_bytes = max_message_bytes
        self.max_calls = max_calls
        self.open_calls = 0
        self.open_probes = 0
        self.connections: set[Connection] = set()
        self.is_stopping = False
        self.patience_s = patience_s
        self.slow = Overdue(patience_s)
        self.loop: asyncio.AbstractEventLoop
        self._methods: dict[bytes, Handler] = {}
        self._listening: asyncio.Server | None = None

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """A service's methods by name."""
        for name, handler in handlers.items():
            self._methods[f"/{service}/{name}".encode()] = handler

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """Nothing: generated code gives the same methods to `add_registered_method_handlers`."""

    def method(self, path: bytes) -> Handler:
        """The method that a new call is for; raises _Ended where it cannot be called."""
        if self.is_stopping:
            raise _Ended(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        if self.open_calls - self.open_probes > self.max_calls and path != _PROBE:
            raise _Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {self.max_calls} calls are open")
        method = self._methods.get(path)
        if method is None:
            raise _Ended(grpc.StatusCode.UNIMPLEMENTED, f"no method {path.decode('latin-1')}")
        return method

    async def start(self, listener: socket, tls: ssl.SSLContext | None) -> None:
        """Listen on a bound socket. tls: with `h2` among its protocols."""
        self.loop = asyncio.get_running_loop()
        self._listening = await self.loop.create_server(
            lambda: Connection(self), sock=listener, ssl=tls, backlog=BACKLOG
        )

    async def stop(self, grace_s: float) -> None:
        """Listen no more, and give the calls that are running this long."""
        self.is_stopping = True
        if self._listening is not None:
            self._listening.close()
        for connection in list(self.connections):
            connection.stop()
        ends = self.loop.time() + grace_s
        while self.open_calls and self.loop.time() < ends:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.cut()


def _message(content: bytes) -> bytes:
    return b"\0" + len(content).to_bytes(4, "big") + content


def _status(code: grpc.StatusCode, details: str) -> bytes:
    number = str(code.value[0]).encode()
    if len(details) > LONGEST_DETAILS:
        details = details[:LONGEST_DETAILS] + "..."
    return encoded([(b"grpc-status", number), (b"grpc-message", quote(details, safe=_READABLE).encode())])


def _timeout_s(header: bytes | None) -> float | None:
    if header is None:
        return None
    found = _TIMEOUT.fullmatch(header)
    if found is None:
        raise _Ended(grpc.StatusCode.INVALID_ARGUMENT, f"grpc-timeout: {header!r}, wanted digits and a unit")
    return min(int(found[1]) * _UNITS[found[2]], LONGEST_TIMEOUT_S)


def _decompressed(message: bytes, encoding: bytes, max_bytes: int) -> bytes:
    window = _COMPRESSIONS.get(encoding)
    if window is None:
        raise _Ended(
            grpc.StatusCode.UNIMPLEMENTED, f"grpc-encoding: {encoding!r}, wanted gzip or deflate for what is compressed"
        )
    machine = zlib.decompressobj(window)
    try:
        content = machine.decompress(message, max_bytes + 1)
    except zlib.error as error:
        raise _Ended(grpc.StatusCode.INTERNAL, f"the message cannot be decompressed: {error}") from None
    if len(content) > max_bytes:
        raise _too_long(len(content), max_bytes)
    if not machine.eof:
        raise _Ended(grpc.StatusCode.INTERNAL, "the message cannot be decompressed: it ends too early")
    return content


def _too_long(found: int, max_bytes: int) -> _Ended:
    return _Ended(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max ({found} vs. {max_bytes} bytes)"
    )
