import numpy as np
import pytest

from training.paired import corrected_interval


def test_the_corrected_interval_by_hand():
    """Four folds of 1, 2, 3, 4 with n_test/n_train = 1/3: variance 5/3, times 1/4 + 1/3; t(0.975, 3) = 3.182446."""
    interval = corrected_interval(np.array([1.0, 2.0, 3.0, 4.0]), 1 / 3)
    half = 3.182446 * np.sqrt((1 / 4 + 1 / 3) * 5 / 3)
    assert interval.mean == 2.5
    assert interval.lower == pytest.approx(2.5 - half, abs=1e-5)
    assert interval.upper == pytest.approx(2.5 + half, abs=1e-5)
    assert not interval.excludes_zero


def test_repeats_alone_do_not_shrink_the_interval_to_nothing():
    values = np.random.default_rng(0).normal(size=10)
    once, often = (corrected_interval(np.tile(values, times), 1 / 9) for times in (1, 100))
    assert often.upper - often.lower > 0.5 * (once.upper - once.lower)


def test_a_difference_that_is_there_is_shown():
    assert corrected_interval(np.random.default_rng(0).normal(5, 1, 20), 1 / 9).excludes_zero
