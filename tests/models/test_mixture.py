"""Quantiles of mixtures of Gaussians against SciPy's root finder, and against samples."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import brentq
from scipy.stats import norm

from models import mixture

LEVELS = (0.05, 0.95)


def found(means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """[rows, 2] by the graph, float32 as served; stds [rows, T] or [rows, 1]."""
    mean = means.mean(axis=1)
    std = np.sqrt(means.var(axis=1, ddof=1) + (stds**2).mean(axis=1))
    tensors = [tf.constant(values, tf.float32) for values in (means, stds, mean, std)]
    return tf.function(mixture.quantiles)(*tensors, LEVELS).numpy()


def expected(means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    wide = np.broadcast_to(stds, means.shape)

    def root(row: int, level: float) -> float:
        ends = means[row] - 9 * wide[row], means[row] + 9 * wide[row]
        return brentq(lambda x: norm.cdf(x, means[row], wide[row]).mean() - level, ends[0].min(), ends[1].max())

    return np.array([[root(row, level) for level in LEVELS] for row in range(len(means))])


@pytest.mark.parametrize("noise", [1e-3, 0.05, 0.5, 1.0, 30.0])
@pytest.mark.parametrize("own", [True, False], ids=["of the draw", "constant"])
def test_quantiles_are_scipys(noise, own):
    random = np.random.default_rng(0)
    # With 100 draws and little noise every number between two of them would be a quantile.
    means = random.normal(200, 1, (40, 103))
    stds = noise * random.uniform(0.5, 2, means.shape) if own else np.full((40, 1), noise)
    spread = np.sqrt(1 + noise**2)
    np.testing.assert_allclose(found(means, stds), expected(means, stds), atol=3e-4 * spread)


def test_two_far_peaks_of_unequal_weight():
    means = np.concatenate([np.zeros((3, 94)), np.full((3, 6), 1e4)], axis=1)
    stds = np.full((3, 1), 2.0)
    # In float32 a number near 1e4 is known to 1e-3.
    np.testing.assert_allclose(found(means, stds), expected(means, stds), atol=0.3)


def test_equal_draws_are_one_gaussian():
    low, high = found(np.full((1, 50), 7.0), np.full((1, 1), 2.0))[0]
    assert low == pytest.approx(7 + 2 * norm.ppf(0.05), abs=1e-4)
    assert high == pytest.approx(7 + 2 * norm.ppf(0.95), abs=1e-4)


def test_samples_fall_between_them_as_often_as_they_should():
    random = np.random.default_rng(1)
    means = random.gamma(1.0, 2.0, (5, 200))
    stds = random.uniform(0.2, 1.0, means.shape)
    ends = found(means, stds)
    for row in range(5):
        draw = random.integers(0, 200, 200_000)
        samples = random.normal(means[row, draw], stds[row, draw])
        assert np.mean(samples < ends[row, 0]) == pytest.approx(0.05, abs=0.003)
        assert np.mean(samples > ends[row, 1]) == pytest.approx(0.05, abs=0.003)


def test_a_row_has_the_same_quantiles_alone():
    random = np.random.default_rng(2)
    means = random.normal(0, 1, (30, 60)) * random.uniform(0.01, 20, (30, 1))
    stds = random.uniform(0.01, 2, (30, 1))
    together = found(means, stds)
    for row in (0, 17):
        np.testing.assert_array_equal(found(means[row : row + 1], stds[row : row + 1])[0], together[row])
