"""The server beside its peers, and what it must reach.

    python -m benchmarks.http [--seconds 5] [--rounds 3] [--connections 16 --connections 64] [--quick] [--json]
        [--trained REPOSITORY] [--mlserver PYTHON] [--soak MINUTES]

All servers run at one time on one core, and wrk asks one after the other from another core: whoever is not asked does
nothing. The cases take turns, round by round, and a ratio is taken within each round, so that a slow minute of the
machine falls on both its sides. Medians over the rounds. The output is Markdown.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Run as a file: modules are found from the project's root, and this folder hides none of Python's own.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import contextlib
import json
import shutil
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from benchmarks.server import contestants
from benchmarks.server.load import (
    WARM_UP_S,
    BenchmarkError,
    Case,
    Running,
    Server,
    check,
    figures,
    grpc_load,
    load,
    require_tools,
    started,
    train,
    wrk,
)
from benchmarks.server.soak import soak
from benchmarks.server.wanted import HEAD, Figure, Figures, Line, lines, ratio, start_lines

STREAM_CONNECTIONS = 4


def take(running: Running, case: Case, connections: int, seconds: float) -> dict[str, int]:
    """One round of one case."""
    if case.speaks_grpc:
        return grpc_load(f"127.0.0.1:{running.ports[case.port]}", case, connections, seconds)
    return load(running.url(case).removesuffix(case.path), case, connections, seconds)


def beside_a_stream(running: Running, seconds: float, connections: int) -> dict[str, int]:
    """One round of /predict while others ask for many draws."""
    case = next(c for c in running.server.cases if c.name == contestants.named(contestants.BARE, contestants.PREDICT))
    stream = contestants.long_stream()
    url = running.url(case).removesuffix(case.path)
    with wrk(url, stream, STREAM_CONNECTIONS, seconds + 2) as process:
        taken = load(url, case, connections, seconds)
        others = figures(*process.communicate(), process.returncode)
    if not others["requests"]:
        raise BenchmarkError(f"{stream.name}: none was answered in {seconds + 2} s")
    return taken


def summarise(case: str, connections: int, rounds: list[dict[str, int]]) -> Figure:
    return Figure(
        case=case,
        connections=connections,
        per_second=[r["requests"] / r["microseconds"] * 1e6 for r in rounds],
        p50_ms=[r["p50_us"] / 1000 for r in rounds],
        p99_ms=[r["p99_us"] / 1000 for r in rounds],
        failed=sum(r["failed"] for r in rounds),
    )


def measure(
    servers: list[Server], connections: list[int], rounds: int, seconds: float, folder: Path, console: Console
) -> tuple[list[Line], Figures]:
    """Start one server after the other; then ask all of them, round by round."""
    stream = f"{contestants.named(contestants.BARE, contestants.PREDICT)}, beside T={contestants.LONG_DRAWS:,}"
    taken: dict[tuple[str, int], list[dict[str, int]]] = {}
    with contextlib.ExitStack() as stack:
        all_running: list[Running] = []
        for index, server in enumerate(servers):
            console.print(f"starting {server.name}", style="dim")
            running = stack.enter_context(started(server, folder / f"{index}.log"))
            all_running.append(running)
            for case in server.cases:
                if not case.speaks_grpc:
                    check(running.url(case).removesuffix(case.path), case)
                take(running, case, connections[0], min(WARM_UP_S, seconds))
        for number in range(rounds):
            for count in connections:
                console.print(f"round {number + 1} of {rounds}, {count} connections", style="dim")
                for running in all_running:
                    for case in running.server.cases:
                        taken.setdefault((case.name, count), []).append(take(running, case, count, seconds))
                taken.setdefault((stream, count), []).append(beside_a_stream(all_running[0], seconds, count))
        found = {key: summarise(*key, results) for key, results in taken.items()}
        verdicts = lines(found)
        for count in connections:
            alone = found[contestants.named(contestants.BARE, contestants.PREDICT), count].p99_ms
            beside = found[stream, count].p99_ms
            verdicts.append(ratio(f"{stream} / alone, p99, c={count}", beside, alone, 2, at_most=True))
        for running in all_running:
            ours = running.server.name == "dropserve"
            verdicts += start_lines(running, ours)
    return verdicts, found


def main(
    seconds: Annotated[int, typer.Option(help="Length of one round.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds of each case.", min=1)] = 3,
    connections: Annotated[list[int] | None, typer.Option(help="Open connections; may be given again.")] = None,
    mlserver: Annotated[
        Path | None, typer.Option(help="Python of an environment with mlserver and tensorflow.")
    ] = None,
    trained: Annotated[Path | None, typer.Option(help="A repository that holds Sonar's version 1.")] = None,
    soak_minutes: Annotated[float, typer.Option("--soak", help="Minutes of traffic with reloads, after the rest.")] = 0,
    quick: Annotated[bool, typer.Option(help="One round of a second each: whether it runs, not how fast.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Train Sonar, serve it on one core beside the peers, and measure all of them from another."""
    console = Console(stderr=True, highlight=False)
    counts = connections or [16, 64]
    if quick:
        seconds, rounds = 1, 1
    failure: BenchmarkError | None = None
    try:
        require_tools()
        with tempfile.TemporaryDirectory(prefix="dropserve-bench-") as name:
            folder = Path(name)
            repository = folder / "artifacts"
            busy = psutil.cpu_percent(interval=1)
            if trained is None:
                console.print("training Sonar", style="dim")
                train(repository)
            else:
                shutil.copytree(trained / "sonar" / "1", repository / "sonar" / "1")
            artifact = repository / "sonar" / "1"
            servers = [contestants.dropserve(repository), contestants.plain(artifact), contestants.constant()]
            if mlserver is not None:
                servers.append(contestants.mlserver(mlserver.absolute(), artifact, folder / "mlserver"))
            verdicts, found = measure(servers, counts, rounds, seconds, folder, console)
            if soak_minutes:
                console.print(f"soak, {soak_minutes:g} minutes", style="dim")
                try:
                    verdicts += soak(repository, soak_minutes, folder / "soak.log")
                except BenchmarkError as error:
                    # What was measured before it is not lost.
                    failure = error
    except BenchmarkError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    if as_json:
        result = {
            "busy_percent": busy,
            "lines": [asdict(line) | {"verdict": line.verdict} for line in verdicts],
            "figures": [asdict(figure) for figure in found.values()],
        }
        print(json.dumps(result, indent=2))
    else:
        show(verdicts, found)
        print(f"\nBefore the run, other work took {busy:.0f} % of the machine.")
    if failure is not None:
        console.print(f"error: soak: {failure}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2)


def show(verdicts: list[Line], found: Figures) -> None:
    print(HEAD)
    for line in verdicts:
        print(line.row())
    print("\n| case | connections | requests/s | p50 ms | p99 ms | failed |\n|---|---|---|---|---|---|")
    for figure in sorted(found.values(), key=lambda figure: figure.connections):
        middle = statistics.median
        rate, p50, p99 = middle(figure.per_second), middle(figure.p50_ms), middle(figure.p99_ms)
        print(f"| {figure.case} | {figure.connections} | {rate:,.0f} | {p50:.1f} | {p99:.1f} | {figure.failed:,} |")
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
