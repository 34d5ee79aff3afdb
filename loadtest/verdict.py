"""Runs Locust headless against a server, and says whether the server passed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Group
from rich.table import Table
from rich.text import Text

from loadtest import rows
from loadtest.errors import LoadTestError
from loadtest.profile import Profile

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
PROBE_TIMEOUT_S = 5
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Endpoint:
    """Figures of one endpoint, or of all. Latencies in ms are None where nothing was answered."""

    name: str
    requests: int
    failures: int
    requests_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Verdict:
    """passed: every endpoint was asked, and every answer was right."""

    host: str
    passed: bool
    endpoints: list[Endpoint]
    total: Endpoint
    # "<endpoint>: <what was wrong>" and how often, most frequent first.
    errors: list[tuple[str, int]]

    def document(self) -> dict[str, Any]:
        """The verdict as one JSON document."""
        return asdict(self)

    def table(self) -> Group:
        """The verdict for people."""
        table = Table("endpoint", title=f"load test of {self.host}")
        for column in ("requests", "requests/s", "p50 ms", "p95 ms", "p99 ms", "failures"):
            table.add_column(column, justify="right")
        for entry in [*self.endpoints, self.total]:
            name = "both" if entry is self.total else entry.name
            latencies = [f"{value:,.0f}" for value in (entry.p50_ms, entry.p95_ms, entry.p99_ms)]
            rate = f"{entry.requests_per_second:,.1f}"
            table.add_row(name, f"{entry.requests:,}", rate, *latencies, f"{entry.failures:,}")
        lines = [f"{count:,} x {text}" for text, count in self.errors[:SHOWN_ERRORS]]
        if len(self.errors) > SHOWN_ERRORS:
            lines.append(f"and {len(self.errors) - SHOWN_ERRORS:,} other errors")
        word = Text("passed", style="green") if self.passed else Text("failed", style="red")
        return Group(table, *map(Text, lines), word)


def measure(host: str, profile: Profile, rows_file: Path | None = None, target: str | None = None) -> Verdict:
    """Put a profile's traffic on the server at `host` (http://name:port) and judge it.

    rows_file, target: see `rows.choose`.
    Raises LoadTestError where the server is not ready, RowsError (one of them) where the rows cannot be had.
    """
    _check_ready(host)
    # Locust reads them again by itself; read here first, so that what is wrong with them is said in one line.
    rows.choose(host, rows_file, target)
    with tempfile.TemporaryDirectory(prefix="dropserve-loadtest-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary"]
        command += ["--loglevel", "WARNING", "--host", host, "--users", str(profile.users)]
        command += ["--spawn-rate", str(profile.spawn_rate), "--run-time", profile.run_time, "--report", str(report)]
        # A request under way at the end is waited for, and counted.
        command += ["--stop-timeout", "10"]
        command += ["--rows", str(rows_file)] if rows_file else []
        command += ["--target", target] if target else []
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if not report.exists():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise LoadTestError(f"locust ended with exit code {done.returncode}: {said[-1] if said else 'no output'}")
        return judge(host, json.loads(report.read_text(encoding="utf-8")), done.returncode)


def judge(host: str, figures: dict[str, Any], exit_code: int) -> Verdict:
    """The verdict on one Locust run, from the report that the locustfile writes and Locust's exit code."""
    *endpoints, total = [Endpoint(**entry) for entry in figures["endpoints"]]
    errors = [(f"{error['name']}: {error['error']}", error["count"]) for error in figures["errors"]]
    errors += [(f"in the load test itself: {error['error']}", error["count"]) for error in figures["exceptions"]]
    errors.sort(key=lambda error: -error[1])
    unasked = {"/predict", "/uncertainty"} - {endpoint.name for endpoint in endpoints if endpoint.requests}
    errors += [(f"{name}: nothing was answered", 1) for name in sorted(unasked)]
    passed = exit_code == 0 and not errors
    return Verdict(host=host, passed=passed, endpoints=endpoints, total=total, errors=errors)


def _check_ready(host: str) -> None:
    try:
        response = httpx.get(f"{host}/readyz", timeout=PROBE_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LoadTestError(f"{host}: no server answers ({error}); start one with `dropserve serve`") from error
    if response.status_code != 200:
        raise LoadTestError(f"{host}/readyz: status {response.status_code}, wanted 200; is the server still loading?")
