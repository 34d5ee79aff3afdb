"""Runs Locust headless against a server, and says whether the server passed."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Group
from rich.table import Table
from rich.text import Text

from loadtest import manifest, subjects
from loadtest.errors import LoadTestError
from loadtest.profile import END_S, NAMES, Phase, Profile, Thresholds, request_name

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
# How long a request under way at the end is waited for.
STOP_TIMEOUT_S = 10
# How long after the schedule's end what waits for a free user may still be sent.
DRAIN_S = 10
# How long Locust waits until all its processes have their users: without them one would draw up an empty schedule.
USERS_TIMEOUT_S = 30
# A load test that is later than this tells more of its own machine than of the server.
LATE_MS = 10
PROBE_TIMEOUT_S = 5
# Of a profile's mix: whom `--grpc` is for.
GRPC_USER = "GrpcUser"
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Endpoint:
    """Figures of one endpoint, or of all. Latencies in ms are None where nothing was answered."""

    name: str
    requests: int
    failures: int
    requests_per_second: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class Try:
    """One rate of a search for the knee."""

    rate: float
    p99_ms: float | None
    failures: int
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """passed: every kind of request was sent, every answer was right, and the times kept the profile's limits."""

    host: str
    passed: bool
    endpoints: list[Endpoint]
    total: Endpoint
    # "<endpoint>: <what was wrong>" and how often, most frequent first.
    errors: list[tuple[str, int]]
    # Once a second: see `loadtest.locustfile`. Of a search, those of its last try.
    timeline: list[dict[str, Any]]
    # How late the load test itself was with 99 of 100 requests, where it had a free user; see `pace`.
    late_ms: int | None = None
    # Of a search: its tries, and the highest rate that passed.
    tries: list[Try] = field(default_factory=list)
    knee: float | None = None

    def document(self) -> dict[str, Any]:
        """The verdict as one JSON document."""
        document = asdict(self)
        del document["timeline"]
        return document

    @property
    def is_late(self) -> bool:
        """Whether the times tell of the load test's own machine, too."""
        return self.late_ms is not None and self.late_ms > LATE_MS

    def table(self) -> Group:
        """The verdict for people."""
        table = Table("endpoint", title=f"load test of {self.host}")
        for column in ("requests", "requests/s", "p50 ms", "p95 ms", "p99 ms", "failures"):
            table.add_column(column, justify="right")
        for entry in [*self.endpoints, self.total]:
            name = "all" if entry is self.total else entry.name
            latencies = [
                "" if value is None else f"{value:,.0f}" for value in (entry.p50_ms, entry.p95_ms, entry.p99_ms)
            ]
            rate = f"{entry.requests_per_second:,.1f}"
            table.add_row(name, f"{entry.requests:,}", rate, *latencies, f"{entry.failures:,}")
        lines = [f"{count:,} x {text}" for text, count in self.errors[:SHOWN_ERRORS]]
        if len(self.errors) > SHOWN_ERRORS:
            lines.append(f"and {len(self.errors) - SHOWN_ERRORS:,} other errors")
        if self.tries:
            knee = "none that passed" if self.knee is None else f"{self.knee:,.0f} requests/s"
            tried = ", ".join(f"{one.rate:,.0f} {'passed' if one.passed else 'failed'}" for one in self.tries)
            lines.append(f"knee: {knee} (tried {tried})")
        if self.is_late:
            lines.append(f"the load test itself was late, by {self.late_ms:,} ms: its machine is too busy to judge by")
        word = Text("passed", style="green") if self.passed else Text("failed", style="red")
        return Group(table, *map(Text, lines), word)


def measure(
    host: str,
    profile: Profile,
    files: Sequence[str] = (),
    targets: Sequence[str] = (),
    *,
    models: Sequence[str] = (),
    processes: int = 1,
    grpc: str = "127.0.0.1:8500",
) -> Verdict:
    """Put a profile's traffic on the server at `host` (http://name:port) and judge it.

    models: see `subjects.weights`; none: the one that answers where none is named. files, targets: of rows, see
    `subjects.sources`. processes: over which Locust spreads the users. grpc: the server's gRPC port.
    Raises LoadTestError where the server is not ready, or a model or its rows cannot be had.
    """
    weights = subjects.weights(models)
    given = subjects.sources(files, targets, weights or [subjects.DEFAULT])
    _check_ready(host)
    if profile.mix.get(GRPC_USER):
        _check_grpc(grpc)
    mix = subjects.shares(profile.mix, weights, manifest.default_model(host) if weights else None)
    needed = processes * len(mix)
    if profile.users < needed:
        raise LoadTestError(f"{profile.users} users: wanted at least {needed}, of each kind one in each process")
    # Locust reads them again by itself; read here first, so that what is wrong with them is said in one line.
    subjects.gather(host, mix, given)
    run = Run(host, mix, files, targets, processes, grpc)
    return run.once(profile) if profile.search is None else run.search(profile)


@dataclass(frozen=True)
class Run:
    """Locust against one server, with one mix of users and models, and one set of rows."""

    host: str
    mix: subjects.Mix
    files: Sequence[str]
    targets: Sequence[str]
    processes: int
    grpc: str

    def once(self, profile: Profile) -> Verdict:
        with tempfile.TemporaryDirectory(prefix="dropserve-loadtest-") as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary"]
            command += ["--loglevel", "WARNING", "--host", self.host, "--users", str(profile.users)]
            command += [
                "--spawn-rate",
                str(profile.spawn_rate),
                "--run-time",
                f"{math.ceil(profile.seconds + profile.users / profile.spawn_rate) + DRAIN_S}s",
            ]
            command += ["--stop-timeout", str(STOP_TIMEOUT_S), "--report", str(report), "--grpc", self.grpc]
            command += ["--phases", json.dumps([[phase.seconds, phase.rate] for phase in profile.phases])]
            command += ["--mix", json.dumps(self.mix)]
            command += [part for file in self.files for part in ("--rows", file)]
            command += [part for target in self.targets for part in ("--target", target)]
            if self.processes > 1:
                # A port of its own: Locust's usual one would let two load tests on one machine meet.
                port = str(_free_port())
                command += ["--processes", str(self.processes), "--master-bind-host", "127.0.0.1"]
                command += ["--master-bind-port", port, "--master-port", port]
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | {"LOCUST_WAIT_FOR_WORKERS_REPORT_AFTER_RAMP_UP": str(USERS_TIMEOUT_S)},
            )
            if not report.exists():
                said = (done.stderr.strip() or done.stdout.strip()).splitlines()
                raise LoadTestError(
                    f"locust ended with exit code {done.returncode}: {said[-1] if said else 'no output'}"
                )
            figures = json.loads(report.read_text(encoding="utf-8"))
        return judge(self.host, figures, done.returncode, self.mix, profile)

    def search(self, profile: Profile) -> Verdict:
        """The knee: the highest rate whose run passes, by doubling and then by bisection."""
        search = profile.search
        assert search is not None
        tries: list[Try] = []
        best: Verdict | None = None
        last: Verdict | None = None
        passed, failed, rate = 0.0, math.inf, search.lowest
        while failed > passed * (1 + search.precision) and passed < search.highest:
            last = self.once(replace(profile, phases=tuple(Phase(phase.seconds, rate) for phase in profile.phases)))
            total = last.total
            tries.append(Try(rate, total.p99_ms, total.failures, last.passed))
            if last.passed:
                passed, best = rate, last
            else:
                failed = rate
                if passed == 0.0:
                    break
            rate = min(2 * rate, search.highest) if math.isinf(failed) else (passed + failed) / 2
        found = best or last
        assert found is not None
        return replace(found, tries=tries, knee=passed or None)


def judge(host: str, figures: dict[str, Any], exit_code: int, mix: subjects.Mix, profile: Profile) -> Verdict:
    """The verdict on one Locust run, from the report that the locustfile writes and Locust's exit code."""
    *endpoints, total = [Endpoint(**entry) for entry in figures["endpoints"]]
    errors = [(f"{error['name']}: {error['error']}", error["count"]) for error in figures["errors"]]
    errors += [(f"in the load test itself: {error['error']}", error["count"]) for error in figures["exceptions"]]
    errors.sort(key=lambda error: -error[1])
    asked = {endpoint.name for endpoint in endpoints if endpoint.requests}
    errors += [(f"{name}: nothing was answered", 1) for name in _silent(mix, asked)]
    if figures["unsent"]:
        errors.append((f"{figures['unsent']:,} requests were due and not sent before the end, all users being busy", 1))
    if figures["unanswered"] > 0:
        errors.append((f"{figures['unanswered']:,} requests were sent and had no answer when the test ended", 1))
    errors += _too_slow(total, _end_p50_ms(figures["timeline"], profile), profile.thresholds)
    passed = exit_code == 0 and not errors
    return Verdict(host, passed, endpoints, total, errors, figures["timeline"], figures["late_ms"])


def _silent(mix: subjects.Mix, asked: set[str]) -> list[str]:
    """Kinds of requests and models that had no answer at all; a kind need not have asked every model."""
    heard = [(kind, name) for kind, names in mix.items() for name in names if request_name(kind, name) in asked]
    kinds, models = {kind for kind, _ in heard}, {model for _, model in heard}
    wanted = {model for names in mix.values() for model in names if model != subjects.DEFAULT}
    return sorted({NAMES[kind] for kind in mix.keys() - kinds} | {f"model {model}" for model in wanted - models})


def _end_p50_ms(timeline: list[dict[str, Any]], profile: Profile) -> float | None:
    """The median of the medians of the schedule's last seconds; None where nothing was answered then."""
    begin = profile.seconds - END_S
    medians = [point["p50_ms"] for point in timeline if begin <= point["second"] and point["p50_ms"] is not None]
    return statistics.median(medians) if medians else None


def _too_slow(total: Endpoint, end_p50_ms: float | None, limits: Thresholds) -> list[tuple[str, int]]:
    taken = (
        ("p50", total.p50_ms, limits.p50_ms),
        ("p99", total.p99_ms, limits.p99_ms),
        (f"p50 of the last {END_S} s", end_p50_ms, limits.end_p50_ms),
    )
    return [
        (f"all: {name} is {found:,.6g} ms, wanted at most {limit:,.6g} ms", 1)
        for name, found, limit in taken
        if found is not None and limit is not None and found > limit
    ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _check_ready(host: str) -> None:
    if not host.startswith(("http://", "https://")):
        raise LoadTestError(f"--host {host}: wanted the address with its scheme, as http://localhost:3000")
    try:
        response = httpx.get(f"{host}/readyz", timeout=PROBE_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LoadTestError(f"{host}: no server answers ({error}); start one with `dropserve serve`") from error
    if response.status_code != 200:
        raise LoadTestError(f"{host}/readyz: status {response.status_code}, wanted 200; is the server still loading?")


def _check_grpc(address: str) -> None:
    # Only the mixed profile needs it.
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=PROBE_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise LoadTestError(
                f"--grpc {address}: no gRPC server answers; wanted the server's DROPSERVE_GRPC_PORT"
            ) from error
