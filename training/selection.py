"""What doubt is good for: the error among the answers that are given when the most doubtful rows are withheld.

curve = risk_coverage(doubt, loss)
curve.area, curve.at(0.8)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.reliability import ranks

Array = NDArray[Any]


@dataclass(frozen=True)
class RiskCoverage:
    """Point n: the n + 1 least doubtful rows are answered."""

    # [N] share of the rows that are answered, and the mean loss of the answers.
    coverage: Array
    risk: Array

    @property
    def area(self) -> float:
        """AURC: the mean risk over all coverages (Geifman & El-Yaniv 2017). Less is better."""
        return float(self.risk.mean())

    def at(self, coverage: float) -> float:
        """The risk where at least this share of the rows is answered."""
        return float(self.risk[np.searchsorted(self.coverage, coverage - 1e-12)])


def risk_coverage(doubt: Array, loss: Array) -> RiskCoverage:
    """doubt [N]: whatever rows are withheld by, the highest first. loss [N]: 0 or 1 for answers, or squared errors.

    Rows of equal doubt count with their mean loss: no order among them is better than another.
    """
    return ranked_risk_coverage(ranks(doubt), loss)


def ranked_risk_coverage(rank: NDArray[np.int64], loss: Array) -> RiskCoverage:
    """The same from each row's rank by its doubt, [N] from 0, the same for equal ones; some may be nobody's."""
    rows = np.bincount(rank)
    held = rows > 0
    rows, losses = rows[held], np.bincount(rank, weights=loss)[held]
    count = np.arange(1, len(rank) + 1)
    return RiskCoverage(count / len(rank), np.cumsum(np.repeat(losses / rows, rows)) / count)


def best_area(loss: Array) -> float:
    """The AURC of a doubt that knows the losses: what no other goes below."""
    return risk_coverage(loss, loss).area


def accuracy_rejection(doubt: Array, right: Array, rejected: Sequence[float]) -> list[float]:
    """The accuracy of what is left when these shares of the rows, the most doubtful, are rejected (Nadeem et al. 2009).

    Shares from 0 to below 1; at least one row is left.
    """
    curve = risk_coverage(doubt, 1 - right.astype(np.float64))
    return [1 - curve.at(max(1 - share, 1 / len(doubt))) for share in rejected]
