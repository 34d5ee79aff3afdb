"""When requests start: a schedule that waits for nobody.

A user that asks again only when it was answered slows down with the server, and so leaves out just those requests that
would have met the slow moments (coordinated omission). Here requests are due at times that were drawn beforehand, and
their latencies are measured from there: what waits for a free user waits for the server.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence


def arrivals(phases: Sequence[tuple[float, float]], share: float, seed: str) -> Iterator[float]:
    """Seconds from the start, ascending, of a Poisson process; the same for the same seed.

    phases: (seconds, requests a second); share: of these rates, what is drawn here.
    """
    choices = random.Random(seed)
    begin = 0.0
    for seconds, rate in phases:
        at = begin
        while rate * share > 0 and (at := at + choices.expovariate(rate * share)) < begin + seconds:
            yield at
        # What would have come after the phase is forgotten: the process has no memory.
        begin += seconds


class Schedule:
    """Arrivals, given out one by one to whoever is free; the clock starts with the first."""

    def __init__(self, phases: Sequence[tuple[float, float]], share: float, seed: str) -> None:
        self._arrivals = arrivals(phases, share, seed)
        self._start: float | None = None

    def take(self) -> float | None:
        """When the next request is due, by `time.perf_counter`; None when there are no more."""
        if self._start is None:
            self._start = time.perf_counter()
        at = next(self._arrivals, None)
        return None if at is None else self._start + at

    def close(self) -> int:
        """How many requests are due by now and were not taken; there are no more afterwards."""
        left, self._arrivals = self._arrivals, iter(())
        if self._start is None:
            return 0
        passed = time.perf_counter() - self._start
        return sum(1 for _ in itertools.takewhile(lambda at: at <= passed, left))
