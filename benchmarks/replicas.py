"""One replica, then two behind HAProxy: what the second one brings, beside what the simulator says.

    python -m benchmarks.replicas [--seconds 10] [--rounds 3] [--draws 1000] [--rows 50] [--json]

Each replica has a core of its own. Requests are heavy (50 rows x 1,000 draws), so that wrk and HAProxy, which on a
machine of two cores share the second replica's, take little of it; with four cores they have the other two. Rounds
take turns. Then requests arrive at random at `--usage` of the capacity found, and their latencies stand beside the
simulator's for the service time that was measured with one request at a time.

Needs `wrk` and `haproxy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
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
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import simulator
from benchmarks.server.load import BenchmarkError, Case, Server, check, load, require_tools, running, train
from loadtest import rows as sonar

CONFIG = Path(__file__).parents[1] / "deploy" / "haproxy.cfg"
WANTED = 1.8
# Cores: two replicas, wrk and the balancer.
CORES_WANTED = 4
# Open connections for each replica: there is always a next request.
CONNECTIONS = 4
SERIAL_REQUESTS = 60
# `Settings.batch_row_draws`: how much goes into one call.
CALL_ROW_DRAWS = 65_536


@dataclass(frozen=True)
class Latency:
    """In ms: of requests that arrived at random, measured and simulated."""

    replicas: int
    rate: float
    p50_ms: float
    p99_ms: float
    simulated_p50_ms: float
    simulated_p99_ms: float


@dataclass(frozen=True)
class Result:
    """Requests/s of each round, always busy; service_ms: a request alone, by the same connection."""

    cores: int
    service_ms: float
    one: list[float]
    two: list[float]
    simulated_ratio: float
    latencies: list[Latency]

    @property
    def ratio(self) -> float:
        return statistics.median(two / one for one, two in zip(self.one, self.two, strict=True))


def server(name: str, repository: Path, body: str, core: str) -> Server:
    command = [
        "taskset",
        "-c",
        core,
        sys.executable,
        "-m",
        "dropserve",
        "serve",
        "--port",
        "{port}",
        "--model",
        "sonar",
    ]
    closed = {"DROPSERVE_REPOSITORY": str(repository), "DROPSERVE_GRPC_PORT": "0", "DROPSERVE_REST_PORT": "0"}
    # One core each, so that one thread each: more would only wait for each other.
    closed |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    return Server(name, command, closed, "/readyz", [Case(name, "/uncertainty", body)])


@contextlib.contextmanager
def balanced(replicas: list[str], core: str, folder: Path) -> Iterator[str]:
    """HAProxy with the configuration of deploy/, in front of these addresses (host:port)."""
    port = 23_900 + len(replicas)
    lines = CONFIG.read_text().replace("bind *:3000", f"bind 127.0.0.1:{port}").splitlines()
    kept = [line for line in lines if not line.startswith("    server ")]
    kept += [f"    server replica-{number} {address}" for number, address in enumerate(replicas)]
    place = folder / f"haproxy-{len(replicas)}.cfg"
    place.write_text("\n".join(kept) + "\n")
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(["taskset", "-c", core, "haproxy", "-db", "-f", place], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchmarkError(f"haproxy did not start; wanted port {port} free")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    return False


def service_seconds(url: str, case: Case) -> np.ndarray:
    """Seconds [SERIAL_REQUESTS] of requests one after the other."""
    found = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(SERIAL_REQUESTS):
            begin = time.perf_counter()
            client.post(case.path, content=case.body, headers={"Content-Type": "application/json"}).raise_for_status()
            found.append(time.perf_counter() - begin)
    return np.array(found)


async def open_latencies(url: str, case: Case, rate: float, seconds: float) -> np.ndarray:
    """Seconds from when each request was due to its answer; due at random, whether or not others were answered."""
    due = simulator.poisson(rate, max(20, int(rate * seconds)), seed=1)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=256)) as client:
        begin = time.perf_counter()

        async def ask(at: float) -> float:
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            answer = await client.post(case.path, content=case.body, headers={"Content-Type": "application/json"})
            answer.raise_for_status()
            return time.perf_counter() - begin - at

        return np.array(await asyncio.gather(*map(ask, due)))


def latency(url: str, case: Case, replicas: int, rate: float, seconds: float, service: np.ndarray) -> Latency:
    found = asyncio.run(open_latencies(url, case, rate, seconds))
    choices = np.random.default_rng(0)
    # Each simulated call takes as long as one that was measured.
    replica = simulator.Replica(lambda count: float(choices.choice(service)))
    simulated = simulator.latencies(simulator.poisson(rate, simulator.REQUESTS, 2), replica, replicas)
    ms = [float(np.quantile(values, share) * 1000) for values in (found, simulated) for share in (0.5, 0.99)]
    return Latency(replicas, rate, *ms)


def main(
    seconds: Annotated[int, typer.Option(min=2, help="Length of one round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of one replica and of two.")] = 3,
    draws: Annotated[int, typer.Option(min=2, help="Of a request.")] = 1_000,
    rows: Annotated[int, typer.Option(min=1, help="Of a request.")] = 50,
    usage: Annotated[float, typer.Option(min=0.1, max=0.95, help="Share of the capacity for the latencies.")] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Train Sonar, serve it twice, and ask one replica and both."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    try:
        if rows * draws <= CALL_ROW_DRAWS // 2:
            raise BenchmarkError(
                f"{rows} rows x {draws} draws: wanted more than {CALL_ROW_DRAWS // 2:,}: one request a call"
            )
        result = measure(console, seconds, rounds, draws, rows, usage)
    except BenchmarkError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(asdict(result) | {"ratio": result.ratio}, indent=2))
    else:
        show(console, result)


def measure(console: Console, seconds: int, rounds: int, draws: int, rows: int, usage: float) -> Result:
    require_tools()
    if shutil.which("haproxy") is None:
        raise BenchmarkError("haproxy is not there; on Debian: apt-get install haproxy")
    cores = len(os.sched_getaffinity(0))
    # wrk has core 1 in all of our benchmarks.
    core_two, core_balancer = ("2", "3") if cores >= CORES_WANTED else ("1", "1")
    _, known = sonar.read_csv(sonar.SONAR, sonar.SONAR_TARGET)
    instances = [known[number % len(known)] for number in range(rows)]
    body = json.dumps({"instances": instances, "num_samples": draws})
    with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as name:
        folder = Path(name)
        with console.status("training Sonar"):
            train(folder / "artifacts")
        first = server("one", folder / "artifacts", body, core="0")
        second = server("two", folder / "artifacts", body, core_two)
        case = first.cases[0]
        with (
            console.status("measuring"),
            running(first, folder / "one.log") as (url_one, _, _),
            running(second, folder / "two.log") as (url_two, _, _),
            balanced([url_one.removeprefix("http://")], core_balancer, folder) as one,
            balanced([url.removeprefix("http://") for url in (url_one, url_two)], core_balancer, folder) as two,
        ):
            for url in (one, two):
                check(url, case)
                load(url, case, 2 * CONNECTIONS, 2)
            rates: dict[str, list[float]] = {one: [], two: []}
            for _ in range(rounds):
                for url, count in ((one, 1), (two, 2)):
                    found = load(url, case, count * CONNECTIONS, seconds)
                    if found["failed"]:
                        raise BenchmarkError(f"{found['failed']} of {found['requests']} requests failed")
                    rates[url].append(found["requests"] / found["microseconds"] * 1e6)
            service = service_seconds(one, case)
            latencies = [
                latency(url, case, count, usage * statistics.median(rates[url]), 2 * seconds, service)
                for url, count in ((one, 1), (two, 2))
            ]
    replica = simulator.Replica(lambda count: float(np.median(service)))
    limit = 10 * float(np.median(service))
    ratio = simulator.knee(replica, 2, limit) / simulator.knee(replica, 1, limit)
    return Result(cores, float(np.median(service) * 1000), rates[one], rates[two], ratio, latencies)


def show(console: Console, result: Result) -> None:
    table = Table("replicas", "requests/s, always busy", "arrivals/s", "p50 ms", "simulated", "p99 ms", "simulated")
    for entry, rates in zip(result.latencies, (result.one, result.two), strict=True):
        measured = (entry.p50_ms, entry.simulated_p50_ms, entry.p99_ms, entry.simulated_p99_ms)
        table.add_row(
            str(entry.replicas),
            f"{statistics.median(rates):,.1f}",
            f"{entry.rate:,.1f}",
            *(f"{value:,.0f}" for value in measured),
        )
    console.print(table)
    reached = "reached" if result.ratio >= WANTED else "missed"
    console.print(f"a request alone: {result.service_ms:.1f} ms")
    console.print(f"two replicas: {result.ratio:.2f} of one (wanted: {WANTED}): {reached}")
    console.print(f"the simulator, knees at a p99 of ten service times: {result.simulated_ratio:.2f}")
    if result.cores < CORES_WANTED:
        console.print(
            f"{result.cores} cores found, {CORES_WANTED} wanted: HAProxy and wrk run on the second replica's core, "
            "and what they take is missing from it"
        )


if __name__ == "__main__":
    typer.run(main)
