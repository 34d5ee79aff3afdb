"""Differences between networks that were judged on the same folds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over the folds of a repeated cross-validation, and where it may lie."""

    mean: float
    lower: float
    upper: float
    confidence: float
    # Folds times repeats.
    folds: int

    @property
    def excludes_zero(self) -> bool:
        return self.lower > 0 or self.upper < 0

    def document(self) -> dict[str, Any]:
        return asdict(self)


def corrected_interval(values: NDArray[np.float64], test_share: float, confidence: float = CONFIDENCE) -> Interval:
    """The t interval of the mean of one figure a fold, its variance corrected for the rows that the folds share.

    Training sets of a repeated cross-validation overlap, so that s²/J is far too small a variance of the mean of J
    folds; it is taken as (1/J + n_test/n_train) s², with J - 1 degrees of freedom.
    Source: Nadeau & Bengio 2003, "Inference for the generalization error"; for repeated k-fold Bouckaert & Frank 2004.

    values [J]: a figure of each fold, or the difference of two. test_share: n_test / n_train.
    """
    count = len(values)
    mean = float(np.mean(values))
    variance = float(np.var(values, ddof=1))
    half = float(student.ppf((1 + confidence) / 2, count - 1)) * math.sqrt((1 / count + test_share) * variance)
    return Interval(mean, mean - half, mean + half, confidence, count)
