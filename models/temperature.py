"""Temperature of a classification's draws: fitted on held-out rows, kept only where cross-validation shows a gain.

Arrays are NumPy's: draws [N, T, K] of probabilities, classes [N]; of P places in a row [N, T, P, K] and [N, P].
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.model_selection import KFold

from models.contract import Temperature
from models.reliability import expected_calibration_error
from models.sampling import some
from models.statistics import SMALLEST_NORMAL

Array = NDArray[Any]

# Folds of the cross-validation that decides, at most.
FOLDS = 5
# Fewer rows say nothing of a temperature.
MIN_ROWS = 10
# Numbers of the draws at most: one parameter needs no more, and its search goes over them some hundred times.
MOST_NUMBERS = 2**22
# A factor of four either way: below, draws would be votes and no probabilities.
LOG_BOUND = float(np.log(4.0))
# Standard deviation of log T before any row is seen. On a few dozen rows, all right or nearly so, the likelihood alone
# runs to T = 0, and one wrong row that nobody held out then costs everything; a few hundred rows outweigh it.
LOG_PRIOR = 0.5


def fit(draws: Array, classes: Array) -> tuple[Temperature, str | None]:
    """The temperature of these rows, and the sentence that says why it stays off (value 1), if it does.

    It minimises the negative log-likelihood of the mean over the draws (Guo et al. 2017: of one softmax), with a normal
    prior on log T around 0. Of several places in a row each one counts; a fold of the cross-validation is of whole
    rows, as a row's places are alike.
    """
    most = usable_rows(draws.shape)
    draws, classes = some(draws, most), some(classes, most)
    count = len(classes)
    rows = np.repeat(np.arange(count), classes.size // count)
    logs, classes = logarithms(_by_place(draws)), classes.reshape(-1)
    before = answers(logs, 1.0)
    nll_before, ece_before = nll(before, classes), expected_calibration_error(before, classes)
    if count < MIN_ROWS:
        off = Temperature(
            value=1.0, nll_before=nll_before, nll_after=nll_before, ece_before=ece_before, ece_after=ece_before
        )
        return off, f"temperature stays off: {count} calibration rows found, {MIN_ROWS} wanted at least"
    after = cross_validated(logs, classes, rows)
    nll_after, ece_after = nll(after, classes), expected_calibration_error(after, classes)
    is_better = nll_after < nll_before
    found = Temperature(
        value=minimiser(logs, classes) if is_better else 1.0,
        nll_before=nll_before,
        nll_after=nll_after,
        ece_before=ece_before,
        ece_after=ece_after,
    )
    reason = f"in cross-validation it takes the NLL from {nll_before:.4g} to {nll_after:.4g}"
    return found, None if is_better else f"temperature stays off: {reason}"


def applied(draws: tf.Tensor, temperature: float, binary: bool) -> tf.Tensor:
    """softmax(log p / T) in the graph: draws [..., K], or with `binary` of the second of two classes [...]."""
    logs = tf.math.log(tf.maximum(draws, SMALLEST_NORMAL))
    if not binary:
        return tf.nn.softmax(logs / temperature)
    others = tf.math.log(tf.maximum(1.0 - draws, SMALLEST_NORMAL))
    return tf.sigmoid((logs - others) / temperature)


def usable_rows(shape: tuple[int, ...]) -> int:
    """How many rows of draws of this shape [N, T, ...] are used."""
    return min(shape[0], max(MIN_ROWS, MOST_NUMBERS // prod(shape[1:])))


def usable_places(num_samples: int, classes: int) -> int:
    """Of how many places in a row the draws are used at most: so many that the fewest rows stay within the bound."""
    return max(MOST_NUMBERS // (MIN_ROWS * num_samples * classes), 1)


def _by_place(draws: Array) -> Array:
    """[N, T, P, K] -> [N P, T, K]; those of one place [N, T, K] as they are."""
    return draws if draws.ndim == 3 else np.moveaxis(draws, 1, 2).reshape(-1, draws.shape[1], draws.shape[3])


def logarithms(draws: Array) -> Array:
    return np.log(np.maximum(draws, np.float32(SMALLEST_NORMAL)))


def answers(logs: Array, temperature: float) -> Array:
    """The mean over the draws of softmax(log p / T): [N, K], float64."""
    if temperature == 1.0:
        return np.exp(logs).mean(axis=1, dtype=np.float64)
    scaled = logs / np.float32(temperature)
    scaled -= scaled.max(axis=-1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=-1, keepdims=True)
    return scaled.mean(axis=1, dtype=np.float64)


def minimiser(logs: Array, classes: Array) -> float:
    def cost(log: float) -> float:
        return nll(answers(logs, float(np.exp(log))), classes) * len(classes) + (log / LOG_PRIOR) ** 2 / 2

    found = minimize_scalar(cost, bounds=(-LOG_BOUND, LOG_BOUND), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def cross_validated(logs: Array, classes: Array, rows: Array) -> Array:
    """Each answer at the temperature of the other folds: [N, K]. rows: [N] whose they are, ascending from 0."""
    found = np.empty((logs.shape[0], logs.shape[2]))
    for _, chosen in KFold(FOLDS, shuffle=True, random_state=0).split(np.unique(rows)):
        fold = np.isin(rows, chosen)
        found[fold] = answers(logs[fold], minimiser(logs[~fold], classes[~fold]))
    return found


def nll(probabilities: Array, classes: Array) -> float:
    """Mean negative log-likelihood, nats."""
    chosen = np.take_along_axis(probabilities, classes[:, None], axis=1)
    return float(-np.log(np.maximum(chosen, SMALLEST_NORMAL)).mean())
