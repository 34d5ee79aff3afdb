"""uvicorn's connections, with limits that it has not: how long the head of a request may take, and be.

uvicorn waits for ever for the rest of a head, and keeps all of it: whoever opens connections and sends next to nothing
has its sockets, and whoever never ends a head its memory. What is refused here is counted and logged as all else is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serving.errors import HeadTimeout, HeadTooLarge, InvalidRequest, ServingError
from serving.observer import Observer
from serving.overdue import Overdue
from serving.web import error_response

# The longest head, in bytes, after those that came with its beginning.
HEAD_BYTES = 2**16
# How long an answer is still meant for a client that has closed its side of the connection, in seconds. It may wait for
# the answer; most have gone, and what is longer is not drawn for nobody.
HALF_CLOSED_S = 1.0


def closing_soon(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> asyncio.TimerHandle | None:
    """Of a client that has closed its side: what closes ours in a while. None where both sides are closed together."""
    # As the event loop does with TLS.
    is_tls = transport.get_extra_info("sslcontext") is not None
    return None if is_tls else loop.call_later(HALF_CLOSED_S, transport.close)


class _Timed(asyncio.Protocol):
    """Before one of uvicorn's protocols among a class's bases."""

    # uvicorn's own: the latest request whose head is whole, None before the first one.
    cycle: Any
    server_state: ServerState
    timeout_keep_alive: int
    timeout_keep_alive_handler: Callable[[], None]
    timeout_keep_alive_task: asyncio.TimerHandle | None
    transport: asyncio.Transport

    def __init__(
        self,
        heads: Overdue,
        observer: Observer,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)  # type: ignore[call-arg]
        self._loop = loop
        self._heads = heads
        self._observer = observer
        self._head_begun = time.perf_counter()
        # Set once the client has closed its side: when ours is closed at the latest.
        self._half_closed: asyncio.TimerHandle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        self._heads.end(self)
        if self._half_closed is not None:
            self._half_closed.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        was_over = self._reads_over()
        if self._awaits_head() and self not in self._heads:
            self._heads.begin(self, lambda: self._refuse(HeadTimeout(self._heads.limit_s)))
            self._head_begun = time.perf_counter()
        super().data_received(data)
        if not self._awaits_head():
            self._heads.end(self)
        elif was_over and not self._reads_over() and not self.transport.is_closing():
            # At rest again, as after any answer. uvicorn's own timer has ended with the rest's first bytes.
            self._heads.end(self)
            self.timeout_keep_alive_task = self._loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def eof_received(self) -> bool:
        """The client sends no more. Whether the connection stays open, for what is still to be answered."""
        is_asked = not self._awaits_head() and not self.cycle.more_body
        if is_asked and self._half_closed is None:
            self._half_closed = closing_soon(self.transport, self._loop)
        return is_asked and self._half_closed is not None

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if self._half_closed is not None and self._awaits_head():
            self.transport.close()

    def send_400_response(self, _: str) -> None:
        """uvicorn's, for what its parser cannot read."""
        self._refuse(InvalidRequest("this is no HTTP request as RFC 9112 has it"))

    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _reads_over(self) -> bool:
        """Whether what comes is the rest of a request that was answered before it was whole."""
        raise NotImplementedError

    def _refuse(self, error: ServingError) -> None:
        if self.transport.is_closing():
            return
        if self._reads_over():
            # It has its answer.
            self.transport.close()
            return
        exchange = self._observer.begin("none", "", "", None, None)
        exchange.started = self._head_begun
        response = error_response(error)
        self.transport.write(response.encoded(exchange, self.server_state.default_headers, closes=True))
        self.transport.close()
        self._observer.end(exchange, str(response.status), is_error=True)


class TimedHttpTools(_Timed, HttpToolsProtocol):  # type: ignore[misc]  # uvicorn keeps no half of a connection
    _is_in_head = False
    _is_in_body = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if was_in_head and self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(HeadTooLarge(HEAD_BYTES))

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # What follows a body's chunks nobody reads.
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._is_in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body = False
        super().on_message_complete()

    def _reads_over(self) -> bool:
        return self._is_in_body and self._awaits_head()


class TimedH11(_Timed, H11Protocol):  # type: ignore[misc]  # likewise
    """h11 has a limit of its own for heads."""

    # uvicorn's own.
    conn: h11.Connection

    def _reads_over(self) -> bool:
        # Until the rest is there: then both sides begin anew.
        return self.conn.our_state is h11.DONE
