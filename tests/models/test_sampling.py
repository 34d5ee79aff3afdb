"""Which rows stand for all."""

import numpy as np
import pytest

from models.sampling import some


@pytest.mark.parametrize("count", [1, 100])
def test_rows_within_the_bound_are_all_there(count):
    rows = np.arange(count)
    assert some(rows, 100) is rows


def test_the_choice_is_spread_in_order_and_the_same_for_arrays_of_one_length():
    found = some(np.arange(10_000), 1_000)
    assert len(np.unique(found)) == len(found) == 1_000
    assert (np.diff(found) > 0).all()
    # Each tenth has a tenth, within five standard deviations of a hypergeometric count.
    assert np.abs(np.bincount(found // 1_000, minlength=10) - 100).max() < 5 * np.sqrt(100 * 0.9 * 0.9)
    np.testing.assert_array_equal(some(np.arange(10_000)[:, None] * [1, 2], 1_000)[:, 0], found)


def test_the_choice_does_not_follow_a_pattern_of_the_rows():
    """A stride would take every row of one class where classes take turns."""
    assert some(np.arange(20_000) % 2, 10_000).mean() == pytest.approx(0.5, abs=0.03)
