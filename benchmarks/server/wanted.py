"""What must be reached, and whether it was: ratios of two cases taken within each round, and a few absolute figures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.server.contestants import (
    BARE,
    BENTO,
    CONSTANT,
    GRPC,
    MANY_BINARY,
    MANY_GRPC,
    MANY_JSON,
    MLSERVER,
    PLAIN,
    PREDICT,
    TFS,
    UNCERTAINTY,
    named,
)
from benchmarks.server.load import Running

READY_LIMIT_S = 12
WORKER_LIMIT_MB = 700
P99_LIMIT_MS = 10
# From so many connections on more is wanted.
MANY = 64


@dataclass(frozen=True)
class Figure:
    """One case: requests/s and latencies (ms) of each round, and failures over all of them."""

    case: str
    connections: int
    per_second: list[float]
    p50_ms: list[float]
    p99_ms: list[float]
    failed: int


Figures = dict[tuple[str, int], Figure]


@dataclass(frozen=True)
class Line:
    """One thing that must be reached. limit: at least this, or at most where `at_most`; None: shown, nothing wanted."""

    what: str
    found: float
    limit: float | None
    unit: str = "x"
    at_most: bool = False
    lowest: float | None = None
    highest: float | None = None

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        return "met" if (self.found <= self.limit if self.at_most else self.found >= self.limit) else "**missed**"

    def row(self) -> str:
        """Of a table in Markdown."""
        wanted = "" if self.limit is None else f"{'at most' if self.at_most else 'at least'} {self.limit:g}{self.unit}"
        spread = "" if self.lowest is None or self.highest is None else f"{self.lowest:.3g} - {self.highest:.3g}"
        return f"| {self.what} | {wanted} | {self.found:.3g}{self.unit} | {spread} | {self.verdict} |"


HEAD = "| what | wanted | found | lowest - highest round | |\n|---|---|---|---|---|"


def ratio(what: str, ours: list[float], theirs: list[float], limit: float | None, *, at_most: bool = False) -> Line:
    each = [a / b if b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return Line(what, statistics.median(each), limit, at_most=at_most, lowest=min(each), highest=max(each))


def lines(figures: Figures) -> list[Line]:
    """The issue's lines, as far as their cases were measured."""
    found: list[Line] = []
    counts = sorted({count for _, count in figures})

    def speed(ours: str, theirs: str, limit: float | None, count: int) -> None:
        if (ours, count) in figures and (theirs, count) in figures:
            a, b = figures[ours, count], figures[theirs, count]
            found.append(ratio(f"{ours} / {theirs}, requests/s, c={count}", a.per_second, b.per_second, limit))

    def patience(ours: str, theirs: str, limit: float, count: int) -> None:
        a, b = figures[ours, count], figures[theirs, count]
        found.append(ratio(f"{ours} / {theirs}, p99, c={count}", a.p99_ms, b.p99_ms, limit, at_most=True))

    for count in counts:
        for case in (PREDICT, TFS):
            speed(named(BENTO, case), PLAIN, 3, count)
            patience(named(BENTO, case), PLAIN, 0.1, count)
        speed(named(BENTO, UNCERTAINTY), PLAIN, 2.5, count)
        speed(named(BARE, PREDICT), PLAIN, 15 if count < MANY else 25, count)
        speed(named(BARE, UNCERTAINTY), PLAIN, 8 if count < MANY else 12, count)
        for case in (PREDICT, UNCERTAINTY):
            figure = figures[named(BARE, case), count]
            p99 = statistics.median(figure.p99_ms)
            what = f"{figure.case}, p99, c={count}"
            found.append(Line(what, p99, P99_LIMIT_MS, " ms", True, min(figure.p99_ms), max(figure.p99_ms)))
        for port in (BENTO, BARE):
            speed(named(port, UNCERTAINTY), named(port, PREDICT), 0.5, count)
        speed(GRPC, PLAIN, 5, count)
        speed(named(BARE, MANY_BINARY), named(BARE, MANY_JSON), 10, count)
        speed(MANY_GRPC, named(BARE, MANY_JSON), 10, count)
        speed(named(BARE, PREDICT), MLSERVER, None, count)
        speed(named(BARE, PREDICT), CONSTANT, None, count)
    return found


def start_lines(running: Running, is_ours: bool) -> list[Line]:
    """How soon the server was ready, its worker's memory then, and now that the load has passed."""
    name, limit = running.server.name, WORKER_LIMIT_MB if is_ours else None
    return [
        Line(f"{name}: ready after its start", running.ready_s, READY_LIMIT_S if is_ours else None, " s", True),
        Line(f"{name}: resident memory of the worker, as it is ready", running.ready_mb, limit, " MB", True),
        Line(f"{name}: resident memory of the worker, as the load ends", running.worker_mb(), limit, " MB", True),
    ]
