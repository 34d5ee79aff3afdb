"""What has lasted too long, found by one timer for all.

A timer for each would cost more, and keep every request's memory until it has run out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# How often to look, in seconds, at most.
SWEEP_S = 1.0


class Overdue:
    """Calls back for whatever has begun and not ended within a limit. On one event loop."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        # How much later than the limit it may be found.
        self._sweep_s = min(SWEEP_S, limit_s)
        # The oldest first.
        self._open: dict[object, tuple[float, Callable[[], None]]] = {}
        self._is_planned = False

    def begin(self, who: object, act: Callable[[], None]) -> None:
        """act: what to do once the limit has passed, unless `end` comes first."""
        self._open[who] = time.monotonic(), act
        if not self._is_planned:
            self._plan()

    def __contains__(self, who: object) -> bool:
        return who in self._open

    def end(self, who: object) -> None:
        self._open.pop(who, None)

    def _plan(self) -> None:
        self._is_planned = True
        asyncio.get_running_loop().call_later(self._sweep_s, self._sweep)

    def _sweep(self) -> None:
        self._is_planned = False
        latest = time.monotonic() - self.limit_s
        late = []
        for who, (begun, act) in self._open.items():
            if begun > latest:
                break
            late.append((who, act))
        for who, act in late:
            self.end(who)
            act()
        if self._open:
            self._plan()
