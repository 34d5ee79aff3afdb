"""What came of answers with classes: found once for each of them, so that a resample of rows only chooses among them.

outcomes = Outcomes(probabilities, y)
outcomes.figures(), outcomes.figures(rows)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import reliability
from models.contract import NO_CLASS
from training import scores
from training.selection import ranked_risk_coverage

Array = NDArray[Any]


class Outcomes:
    """Of rows [N], or of the places of rows [N, P], of which each one counts that has a class."""

    def __init__(self, probabilities: Array, y: Array) -> None:
        """probabilities [N, K] and y [N], or [N, P, K] and [N, P]."""
        self._numbers = np.arange(y.size).reshape(y.shape)
        probabilities, y = probabilities.reshape(-1, probabilities.shape[-1]), y.ravel()
        self._has_class = y != NO_CLASS
        self._confidence, self._right = reliability.named(probabilities, y)
        # A place without a class has some here, and is never chosen.
        self._nll, self._brier = scores.nll(probabilities, y), scores.brier(probabilities, y)
        self._bin = reliability.width_bins(self._confidence)
        self._confidence_rank = reliability.ranks(self._confidence)
        # Of confidences that differ some leave the same doubt.
        self._doubt_rank = reliability.ranks(1 - self._confidence)

    def figures(self, rows: NDArray[np.int64] | None = None) -> dict[str, float]:
        """Those that have intervals; brier is summed over the classes, nll in nats.

        rows: numbers of rows, some of them more than once; None for every row once.
        """
        chosen = (self._numbers if rows is None else self._numbers[rows]).ravel()
        chosen = chosen[self._has_class[chosen]]
        confidence, right = self._confidence[chosen], self._right[chosen]
        even, of_mass = self._bin[chosen], reliability.mass_bins(self._confidence_rank[chosen])
        return {
            "accuracy": float(right.mean()),
            "nll": float(self._nll[chosen].mean()),
            "brier": float(self._brier[chosen].mean()),
            "ece": reliability.curve(confidence, right, even).expected_error,
            "adaptive_ece": reliability.curve(confidence, right, of_mass).expected_error,
            "aurc": ranked_risk_coverage(self._doubt_rank[chosen], ~right).area,
        }
