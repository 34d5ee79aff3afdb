"""Against uncertainty-toolbox, MAPIE, numerical integration and scores that were written once before."""

import numpy as np
import pytest
import uncertainty_toolbox as uct
from mapie.metrics.regression import regression_coverage_score, regression_mean_width_score
from scipy.integrate import quad
from scipy.stats import kstest, norm

from training import predictive, scores

GENERATOR = np.random.default_rng(3)
MEAN, STD = GENERATOR.normal(10, 5, 400), GENERATOR.uniform(0.5, 3, 400)
Y = GENERATOR.normal(MEAN, STD)
DRAWS = GENERATOR.normal(MEAN, STD, (50, 400))


def test_gaussian_scores_are_uncertainty_toolbox_s():
    assert predictive.gaussian_crps(MEAN, STD, Y).mean() == pytest.approx(uct.crps_gaussian(MEAN, STD, Y))
    assert predictive.gaussian_nll(MEAN, STD, Y) == pytest.approx(uct.nll_gaussian(MEAN, STD, Y))
    assert predictive.sharpness(STD) == pytest.approx(uct.sharpness(STD))


def test_gaussian_crps_is_the_integral_that_defines_it():
    for row in range(3):
        z = quad(lambda x, row=row: norm.cdf(x, MEAN[row], STD[row]) ** 2, MEAN[row] - 40, Y[row])[0]
        z += quad(lambda x, row=row: norm.sf(x, MEAN[row], STD[row]) ** 2, Y[row], MEAN[row] + 40)[0]
        assert predictive.gaussian_crps(MEAN, STD, Y)[row] == pytest.approx(z, abs=1e-6)


def test_crps_of_draws_is_the_mean_over_all_pairs():
    pairs = np.abs(DRAWS[:, None] - DRAWS[None]).mean(axis=(0, 1))
    np.testing.assert_allclose(predictive.draws_crps(DRAWS, Y), np.abs(DRAWS - Y).mean(axis=0) - pairs / 2)


def test_crps_of_draws_is_the_mixture_s_where_its_noise_vanishes():
    wanted = scores.regression(DRAWS, 1e-6, Y)["crps"]
    assert predictive.draws_crps(DRAWS, Y).mean() == pytest.approx(wanted, abs=1e-5)


def test_crps_of_one_draw_is_the_absolute_error():
    np.testing.assert_allclose(predictive.draws_crps(DRAWS[:1], Y), np.abs(DRAWS[0] - Y))


def test_crps_of_many_draws_approaches_the_closed_form():
    many = GENERATOR.normal(MEAN[:20], STD[:20], (20_000, 20))
    wanted = predictive.gaussian_crps(MEAN[:20], STD[:20], Y[:20])
    np.testing.assert_allclose(predictive.draws_crps(many, Y[:20]), wanted, atol=0.1)


@pytest.mark.parametrize(
    "pit",
    [
        predictive.gaussian_pit(MEAN, STD, Y),
        predictive.draws_pit(DRAWS, Y),
        predictive.mixture_pit(MEAN[None], STD, Y),
    ],
    ids=["gaussian", "draws", "mixture"],
)
def test_pit_of_right_distributions_is_uniform_and_of_too_narrow_ones_is_not(pit):
    assert kstest(pit, "uniform").pvalue > 0.01
    assert predictive.pit_distance(pit) == pytest.approx(kstest(pit, "uniform").statistic)
    narrow = predictive.gaussian_pit(MEAN, STD / 3, Y)
    assert predictive.pit_distance(narrow) > 2 * predictive.pit_distance(pit)


def test_pit_of_draws_counts_ties_by_half():
    assert predictive.draws_pit(np.array([[1.0], [2.0], [2.0], [4.0]]), np.array([2.0])) == pytest.approx(0.5)


def test_pit_of_a_mixture_is_its_distribution_function():
    centres, noise = np.array([[0.0], [3.0]]), 0.8
    inside = quad(lambda x: np.mean(norm.pdf(x, centres[:, 0], noise)), -20, 1.7)[0]
    assert predictive.mixture_pit(centres, noise, np.array([1.7])) == pytest.approx(inside)


def test_intervals_are_mapie_s():
    lower, upper = MEAN - STD, MEAN + STD
    both = np.stack([lower, upper], axis=1)[..., None]
    assert predictive.interval_coverage(lower, upper, Y) == pytest.approx(regression_coverage_score(Y, both)[0])
    assert predictive.interval_width(lower, upper) == pytest.approx(regression_mean_width_score(both)[0])
