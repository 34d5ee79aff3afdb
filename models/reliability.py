"""Whether probabilities mean what they say: reliability curves, calibration errors, the Brier score's parts.

    curve = top_label_curve(probabilities, y)
    curve.expected_error, curve.confidence, curve.accuracy

Everything is about held-out rows: probabilities [N, K] whose rows sum to 1, y [N] class indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

# Of confidence; Guo et al. 2017 and most since have 15.
BINS = 15
# Of each class's probability, for the parts of the Brier score.
BRIER_BINS = 10

Array = NDArray[Any]


@dataclass(frozen=True)
class ReliabilityCurve:
    """Bins of confidence that hold rows, in ascending order."""

    # [B] mean confidence and share of right answers of each bin's rows.
    confidence: Array
    accuracy: Array
    # [B] how many they are.
    rows: NDArray[np.int64]

    @property
    def expected_error(self) -> float:
        """Mean distance of confidence and accuracy, weighted by rows (Guo, Pleiss, Sun & Weinberger 2017, eq. 5)."""
        return float(np.abs(self.accuracy - self.confidence) @ self.rows / self.rows.sum())


def top_label_curve(probabilities: Array, y: Array, bins: int = BINS) -> ReliabilityCurve:
    """Of the class that is named, in equally wide bins. A confidence on an edge belongs to the bin above it."""
    confidence, right = named(probabilities, y)
    return curve(confidence, right, width_bins(confidence, bins))


def adaptive_curve(probabilities: Array, y: Array, bins: int = BINS) -> ReliabilityCurve:
    """Of the class that is named, in bins of as many rows each, within one (Nguyen & O'Connor 2015).

    Rows of one confidence are in one bin, that of the first of them: their order says nothing.
    """
    confidence, right = named(probabilities, y)
    return curve(confidence, right, mass_bins(ranks(confidence), bins))


def ranks(values: Array) -> NDArray[np.int64]:
    """[N] from 0 in the order of the values, the same for equal ones."""
    return np.unique(values, return_inverse=True)[1]


def width_bins(confidence: Array, bins: int = BINS) -> NDArray[np.int64]:
    """[N] each row's bin among equally wide ones."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def mass_bins(rank: NDArray[np.int64], bins: int = BINS) -> NDArray[np.int64]:
    """[N] each row's bin among those of as many rows. rank [N]: from 0 and in the order of the confidences, the same
    for equal ones; some may be nobody's.
    """
    rows = np.bincount(rank)
    first = np.cumsum(rows) - rows
    return (first * min(bins, len(rank)) // len(rank))[rank]


def expected_calibration_error(probabilities: Array, y: Array, bins: int = BINS) -> float:
    """ECE. It is biased upwards where rows are few: compare answers to the same rows only."""
    return top_label_curve(probabilities, y, bins).expected_error


def adaptive_calibration_error(probabilities: Array, y: Array, bins: int = BINS) -> float:
    """ECE with bins of equal mass: no bin of three rows speaks as loudly as it likes."""
    return adaptive_curve(probabilities, y, bins).expected_error


def mean_entropy(probabilities: Array) -> float:
    """Sharpness of a classification: the mean entropy of the answers, nats. Less is sharper, whether right or not."""
    return float(-xlogy(probabilities, probabilities).sum(axis=1).mean())


def brier_parts(probabilities: Array, y: Array, bins: int = BRIER_BINS) -> dict[str, float]:
    """The Brier score, summed over the classes, as reliability - resolution + uncertainty.

    reliability: how far probabilities lie from frequencies (less is better). resolution: how far frequencies differ
    from the base rate where probabilities do (more is better). uncertainty: the data's own. Each class is binned by its
    probability; what varies within a bin counts as resolution, so that the sum is exact.
    Source: Murphy 1973; Stephenson, Coelho & Jolliffe 2008, eq. 8, for the terms within bins.
    """
    one_hot = np.eye(probabilities.shape[1])[y]
    base = one_hot.mean(axis=0)
    reliability = 0.0
    for predicted, happened in zip(probabilities.T, one_hot.T, strict=True):
        found = curve(predicted, happened, width_bins(predicted, bins))
        reliability += float(np.square(found.confidence - found.accuracy) @ found.rows / len(y))
    uncertainty = float((base * (1 - base)).sum())
    score = float(np.square(probabilities - one_hot).sum(axis=1).mean())
    return {
        "reliability": reliability,
        "resolution": reliability + uncertainty - score,
        "uncertainty": uncertainty,
    }


def named(probabilities: Array, y: Array) -> tuple[Array, Array]:
    """[N] the largest probability, float64, and whether its class is the true one."""
    return probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == y


def curve(predicted: Array, happened: Array, bins: NDArray[np.int64]) -> ReliabilityCurve:
    """Of rows [N] whose bins are known."""
    rows = np.bincount(bins)
    held = rows > 0
    rows = rows[held]
    return ReliabilityCurve(
        np.bincount(bins, weights=predicted)[held] / rows, np.bincount(bins, weights=happened)[held] / rows, rows
    )
