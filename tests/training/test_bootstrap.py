"""Percentile intervals against scipy's, and what they promise."""

import numpy as np
import pytest
from scipy import stats

from training.bootstrap import intervals

GENERATOR = np.random.default_rng(4)


def test_interval_is_scipy_s():
    values = GENERATOR.exponential(1, 300)
    found = intervals(lambda rows: {"mean": values[rows].mean()}, 300, resamples=4000)["mean"]
    wanted = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=GENERATOR)
    assert found == pytest.approx(tuple(wanted.confidence_interval), abs=0.01)


def test_figures_of_one_resample_share_their_rows():
    values = GENERATOR.normal(0, 1, 50)
    found = intervals(lambda rows: {"zero": values[rows].mean() - (values[rows] + 1).mean()}, 50, resamples=200)
    assert found["zero"] == pytest.approx((-1, -1))


def test_same_seed_same_interval_and_as_many_resamples_as_rows_allow():
    calls = []

    def figures(rows):
        calls.append(len(rows))
        return {"mean": float(rows.mean())}

    assert intervals(figures, 40, resamples=50) == intervals(figures, 40, resamples=50)
    assert intervals(figures, 40, resamples=50) != intervals(figures, 40, resamples=50, seed=1)
    calls.clear()
    intervals(figures, 400_000)
    assert calls == [400_000] * 100
    calls.clear()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_or_two_are_enough_to_ask(rows):
    lower, upper = intervals(lambda chosen: {"mean": float(chosen.mean())}, rows, resamples=20)["mean"]
    assert 0 <= lower <= upper <= rows - 1
