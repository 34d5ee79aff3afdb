"""A process that holds one framework's contestants, on one core, and answers the benchmark's questions over a pipe."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.contestants import Run, Unsuitable

# Set before any library starts its threads.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "KERAS_BACKEND": "tensorflow",
}
# A sample lasts at least this long: shorter runs are repeated within it.
SAMPLE_S = 0.03
# Draws of a contestant in a check at least; a loop in Python gives them one by one.
LEAST_CHECK_DRAWS = 20


@dataclass(frozen=True)
class Estimate:
    """step: draws of one call; timed_draws: how many a sample times, the rest is scaled; repeats: within a sample."""

    step: int
    timed_draws: int
    repeats: int


class WorkerError(Exception):
    """A contestant cannot run. `str()` is one line."""


class Worker:
    """The parent's end. Questions are methods of `_Bench`."""

    def __init__(self, framework: str, core: int, log: Path) -> None:
        self.framework = framework
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, framework, core, log), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer, or WorkerError with the worker's own one."""
        try:
            self._pipe.send((question, arguments))
            succeeded, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise WorkerError(f"{self.framework}: the worker ended ({said[-1] if said else 'no output'})") from error
        if not succeeded:
            raise WorkerError(answer)
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, framework: str, core: int, log: Path) -> None:
    os.sched_setaffinity(0, {core})
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    bench: _Bench | None = None
    with suppress(EOFError, OSError):
        while True:
            question, arguments = pipe.recv()
            try:
                if bench is None:
                    bench = _Bench(framework)
                pipe.send((True, getattr(bench, question)(*arguments)))
            except Unsuitable as error:
                pipe.send((False, str(error)))
            except Exception as error:  # the parent decides what a failure means
                pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))


class _Bench:
    def __init__(self, framework: str) -> None:
        module, name = framework.split(":")
        self._framework = getattr(importlib.import_module(module), name)()
        self._runs: dict[str, tuple[Run, Estimate]] = {}
        # Of the check's cell: compiled once, used twice.
        self._checked: dict[tuple[str, int, int], list[Run]] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(self._framework.names)

    def load(self, letter: str, folder: Path) -> Any:
        self._runs.clear()
        self._checked.clear()
        return self._framework.load(letter, folder)

    def prepare(self, name: str, rows: int, draws: int, budget_s: float, whole: bool) -> Estimate:
        """Make a cell ready and warm; see how many of its draws fit into `budget_s` (all of them if `whole`)."""
        ways = self._checked.pop((name, rows, draws), None) or self._framework.ways(name, rows, draws)
        seconds, run = min(((_seconds(run, draws), run) for run in ways), key=lambda way: way[0])
        steps = draws // run.step
        timed = steps if whole else min(steps, max(int(budget_s / seconds * steps), 1))
        repeats = max(int(SAMPLE_S / (seconds * timed / steps)), 1)
        estimate = Estimate(run.step, timed * run.step, repeats)
        self._runs[name] = (run, estimate)
        return estimate

    def drop(self) -> None:
        """Forget the cell."""
        self._runs.clear()

    def sample(self, name: str, draws: int) -> float:
        """Seconds of one cell: the mean of repeated calls, scaled to all draws."""
        run, estimate = self._runs[name]
        return sum(run.seconds(draws, estimate.timed_draws) for _ in range(estimate.repeats)) / estimate.repeats

    def answers(self, name: str, rows: int, draws: int, most: int, budget_s: float) -> list[Any]:
        """Mean, deviation and number of draws of each way to a cell, for the check.

        The draws are as many as `budget_s` allows, up to `most`.
        """
        found = []
        self._checked[name, rows, draws] = self._framework.ways(name, rows, draws)
        for run in self._checked[name, rows, draws]:
            least = max(run.step, LEAST_CHECK_DRAWS)
            count = least * max(min(int(budget_s / _seconds(run, least)), most // least), 1)
            found.append((*run.answer(count), count))
        return found

    def reference(self, name: str, rows: int, draws: int) -> Any:
        """Mean, deviation and number of draws of one call."""
        (run,) = self._framework.ways(name, rows, draws)
        return (*run.answer(draws), draws)

    def gemm(self, size: int) -> float:
        return self._framework.gemm(size)


def _seconds(run: Run, draws: int) -> float:
    """Of a warm run, roughly: one step is timed, a quick one several times."""
    run.seconds(draws, run.step)
    seconds = run.seconds(draws, run.step)
    if seconds < SAMPLE_S:
        seconds = min(seconds, run.seconds(draws, run.step), run.seconds(draws, run.step))
    return seconds
