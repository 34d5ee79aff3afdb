"""`--max-error` on real data: the promise holds in as many of 500 calibrations as it says, whatever the network.

The rows that did not train the network are the world: its error at a threshold is known. One trained network and its
draws serve all calibrations.
"""

import numpy as np
import pytest
from scipy.stats import binom

from models import abstention
from training.datasets import load
from training.fit import fit
from training.recipes import recipe

SPLITS = 500
LEVELS = (0.8, 0.95)
# Training rows, epochs and the error to promise: less than the network makes, so that answers must be withheld.
ASKED = {"breast_cancer": (60, 20, 0.03), "digits": (250, 20, 0.02)}


@pytest.fixture(scope="module", params=ASKED)
def world(request):
    """Confidence of the mean of twenty draws and whether it is right, of all rows but the training ones; the error."""
    data, (count, epochs, max_error) = load(request.param), ASKED[request.param]
    order = np.random.default_rng(0).permutation(len(data.y))
    train, pool = np.sort(order[:count]), np.sort(order[count:])
    model = fit(data, train, recipe(request.param, epochs=epochs), seed=0).model
    p = np.mean([np.asarray(model(data.network_input(pool), training=True)) for _ in range(20)], axis=0)
    p = np.concatenate([1 - p, p], axis=1) if p.shape[1] == 1 else p
    right = p.argmax(axis=1) == data.y[pool]
    assert 1 - right.mean() > max_error, "the network is too good for this test to show anything"
    return p.max(axis=1).astype(np.float32), right, max_error


def at_most(broken: int, share: float) -> None:
    """As many broken promises as the share allows, up to the chance of 500 trials."""
    assert broken <= binom.ppf(0.999, SPLITS, share)


@pytest.mark.parametrize("level", LEVELS)
def test_promised_error_holds_when_calibration_rows_are_drawn_at_random(world, level):
    """Independent rows, each calibration of its own: Clopper and Pearson's bound is exact here."""
    confidence, right, max_error = world
    random, broken, shares = np.random.default_rng(1), 0, []
    for _ in range(SPLITS):
        chosen = random.integers(0, len(right), len(right) // 2)
        rule, _ = abstention.of_max_error(confidence[chosen], right[chosen], max_error, level)
        given = confidence >= np.float32(rule.threshold)
        shares.append(given.mean())
        broken += bool(given.any() and 1 - right[given].mean() > max_error)
    at_most(broken, 1 - level)
    # A promise that is kept by silence is worth nothing.
    assert np.mean(shares) > 0.4


@pytest.mark.parametrize("level", LEVELS)
def test_errors_of_the_other_half_are_no_more_than_the_promise_and_their_own_chance_allow(world, level):
    confidence, right, max_error = world
    random, broken, beyond = np.random.default_rng(2), 0, 0
    for _ in range(SPLITS):
        order = random.permutation(len(right))
        first, rest = order[: len(right) // 2], order[len(right) // 2 :]
        rule, _ = abstention.of_max_error(confidence[first], right[first], max_error, level)
        given = confidence >= np.float32(rule.threshold)
        broken += bool(given.any() and 1 - right[given].mean() > max_error)
        wrong, answered = int((~right[rest][given[rest]]).sum()), int(given[rest].sum())
        # Had the rest the promised error and no more, so many wrong ones would come once in a hundred times.
        beyond += wrong > binom.ppf(0.99, answered, max_error)
    at_most(broken, 1 - level)
    at_most(beyond, 1 - level + 0.01)
