"""How many replicas: requests arriving at random, replicas that put waiting requests into one call, latencies.

    python -m benchmarks.simulator --fixed-ms 0.3 --request-ms 0.15 --rate 10000
    python -m benchmarks.simulator --fixed-ms 0.3 --request-ms 0.15 --replicas 1 --replicas 2 --replicas 4

A discrete-event simulation. A replica takes what waits, at most `--batch` requests, as soon as it is free (as
`serving.batcher` does) and is busy for `fixed + request x count`; the balancer gives a request to the replica with the
fewest open ones. With --rate: the fewest replicas whose p99 is within --p99-ms; without: the knee of each number of
replicas, the highest rate whose p99 is.

Its two times are measured of one replica by `python -m benchmarks.replicas`.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

# Seconds that a call with so many requests takes.
Duration = Callable[[int], float]
# To the replica with the fewest open requests, to one after the other, or from one queue to whoever is free.
Dispatch = Literal["least", "turns", "shared"]

REQUESTS = 40_000
# Of a run, what is left out: it began with empty queues.
WARM_UP_SHARE = 0.1
PRECISION = 0.02
MOST_REPLICAS = 10_000


@dataclass(frozen=True)
class Replica:
    """duration: of a call; batch: requests in one call, at most."""

    duration: Duration
    batch: int = 1

    @property
    def capacity(self) -> float:
        """Requests a second, always busy with full calls."""
        return self.batch / self.duration(self.batch)


def batching(fixed_s: float, request_s: float, batch: int) -> Replica:
    return Replica(lambda count: fixed_s + request_s * count, batch)


def poisson(rate: float, count: int, seed: int) -> np.ndarray:
    """Times [count] of arrivals, in seconds."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()


def latencies(arrivals: Iterable[float], replica: Replica, replicas: int, dispatch: Dispatch = "least") -> np.ndarray:
    """Seconds from each request's arrival to its answer, in the order of the answers."""
    queues: list[deque[float]] = [deque()] * replicas if dispatch == "shared" else [deque() for _ in range(replicas)]
    taken: list[list[float]] = [[] for _ in range(replicas)]
    open_requests = [0] * replicas
    # Among equals, whose turn it is.
    turns = itertools.cycle(range(replicas))
    ends: list[tuple[float, int]] = []
    found: list[float] = []

    def begin(number: int, now: float) -> None:
        queue = queues[number]
        if queue and not taken[number]:
            taken[number] = [queue.popleft() for _ in range(min(len(queue), replica.batch))]
            heapq.heappush(ends, (now + replica.duration(len(taken[number])), number))

    def end() -> None:
        now, number = heapq.heappop(ends)
        found.extend(now - arrived for arrived in taken[number])
        open_requests[number] -= len(taken[number])
        taken[number] = []
        begin(number, now)

    for arrived in arrivals:
        while ends and ends[0][0] <= arrived:
            end()
        first = next(turns)
        if dispatch == "shared":
            number = next((n for n in range(replicas) if not taken[n]), first)
        elif dispatch == "turns":
            number = first
        else:
            number = min(range(replicas), key=lambda n: (open_requests[n], (n - first) % replicas))
        open_requests[number] += 1
        queues[number].append(arrived)
        begin(number, arrived)
    while ends:
        end()
    return np.array(found)


def percentile(
    replica: Replica, replicas: int, rate: float, share: float = 0.99, requests: int = REQUESTS, seed: int = 0
) -> float:
    """Latency in seconds that `share` of the requests do not exceed."""
    found = latencies(poisson(rate, requests, seed), replica, replicas)
    return float(np.quantile(found[int(len(found) * WARM_UP_SHARE) :], share))


def knee(replica: Replica, replicas: int, p99_s: float, requests: int = REQUESTS, seed: int = 0) -> float:
    """The highest rate, in requests a second, whose p99 is within `p99_s`, to PRECISION; 0: not even one request."""
    if replica.duration(1) > p99_s:
        return 0.0
    low, high = 0.0, replica.capacity * replicas
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if percentile(replica, replicas, middle, requests=requests, seed=seed) <= p99_s:
            low = middle
        else:
            high = middle
    return low


def needed(replica: Replica, rate: float, p99_s: float, requests: int = REQUESTS, seed: int = 0) -> int | None:
    """The fewest replicas for a rate; None where even a request alone takes longer than `p99_s`."""
    if replica.duration(1) > p99_s:
        return None
    fewest = max(1, math.ceil(rate / replica.capacity))
    # Each has its share of the arrivals: beyond some tens of replicas more of them behave like these.
    for count in range(fewest, MOST_REPLICAS):
        part = max(1, count // 32)
        if percentile(replica, max(1, count // part), rate / part, requests=requests, seed=seed) <= p99_s:
            return count
    return None


def main(
    fixed_ms: Annotated[float, typer.Option(help="What a call takes, however many requests are in it.")],
    request_ms: Annotated[float, typer.Option(help="What each request in it takes.")],
    batch: Annotated[int, typer.Option(min=1, help="Requests in one call, at most.")] = 64,
    p99_ms: Annotated[float, typer.Option(help="The limit.")] = 50.0,
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; may be given again.")] = None,
    replicas: Annotated[list[int] | None, typer.Option(help="Without --rate; may be given again.")] = None,
    requests: Annotated[int, typer.Option(min=1_000, help="Simulated for each point.")] = REQUESTS,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Replicas for a rate, or the knee of some replicas."""
    if min(fixed_ms, request_ms) < 0 or request_ms + fixed_ms <= 0 or p99_ms <= 0 or min(rate or [1]) <= 0:
        raise typer.BadParameter("times and rates must be positive")
    replica = batching(fixed_ms / 1000, request_ms / 1000, batch)
    found: list[dict[str, float | None]] = []
    for wanted in rate or ():
        found.append({"rate": wanted, "replicas": needed(replica, wanted, p99_ms / 1000, requests, seed)})
    for count in [] if rate else replicas or [1, 2, 4, 8]:
        found.append({"replicas": count, "knee": knee(replica, count, p99_ms / 1000, requests, seed)})
    if as_json:
        print(json.dumps({"capacity_of_one": replica.capacity, "found": found}, indent=2))
        return
    table = Table(*found[0], title=f"p99 within {p99_ms:g} ms")
    for row in found:
        table.add_row(*("none" if value is None else f"{value:,.0f}" for value in row.values()))
    Console().print(table)
    Console().print(f"one replica, always full: {replica.capacity:,.0f} requests/s")


if __name__ == "__main__":
    typer.run(main)
