"""Beyond the reference's protocol, on the same splits: ensembles of Monte Carlo dropout nets, their noise learned.

Each split chooses for itself, on the last fifth of its training rows: the head (one noise for all rows, or a variance
learned with the mean), the dropout rate and a factor of the noise. That is trained anew on all its training rows. Test
rows are read once, for the figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from benchmarks.uci_sets.protocol import TRAIN_SHARE, Standardised, line_seed, standardise
from benchmarks.uci_sets.sets import RegressionSet
from benchmarks.uci_sets.stack import Head, Stack

MEMBERS = 4
HEADS: tuple[Head, ...] = ("mean", "gaussian")
RATES = (0.001, 0.005, 0.02, 0.05)
# Of the kernels' sum of squares, beside a loss of about 1 a row.
DECAY = 1e-5
# Few rows: small batches, for more steps from as many rows. The learning rate falls to 0 over the steps.
SMALL_SET, SMALL_BATCH, LARGE_BATCH = 5_000, 32, 128
STEPS, LEARNING_RATE = 12_000, 3e-3
# Of each member.
SELECTION_DRAWS, TEST_DRAWS = 100, 2_500
LOG_FACTORS = (-6.0, 2.0)
# What a line's random numbers are for: not those of the protocol.
SELECT, REFIT, SELECT_DRAW, TEST_DRAW = range(10, 14)


def default_epochs(data: RegressionSet) -> int:
    """As many as make STEPS steps while choosing."""
    rows = int(TRAIN_SHARE * len(data.splits[0].train))
    return math.ceil(STEPS / math.ceil(rows / _batch_size(data)))


def run(data: RegressionSet, splits: Sequence[int], epochs: int) -> list[dict[str, Any]]:
    """Results of some splits, trained side by side: for each one the record that goes into the file."""
    start = time.perf_counter()
    grids = _grid(data, splits, epochs)
    records = []
    for split, grid in zip(splits, grids, strict=True):
        best = max(grid, key=lambda cell: cell["ll"])
        own = data.splits[split]
        stack = _train(data, [split], [own.train], epochs, REFIT, (best["rate"],), best["head"])
        rows = standardise(data, own.train, own.test)
        chunks = _draws(data, stack, (0, split), 0, rows, TEST_DRAW)
        mean = np.concatenate(chunks)[..., 0].mean(axis=0, dtype=np.float64)
        records.append(
            {
                "split": split,
                "epochs": epochs,
                **{key: best[key] for key in ("head", "rate", "factor")},
                "rmse": float(rows.scale * np.sqrt(np.square(rows.y - mean).mean())),
                "ll": float(mixture(chunks, rows.y, best["factor"]).mean() - math.log(rows.scale)),
                "grid": grid,
            }
        )
    seconds = (time.perf_counter() - start) / len(splits)
    return [record | {"seconds": round(seconds, 1)} for record in records]


def _grid(data: RegressionSet, splits: Sequence[int], epochs: int) -> list[list[dict[str, Any]]]:
    """For each split, heads and rates with their best factor of the noise, on the rows held out of training."""
    parts = [np.split(rows, [int(TRAIN_SHARE * len(rows))]) for rows in (data.splits[split].train for split in splits)]
    grids: list[list[dict[str, Any]]] = [[] for _ in splits]
    for head in HEADS:
        stack = _train(data, splits, [train for train, _ in parts], epochs, SELECT, RATES, head)
        for at, (split, (train, held), grid) in enumerate(zip(splits, parts, grids, strict=True)):
            rows = standardise(data, train, held)
            for number, rate in enumerate(RATES):
                chunks = _draws(data, stack, (at, split), number, rows, SELECT_DRAW)
                factor = best_factor(chunks, rows.y)
                ll = float(mixture(chunks, rows.y, factor).mean() - math.log(rows.scale))
                grid.append({"head": head, "rate": rate, "factor": factor, "ll": ll})
    return grids


def mixture(chunks: Iterable[NDArray[np.float32]], y: NDArray[np.float32], factor: float) -> NDArray[np.float64]:
    """Log-likelihood of each row under the mixture of its draws, all standardised, [n].

    chunks: [T, n, 1], means under unit noise, or [T, n, 2], means and log variances. factor multiplies the deviations.
    """
    logs, count = [], 0
    for chunk in chunks:
        log_variance = 2 * math.log(factor) + (chunk[..., 1] if chunk.shape[-1] == 2 else np.zeros_like(chunk[..., 0]))
        squared = np.square(y - chunk[..., 0]) * np.exp(-log_variance)
        logs.append(logsumexp(-(squared + log_variance) / 2, axis=0))
        count += len(chunk)
    return logsumexp(np.array(logs, np.float64), axis=0) - math.log(count) - math.log(2 * math.pi) / 2


def best_factor(chunks: Sequence[NDArray[np.float32]], y: NDArray[np.float32]) -> float:
    """The factor of the deviations under which these rows are likeliest."""
    found = minimize_scalar(lambda log: -mixture(chunks, y, math.exp(log)).mean(), bounds=LOG_FACTORS, method="bounded")
    return math.exp(found.x)


def _batch_size(data: RegressionSet) -> int:
    return SMALL_BATCH if len(data.y) < SMALL_SET else LARGE_BATCH


def _train(
    data: RegressionSet,
    splits: Sequence[int],
    rows: Sequence[NDArray[np.int64]],
    epochs: int,
    purpose: int,
    rates: Sequence[float],
    head: Head,
) -> Stack:
    """MEMBERS lines for each split, one after another, each with its own start, batches and masks."""
    fitted = [standardise(data, own, own) for own in rows for _ in range(MEMBERS)]
    batch_size = _batch_size(data)
    stack = Stack(
        np.stack([own.x for own in fitted]),
        np.stack([own.y for own in fitted]),
        rates=np.tile(rates, (len(fitted), 1)),
        decay=np.full((len(fitted), len(rates), 1), DECAY),
        hidden=(data.hidden_units,),
        seeds=[(*line_seed(data, split, purpose), member) for split in splits for member in range(MEMBERS)],
        head=head,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        falls_over=epochs * math.ceil(len(rows[0]) / batch_size),
    )
    stack.train(epochs)
    return stack


def _draws(
    data: RegressionSet, stack: Stack, at: tuple[int, int], rate: int, rows: Standardised, purpose: int
) -> list[NDArray[np.float32]]:
    """Draws of all members, as many of each. at: the split's place in the stack, and its number."""
    place, split = at
    count = TEST_DRAWS if purpose == TEST_DRAW else SELECTION_DRAWS
    chunks: list[NDArray[np.float32]] = []
    for member in range(MEMBERS):
        seed = (*line_seed(data, split, purpose), member)
        chunks += stack.draws((place * MEMBERS + member, rate, 0), rows.x, count, seed)
    return chunks
