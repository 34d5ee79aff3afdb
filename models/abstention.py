"""When an answer is withheld: the threshold of its confidence, or of its standard deviation, from held-out rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from models.contract import Abstention

Array = NDArray[Any]

# Share of the calibration rows that is withheld where no error is promised.
WITHHELD_SHARE = 0.05
# A threshold lies this share beyond the row that it comes from: that row's answer is given whatever is asked beside it,
# though matrix products of another size round otherwise.
_MARGIN = 2e-6
# A confidence that no answer has.
NEVER = 2.0


def of_confidence(confidence: Array, right: Array) -> Abstention:
    """Withholds the least confident twentieth. confidence [N] of the answers, right [N]: whether they are."""
    threshold = float(np.sort(confidence)[int(len(confidence) * WITHHELD_SHARE)])
    return described(threshold * (1 - _MARGIN), confidence, right)


def of_max_error(confidence: Array, right: Array, max_error: float, level: float) -> tuple[Abstention, str | None]:
    """The lowest threshold whose error is shown to be at most `max_error`, with probability `level`; and a sentence
    where there is none, and everything is withheld.

    Fixed-sequence testing (Angelopoulos et al. 2022, Learn then Test): from the most confident answers down, as long as
    the Clopper-Pearson bound of the error of what is answered stays below, so that one level serves all thresholds. The
    first one tested answers as many rows as could show it without a mistake. It takes that less confident answers are
    no more often right.
    """
    least = rows_wanted(max_error, level)
    order = np.argsort(-confidence, kind="stable")
    ordered, wrong = confidence[order], np.cumsum(~right[order])
    # A threshold answers all rows of an equal confidence.
    ends = np.flatnonzero(np.append(ordered[1:] < ordered[:-1], True))
    tested = ends[ends + 1 >= least]
    shown = upper_bound(wrong[tested], tested + 1, level) <= max_error
    passed = len(shown) if shown.all() else int(shown.argmin())
    found = float(ordered[tested[passed - 1]]) if passed else None
    if found is not None:
        return described(found, confidence, right, max_error, level), None
    return described(NEVER, confidence, right, max_error, level), (
        f"every answer is withheld: an error of at most {max_error:g} is not shown with confidence {level:g} by "
        f"{len(right)} calibration rows; at least {least} confident ones, all right, are wanted"
    )


def of_cost_ratio(confidence: Array, right: Array, cost_ratio: float) -> Abstention:
    """Chow's rule: answer where the expected cost of a mistake is less than that of withholding."""
    return described(float(np.float32(1 - 1 / cost_ratio)), confidence, right)


def upper_bound(wrong: Array, rows: Array, level: float) -> Array:
    """Of error rates, by Clopper & Pearson, one-sided: of so many wrong answers among so many rows."""
    return np.where(wrong == rows, 1.0, beta.ppf(level, wrong + 1, np.maximum(rows - wrong, 1)))


def rows_wanted(max_error: float, level: float) -> int:
    """The fewest rows, all right, that show the error."""
    return math.ceil(math.log(1 - level) / math.log(1 - max_error))


def of_std(std: Array) -> Abstention:
    """Withholds the answers with the largest standard deviations, a twentieth. std: [N]."""
    threshold = float(np.sort(std)[len(std) - 1 - int(len(std) * WITHHELD_SHARE)]) * (1 + _MARGIN)
    return Abstention(statistic="std", threshold=threshold, answered_share=float((std <= threshold).mean()))


def described(
    threshold: float, confidence: Array, right: Array, max_error: float | None = None, level: float | None = None
) -> Abstention:
    """The threshold with what it does on the rows that it was found on."""
    given = confidence >= threshold
    return Abstention(
        statistic="confidence",
        threshold=threshold,
        answered_share=float(given.mean()),
        error=float(1 - right[given].mean()) if given.any() else None,
        max_error=max_error,
        confidence=level,
    )
