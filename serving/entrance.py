"""How many requests are inside at one time, and how long their bodies may take."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from serving.errors import QueueFull
from serving.settings import Settings

# How often bodies that are being read are looked at, in seconds, at most.
SWEEP_S = 1.0


class Reader(Protocol):
    """A request whose body is being read."""

    is_late: bool


class Entrance:
    """One timer for all bodies: a timer for each would cost more, and keep every request's memory for as long."""

    def __init__(self, settings: Settings) -> None:
        self.max_body_bytes = settings.max_body_bytes
        self.body_timeout_s = settings.body_timeout_s
        self._places = settings.max_concurrency
        self._reading: dict[Reader, tuple[asyncio.Task[Any] | None, float]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of all requests. Asking asyncio for it is a system call, up to Python 3.11."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def enter(self) -> None:
        """Take a place, which `leave` gives back; raises QueueFull where none is left."""
        if self._places <= 0:
            raise QueueFull
        self._places -= 1

    def leave(self) -> None:
        self._places += 1

    def begin_reading(self, reader: Reader) -> None:
        """From now on the task is cancelled, and the reader told that it is late, when the time is over."""
        self._reading[reader] = asyncio.current_task(self.loop), time.monotonic()
        if self._sweeper is None:
            self._plan_sweep()

    def end_reading(self, reader: Reader) -> None:
        del self._reading[reader]

    def _plan_sweep(self) -> None:
        wait = min(SWEEP_S, self.body_timeout_s)
        self._sweeper = self.loop.call_later(wait, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        latest = time.monotonic() - self.body_timeout_s
        for reader, (task, begun) in self._reading.items():
            if begun < latest and task is not None and not reader.is_late:
                reader.is_late = True
                task.cancel()
        if self._reading:
            self._plan_sweep()
