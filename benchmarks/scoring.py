"""Scoring of files against JSON requests, the engine alone, and Ray.

    python -m benchmarks.scoring [--rows 1000000] [--seconds 10] [--skip-ray] [--json]

Sonar-like rows (Sonar's own with a little noise), T = 100. On one core each, one after the other: the engine alone (the
graph called with arrays that are there already), `dropserve score`, and a server that wrk, on the other core, asks
for 100 rows a request. Then `dropserve score` on all cores, without Ray and with it. Whole commands are timed, start
and loading of the model included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.server.load import (
    SERVER_CORE,
    WARM_UP_S,
    BenchmarkError,
    Case,
    Server,
    check,
    load,
    require_tools,
    running,
    train,
)
from loadtest import rows

DRAWS = 100
ROWS_PER_REQUEST = 100
CONNECTIONS = 4
# Rows that are made at a time, and the deviation of the noise that makes them differ.
BLOCK = 100_000
NOISE = 0.01

OVER_JSON, OF_ENGINE, RSS_LIMIT_MB, RAY_OF_LOCAL = 20.0, 0.7, 2_000, 0.7

# The engine alone, in a process of its own: rows/s over `seconds`, and rows per second of processor time.
ENGINE = """
import json, sys, time
from pathlib import Path
import numpy as np
from models.contract import drawing
from serving.runtime import Model
from serving.scoring.scorer import CALL_ROW_DRAWS
folder, draws, seconds, data = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), np.load(sys.argv[4])
model = Model.load(Path(folder))
rows = CALL_ROW_DRAWS // draws
signature, scalars = drawing(model.manifest, draws, 0)
asked = {"features": data[:rows], **scalars}
model.run(signature, asked)
begin, cpu, calls = time.perf_counter(), time.process_time(), 0
while time.perf_counter() - begin < seconds:
    model.run(signature, asked)
    calls += 1
wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
print(json.dumps({"wall": calls * rows / wall, "cpu": calls * rows / cpu}))
"""


@dataclass(frozen=True)
class Timed:
    """One command, to its end; rss_mb: its largest process at its largest."""

    wall_s: float
    cpu_s: float
    rss_mb: float


@dataclass(frozen=True)
class Check:
    what: str
    found: float
    wanted: float
    reached: bool


def sonar_like(count: int, path: Path) -> np.ndarray:
    """Write `count` rows to a Parquet file; return the first ones, as the model takes them."""
    names, values = rows.read_csv(rows.SONAR, rows.SONAR_TARGET)
    known = np.array(values, np.float32)
    generator = np.random.default_rng(0)
    first: np.ndarray | None = None
    schema = pa.schema([("id", pa.int64()), *((name, pa.float32()) for name in names or [])])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            noise = generator.normal(0, NOISE, (size, known.shape[1])).astype(np.float32)
            block = np.clip(known[generator.integers(0, len(known), size)] + noise, 0, 1)
            first = block[:1_000] if first is None else first
            columns = [pa.array(np.arange(start, start + size)), *(pa.array(column) for column in block.T.copy())]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    assert first is not None
    return first


def timed(command: list[str], core: str | None) -> Timed:
    pinned = ["taskset", "-c", core, *command] if core is not None else command
    begin = perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(pinned, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        # Of this child alone, and of what it waited for.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = perf_counter() - begin
        if process.returncode:
            errors.seek(0)
            raise BenchmarkError(f"{' '.join(command[-8:])}: {errors.read().decode(errors='replace')[-500:]}")
    return Timed(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def json_rate(repository: Path, sample: np.ndarray, seconds: int, log: Path) -> float:
    """Rows/s of `/uncertainty` on its own core, with 100 rows a request."""
    instances = [[round(float(value), 4) for value in row] for row in sample[:ROWS_PER_REQUEST]]
    case = Case("json", "/uncertainty", json.dumps({"instances": instances, "num_samples": DRAWS}))
    environment = {"DROPSERVE_REPOSITORY": str(repository), "DROPSERVE_GRPC_PORT": "0", "DROPSERVE_REST_PORT": "0"}
    command = [sys.executable, "-m", "dropserve", "serve", "--port", "{port}"]
    with running(Server("dropserve", command, environment, "/readyz", [case]), log) as (url, _, _):
        check(url, case)
        load(url, case, CONNECTIONS, WARM_UP_S)
        found = load(url, case, CONNECTIONS, seconds)
    if found["failed"]:
        raise BenchmarkError(f"{found['failed']} of {found['requests']} JSON requests failed")
    return found["requests"] * ROWS_PER_REQUEST / found["microseconds"] * 1e6


def engine_rate(artifact: Path, sample: np.ndarray, seconds: int, folder: Path) -> dict[str, float]:
    np.save(folder / "sample.npy", sample)
    command = ["taskset", "-c", SERVER_CORE, sys.executable, "-c", ENGINE, str(artifact), str(DRAWS), str(seconds)]
    done = subprocess.run([*command, str(folder / "sample.npy")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"the engine alone: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(
    count: Annotated[int, typer.Option("--rows", min=1000, help="Rows to score.")] = 1_000_000,
    seconds: Annotated[int, typer.Option(min=1, help="Of the engine alone, and of wrk.")] = 10,
    skip_ray: Annotated[bool, typer.Option("--skip-ray", help="Leave Ray out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Train Sonar, score Sonar-like rows, and hold the rates beside each other."""
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    try:
        require_tools()
        with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as name:
            checks, figures = measure(Path(name), count, seconds, skip_ray, console)
    except BenchmarkError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "figures": figures}, indent=2))
        return
    table = Table("figure", "found", "wanted", "", title=f"{count:,} rows, T = {DRAWS}")
    for one in checks:
        word = "[green]reached[/]" if one.reached else "[red]missed[/]"
        table.add_row(one.what, f"{one.found:,.2f}", f"{one.wanted:,.2f}", word)
    console.print(table)
    for what, value in figures.items():
        console.print(f"{what}: {value:,.1f}")


def measure(
    folder: Path, count: int, seconds: int, skip_ray: bool, console: Console
) -> tuple[list[Check], dict[str, float]]:
    repository, source, tiny = folder / "artifacts", folder / "in.parquet", folder / "one.parquet"
    with console.status("training Sonar, writing rows"):
        train(repository)
        sample = sonar_like(count, source)
        sonar_like(1, tiny)
    score = [sys.executable, "-m", "dropserve", "score"]
    options = ["--model", "sonar", "--num-samples", str(DRAWS), "--repository", str(repository), "--json"]
    with console.status("the engine alone, files and JSON on one core"):
        before = engine_rate(repository / "sonar" / "1", sample, seconds, folder)
        start = timed([*score, str(tiny), str(folder / "a"), *options], SERVER_CORE)
        local = timed([*score, str(source), str(folder / "b"), *options], SERVER_CORE)
        after = engine_rate(repository / "sonar" / "1", sample, seconds, folder)
        over_json = json_rate(repository, sample, seconds, folder / "log")
    # The machine may have changed meanwhile: the engine is measured on both sides of the scoring.
    engine_wall, engine_cpu = (before["wall"] + after["wall"]) / 2, (before["cpu"] + after["cpu"]) / 2
    # The start is taken off in processor time only: by the clock it depends on what else the machine does.
    whole, cpu = count / local.wall_s, count / max(local.cpu_s - start.cpu_s, 1e-9)
    figures = {
        "engine alone, rows/s": engine_wall,
        "engine alone, rows per second of processor time": engine_cpu,
        "score, rows/s, whole command": whole,
        "score, rows per second of processor time, from the first row": cpu,
        "score, seconds, whole command": local.wall_s,
        "score with one row, seconds": start.wall_s,
        f"/uncertainty with {ROWS_PER_REQUEST} rows a request, rows/s": over_json,
        "engine alone / JSON: no scoring can have more": engine_wall / over_json,
    }
    checks = [
        Check("score / JSON, whole command", whole / over_json, OVER_JSON, whole / over_json >= OVER_JSON),
        Check("score / engine, whole command", whole / engine_wall, OF_ENGINE, whole / engine_wall >= OF_ENGINE),
        Check("score / engine, processor time", cpu / engine_cpu, OF_ENGINE, cpu / engine_cpu >= OF_ENGINE),
        Check("peak resident memory, MB", local.rss_mb, RSS_LIMIT_MB, local.rss_mb <= RSS_LIMIT_MB),
    ]
    if not skip_ray:
        with console.status("all cores, without Ray and with it"):
            here = timed([*score, str(source), str(folder / "c"), *options], None)
            ray = timed([*score, str(source), str(folder / "d"), *options, "--ray"], None)
            ray_start = timed([*score, str(tiny), str(folder / "e"), *options, "--ray"], None)
        figures |= {
            "score on all cores, seconds": here.wall_s,
            "score --ray, seconds": ray.wall_s,
            "score --ray with one row, seconds": ray_start.wall_s,
        }
        whole_ratio = here.wall_s / ray.wall_s
        checks += [
            Check("Ray / local, whole command", whole_ratio, RAY_OF_LOCAL, whole_ratio >= RAY_OF_LOCAL),
        ]
    return checks, figures


if __name__ == "__main__":
    typer.run(main)
