"""Memory that the process does not need any more, given back to the operating system."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# How much has come or gone since the last time before it pays to look: it takes some milliseconds.
CHANGED_BYTES = 32 * 2**20
_STATM = Path("/proc/self/statm")
_MAPPINGS = Path("/proc/self/smaps")
# A mapping's first line: where it lies, its permissions, the file, if any.
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ \S+ *(.*)")
# Libraries stay mapped as long as the process lives. What another thread may unmap meanwhile is none of ours.
_LIBRARY = re.compile(r"\.so(\.|$)")


class Memory:
    """Of this process. The C library keeps what was freed, in case that it is asked for again: glibc does."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._trim: Any = getattr(self._library, "malloc_trim", None)
        self._last = 0

    def give_back(self) -> None:
        """Give back what is not in use, where much has come or gone since the last time."""
        if self._trim is None or abs(resident_bytes() - self._last) < CHANGED_BYTES:
            return
        self._trim(0)
        self._last = resident_bytes()

    def give_back_libraries(self) -> None:
        """Give back what lies in memory of libraries' code and constants.

        Much of it was read once: TensorFlow's tables of relocations, what its import and the loading of models ran.
        What is needed again comes back by itself, from the files, most of it without being read from a disk.
        """
        try:
            unchanged = list(unchanged_of_libraries(_MAPPINGS.read_text()))
        except OSError:  # not Linux
            return
        for start, size in unchanged:
            # Where the system refuses, all stays as it is.
            self._library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def unchanged_of_libraries(mappings: str) -> Iterator[tuple[int, int]]:
    """Start and size of what is mapped from libraries, cannot be written, and in no page differs from its file.

    A page that differs, for example one with relocated pointers, would be lost.
    """
    found: tuple[int, int] | None = None
    for line in mappings.splitlines():
        head = _HEAD.match(line)
        if head:
            start, end, permissions, file = head.groups()
            given_back = "w" not in permissions and _LIBRARY.search(file)
            found = (int(start, 16), int(end, 16) - int(start, 16)) if given_back else None
        elif line.startswith("Anonymous:") and found and line.split()[1] == "0":
            yield found
            found = None


def resident_bytes() -> int:
    """Of this process's memory, what lies in RAM."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
