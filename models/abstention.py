"""When an answer is withheld: the threshold of its confidence, or of its standard deviation, from held-out rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.contract import Abstention

Array = NDArray[Any]

# Share of the calibration rows that is withheld where no error is promised.
WITHHELD_SHARE = 0.05


def of_confidence(confidence: Array, right: Array) -> Abstention:
    """Withholds the least confident twentieth. confidence [N] of the answers, right [N]: whether they are."""
    threshold = float(np.sort(confidence)[int(len(confidence) * WITHHELD_SHARE)])
    return described(threshold, confidence, right)


def of_std(std: Array) -> Abstention:
    """Withholds the answers with the largest standard deviations, a twentieth. std: [N]."""
    threshold = float(np.sort(std)[len(std) - 1 - int(len(std) * WITHHELD_SHARE)])
    return Abstention(statistic="std", threshold=threshold, answered_share=float((std <= threshold).mean()))


def described(threshold: float, confidence: Array, right: Array, **promise: float) -> Abstention:
    """The threshold with what it does on the rows that it was found on."""
    given = confidence >= threshold
    return Abstention(
        statistic="confidence",
        threshold=threshold,
        answered_share=float(given.mean()),
        error=float(1 - right[given].mean()) if given.any() else None,
        **promise,
    )
