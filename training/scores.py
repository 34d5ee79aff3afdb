"""Scores of probabilistic answers to held-out rows. Lower is better for all but the accuracy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr

# A float32 probability nearer to 1 than this is 1: certainty that float32 cannot tell from less is not punished more.
SMALLEST_PROBABILITY = float(np.finfo(np.float32).eps)

Array = NDArray[np.float64]


def classification(probabilities: Array, y: NDArray[np.int64]) -> dict[str, float]:
    """accuracy; nll, nats a row; brier, summed over the classes: 0 to 2. probabilities [n, K], y [n] class indices."""
    return {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == y)),
        "nll": float(np.mean(nll(probabilities, y))),
        "brier": float(np.mean(brier(probabilities, y))),
    }


def nll(probabilities: Array, y: NDArray[np.int64]) -> Array:
    """[n] negative log-likelihoods, nats."""
    return -np.log(np.clip(probabilities[np.arange(len(y)), y], SMALLEST_PROBABILITY, 1))


def brier(probabilities: Array, y: NDArray[np.int64]) -> Array:
    """[n] squared errors, summed over the classes."""
    return np.asarray(np.square(probabilities - np.eye(probabilities.shape[1])[y]).sum(axis=1))


def regression(draws: Array, noise: Array | float, y: Array) -> dict[str, float]:
    """rmse of the mean; nll and crps of the equal mixture of normals around the draws, in the target's unit.

    draws [T, n] (T = 1: a deterministic answer), noise: standard deviation of the normals, one or [n], y [n].
    nll: Gal & Ghahramani 2016, eq. 8. crps: Grimit, Gneiting, Berrocal & Johnson 2006, eq. 5.
    """
    nll, crps = mixture(draws, noise, y)
    return {
        "rmse": float(np.sqrt(np.mean(np.square((y - draws).mean(axis=0))))),
        "nll": float(np.mean(nll)),
        "crps": float(np.mean(crps)),
    }


def mixture(draws: Array, noise: Array | float, y: Array) -> tuple[Array, Array]:
    """[n] negative log-likelihood and CRPS of the equal mixture of normals around each row's draws."""
    error = y - draws
    logs = -0.5 * np.square(error / noise) - np.log(noise) - 0.5 * np.log(2 * np.pi)
    # Of one draw after another with those behind it: all pairs at once would take the square of their memory.
    wide, count = np.sqrt(2) * noise, len(draws)
    between = count * _expected_distance(np.zeros(draws.shape[1]), wide)
    for number in range(count - 1):
        between += 2 * _expected_distance(draws[number + 1 :] - draws[number], wide).sum(axis=0)
    crps = _expected_distance(error, noise).mean(axis=0) - between / count**2 / 2
    return -(logsumexp(logs, axis=0) - np.log(len(draws))), crps


def share_error(share: float, rows: int) -> float:
    """The standard error of a share of so many rows, by Agresti & Coull 1998: with two rows more of either kind.

    A share of 1 in few rows is not known without error.
    """
    adjusted = (share * rows + 2) / (rows + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (rows + 4))


def _expected_distance(mean: Array, std: Array | float) -> Array:
    """E|X| of a normal X."""
    z = mean / std
    return mean * (2 * ndtr(z) - 1) + 2 * std * np.exp(-0.5 * np.square(z)) / np.sqrt(2 * np.pi)
