"""Risk and coverage against definitions written out, row by row."""

import numpy as np
import pytest

from training.selection import accuracy_rejection, best_area, risk_coverage

GENERATOR = np.random.default_rng(1)
DOUBT = GENERATOR.random(300)
RIGHT = GENERATOR.random(300) > DOUBT / 2


def test_area_is_the_mean_risk_of_every_number_of_answers():
    loss = (~RIGHT).astype(float)
    risks = []
    for answered in range(1, 301):
        least_doubtful = sorted(range(300), key=lambda row: DOUBT[row])[:answered]
        risks.append(sum(loss[row] for row in least_doubtful) / answered)
    curve = risk_coverage(DOUBT, loss)
    np.testing.assert_allclose(curve.risk, risks)
    assert curve.area == pytest.approx(np.mean(risks))
    assert curve.at(1.0) == pytest.approx(loss.mean())
    assert curve.at(0.5) == pytest.approx(risks[149])


def test_order_of_the_rows_does_not_matter_even_where_doubts_are_equal():
    doubt, loss = np.round(DOUBT, 1), (~RIGHT).astype(float)
    curve = risk_coverage(doubt, loss)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(300)
        np.testing.assert_allclose(risk_coverage(doubt[order], loss[order]).risk, curve.risk)


def test_equal_doubts_count_as_the_average_over_their_orders():
    doubt, loss = np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0])
    either = [risk_coverage(np.array([0.0, *pair]), loss).risk for pair in ([1.0, 2.0], [2.0, 1.0])]
    np.testing.assert_allclose(risk_coverage(doubt, loss).risk, np.mean(either, axis=0))


def test_no_doubt_beats_one_that_knows_the_losses():
    loss = (~RIGHT).astype(float)
    assert best_area(loss) < risk_coverage(DOUBT, loss).area
    # Geifman, Uziel & El-Yaniv 2019, eq. 5: for a share r of errors it is near r + (1 - r) ln(1 - r).
    share = loss.mean()
    assert best_area(loss) == pytest.approx(share + (1 - share) * np.log(1 - share), abs=0.005)


def test_accuracy_of_what_is_not_rejected():
    found = accuracy_rejection(DOUBT, RIGHT, [0, 0.25, 0.999])
    kept = np.argsort(DOUBT)
    assert found == pytest.approx([RIGHT.mean(), RIGHT[kept[:225]].mean(), float(RIGHT[kept[0]])])


def test_squared_errors_are_losses_too():
    errors = np.array([4.0, 1.0, 9.0])
    assert risk_coverage(np.array([2, 1, 3]), errors).risk == pytest.approx([1, 2.5, 14 / 3])
