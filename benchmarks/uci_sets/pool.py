"""Batches of splits on several processes, one core each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.uci_sets import sets

# Splits trained side by side are lost side by side when a run is killed, and a batch of large sets takes minutes.
BATCH_ROWS = 12_000
MOST_SPLITS = 5

Records = list[dict[str, Any]]
Work = Callable[[sets.RegressionSet, Sequence[int], int], Records]


@dataclass(frozen=True)
class Batch:
    """Splits of one set that train in one stack."""

    set_name: str
    splits: tuple[int, ...]
    epochs: int


def batches(data: sets.RegressionSet, splits: Sequence[int], epochs: int) -> list[Batch]:
    """Cut splits into stacks; a stack's splits have equally many training rows."""
    most = max(1, min(MOST_SPLITS, BATCH_ROWS // len(data.y)))
    cut: list[list[int]] = []
    for split in splits:
        alike = cut and len(data.splits[cut[-1][0]].train) == len(data.splits[split].train)
        if alike and len(cut[-1]) < most:
            cut[-1].append(split)
        else:
            cut.append([split])
    return [Batch(data.name, tuple(own), epochs) for own in cut]


def run(work: Work, folder: Path, queue: Sequence[Batch], processes: int) -> Iterator[tuple[Batch, Records]]:
    """Do the batches in about their order and yield each one's records as it is done."""
    # A worker's products are too small for threads. NumPy's BLAS reads this when it is loaded: processes are spawned.
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        futures = {pool.submit(_work, work, folder, batch): batch for batch in queue}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            # Interrupted: the pool by itself would wait for batches that nobody reads any more.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _work(work: Work, folder: Path, batch: Batch) -> Records:
    return work(sets.load(folder, batch.set_name), batch.splits, batch.epochs)


def _begin() -> None:
    """A killed run leaves no process behind; an interrupt from the keyboard is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
