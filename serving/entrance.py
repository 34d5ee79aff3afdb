"""How many requests are inside at one time, how long their heads and bodies may take, and which of them take long."""

from __future__ import annotations

import asyncio

from serving.errors import QueueFull
from serving.overdue import Overdue
from serving.settings import Settings

# Work that takes longer, in seconds, is given up when its client goes away: the connection is watched from then on.
LONG_WORK_S = 0.02


class Entrance:
    def __init__(self, settings: Settings) -> None:
        self.max_body_bytes = settings.max_body_bytes
        self.body_timeout_s = settings.body_timeout_s
        self.bodies = Overdue(settings.body_timeout_s)
        self.heads = Overdue(settings.body_timeout_s)
        self.work = Overdue(LONG_WORK_S)
        self._places = settings.max_concurrency
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
