"""Logs: one JSON object a line on standard output, for a terminal in colour. Never a payload."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import orjson
import structlog

# How long lines of the access log wait for others, in seconds, and how many bytes of them: a write for each would cost
# as much as a prediction, and so would more lines, in memory that is not in a cache.
GATHER_S = 0.05
GATHER_BYTES = 2**14


def configure() -> None:
    """Called once, by the process that serves."""
    if sys.stdout.isatty():
        return
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_dump),
        ]
    )


class AccessLog:
    """One line for each request, written some together. On one event loop."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._bytes = 0
        self._planned: asyncio.TimerHandle | None = None
        self._second = -1
        self._prefix = ""

    def write(self, event: dict[str, Any]) -> None:
        """Values are short strings and numbers; `timestamp` is added."""
        event["timestamp"] = self._timestamp(time.time())
        line = orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes > GATHER_BYTES:
            self.flush()
        elif self._planned is None:
            self._planned = asyncio.get_running_loop().call_later(GATHER_S, self.flush)

    def flush(self) -> None:
        if self._planned is not None:
            self._planned.cancel()
            self._planned = None
        content = b"".join(self._lines)
        self._lines.clear()
        self._bytes = 0
        if content:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()

    def _timestamp(self, now: float) -> str:
        """As structlog's; the part down to the second is kept for the next one."""
        second = int(now)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._prefix}{int((now - second) * 1e6):06d}Z"


def _dump(event: Any, default: Any = None, **_: Any) -> str:
    return orjson.dumps(event, default=default or str).decode()
