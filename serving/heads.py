"""uvicorn's connections, with a limit that it has not: how long the head of a request may take.

uvicorn waits for ever for the rest of a head, and whoever opens connections and sends next to nothing has its sockets.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serving.errors import HeadTimeout
from serving.overdue import Overdue
from serving.web import error_response


class _Timed(asyncio.Protocol):
    """Before one of uvicorn's protocols among a class's bases."""

    # uvicorn's own: the latest request whose head is whole, None before the first one.
    cycle: Any
    transport: asyncio.Transport

    def __init__(
        self,
        heads: Overdue,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)  # type: ignore[call-arg]
        self._heads = heads

    def connection_lost(self, error: Exception | None) -> None:
        self._heads.end(self)
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._awaits_head() and self not in self._heads:
            self._heads.begin(self, self._close)
        super().data_received(data)
        if not self._awaits_head():
            self._heads.end(self)

    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close(self) -> None:
        if self.transport.is_closing():
            return
        response = error_response(HeadTimeout(self._heads.limit_s))
        head = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (response.content_type.encode(), len(response.body)) + response.body)
        self.transport.close()


class TimedHttpTools(_Timed, HttpToolsProtocol):
    pass


class TimedH11(_Timed, H11Protocol):
    pass
