"""The HTTP routes on a port of their own: plain uvicorn on the worker's event loop, beside BentoML's port.

Same routes, same core, same limits. Nothing of BentoML stands in front, and BentoML's own paths are not here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import structlog
import uvicorn

from serving.app import App
from serving.direct import DirectProtocol
from serving.listener import listen
from serving.tls import Tls

log = structlog.get_logger()

# Longer than clients and load balancers keep an idle connection: they should be the ones to close it.
KEEP_ALIVE_S = 75
START_POLL_S = 0.01


class RestPort:
    """All methods are called on the worker's event loop."""

    def __init__(self, app: App, host: str, port: int, tls: Tls | None = None, is_shared: bool = False) -> None:
        """is_shared: whether other workers listen there too. Raises StartError where the port is taken."""
        self._place = f"{host}:{port}"
        self._socket = listen(host, port, "REST", is_shared)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=cast(Any, partial(DirectProtocol, app.direct())),
                # An upgrade to WebSocket is a request like any other.
                ws="none",
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
