"""Response times, as they are judged: Locust's own are of two digits from 100 ms on, so that 104.9 ms are 100."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

# Times are kept to the next hundredth of a millisecond: as many counts as there are requests would be too many.
PER_MS = 100


class Latencies:
    """Of one process of the load test, or of all of them together; by the name of the request."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[int]] = {}

    def note(self, name: str, response_time_ms: float) -> None:
        self._counts.setdefault(name, Counter())[math.ceil(PER_MS * response_time_ms)] += 1

    def of(self, name: str) -> Counter[int]:
        """How often each time was, in units of 1 / PER_MS ms."""
        return self._counts.get(name, Counter())

    def all(self) -> Counter[int]:
        """The same of all requests together."""
        return sum(self._counts.values(), Counter())

    def taken(self) -> dict[str, Any]:
        """What was noted since the last time, as a message to Locust's master."""
        message = {name: dict(counts) for name, counts in self._counts.items()}
        self._counts.clear()
        return message

    def add(self, message: dict[str, Any]) -> None:
        for name, counts in message.items():
            self._counts.setdefault(name, Counter()).update(counts)


def percentile_ms(counts: Mapping[int, int], share: float) -> float | None:
    """The least time, in ms, within which such a share of the requests was answered; None where there is none."""
    wanted, found = share * sum(counts.values()), 0
    for time in sorted(counts):
        found += counts[time]
        if found >= wanted:
            return time / PER_MS
    return None
