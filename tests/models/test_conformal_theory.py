"""Coverage of split conformal prediction against its exact law, on real data and the draws of real networks.

With scores that do not tie, n calibration rows and rank k, the number of m test rows that are covered is beta-binomial
(m, k, n + 1 - k): so in every random split of a pool of held-out rows, whatever the network.
"""

import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import betabinom, binom, norm

from models import conformal
from training.datasets import load
from training.fit import fit
from training.recipes import recipe
from training.splits import split

SPLITS = 500
# There are 45 checks, of networks that differ from processor to processor in their last bits: all of them pass.
LEVEL = 1e-6
COVERAGES = (0.8, 0.9, 0.95)
EPOCHS = {"breast_cancer": 10, "digits": 6, "diabetes": 30}


@pytest.fixture(scope="module", params=EPOCHS)
def held_out(request):
    """Means and deviations of twenty draws for the rows that did not train the network, and their targets."""
    data = load(request.param)
    rows = split(data.y, data.task)
    pool = np.concatenate([rows.calibration, rows.test])
    chosen = recipe(request.param, epochs=EPOCHS[request.param])
    model = fit(data, rows.train, chosen, seed=0).model
    draws = np.stack([np.asarray(model(data.network_input(pool), training=True)) for _ in range(20)])
    if data.task == "regression":
        mean, std = draws.mean(axis=0)[:, 0], np.hypot(draws.std(axis=0)[:, 0], 40.0)
        return None, (mean, std), data.y[pool]
    mean = draws.mean(axis=0)
    mean = np.concatenate([1 - mean, mean], axis=1) if mean.shape[1] == 1 else mean
    # Scores that tie are covered together: a breath of difference keeps the law exact.
    mean = mean * np.random.default_rng(0).uniform(0.999, 1.0, mean.shape)
    return len(data.labels), mean.astype(np.float32), data.y[pool]


def within_the_law(covered: np.ndarray, size: int, rows: int, coverage: float) -> None:
    """covered [SPLITS]: test rows of `size` that were covered; calibrated on `rows`."""
    rank = int(np.ceil(round((rows + 1) * coverage, 9)))
    law = betabinom(size, rank, rows + 1 - rank)
    outside = (covered < law.ppf(0.005)) | (covered > law.ppf(0.995))
    assert outside.sum() <= binom.ppf(1 - LEVEL, SPLITS, 0.01)
    assert abs(covered.mean() - law.mean()) <= norm.ppf(1 - LEVEL / 2) * law.std() / np.sqrt(SPLITS)


@pytest.mark.parametrize("coverage", COVERAGES)
def test_coverage_of_500_splits_follows_its_beta_law(held_out, coverage):
    classes, answers, y = held_out
    random, half = np.random.default_rng(1), len(y) // 2
    covered = np.empty(SPLITS)
    for number in range(SPLITS):
        order = random.permutation(len(y))
        first, rest = order[:half], order[half:]
        if classes is None:
            mean, std = answers
            scores = conformal.of_values(mean[first], std[first], y[first])
            low, high = conformal.interval(mean[rest], std[rest], scores, coverage)
            covered[number] = ((low <= y[rest]) & (y[rest] <= high)).sum()
        else:
            scores = conformal.of_classes(answers[first], y[first], "lac")
            sets = conformal.prediction_set(tf.constant(answers[rest]), scores, coverage).numpy()
            covered[number] = sets[np.arange(len(rest)), y[rest]].sum()
    within_the_law(covered, len(y) - half, half, coverage)


@pytest.mark.parametrize("coverage", COVERAGES)
def test_coverage_of_each_class_follows_its_own(held_out, coverage):
    """Splits with as many calibration rows of each class as of the others' half."""
    classes, answers, y = held_out
    if classes is None:
        pytest.skip("a regression has no classes")
    random = np.random.default_rng(2)
    members = [np.flatnonzero(y == label) for label in range(classes)]
    covered = np.empty((SPLITS, classes))
    for number in range(SPLITS):
        orders = [random.permutation(rows) for rows in members]
        first = np.concatenate([rows[: len(rows) // 2] for rows in orders])
        rest = np.concatenate([rows[len(rows) // 2 :] for rows in orders])
        scores = conformal.of_classes(answers[first], y[first], "class")
        sets = conformal.prediction_set(tf.constant(answers[rest]), scores, coverage).numpy()
        inside = sets[np.arange(len(rest)), y[rest]]
        covered[number] = [inside[y[rest] == label].sum() for label in range(classes)]
    for label, rows in enumerate(members):
        within_the_law(covered[:, label], len(rows) - len(rows) // 2, len(rows) // 2, coverage)
