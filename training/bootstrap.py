"""How much figures of held-out rows would vary with other rows of the kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 1_000
# Rows drawn in all, at most: a hundred thousand rows need no thousand resamples.
MOST_ROWS = 20_000_000
MIN_RESAMPLES = 100

Rows = NDArray[np.int64]
Bounds = tuple[float, float]


def intervals(
    figures: Callable[[Rows], Mapping[str, float]],
    rows: int,
    *,
    places: int = 1,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, Bounds]:
    """The percentile interval of every figure that `figures` makes of row numbers, drawn with replacement.

    places: answers of each row. They come and go with it, as a row's places depend on each other.
    All figures of one resample are of the same rows: a difference of two answers belongs in `figures` itself.
    Source: Efron & Tibshirani 1993, chapter 13. A figure that is biased in small samples (a calibration error) is more
    so in resamples: its interval lies high, and may miss the figure.
    """
    generator = np.random.default_rng(seed)
    count = min(resamples, max(MIN_RESAMPLES, MOST_ROWS // (rows * places)))
    found: dict[str, list[float]] = {}
    for _ in range(count):
        for name, value in figures(generator.integers(0, rows, rows)).items():
            found.setdefault(name, []).append(value)
    ends: Any = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {name: tuple(np.quantile(values, ends).tolist()) for name, values in found.items()}
