"""Memory that a burst of large requests left behind, given back to the operating system."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

# How much has come or gone since the last time before it pays to look: it takes some milliseconds.
CHANGED_BYTES = 32 * 2**20
_STATM = Path("/proc/self/statm")


class Memory:
    """Of this process. The C library keeps what was freed, in case that it is asked for again: glibc does."""

    def __init__(self) -> None:
        self._trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._last = 0

    def give_back(self) -> None:
        """Give back what is not in use, where much has come or gone since the last time."""
        if self._trim is None or abs(resident_bytes() - self._last) < CHANGED_BYTES:
            return
        self._trim(0)
        self._last = resident_bytes()


def resident_bytes() -> int:
    """Of this process's memory, what lies in RAM."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
