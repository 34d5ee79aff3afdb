"""Deterministic, stratified train / calibration / test rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from models.contract import Task

# The rest, 60 %, trains. A fifth is what a conformal quantile at 90 % needs even of Sonar's 208 rows.
CALIBRATION_SHARE = 0.2
TEST_SHARE = 0.2

# Fixed, and not the training seed: every network of a data set is judged on the same rows, whatever its own seed.
SPLIT_SEED = 20_240_601

# Strata of a regression target: deciles, so that no part of the range is missing from the test rows by chance.
TARGET_BINS = 10
# Of one stratum: one for each fifth.
MIN_BIN_ROWS = 5


@dataclass(frozen=True)
class Split:
    """Row numbers, ascending, int64. Every row is in exactly one of the three."""

    train: NDArray[np.int64]
    # Held out from fitting for temperature, conformal quantiles and thresholds.
    calibration: NDArray[np.int64]
    # Held out from fitting and calibration: the published metrics.
    test: NDArray[np.int64]


def split(y: NDArray[Any], task: Task) -> Split:
    """Split the rows, stratified by class, or by decile of a regression target.

    y: [N] class indices or target values.
    """
    groups = y if task == "classification" else target_bins(y)
    rows = np.arange(len(y))
    test_rows, calibration_rows = round(TEST_SHARE * len(y)), round(CALIBRATION_SHARE * len(y))
    rest, test = train_test_split(rows, test_size=test_rows, stratify=groups, random_state=SPLIT_SEED)
    train, calibration = train_test_split(
        rest, test_size=calibration_rows, stratify=groups[rest], random_state=SPLIT_SEED
    )
    return Split(train=np.sort(train), calibration=np.sort(calibration), test=np.sort(test))


def target_bins(y: NDArray[np.float32]) -> NDArray[np.int64]:
    """The decile of each target value: [N] in 0..9. Fewer, wider bins where there are not rows enough for ten; a single
    one where the values repeat so much that a bin would be left with too few rows to share.
    """
    bins = min(TARGET_BINS, len(y) // MIN_BIN_ROWS)
    inner_edges = np.quantile(y, np.linspace(0, 1, bins + 1)[1:-1])
    found = np.searchsorted(inner_edges, y, side="right")
    _, rows = np.unique(found, return_counts=True)
    return found if rows.min() >= MIN_BIN_ROWS else np.zeros(len(y), np.int64)
