"""Requests per second over HTTP, as ratios taken side by side in one run.

    python -m benchmarks.http [--seconds 5] [--rounds 3] [--connections 16 --connections 64] [--json]

Each server runs alone on one core, wrk on another. The cases of one server take turns, round by round, and a ratio is
taken within each round, so that a slow minute of the machine falls on both its sides. Medians over the rounds; one
Sonar row a request.

A peer is one more entry in `servers()`, and what it is held to one more entry in `RATIOS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from loadtest import rows

SERVER_CORE = "0"
CLIENT_CORE = "1"
# What is wanted of training and of a server's start, beside the ratios.
TRAIN_LIMIT_S = 60
READY_LIMIT_S = 20
MEMORY_LIMIT_MB = 900
START_TIMEOUT_S = 120
WARM_UP_S = 2

# wrk speaks Lua: the request, then the figures as JSON (latencies in microseconds).
WRK_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [==[%s]==]
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{"requests": %%d, "microseconds": %%d, "failed": %%d, "p50_us": %%d, "p99_us": %%d}\\n',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


class BenchmarkError(Exception):
    """A benchmark cannot be run here. `str()` is one line: what was found, what is wanted."""


@dataclass(frozen=True)
class Case:
    """One kind of request to one server."""

    name: str
    path: str
    body: str


@dataclass(frozen=True)
class Server:
    """A server under test. `{port}` in the command stands for the port; it is ready when `ready_path` answers 200."""

    name: str
    command: list[str]
    environment: dict[str, str]
    ready_path: str
    cases: list[Case]


@dataclass(frozen=True)
class Ratio:
    """What one case must reach, as a share of another's requests/s at the same number of connections."""

    case: str
    of: str
    wanted: float


@dataclass(frozen=True)
class Figure:
    """One case: requests/s of each round and their median, median latencies (ms), and failures over all rounds."""

    case: str
    connections: int
    rounds: list[float]
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    failed: int


@dataclass(frozen=True)
class Start:
    """ready_s: from the command to the first 200; rss: resident memory after the load, worker: the largest process."""

    server: str
    ready_s: float
    worker_rss_mb: float
    total_rss_mb: float


PREDICT = "dropserve /predict"
UNCERTAINTY = "dropserve /uncertainty T=100"
RATIOS = [Ratio(UNCERTAINTY, PREDICT, wanted=0.7)]


def servers(repository: Path) -> list[Server]:
    _, (row, *_) = rows.read_csv(rows.SONAR, rows.SONAR_TARGET)
    one_row = json.dumps({"instances": [row]})
    hundred_draws = json.dumps({"instances": [row], "num_samples": 100})
    return [
        Server(
            name="dropserve",
            command=[sys.executable, "-m", "dropserve", "serve", "--port", "{port}", "--model", "sonar"],
            # BentoML's port alone.
            environment={
                "DROPSERVE_REPOSITORY": str(repository),
                "DROPSERVE_GRPC_PORT": "0",
                "DROPSERVE_REST_PORT": "0",
            },
            ready_path="/readyz",
            cases=[Case(PREDICT, "/predict", one_row), Case(UNCERTAINTY, "/uncertainty", hundred_draws)],
        )
    ]


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[tuple[str, float, psutil.Process]]:
    """Start a server on its core; give its address, the seconds until it was ready, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = ["taskset", "-c", SERVER_CORE, *(part.format(port=port) for part in server.command)]
    begin = time.perf_counter()
    with log.open("wb") as stream:
        process = psutil.Popen(
            command,
            env=os.environ | server.environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not _is_ready(url + server.ready_path):
            if process.poll() is not None or time.perf_counter() - begin > START_TIMEOUT_S:
                said = log.read_text(errors="replace").strip().splitlines()
                raise BenchmarkError(f"{server.name} did not start: {said[-1] if said else 'no output'}")
            time.sleep(0.05)
        yield url, time.perf_counter() - begin, process
    finally:
        _stop(process)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(process: psutil.Popen) -> None:
    family = [*process.children(recursive=True), process] if process.is_running() else []
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=15)
    for straggler in left:
        straggler.kill()
    psutil.wait_procs(left, timeout=5)


def check(url: str, case: Case) -> None:
    """One request by hand: wrk counts statuses, this says why."""
    response = httpx.post(url + case.path, content=case.body, headers={"Content-Type": "application/json"}, timeout=30)
    if response.status_code != 200:
        raise BenchmarkError(f"{case.name}: status {response.status_code}, wanted 200: {response.text[:200]}")


def load(url: str, case: Case, connections: int, seconds: float) -> dict[str, int]:
    """One round of wrk."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK_SCRIPT % case.body)
        script.flush()
        command = ["taskset", "-c", CLIENT_CORE, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"]
        done = subprocess.run(
            [*command, "-s", script.name, url + case.path], capture_output=True, text=True, check=False
        )
    figures = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not figures.startswith("{"):
        raise BenchmarkError(f"wrk: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads(figures)


def summarise(case: str, connections: int, rounds: list[dict[str, int]]) -> Figure:
    per_second = [r["requests"] / r["microseconds"] * 1e6 for r in rounds]
    return Figure(
        case=case,
        connections=connections,
        rounds=per_second,
        requests_per_second=statistics.median(per_second),
        p50_ms=statistics.median(r["p50_us"] for r in rounds) / 1000,
        p99_ms=statistics.median(r["p99_us"] for r in rounds) / 1000,
        failed=sum(r["failed"] for r in rounds),
    )


def measure(server: Server, connections: list[int], rounds: int, seconds: int, log: Path) -> tuple[Start, list[Figure]]:
    taken: dict[tuple[str, int], list[dict[str, int]]] = {}
    with running(server, log) as (url, ready_s, process):
        for case in server.cases:
            check(url, case)
            load(url, case, connections[0], WARM_UP_S)
        for _ in range(rounds):
            for count in connections:
                for case in server.cases:
                    taken.setdefault((case.name, count), []).append(load(url, case, count, seconds))
        family = [process, *process.children(recursive=True)]
        resident = [member.memory_info().rss / 1e6 for member in family]
    start = Start(server.name, ready_s, max(resident), sum(resident))
    return start, [summarise(case, count, results) for (case, count), results in taken.items()]


@dataclass(frozen=True)
class Found:
    """A ratio as it was found: taken within each round, so that both sides saw the same minute of the machine."""

    ratio: Ratio
    connections: int
    median: float
    lowest: float
    highest: float
    reached: bool


def ratios(figures: list[Figure]) -> list[Found]:
    by_case = {(figure.case, figure.connections): figure.rounds for figure in figures}
    found = []
    for ratio in RATIOS:
        for count in sorted({figure.connections for figure in figures}):
            ours, theirs = by_case[ratio.case, count], by_case[ratio.of, count]
            each = [a / b for a, b in zip(ours, theirs, strict=True)]
            middle = statistics.median(each)
            found.append(Found(ratio, count, middle, min(each), max(each), reached=middle >= ratio.wanted))
    return found


def train(repository: Path) -> float:
    """Train and publish Sonar; return the seconds it took."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "dropserve", "train", "sonar"]
    done = subprocess.run(
        command,
        env=os.environ | {"DROPSERVE_REPOSITORY": str(repository)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchmarkError(f"dropserve train sonar: {done.stderr.strip()}")
    return time.perf_counter() - begin


def require_tools() -> None:
    for tool in ("wrk", "taskset"):
        if shutil.which(tool) is None:
            raise BenchmarkError(f"{tool} is not there; on Debian: apt-get install wrk util-linux")
    if (os.cpu_count() or 1) < 2:
        raise BenchmarkError("one core found; wanted two: one for the server, one for wrk")


def main(
    seconds: Annotated[int, typer.Option(help="Length of one round.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds of each case.")] = 3,
    connections: Annotated[list[int] | None, typer.Option(help="Open connections; may be given again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Train Sonar, serve it on one core, and measure it from another."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    counts = connections or [16, 64]
    try:
        require_tools()
        with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as folder:
            repository = Path(folder) / "artifacts"
            busy = psutil.cpu_percent(interval=1)
            with console.status("training Sonar"):
                train_s = train(repository)
            starts: list[Start] = []
            figures: list[Figure] = []
            for server in servers(repository):
                with console.status(f"measuring {server.name}"):
                    start, measured = measure(server, counts, rounds, seconds, Path(folder) / "server.log")
                starts.append(start)
                figures += measured
    except BenchmarkError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    if as_json:
        result = {
            "busy_percent": busy,
            "train_s": train_s,
            "starts": [asdict(start) for start in starts],
            "figures": [asdict(figure) for figure in figures],
            "ratios": [asdict(found) for found in ratios(figures)],
        }
        print(json.dumps(result, indent=2))
    else:
        show(console, train_s, starts, figures)
        console.print(f"before the run, other work took {busy:.0f} % of the machine")


def show(console: Console, train_s: float, starts: list[Start], figures: list[Figure]) -> None:
    table = Table("ratio of requests/s", "connections", "found", "lowest - highest", "wanted", "")
    for found in ratios(figures):
        name = f"{found.ratio.case} / {found.ratio.of}"
        spread = f"{found.lowest:.0%} - {found.highest:.0%}"
        reached = "[green]reached[/]" if found.reached else "[red]missed[/]"
        table.add_row(name, str(found.connections), f"{found.median:.0%}", spread, f"{found.ratio.wanted:.0%}", reached)
    console.print(table)
    table = Table("case", "connections", "requests/s", "p50 ms", "p99 ms", "failed")
    for f in figures:
        cells = (f"{f.requests_per_second:,.0f}", f"{f.p50_ms:.1f}", f"{f.p99_ms:.1f}", f"{f.failed:,}")
        table.add_row(f.case, str(f.connections), *cells)
    console.print(table)
    console.print(f"train and package, process start included: {train_s:.1f} s (wanted: {TRAIN_LIMIT_S})")
    for s in starts:
        console.print(f"{s.server}: ready {s.ready_s:.1f} s after start (wanted: {READY_LIMIT_S})")
        console.print(
            f"{s.server}: serving process {s.worker_rss_mb:,.0f} MB (wanted: {MEMORY_LIMIT_MB}), "
            f"with its parent {s.total_rss_mb:,.0f} MB"
        )


if __name__ == "__main__":
    typer.run(main)
