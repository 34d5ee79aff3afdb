"""What draws say of held-out targets: RMSE of their mean, log-likelihood of their mixture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """In the target's units and in nats: root mean squared error of the draws' mean; log-likelihood, mean over rows."""

    rmse: float
    ll: float


def score(draws: Iterable[NDArray[np.float32]], y: Floats, *, mean: float, scale: float, tau: float) -> Scores:
    """Score draws of a standardised target under Gaussian noise of precision tau.

    draws: chunks [T, n, 1], standardised by mean and scale. y [n] and tau in the target's own units.
    Per row `log(1/T sum_t N(y; y_t, 1/tau))`, then the mean over rows: never the likelihood of all rows jointly.
    Source: Gal & Ghahramani 2016, eq. 8, and their code.
    """
    wanted = (y - mean) / scale
    total, count, logs = np.zeros(len(y)), 0, []
    for chunk in draws:
        predicted = chunk[..., 0].astype(np.float64)
        total += predicted.sum(axis=0)
        count += len(predicted)
        logs.append(logsumexp(-tau / 2 * scale**2 * np.square(wanted - predicted), axis=0))
    rmse = scale * math.sqrt(np.square(wanted - total / count).mean())
    ll = logsumexp(logs, axis=0) - math.log(count) - math.log(2 * math.pi) / 2 + math.log(tau) / 2
    return Scores(rmse, float(ll.mean()))
