"""A target's own noise, which the draws do not vary with: fitted on held-out rows, by maximum likelihood.

Arrays are NumPy's: draws [N, T] of the mean, targets [N], both in the target's unit. Given a row's draws its target is
a mixture of Gaussians around them (Gal & Ghahramani 2016: of variance 1 / tau).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.model_selection import KFold

from models.contract import Noise, TargetNoises
from models.sampling import some
from models.temperature import FOLDS, MIN_ROWS, usable_rows

Array = NDArray[Any]

# The search's ends: of the residuals' root mean square for a constant noise, of a head's own for its scale.
_SMALLEST, _LARGEST = 1e-3, 10.0
# Noise below this share of the target's spread is not told from none in float32.
_FLOOR = 1e-5


def fit(draws: Array, stds: Array | None, targets: Array) -> tuple[Noise | None, str | None]:
    """The noise of these rows, and a sentence where it is not what was hoped for.

    stds: [N, T], what the network's own variance head says, of which the scale is fitted; None without one.
    """
    rows = usable_rows((*draws.shape, 1))
    draws, targets = some(draws, rows).astype(np.float64), some(targets, rows)
    if len(targets) < MIN_ROWS:
        return None, f"noise is not known: {len(targets)} calibration rows found, {MIN_ROWS} wanted at least"
    if stds is None:
        return _constant(draws, targets)
    return _scaled(draws, some(stds, rows).astype(np.float64), targets)


def fit_targets(draws: Array, targets: Array) -> tuple[TargetNoises | None, list[str]]:
    """`fit` of each number of a row by itself. draws: [N, T, D]; targets: [N, D]."""
    found = [fit(draws[..., place], None, targets[:, place]) for place in range(targets.shape[1])]
    noises = [noise for noise, _ in found if noise is not None]
    if not noises:
        # Too few rows, for all of them.
        return None, [reason for _, reason in found[:1] if reason is not None]
    reasons = [f"number {place}: {reason}" for place, (_, reason) in enumerate(found) if reason is not None]
    return TargetNoises(targets=noises), reasons


def nll(draws: Array, stds: Array | float, targets: Array) -> float:
    """Mean negative log-likelihood of the mixture, nats."""
    distance = (targets[:, None] - draws) / stds
    logs = logsumexp(-0.5 * distance**2 - np.log(stds), axis=1) - math.log(draws.shape[1])
    return float(0.5 * math.log(2 * math.pi) - logs.mean())


def constant(draws: Array, targets: Array) -> float:
    """The most likely standard deviation of a noise that is the same for all rows."""
    return minimiser(lambda value: nll(draws, value, targets), _rough(draws.mean(axis=1), targets))


def _rough(means: Array, targets: Array) -> float:
    """Root mean square of the residuals."""
    return max(float(np.sqrt(np.mean((targets - means) ** 2))), _FLOOR * (float(targets.std()) or 1.0))


def minimiser(cost: Any, about: float) -> float:
    bounds = (math.log(about * _SMALLEST), math.log(about * _LARGEST))
    found = minimize_scalar(lambda log: cost(math.exp(log)), bounds=bounds, method="bounded", options={"xatol": 1e-5})
    return math.exp(found.x)


def _constant(draws: Array, targets: Array) -> tuple[Noise, str | None]:
    before, after = [], []
    for rest, fold in _folds(targets):
        mean = draws.mean(axis=1, keepdims=True)
        alone = _rough(mean[rest, 0], targets[rest])
        before.append(nll(mean[fold], alone, targets[fold]) * len(fold))
        after.append(nll(draws[fold], constant(draws[rest], targets[rest]), targets[fold]) * len(fold))
    nll_before, nll_after = sum(before) / len(targets), sum(after) / len(targets)
    found = Noise(std=constant(draws, targets), nll_before=nll_before, nll_after=nll_after)
    if nll_after <= nll_before:
        return found, None
    return found, (
        f"the draws' spread adds nothing to the likelihood: NLL {nll_after:.4g} with it, {nll_before:.4g} with one "
        "noise for all rows (cross-validated)"
    )


def _scaled(draws: Array, stds: Array, targets: Array) -> tuple[Noise, str | None]:
    def scale(rows: Array) -> float:
        return minimiser(lambda value: nll(draws[rows], value * stds[rows], targets[rows]), 1.0)

    nll_before = nll(draws, stds, targets)
    after = [nll(draws[fold], scale(rest) * stds[fold], targets[fold]) * len(fold) for rest, fold in _folds(targets)]
    nll_after = sum(after) / len(targets)
    is_better = nll_after < nll_before
    every = np.arange(len(targets))
    found = Noise(std=None, scale=scale(every) if is_better else 1.0, nll_before=nll_before, nll_after=nll_after)
    reason = f"in cross-validation it takes the NLL from {nll_before:.4g} to {nll_after:.4g}"
    return found, None if is_better else f"the noise's scale stays 1: {reason}"


def _folds(targets: Array) -> Any:
    return KFold(FOLDS, shuffle=True, random_state=0).split(targets)
