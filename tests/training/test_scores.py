"""Scores against scikit-learn, numerical integration and hand-made cases."""

import tracemalloc

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error

from training import scores

GENERATOR = np.random.default_rng(0)
PROBABILITIES = GENERATOR.dirichlet(np.ones(3), size=200)
CLASSES = GENERATOR.integers(0, 3, 200)


def test_classification_is_scikit_learn_s():
    found = scores.classification(PROBABILITIES, CLASSES)
    assert found["accuracy"] == accuracy_score(CLASSES, PROBABILITIES.argmax(axis=1))
    assert found["nll"] == pytest.approx(log_loss(CLASSES, PROBABILITIES))
    one_hot = np.eye(3)[CLASSES]
    assert found["brier"] == pytest.approx(3 * mean_squared_error(one_hot, PROBABILITIES))


def test_a_certain_error_costs_a_finite_amount():
    found = scores.classification(np.array([[1.0, 0.0]]), np.array([1]))
    assert found["nll"] == pytest.approx(-np.log(np.finfo(np.float32).eps))


def test_regression_scores_are_the_mixture_s_own():
    draws, noise, y = np.array([[0.0, 1.0], [2.0, 1.5], [0.5, -1.0]]), 0.7, np.array([0.4, 3.0])
    found = scores.regression(draws, noise, y)
    density = [norm.pdf(y[row], draws[:, row], noise).mean() for row in range(2)]
    assert found["nll"] == pytest.approx(-np.log(density).mean())
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((y - draws.mean(axis=0)) ** 2)))

    def integral(row):
        def square(value):
            return (norm.cdf(value, draws[:, row], noise).mean() - (value >= y[row])) ** 2

        return quad(square, -15, y[row])[0] + quad(square, y[row], 15)[0]

    assert found["crps"] == pytest.approx(np.mean([integral(row) for row in range(2)]), abs=1e-6)


def test_memory_of_the_mixture_s_scores_does_not_grow_with_the_square_of_the_draws():
    draws, y = GENERATOR.normal(size=(300, 40)), GENERATOR.normal(size=40)
    tracemalloc.start()
    try:
        scores.mixture(draws, np.ones(40), y)
        assert tracemalloc.get_traced_memory()[1] < 20 * draws.nbytes
    finally:
        tracemalloc.stop()


def test_each_row_may_have_a_noise_of_its_own():
    draws, noise, y = np.array([[0.0, 1.0], [2.0, 1.5]]), np.array([0.7, 2.0]), np.array([0.4, 3.0])
    together = scores.regression(draws, noise, y)
    apart = [scores.regression(draws[:, [row]], float(noise[row]), y[[row]]) for row in range(2)]
    for name in ("nll", "crps"):
        assert together[name] == pytest.approx(np.mean([figures[name] for figures in apart]))
