"""Servers as processes on one core, wrk on another; what both leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

SERVER_CORE = "0"
CLIENT_CORE = "1"
START_TIMEOUT_S = 120
WARM_UP_S = 2
JSON_TYPE = "application/json"

# wrk speaks Lua: the request, then the figures as JSON (latencies in microseconds).
WRK_SCRIPT = """
wrk.method = "POST"
%s
local file = io.open("%s", "rb")
wrk.body = file:read("*a")
file:close()
%s
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{"requests": %%d, "microseconds": %%d, "failed": %%d, "p50_us": %%d, "p99_us": %%d}\\n',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""
# Between two requests of a connection; a whole number of milliseconds, so that the fraction is a matter of chance.
WRK_DELAY = "function delay() return %d + (math.random() < %f and 1 or 0) end"


class BenchmarkError(Exception):
    """A benchmark cannot be run here. `str()` is one line: what was found, what is wanted."""


@dataclass(frozen=True)
class Case:
    """One kind of request to one server. rows: in each request."""

    name: str
    path: str
    body: str | bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": JSON_TYPE})
    rows: int = 1
    port: str = "port"
    """Which of the server's ports: as in its command."""
    speaks_grpc: bool = False
    """The body is a PredictRequest, the path a method, and the client `benchmarks.server.grpc_load`."""


@dataclass(frozen=True)
class Server:
    """A server under test. `{port}` in its command and environment stands for a free port, as do other names there.

    It is ready when `ready_path` answers 200.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    ready_path: str
    cases: list[Case]
    other_ports: tuple[str, ...] = ()


class Running:
    """A server that answers: ready_s after its command, with ready_mb of resident memory; ports by their names."""

    def __init__(self, server: Server, ports: dict[str, int], ready_s: float, process: psutil.Process) -> None:
        self.server, self.ports, self.ready_s, self.process = server, ports, ready_s, process
        self.ready_mb = self.worker_mb()

    def url(self, case: Case) -> str:
        return f"http://127.0.0.1:{self.ports[case.port]}{case.path}"

    def worker_mb(self) -> float:
        """Resident memory of its largest process."""
        family = [self.process, *self.process.children(recursive=True)]
        return max(member.memory_info().rss for member in family) / 1e6


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(server: Server, log: Path) -> Iterator[Running]:
    """Start a server on its core; ended afterwards. Raises BenchmarkError where it does not become ready."""
    ports = {name: _free_port() for name in ("port", *server.other_ports)}
    url = f"http://127.0.0.1:{ports['port']}"
    command = ["taskset", "-c", SERVER_CORE, *(part.format(**ports) for part in server.command)]
    environment = {name: value.format(**ports) for name, value in server.environment.items()}
    begin = time.perf_counter()
    with log.open("wb") as stream:
        process = psutil.Popen(
            command,
            env=os.environ | environment,
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
        yield Running(server, ports, time.perf_counter() - begin, process)
    finally:
        _stop(process)


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[tuple[str, float, psutil.Process]]:
    """Likewise; its address, the seconds until it was ready, and its process."""
    with started(server, log) as found:
        yield f"http://127.0.0.1:{found.ports['port']}", found.ready_s, found.process


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
    response = httpx.post(url + case.path, content=case.body, headers=case.headers, timeout=30)
    if response.status_code != 200:
        raise BenchmarkError(f"{case.name}: status {response.status_code}, wanted 200: {response.text[:200]}")


def load(url: str, case: Case, connections: int, seconds: float, delay_ms: float = 0) -> dict[str, int]:
    """One round of wrk. delay_ms: of a connection, from an answer to its next request."""
    with wrk(url, case, connections, seconds, delay_ms) as process:
        said, wrong = process.communicate()
    return figures(said, wrong, process.returncode)


@contextlib.contextmanager
def wrk(url: str, case: Case, connections: int, seconds: float, delay_ms: float = 0) -> Iterator[subprocess.Popen[str]]:
    """wrk, running."""
    headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in case.headers.items())
    delay = WRK_DELAY % divmod(delay_ms, 1) if delay_ms else ""
    with tempfile.TemporaryDirectory(prefix="dropserve-wrk-") as folder:
        script, body = Path(folder) / "script.lua", Path(folder) / "body"
        body.write_bytes(case.body.encode() if isinstance(case.body, str) else case.body)
        script.write_text(WRK_SCRIPT % (headers, body, delay))
        command = [
            "taskset",
            "-c",
            CLIENT_CORE,
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds:.0f}s",
            "--timeout",
            "10s",
        ]
        with subprocess.Popen(
            [*command, "-s", str(script), url + case.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def grpc_load(place: str, case: Case, connections: int, seconds: float) -> dict[str, int]:
    """One round of gRPC calls, from Python, on the client's core."""
    with tempfile.NamedTemporaryFile(suffix=".pb") as body:
        body.write(case.body if isinstance(case.body, bytes) else case.body.encode())
        body.flush()
        command = ["taskset", "-c", CLIENT_CORE, sys.executable, "-m", "benchmarks.server.grpc_load"]
        arguments = [place, case.path, body.name, str(connections), str(seconds)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    return figures(done.stdout, done.stderr, done.returncode)


def figures(said: str, wrong: str, code: int | None) -> dict[str, int]:
    """The last line of a load generator."""
    line = said.strip().rpartition("\n")[2]
    if code != 0 or not line.startswith("{"):
        raise BenchmarkError(f"the load generator: {wrong.strip()[-300:] or said.strip()[-300:]}")
    found: dict[str, Any] = json.loads(line)
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
