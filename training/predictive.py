"""Predictive distributions of a number, held against what came: CRPS, PIT, intervals, sharpness.

All in the target's unit, y [N]. Draws are [T, N].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import norm

Array = NDArray[Any]

# Of a histogram of the PIT.
PIT_BINS = 10


def gaussian_nll(mean: Array, std: Array, y: Array) -> float:
    """Mean negative log-likelihood of y under normals, nats."""
    return float(-norm.logpdf(y, mean, std).mean())


def gaussian_crps(mean: Array, std: Array, y: Array) -> Array:
    """[N] the continuous ranked probability score of normals (Gneiting & Raftery 2007, eq. 21)."""
    z = (y - mean) / std
    return std * (z * (2 * ndtr(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


def draws_crps(draws: Array, y: Array) -> Array:
    """[N] the CRPS of the draws as they are, each of weight 1 / T: E|X - y| - E|X - X'| / 2.

    Source: Gneiting & Raftery 2007, eq. 20; the second term from the order statistics, T log T instead of T squared.
    """
    ordered = np.sort(draws.astype(np.float64), axis=0)
    count = len(ordered)
    weights = 2 * np.arange(1, count + 1) - count - 1
    apart = weights @ ordered / count**2
    return np.abs(ordered - y).mean(axis=0) - apart


def gaussian_pit(mean: Array, std: Array, y: Array) -> Array:
    """[N] the predictive distribution function at what came: uniform where the distributions are right (Dawid 1984)."""
    return ndtr((y - mean) / std)


def draws_pit(draws: Array, y: Array) -> Array:
    """[N] the same for draws: the mean rank of y among them, so that ties on either side weigh alike."""
    below, up_to = (draws < y).mean(axis=0), (draws <= y).mean(axis=0)
    return (below + up_to) / 2


def mixture_pit(draws: Array, noise: Array | float, y: Array) -> Array:
    """[N] the same for the equal mixture of normals around the draws; noise: their standard deviation, [N] or one."""
    return ndtr((y - draws) / noise).mean(axis=0)


def pit_distance(pit: Array) -> float:
    """The greatest distance of the PIT's distribution function from the uniform one (Kolmogorov & Smirnov): 0 to 1."""
    ordered, count = np.sort(pit), len(pit)
    steps = np.arange(count + 1) / count
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


def interval_coverage(lower: Array, upper: Array, y: Array) -> float:
    """The share of rows whose truth lies within, ends included."""
    return float(((lower <= y) & (y <= upper)).mean())


def interval_width(lower: Array, upper: Array) -> float:
    return float((upper - lower).mean())


def sharpness(std: Array) -> float:
    """The root of the mean predictive variance: how narrow the answers are, whether right or not."""
    return float(np.sqrt(np.square(std).mean()))


def pit_counts(pit: Array, bins: int = PIT_BINS) -> NDArray[np.int64]:
    """[bins] rows whose PIT lies in each equally wide bin: as many in each where the distributions are right."""
    return np.histogram(pit, bins=bins, range=(0, 1))[0]
