"""The population stability index against what it must be by its definition, and against its known sampling noise."""

import numpy as np
import pytest

from models.contract import REFERENCE_LEVELS
from serving.drift import MIN_ROWS, bins, stability_index


def reference_of(values):
    return bins(np.quantile(values, REFERENCE_LEVELS).tolist())


def test_bins_have_equal_weight_and_hold_every_value():
    values = np.random.default_rng(0).gamma(2.0, size=1_000)
    found = reference_of(values)
    np.testing.assert_allclose(found.expected, 0.1)
    np.testing.assert_array_equal(found.counts(values), 100)
    assert found.counts(np.array([-1e9, 1e9])).tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("tied", [0.0, 0.5, 1.0], ids=["the least", "in the middle", "the greatest"])
def test_a_value_that_many_rows_share_is_one_bin(tied):
    """As entropies are where a network is certain: no bin is empty by construction, and the same rows have no drift."""
    values = np.concatenate([np.full(450, tied), np.random.default_rng(0).uniform(size=550)])
    found = reference_of(values)
    assert found.expected.sum() == pytest.approx(1)
    counts = found.counts(values)
    np.testing.assert_allclose(counts / 1000, found.expected, atol=1e-9)
    assert len(found.expected) > 4


def test_one_value_alone_is_no_drift():
    found = bins([0.3] * 11)
    assert stability_index(found.counts(np.full(500, 0.3)).tolist(), found.expected) == pytest.approx(0)


def test_the_index_is_what_its_definition_says():
    counts, expected = [120.0, 90.0, 190.0], np.array([0.5, 0.25, 0.25])
    by_hand = sum((count / 400 - share) * np.log(count / 400 / share) for count, share in zip(counts, expected))  # noqa: B905
    assert stability_index(counts, expected) == pytest.approx(by_hand)


def test_without_drift_the_index_is_noise_of_the_known_size_and_with_drift_it_is_large():
    """Its mean is (bins - 1) / rows: n times the index is chi-squared with bins - 1 degrees of freedom."""
    random = np.random.default_rng(1)
    found = reference_of(random.normal(size=1_000_000))
    scores = [stability_index(found.counts(random.normal(size=900)).tolist(), found.expected) for _ in range(300)]
    assert np.mean(np.array(scores, float)) == pytest.approx(9 / 900, rel=0.15)
    moved = stability_index(found.counts(random.normal(1.0, size=900)).tolist(), found.expected)
    assert moved is not None
    assert moved > 0.25


def test_too_few_rows_say_nothing():
    found = reference_of(np.arange(100.0))
    assert stability_index([MIN_ROWS - 1, *[0] * 9], found.expected) is None
