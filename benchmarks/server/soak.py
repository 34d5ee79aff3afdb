"""Minutes of traffic at a share of the capacity, while new versions of the model arrive."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.server.contestants import BARE, PREDICT, dropserve, named
from benchmarks.server.load import Running, load, started
from benchmarks.server.wanted import Line
from models.contract import MANIFEST_FILE, manifest_bytes, read_manifest

SHARE = 0.8
CONNECTIONS = 16
RELOAD_EVERY_S = 20.0
# Versions that stay on disk; the server keeps two of them.
KEPT = 3
# Memory is compared with what it was after this share of the time, when everything has happened once.
SETTLED = 0.2
CAPACITY_S, TURN_S = 1, 4
# Of a change of the pauses: capacities that are measured for a second differ much.
DAMPING = 0.2


def soak(repository: Path, minutes: float, log: Path) -> list[Line]:
    """Serve the repository alone, load it, publish a version every 20 seconds."""
    server = dropserve(repository)
    with started(server, log) as running:
        case = next(case for case in server.cases if case.name == named(BARE, PREDICT))
        url = running.url(case).removesuffix(case.path)
        memory: list[tuple[float, float]] = []
        seconds = 60 * minutes
        turns: list[dict[str, int]] = []
        shares: list[float] = []
        delay_ms = 0.0
        load(url, case, CONNECTIONS, CAPACITY_S)
        with ThreadPoolExecutor(1) as publisher:
            reloads = publisher.submit(lambda: sum(1 for _ in _publish(repository / "sonar", seconds, running, memory)))
            # The capacity is measured again for each turn: a machine's minutes differ, and a reload takes its part.
            while not reloads.done():
                turns.append(load(url, case, CONNECTIONS, CAPACITY_S))
                capacity = _rate(turns[-1])
                turns.append(load(url, case, CONNECTIONS, TURN_S, delay_ms))
                rate = _rate(turns[-1])
                shares.append(rate / capacity)
                # Each connection has as many requests a second as its answers and pauses leave it.
                wanted_ms = 1000 * CONNECTIONS * (1 / (SHARE * capacity) - 1 / rate)
                delay_ms = max(delay_ms + DAMPING * wanted_ms, 0.0)
    settled = next(found for when, found in memory if when >= SETTLED * seconds)
    requests, failed = (sum(turn[of] for turn in turns) for of in ("requests", "failed"))
    growth = 100 * (memory[-1][1] / settled - 1)
    name = f"soak, {minutes:g} minutes, {reloads.result()} reloads"
    return [
        Line(f"{name}: requests/s, of the capacity at the time, median", statistics.median(shares), None),
        Line(f"{name}: failed requests of {requests:,}", failed, 0, "", at_most=True),
        Line(f"{name}: resident memory's growth", growth, 5, " %", at_most=True),
    ]


def _rate(taken: dict[str, int]) -> float:
    return taken["requests"] / taken["microseconds"] * 1e6


def _publish(model: Path, seconds: float, running: Running, memory: list[tuple[float, float]]) -> Iterator[int]:
    """Publish versions until the time is over, and note how much memory there is before each one."""
    begin = time.monotonic()
    source = model / "1"
    version = 1
    while (now := time.monotonic() - begin) < seconds:
        memory.append((now, running.worker_mb()))
        version += 1
        staging = model / f".staging-{version}"
        shutil.copytree(source, staging)
        renamed = read_manifest(source).model_copy(update={"version": version})
        (staging / MANIFEST_FILE).write_bytes(manifest_bytes(renamed))
        os.rename(staging, model / str(version))
        old = model / str(version - KEPT)
        if old.exists() and old != source:
            shutil.rmtree(old)
        yield version
        time.sleep(max(min(RELOAD_EVERY_S, seconds - (time.monotonic() - begin)), 0))
    memory.append((time.monotonic() - begin, running.worker_mb()))
