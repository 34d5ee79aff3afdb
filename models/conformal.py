"""Split conformal prediction: scores of held-out rows, and the sets and intervals that follow, in the graph.

A class belongs to the set where its own score is at most the threshold of the held-out rows' scores, whose rank
`ConformalScores.thresholds` says.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.calibration_settings import Sets
from models.contract import ConformalScores
from models.sampling import some

Array = NDArray[Any]

# Rows whose scores are kept at most: beyond, a coverage is known to a third of a percent.
MOST_ROWS = 10_000
# Scores of all numbers of a row, where it has several: 2 MB of the manifest.
MOST_SCORES = 100_000
# Scores are kept in such steps, and one step up, so that sums of float32 in another order stay on the right side of a
# threshold. A larger score is a wider set: the guarantee stays.
_STEP = 1e-6


def class_scores(probabilities: tf.Tensor, kind: str) -> tf.Tensor:
    """Each class's score [N, K] of probabilities [N, K]."""
    if kind == "lac":
        return 1.0 - probabilities
    # Sum of what is at least as probable, ties included.
    ordered = tf.sort(probabilities, axis=-1, direction="DESCENDING")
    not_less = tf.searchsorted(-ordered, -probabilities, side="right")
    # Of probabilities that are NaN none is as large as itself.
    return tf.gather(tf.cumsum(ordered, axis=-1), tf.maximum(not_less - 1, 0), batch_dims=1)


def of_classes(probabilities: Array, classes: Array, sets: Sets) -> ConformalScores:
    """The scores of rows with these answers [N, K] (float32, as served) and true classes [N]."""
    probabilities, classes = some(probabilities, MOST_ROWS), some(classes, MOST_ROWS)
    kind: Literal["lac", "aps"] = "aps" if sets == "aps" else "lac"
    every = class_scores(tf.constant(probabilities, tf.float32), kind).numpy()
    scores = np.take_along_axis(every, classes[:, None], axis=1)[:, 0]
    if sets != "class":
        return ConformalScores(kind=kind, scores=[_listed(scores)])
    by_class = [_listed(scores[classes == number]) for number in range(probabilities.shape[1])]
    return ConformalScores(kind=kind, scores=by_class, by_class=True)


def prediction_set(probabilities: tf.Tensor, conformal: ConformalScores, coverage: float) -> tf.Tensor:
    """Which classes are in the set: bool [N, K]. Too few rows make it the full set, and so do NaN."""
    thresholds = tf.constant(conformal.thresholds(coverage), tf.float32)
    return tf.logical_not(class_scores(probabilities, conformal.kind) > thresholds)


def of_values(means: Array, stds: Array, targets: Array) -> ConformalScores:
    """The scores |target - mean| / std of rows with these answers, [N] or [N, D]."""
    scores = np.abs(targets - means.astype(np.float64)) / stds.astype(np.float64)
    by_target = scores.reshape(len(scores), -1)
    kept = some(by_target, min(MOST_ROWS, MOST_SCORES // by_target.shape[1]))
    return ConformalScores(kind="interval", scores=[_listed(own) for own in kept.T])


def interval(
    mean: tf.Tensor, std: tf.Tensor, conformal: ConformalScores, coverage: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Both ends [N] or [N, D], in the target's unit. Too few rows make them infinite."""
    thresholds = conformal.thresholds(coverage)
    reach = std * (thresholds[0] if len(thresholds) == 1 else tf.constant(thresholds, tf.float32))
    return mean - reach, mean + reach


def too_few(conformal: ConformalScores, coverage: float, labels: list[str]) -> str | None:
    """The sentence for an infinite threshold."""
    wanted = conformal.rows_wanted(coverage)
    short = [place for place, scores in enumerate(conformal.scores) if len(scores) < wanted]
    if not short:
        return None
    place = short[0]
    whose = f"of class {labels[place]!r} " if conformal.by_class else ""
    what = "interval is infinite" if conformal.kind == "interval" else "prediction set holds every class"
    if conformal.by_class:
        what = f"prediction set always holds {', '.join(repr(labels[number]) for number in short)}"
    found = len(conformal.scores[place])
    return f"at a coverage of {100 * coverage:g}% the {what}: {found} calibration rows {whose}found, {wanted} wanted"


def _listed(scores: Array) -> list[float]:
    steps = np.rint(scores.astype(np.float64) / _STEP) + 1
    # Divided, so that the manifest shows six decimals.
    return np.sort(steps / round(1 / _STEP)).tolist()
