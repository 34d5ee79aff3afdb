"""What one core gives: rows a second of the five networks and of a served Sonar, what a million costs, how many cores.

    python -m benchmarks.cores [--price 0.04] [--usage 0.7] [--seconds 3] [--letters abcde] [--json]

The networks are those of `benchmarks.nets`, published and run as the server runs them, a session on the artifact, on
one thread, with dropout off and with T = 100; Sonar is asked over HTTP on BentoML's port, the server on one core and
wrk on the other, one row a request and 100. All rates are per second of processor time of the process that answers, so
that other work on the machine counts little.

price: of one core for an hour, in any currency; 0.04 is an assumption, to be replaced by your own. usage: how much
of a core may be planned for, so that requests do not wait long.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import nets
from benchmarks.server.load import BenchmarkError, Case, Server, check, load, require_tools, running, train
from loadtest import rows as sonar

DRAWS = 100
CONNECTIONS = 16
MANY_ROWS = 100
RATES = (10**3, 10**5, 10**7)
# By letter: rows in a call. Rates hardly grow with more.
CALL_ROWS = {"a": 512, "b": 64, "c": 32, "d": 32, "e": 8}

# One network in a process of its own: rows per second of processor time, dropout off and T draws.
ENGINE = """
import json, sys, tempfile, time
from pathlib import Path
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
from benchmarks import nets
from models.artifact import publish
from models.contract import MC_SAMPLE, NUM_SAMPLES, SEED, SERVING_DEFAULT, read_manifest
from serving.graph import Graph
letter, rows, draws, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
subject = nets.SUBJECTS[letter]
with tempfile.TemporaryDirectory() as folder:
    artifact = publish(nets.build(subject), name=subject.name, repository=Path(folder))
    graph, [item] = Graph(artifact), read_manifest(artifact).inputs
x = nets.inputs(tuple(item.shape), rows)
found = {}
for name, function, scalars in (
    ("predict", SERVING_DEFAULT, {}),
    ("draws", MC_SAMPLE, {NUM_SAMPLES: np.int32(draws), SEED: np.int64(0)}),
):
    asked = {item.name: x, **scalars}
    graph.run(function, asked)
    graph.run(function, asked)
    begin, calls = time.process_time(), 0
    while time.process_time() - begin < seconds:
        graph.run(function, asked)
        calls += 1
    found[name] = calls * rows / (time.process_time() - begin)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Core:
    """Rows per second of one core: dropout off, and with T draws."""

    what: str
    predict: float
    draws: float


@dataclass(frozen=True)
class Money:
    """price: of one core for an hour; usage: the share of a core that is planned for."""

    price: float
    usage: float

    def million(self, rate: float) -> float:
        """What 1,000,000 rows cost, at `rate` rows a second."""
        return self.price / 3600 * 1e6 / (rate * self.usage)

    def cores(self, rate: float, wanted: float) -> int:
        """Cores for `wanted` rows a second."""
        return math.ceil(wanted / (rate * self.usage))


def network(letter: str, seconds: float) -> Core:
    command = [sys.executable, "-c", ENGINE, letter, str(CALL_ROWS[letter]), str(DRAWS), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"network {letter}: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Core(f"({letter}) {nets.SUBJECTS[letter].title}", found["predict"], found["draws"])


def served(seconds: int) -> Iterator[Core]:
    """Sonar over HTTP, one row a request and MANY_ROWS."""
    require_tools()
    _, known = sonar.read_csv(sonar.SONAR, sonar.SONAR_TARGET)
    with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as name:
        folder = Path(name)
        train(folder / "artifacts")
        command = [sys.executable, "-m", "dropserve", "serve", "--port", "{port}"]
        closed = {"DROPSERVE_GRPC_PORT": "0", "DROPSERVE_REST_PORT": "0"}
        environment = {"DROPSERVE_REPOSITORY": str(folder / "artifacts"), **closed}
        server = Server("dropserve", command, environment, "/readyz", [])
        with running(server, folder / "log") as (url, _, process):
            for count in (1, MANY_ROWS):
                instances = {"instances": [known[number % len(known)] for number in range(count)]}
                rates = [
                    _rate(url, Case(path, path, json.dumps(instances | sent)), process, count, seconds)
                    for path, sent in (("/predict", {}), ("/uncertainty", {"num_samples": DRAWS}))
                ]
                yield Core(f"Sonar over HTTP, {count} row{'s' if count > 1 else ''} a request", *rates)


def _rate(url: str, case: Case, process: psutil.Process, rows: int, seconds: int) -> float:
    check(url, case)
    load(url, case, CONNECTIONS, 1)
    before = _processor_seconds(process)
    found = load(url, case, CONNECTIONS, seconds)
    if found["failed"]:
        raise BenchmarkError(f"{case.name}: {found['failed']} of {found['requests']} requests failed")
    return found["requests"] * rows / (_processor_seconds(process) - before)


def _processor_seconds(process: psutil.Process) -> float:
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def main(
    price: Annotated[float, typer.Option(min=1e-6, help="Of one core for an hour.")] = 0.04,
    usage: Annotated[float, typer.Option(min=0.05, max=1, help="Share of a core that is planned for.")] = 0.7,
    seconds: Annotated[int, typer.Option(min=1, help="Of each figure.")] = 3,
    letters: Annotated[str, typer.Option(help="Which networks.")] = "abcde",
    skip_server: Annotated[bool, typer.Option("--skip-server", help="The networks alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Measure, and say what follows."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    money = Money(price, usage)
    try:
        unknown = sorted(set(letters) - set(nets.SUBJECTS))
        if unknown:
            raise BenchmarkError(f"--letters {letters}: no network {unknown[0]!r}; wanted of {''.join(nets.SUBJECTS)}")
        cores = []
        with console.status("measuring"):
            cores += [network(letter, seconds) for letter in letters]
            cores += [] if skip_server else served(seconds)
    except BenchmarkError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps([asdict(core) for core in cores], indent=2))
        return
    table = Table("one core", "rows/s", f"rows/s, T={DRAWS}", "a million", f"a million, T={DRAWS}")
    for core in cores:
        figures = [f"{core.predict:,.0f}", f"{core.draws:,.0f}"]
        table.add_row(core.what, *figures, f"{money.million(core.predict):.4f}", f"{money.million(core.draws):.4f}")
    console.print(table)
    table = Table(f"cores for T={DRAWS}", *(f"{rate:,} rows/s" for rate in RATES))
    for core in cores:
        table.add_row(core.what, *(f"{money.cores(core.draws, rate):,}" for rate in RATES))
    console.print(table)
    console.print(f"{price:g} for a core and hour (an assumption), {usage:.0%} of a core planned for")


if __name__ == "__main__":
    typer.run(main)
