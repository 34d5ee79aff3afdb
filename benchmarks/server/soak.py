"""Minutes of traffic at a share of the capacity, while new versions of the model arrive."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.server.contestants import BARE, PREDICT, dropserve, named
from benchmarks.server.load import Running, figures, load, started, wrk
from benchmarks.server.wanted import Line
from models.contract import MANIFEST_FILE, manifest_bytes, read_manifest

SHARE = 0.8
CONNECTIONS = 16
RELOAD_EVERY_S = 20.0
# Versions that stay on disk; the server keeps two of them.
KEPT = 3
# Memory is compared with what it was after this share of the time, when everything has happened once.
SETTLED = 0.2
CALIBRATE_S = 3


def soak(repository: Path, minutes: float, log: Path) -> list[Line]:
    """Serve the repository alone, load it, publish a version every 20 seconds."""
    server = dropserve(repository)
    with started(server, log) as running:
        case = next(case for case in server.cases if case.name == named(BARE, PREDICT))
        url = running.url(case).removesuffix(case.path)
        load(url, case, CONNECTIONS, CALIBRATE_S)
        capacity = _rate(load(url, case, CONNECTIONS, CALIBRATE_S))
        delay_ms = 0.0
        for _ in range(3):
            # Each connection has as many requests a second as its answers and pauses leave it.
            rate = _rate(load(url, case, CONNECTIONS, CALIBRATE_S, delay_ms))
            delay_ms = max(delay_ms + 1000 * CONNECTIONS * (1 / (SHARE * capacity) - 1 / rate), 0.0)
        memory: list[tuple[float, float]] = []
        seconds = 60 * minutes
        with wrk(url, case, CONNECTIONS, seconds, delay_ms) as process:
            reloads = sum(1 for _ in _publish(repository / "sonar", seconds, running, memory))
            taken = figures(*process.communicate(), process.returncode)
    settled = next(found for when, found in memory if when >= SETTLED * seconds)
    growth = 100 * (memory[-1][1] / settled - 1)
    name = f"soak, {minutes:g} minutes, {reloads} reloads"
    return [
        Line(f"{name}: requests/s, of the capacity", _rate(taken) / capacity, None),
        Line(f"{name}: failed requests of {taken['requests']:,}", taken["failed"], 0, "", at_most=True),
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
