"""The draw engine against everything else that could answer: one run, interleaved rounds, medians, ratios.

    python -m benchmarks.engine [--quick] [--models abcde] [--draws 100 --rows 8] [--against PyTorch] [--json FILE]
    python -m benchmarks.engine --memory              peak memory whatever T is; some minutes

Ours is a published artifact, run as the server runs it. Every framework has a worker process of its own, pinned to the
same core, one thread each; in every round each contestant answers in turn while the others wait, so that a slow minute
of the machine falls on all of them. What is compared is processor time: other programs on the core do not count.
Before anything is timed, every contestant's mean and deviation of the draws are compared with ours.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Run as a file: modules are found from the project's root, and this folder hides none of Python's own.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import importlib.metadata
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import memory
from benchmarks.nets import SUBJECTS, Net
from benchmarks.verdicts import NOT_MEASURED, Cell, Figures, figure, verdicts
from benchmarks.worker import ONE_THREAD, Worker, WorkerError

DRAWS = (32, 100, 1000)
ROWS = (1, 8, 64)
GEMM_SIZE = 2048
OURS = ("ours, kept masks", "ours, drawn masks")

# Contestants' class by the package that must be importable.
FRAMEWORKS = {
    "tensorflow": "benchmarks.contestants:TensorFlow",
    "torch": "benchmarks.peers:PyTorch",
    "jax": "benchmarks.peers:Jax",
    "onnxruntime": "benchmarks.peers:OnnxRuntime",
    "openvino": "benchmarks.peers:OpenVino",
    "numpy": "benchmarks.peers:NumPy",
}

# The check: its cell; draws of ours and of others at most; seconds after which a slow contestant has given enough.
CHECK_DRAWS, CHECK_ROWS = 100, 8
MOST_CHECK_DRAWS = 3000
CHECK_S = 0.5
QUICK_CHECK_S = 0.1
# Standard errors that two means may be apart, the largest of some 80; and those of the deviations, pooled.
CHECK_ERRORS = 5.0
CHECK_STD_ERRORS = 6.0


# The memory check: its model and cells, and how many MB the second may need beyond the first.
MEMORY_LETTER, MEMORY_ROWS = "c", 64
MEMORY_DRAWS = (100, 100_000)
MEMORY_SPARE_MB = 300


class BenchmarkError(Exception):
    """A benchmark cannot be run here. `str()` is one line: what was found, what is wanted."""


@dataclass(frozen=True)
class Plan:
    """What is run. budget_s: a sample of a slower cell is timed on fewer draws and scaled."""

    letters: str
    draws: tuple[int, ...]
    rows: tuple[int, ...]
    rounds: int
    budget_s: float
    against: tuple[str, ...]
    check_s: float

    def cells(self) -> list[tuple[int, int]]:
        return [(draws, rows) for draws in self.draws for rows in self.rows]

    def takes(self, name: str) -> bool:
        return name in OURS or not self.against or any(part.lower() in name.lower() for part in self.against)


@dataclass
class Report:
    """All figures of one run."""

    cpu: str
    core: int
    versions: dict[str, str] = field(default_factory=dict)
    gemm_gflops: dict[str, float] = field(default_factory=dict)
    packaging: dict[str, dict[str, Any]] = field(default_factory=dict)
    flops: dict[str, tuple[float, float]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Bench:
    """The workers, and what is asked of them."""

    def __init__(self, core: int, plan: Plan, folder: Path, console: Console) -> None:
        self.plan, self.console = plan, console
        self.report = Report(cpu=_cpu_name(), core=core)
        os.environ.update(ONE_THREAD)
        self.workers: dict[str, Worker] = {}
        self.home: dict[str, Worker] = {}
        for package, framework in FRAMEWORKS.items():
            if importlib.util.find_spec(package) is None:
                self.note(f"{package}: not installed, skipped")
                continue
            worker = Worker(framework, core, folder / f"{package}.log")
            names = [name for name in worker.ask("names") if plan.takes(name)]
            if not names and package != "numpy":
                worker.close()
                continue
            self.workers[package] = worker
            self.report.versions[package] = importlib.metadata.version(package)
            self.home |= dict.fromkeys(names, worker)

    def note(self, line: str) -> None:
        self.report.notes.append(line)
        self.console.print(line, style="yellow", markup=False)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def measure_gemm(self) -> None:
        """The core's peak: the best of NumPy's and TensorFlow's, at several moments of the run."""
        for package in ("tensorflow", "numpy"):
            if package in self.workers:
                found = self.workers[package].ask("gemm", GEMM_SIZE)
                self.report.gemm_gflops[package] = max(found, self.report.gemm_gflops.get(package, 0.0))

    def publish(self, letter: str, folder: Path) -> None:
        with self.console.status(f"({letter}) {SUBJECTS[letter].title}: publishing"):
            packaging = self.workers["tensorflow"].ask("load", letter, folder)
        self.report.packaging[letter] = asdict(packaging)

    def load(self, letter: str, folder: Path) -> list[str]:
        """Publish the model and hand its steps to the peers; returns the contestants that take part."""
        title = SUBJECTS[letter].title
        self.publish(letter, folder)
        with self.console.status(f"({letter}) {title}: handing over"):
            for package, worker in self.workers.items():
                if package != "tensorflow":
                    net: Net = worker.ask("load", letter, folder)
                    self.report.flops[letter] = net.flops()
        with self.console.status(f"({letter}) {title}: checking answers"):
            return list(self._agreeing(letter))

    def _agreeing(self, letter: str) -> Iterator[str]:
        ours = self.home[OURS[0]].ask("reference", OURS[0], CHECK_ROWS, MOST_CHECK_DRAWS)
        limits = CHECK_ROWS, CHECK_DRAWS, MOST_CHECK_DRAWS, self.plan.check_s
        for name in self.home:
            try:
                if name in OURS:
                    theirs = [self.home[name].ask("reference", name, CHECK_ROWS, MOST_CHECK_DRAWS)]
                else:
                    theirs = self.home[name].ask("answers", name, *limits)
            except WorkerError as error:
                self.note(f"({letter}) {name}: left out, {error}")
                continue
            fault = next(filter(None, (disagreement(ours, way) for way in theirs)), None)
            if fault and name in OURS:
                raise BenchmarkError(f"({letter}) {name}: {fault}")
            if fault:
                self.note(f"({letter}) {name}: left out, {fault}")
                continue
            yield name

    def measure(self, letter: str, names: list[str], draws: int, rows: int) -> Cell:
        """One cell: everybody warmed up, then rounds in which everybody takes a turn."""
        estimates = {}
        for name in names:
            try:
                estimates[name] = self.home[name].ask("prepare", name, rows, draws, self.plan.budget_s, name in OURS)
            except WorkerError as error:
                self.note(f"({letter}) {name}, T={draws}, {rows} rows: left out, {error}")
        samples: dict[str, list[float]] = {name: [] for name in estimates}
        for _ in range(self.plan.rounds):
            for name in estimates:
                samples[name].append(self.home[name].ask("sample", name, draws))
        for worker in self.workers.values():
            worker.ask("drop")
        return Cell(
            letter=letter,
            draws=draws,
            rows=rows,
            seconds={name: statistics.median(found) for name, found in samples.items()},
            samples=samples,
            timed_draws={name: estimate.timed_draws for name, estimate in estimates.items()},
        )


def disagreement(ours: Any, theirs: Any) -> str | None:
    """What shows that two answers (mean and deviation [rows, outputs], draws) are not of one distribution, or None."""
    (mean, std, our_draws), (their_mean, their_std, their_draws) = ours, theirs
    if np.shape(mean) != np.shape(their_mean):
        return f"its answer's shape is {np.shape(their_mean)}, ours {np.shape(mean)}"
    # Outputs whose draws hardly differ are compared at the precision of the arithmetic.
    error = np.sqrt(np.square(std) * (1 / our_draws + 1 / their_draws)) + 1e-5
    apart = float(np.max(np.abs(mean - their_mean) / error))
    if not apart <= CHECK_ERRORS:
        return f"its mean is {apart:.1f} standard errors from ours"
    ratio = float(np.sqrt(np.square(their_std).sum() / np.square(std).sum()))
    tolerance = CHECK_STD_ERRORS * np.sqrt(0.5 / their_draws + 0.5 / our_draws)
    if not abs(ratio - 1) <= tolerance:
        return f"its deviation is {ratio:.2f} times ours"
    return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def run(bench: Bench, folder: Path) -> None:
    plan, console = bench.plan, bench.console
    bench.measure_gemm()
    for letter in plan.letters:
        names = bench.load(letter, folder)
        cells = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"({letter}) {SUBJECTS[letter].title}", total=len(plan.cells()))
            for draws, rows in plan.cells():
                cells.append(bench.measure(letter, names, draws, rows))
                progress.advance(task)
        bench.measure_gemm()
        bench.report.cells += cells
        show_cells(console, letter, cells)


def measure_memory(bench: Bench, folder: Path) -> None:
    """Peak memory of few and of many draws."""
    console = bench.console
    bench.publish(MEMORY_LETTER, folder)
    artifact = bench.report.packaging[MEMORY_LETTER]["folder"]
    peaks = []
    for draws in MEMORY_DRAWS:
        with console.status(f"({MEMORY_LETTER}) {MEMORY_ROWS} rows, {draws:,} draws"):
            peaks.append(memory.in_own_process(artifact, MEMORY_ROWS, draws))
        console.print(f"({MEMORY_LETTER}) {MEMORY_ROWS} rows, T = {draws:,}: peak resident memory {peaks[-1]:,.0f} MB")
    within = peaks[1] - peaks[0] <= MEMORY_SPARE_MB
    word = "PASS" if within else "FALLS SHORT"
    console.print(f"difference {peaks[1] - peaks[0]:+,.0f} MB, at most {MEMORY_SPARE_MB} MB wanted: {word}")


def show_cells(console: Console, letter: str, cells: list[Cell]) -> None:
    table = Table(title=f"({letter}) {SUBJECTS[letter].title}: time of each / time of ours, kept masks")
    table.add_column("contestant")
    for cell in cells:
        table.add_column(f"T={cell.draws}\n{cell.rows} row{'s' * (cell.rows > 1)}", justify="right")
    table.add_row("ours, ms", *[figure(cell.seconds[OURS[0]] * 1e3) for cell in cells], end_section=True)
    names = list(dict.fromkeys(name for cell in cells for name in cell.seconds))
    for name in names[1:]:
        row = []
        for cell in cells:
            if name not in cell.seconds:
                row.append("")
                continue
            scaled = "~" if cell.timed_draws[name] < cell.draws else ""
            row.append(scaled + figure(cell.seconds[name] / cell.seconds[OURS[0]]))
        table.add_row(name, *row)
    console.print(table)


def show_summary(console: Console, report: Report) -> None:
    peak = max(report.gemm_gflops.values())
    console.print(f"\n{report.cpu}, core {report.core}, one thread. ~ timed on fewer draws and scaled.")
    measured = ", ".join(f"{name} {found:.1f}" for name, found in report.gemm_gflops.items())
    console.print(f"f32 GEMM peak {GEMM_SIZE}^3: {peak:.1f} GFLOP/s ({measured})")
    for letter, packed in report.packaging.items():
        model = packed["graph_bytes"] + packed["variables_bytes"]
        console.print(
            f"({letter}) published in {packed['seconds']:.1f} s; SavedModel {model / 1e6:.2f} MB, of it graph "
            f"{packed['graph_bytes'] / 1e6:.2f}; weights {packed['weights_bytes'] / 1e6:.2f} MB"
        )
    table = Table("", "wanted", "worst cell", "found", "drawn masks", "", title="What must be reached")
    found = list(verdicts(Figures(report.cells, report.flops, peak * 1e9, report.packaging)))
    for verdict in found:
        if verdict.word == NOT_MEASURED:
            continue
        style = {"PASS": "green", "FALLS SHORT": "red"}.get(verdict.word, "dim")
        table.add_row(
            verdict.what, verdict.wanted, verdict.where, verdict.found, verdict.drawn, f"[{style}]{verdict.word}[/]"
        )
    console.print(table)
    missing = sum(verdict.word == NOT_MEASURED for verdict in found)
    if missing:
        console.print(f"{missing} more are not measured by this selection")


def main(
    core: Annotated[int, typer.Option(help="The core that every contestant is pinned to.")] = 0,
    models: Annotated[str, typer.Option(help="Which of the five.")] = "abcde",
    draws: Annotated[list[int] | None, typer.Option(help="T; may be given again.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows; may be given again.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; a figure is the median.")] = 5,
    budget: Annotated[float, typer.Option(help="Seconds of one sample of a slow contestant.")] = 0.3,
    against: Annotated[list[str] | None, typer.Option(help="Part of a contestant's name; may be given again.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer cells and rounds: two minutes.")] = False,
    check_memory: Annotated[bool, typer.Option("--memory", help="Peak memory of (c), and nothing else.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Time the draw engine against its peers on one core."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    plan = Plan(
        letters="".join(letter for letter in SUBJECTS if letter in models),
        draws=tuple(draws or ((100,) if quick else DRAWS)),
        rows=tuple(rows or ((8,) if quick else ROWS)),
        rounds=3 if quick else rounds,
        budget_s=0.05 if quick else budget,
        # Nobody else is needed for the memory.
        against=(OURS[0],) if check_memory else tuple(against or ()),
        check_s=QUICK_CHECK_S if quick else CHECK_S,
    )
    try:
        with (
            tempfile.TemporaryDirectory(prefix="dropserve-bench-") as folder,
            Bench(core, plan, Path(folder), console) as bench,
        ):
            if check_memory:
                measure_memory(bench, Path(folder))
                return
            run(bench, Path(folder))
    except (BenchmarkError, WorkerError) as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    show_summary(console, bench.report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(bench.report), indent=1, default=str))


if __name__ == "__main__":
    typer.run(main)
