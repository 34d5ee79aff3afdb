"""The HTTP routes on a port of their own: plain uvicorn on the worker's event loop, beside BentoML's port.

Same routes, same core, same limits. Nothing of BentoML stands in front, and BentoML's own paths are not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Literal

import structlog
import uvicorn
from starlette.types import ASGIApp

from serving.errors import StartError
from serving.tls import Tls

log = structlog.get_logger()

# Longer than clients and load balancers keep an idle connection: they should be the ones to close it.
KEEP_ALIVE_S = 75
START_POLL_S = 0.01


class RestPort:
    """All methods are called on the worker's event loop."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: Tls | None = None, is_shared: bool = False) -> None:
        """is_shared: whether other workers listen there too. Raises StartError where the port is taken."""
        self._place = f"{host}:{port}"
        self._socket = listen(host, port, "REST", is_shared)
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                **({} if tls is None else tls.uvicorn()),
            )
        )
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._running = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._running.done():
            await asyncio.sleep(START_POLL_S)
        log.info("REST", address=self._place)

    async def stop(self) -> None:
        """Listen no more, and wait for the requests that are being answered."""
        self._server.should_exit = True
        if self._running is not None:
            await self._running


class _Server(uvicorn.Server):
    """A server that leaves the process's signals to BentoML's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int, protocol: Literal["REST", "gRPC"], is_shared: bool = False) -> socket.socket:
    """A socket on this place; raises StartError where it is taken."""
    try:
        family, kind, number, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(place)
    except UnicodeError as error:
        raise StartError(f"DROPSERVE_HOST={host!r} is no host name ({error})") from error
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} for {protocol} ({error.strerror}); "
            f"choose another DROPSERVE_{protocol.upper()}_PORT, or 0 for none"
        ) from error
    return listener
