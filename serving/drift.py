"""How far the uncertainty of today's answers has moved from that of the calibration rows.

The population stability index over bins of equal weight in the reference: sum (p - q) ln(p / q). Read it as its
inventors in credit scoring do: below 0.1 nothing moved, above 0.25 the traffic is not what the model was tried on.
Source: Siddiqi 2006, Credit Risk Scorecards, ch. 10; its sampling behaviour: Yurdakul 2018, Statistical Properties of
the Population Stability Index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.contract import REFERENCE_LEVELS

# An empty bin counts as this share: the logarithm of 0 would be all that is left of the index.
SHARE_FLOOR = 1e-4
# Without drift the index is about (bins - 1) / rows: with fewer rows than this its noise alone reaches 0.1.
MIN_ROWS = 200


@dataclass(frozen=True)
class Bins:
    """Bins (edge, next edge] of a statistic; the first and the last one are open."""

    edges: np.ndarray
    """[bins - 1], ascending."""
    expected: np.ndarray
    """[bins] the reference's share in each."""

    def counts(self, values: np.ndarray) -> np.ndarray:
        """[bins] how many of the values are in each."""
        return np.bincount(np.searchsorted(self.edges, values, side="left"), minlength=len(self.expected))


def bins(quantiles: Sequence[float]) -> Bins:
    """Bins between the quantiles at REFERENCE_LEVELS.

    Where many rows share a value, several quantiles are equal: it lies inside of one larger bin, since an edge there
    would cut off a share that the levels do not tell.
    """
    inner = [
        (value, level)
        for value, level in zip(quantiles, REFERENCE_LEVELS, strict=True)
        if 0 < level < 1 and quantiles.count(value) == 1
    ]
    edges = np.array([value for value, _ in inner], float)
    return Bins(edges, np.diff([0.0, *(level for _, level in inner), 1.0]))


def stability_index(counts: Sequence[float], expected: np.ndarray) -> float | None:
    """The index of the rows counted in each bin; None for too few rows to say."""
    rows = sum(counts)
    if rows < MIN_ROWS:
        return None
    seen = np.maximum(np.asarray(counts, float) / rows, SHARE_FLOOR)
    wanted = np.maximum(expected, SHARE_FLOOR)
    return float(np.sum((seen - wanted) * np.log(seen / wanted)))
