"""The reference's protocol: a grid judged on the last fifth of the training rows, then all training rows at the best.

Source: github.com/yaringal/DropoutUncertaintyExps, experiment.py and net.py.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.uci_sets.likelihood import Scores, score
from benchmarks.uci_sets.sets import RegressionSet
from benchmarks.uci_sets.stack import Stack

SEED = 1
TRAIN_SHARE = 0.8
LENGTH_SCALE = 1e-2
TEST_DRAWS = 10_000
# Enough to choose by: the reference has 10,000 here too.
SELECTION_DRAWS = 2_000
# What a line's random numbers are for.
GRID, REFIT, GRID_DRAWS, TEST_DRAW = range(4)


@dataclass(frozen=True)
class Standardised:
    """Rows in units of the first `train` of them: x float32 [N, F], y float32 [N]; y = mean + scale * standardised."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    mean: float
    scale: float


def standardise(data: RegressionSet, train: NDArray[np.int64], rows: NDArray[np.int64]) -> Standardised:
    """Rows by the training rows' means and standard deviations; a constant column only loses its mean."""
    x, y = data.x[train], data.y[train]
    width = x.std(axis=0)
    mean, scale = float(y.mean()), float(y.std())
    return Standardised(
        x=((data.x[rows] - x.mean(axis=0)) / np.where(width == 0, 1, width)).astype(np.float32),
        y=((data.y[rows] - mean) / scale).astype(np.float32),
        mean=mean,
        scale=scale,
    )


def weight_decay(rate: NDArray[np.float64], tau: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Factor of the kernels' sum of squares in the loss: l²(1-p) / (2 N tau)."""
    return LENGTH_SCALE**2 * (1 - rate) / (2 * rows * tau)


def line_seed(data: RegressionSet, split: int, purpose: int) -> tuple[int, ...]:
    """A split's numbers are its own: the same whichever splits run beside it."""
    return (SEED, zlib.crc32(data.name.encode()), split, purpose)


def run(data: RegressionSet, splits: Sequence[int], epochs: int) -> list[dict[str, Any]]:
    """Results of some splits, trained side by side: for each one the record that goes into the file."""
    start = time.perf_counter()
    grids = _grid(data, splits, epochs)
    best = [grid[int(np.argmax([cell["ll"] for cell in grid]))] for grid in grids]
    final = _refit(data, splits, epochs, [cell["rate"] for cell in best], [cell["tau"] for cell in best])
    seconds = (time.perf_counter() - start) / len(splits)
    return [
        {
            "split": split,
            "epochs": epochs,
            "rate": chosen["rate"],
            "tau": chosen["tau"],
            "rmse": scores.rmse,
            "ll": scores.ll,
            "seconds": round(seconds, 1),
            "grid": grid,
        }
        for split, chosen, scores, grid in zip(splits, best, final, grids, strict=True)
    ]


def _grid(data: RegressionSet, splits: Sequence[int], epochs: int) -> list[list[dict[str, float]]]:
    """For each split, each cell of the grid with its scores on the rows held out of training."""
    parts = []
    for split in splits:
        rows = data.splits[split].train
        # Not shuffled: the reference takes the last fifth as it lies in the file.
        parts.append(np.split(rows, [int(TRAIN_SHARE * len(rows))]))
    fitted = [standardise(data, train, train) for train, _ in parts]
    rates = np.tile(data.rates, (len(splits), 1))
    stack = Stack(
        np.stack([own.x for own in fitted]),
        np.stack([own.y for own in fitted]),
        rates=rates,
        decay=weight_decay(rates[:, :, None], np.array(data.taus), len(parts[0][0])),
        hidden=(data.hidden_units,),
        seeds=[line_seed(data, split, GRID) for split in splits],
    )
    stack.train(epochs)
    grids = []
    for line, (split, (train, held)) in enumerate(zip(splits, parts, strict=True)):
        unseen = standardise(data, train, held)
        grid = []
        for at, rate in enumerate(data.rates):
            for precision, tau in enumerate(data.taus):
                scores = _scores(data, stack, (line, at, precision), unseen, held, tau, (split, GRID_DRAWS))
                grid.append({"rate": rate, "tau": tau, "ll": scores.ll, "rmse": scores.rmse})
        grids.append(grid)
    return grids


def _refit(
    data: RegressionSet, splits: Sequence[int], epochs: int, rates: list[float], taus: list[float]
) -> list[Scores]:
    """Trained on all training rows, scored on the test rows, which nothing has seen before."""
    own = [data.splits[split] for split in splits]
    fitted = [standardise(data, split.train, split.train) for split in own]
    column = np.array(rates)[:, None]
    stack = Stack(
        np.stack([rows.x for rows in fitted]),
        np.stack([rows.y for rows in fitted]),
        rates=column,
        decay=weight_decay(column, np.array(taus)[:, None], len(own[0].train))[:, :, None],
        hidden=(data.hidden_units,),
        seeds=[line_seed(data, split, REFIT) for split in splits],
    )
    stack.train(epochs)
    return [
        _scores(
            data,
            stack,
            (line, 0, 0),
            standardise(data, data.splits[split].train, data.splits[split].test),
            data.splits[split].test,
            taus[line],
            (split, TEST_DRAW),
        )
        for line, split in enumerate(splits)
    ]


def _scores(
    data: RegressionSet,
    stack: Stack,
    at: tuple[int, int, int],
    rows: Standardised,
    numbers: NDArray[np.int64],
    tau: float,
    purpose: tuple[int, int],
) -> Scores:
    draws = TEST_DRAWS if purpose[1] == TEST_DRAW else SELECTION_DRAWS
    chunks = stack.draws(at, rows.x, draws, line_seed(data, *purpose))
    return score(chunks, data.y[numbers], mean=rows.mean, scale=rows.scale, tau=tau)
