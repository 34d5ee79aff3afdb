"""Calibration errors and the Brier score's parts against MAPIE, scikit-learn and hand-made cases."""

import numpy as np
import pytest
from mapie.metrics.calibration import expected_calibration_error as mapie_error
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from models.reliability import (
    BRIER_BINS,
    adaptive_calibration_error,
    adaptive_curve,
    brier_parts,
    expected_calibration_error,
    mean_entropy,
    top_label_curve,
)

GENERATOR = np.random.default_rng(0)
PROBABILITIES = GENERATOR.dirichlet(np.ones(4), size=500)
CLASSES = np.array([GENERATOR.choice(4, p=row) for row in PROBABILITIES])
RIGHT = (PROBABILITIES.argmax(axis=1) == CLASSES).astype(int)


def test_calibration_error_of_known_cases():
    even = np.full((10, 2), 0.5)
    assert expected_calibration_error(even, np.array([0, 1] * 5)) == pytest.approx(0)
    sure = np.tile([0.9, 0.1], (10, 1))
    assert expected_calibration_error(sure, np.zeros(10, int)) == pytest.approx(0.1)
    assert expected_calibration_error(sure, np.ones(10, int)) == pytest.approx(0.9)


def test_calibration_error_weighs_bins_by_rows():
    probabilities = np.array([[0.95, 0.05]] * 3 + [[0.65, 0.35]])
    assert expected_calibration_error(probabilities, np.zeros(4, int)) == pytest.approx((3 * 0.05 + 0.35) / 4)


@pytest.mark.parametrize("bins", [5, 10, 15, 40])
def test_calibration_error_is_mapie_s(bins):
    # MAPIE counts the edges.
    wanted = mapie_error(RIGHT, PROBABILITIES, num_bins=bins + 1, split_strategy="uniform")
    assert expected_calibration_error(PROBABILITIES, CLASSES, bins) == pytest.approx(wanted)


@pytest.mark.parametrize("bins", [5, 15])
def test_curve_is_scikit_learn_s(bins):
    curve = top_label_curve(PROBABILITIES, CLASSES, bins)
    accuracy, confidence = calibration_curve(RIGHT, PROBABILITIES.max(axis=1), n_bins=bins)
    np.testing.assert_allclose(curve.accuracy, accuracy)
    np.testing.assert_allclose(curve.confidence, confidence)
    assert curve.rows.sum() == len(CLASSES)


@pytest.mark.parametrize(("rows", "bins"), [(500, 15), (500, 20), (7, 15), (1, 15)])
def test_adaptive_bins_hold_as_many_rows_each(rows, bins):
    curve = adaptive_curve(PROBABILITIES[:rows], CLASSES[:rows], bins)
    assert len(curve.rows) == min(rows, bins)
    assert curve.rows.max() - curve.rows.min() <= 1
    assert np.all(np.diff(curve.confidence) >= 0)


def test_adaptive_error_is_that_of_the_sorted_rows_cut_evenly():
    order = np.argsort(PROBABILITIES.max(axis=1), kind="stable")
    confidence, right = PROBABILITIES.max(axis=1)[order], RIGHT[order]
    # 500 rows in 20 bins of 25.
    gaps = [abs(part.mean()) for part in np.split(right - confidence, 20)]
    assert adaptive_calibration_error(PROBABILITIES, CLASSES, 20) == pytest.approx(np.mean(gaps))


def test_adaptive_error_does_not_depend_on_the_order_of_rows_of_one_confidence():
    even, sorted_classes = np.full((100, 2), 0.5), np.repeat([0, 1], 50)
    assert adaptive_calibration_error(even, sorted_classes) == pytest.approx(0)
    few = np.round(PROBABILITIES, 1) + 1e-3
    few /= few.sum(axis=1, keepdims=True)
    wanted = adaptive_calibration_error(few, CLASSES)
    for order in (np.argsort(RIGHT), np.argsort(-RIGHT), GENERATOR.permutation(500)):
        assert adaptive_calibration_error(few[order], CLASSES[order]) == pytest.approx(wanted)


def test_adaptive_error_of_one_row_is_its_own():
    assert adaptive_calibration_error(np.array([[0.7, 0.3]]), np.array([0])) == pytest.approx(0.3)


def test_brier_parts_sum_to_scikit_learn_s_score():
    parts = brier_parts(PROBABILITIES, CLASSES)
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"]
    assert total == pytest.approx(brier_score_loss(CLASSES, PROBABILITIES, scale_by_half=False))


def test_brier_parts_of_binned_forecasts_are_murphy_s():
    """Forecasts of a few values only, so that nothing varies within a bin: the definition as it stands in 1973."""
    rain = GENERATOR.choice([0.05, 0.35, 0.75, 0.95], 400)
    y = (GENERATOR.random(400) < rain**1.3).astype(int)
    found = brier_parts(np.column_stack([1 - rain, rain]), y)
    base, reliability, resolution = y.mean(), 0.0, 0.0
    for value in np.unique(rain):
        share, frequency = np.mean(rain == value), y[rain == value].mean()
        reliability += share * (value - frequency) ** 2
        resolution += share * (frequency - base) ** 2
    # Of both classes.
    assert found["reliability"] == pytest.approx(2 * reliability)
    assert found["resolution"] == pytest.approx(2 * resolution)
    assert found["uncertainty"] == pytest.approx(2 * base * (1 - base))


def test_reliability_part_is_that_of_scikit_learn_s_curve():
    """Of two classes, since its curve takes one probability; rows a bin counted by hand."""
    p = PROBABILITIES[:, 0]
    y = (GENERATOR.random(500) < p).astype(int)
    frequency, mean = calibration_curve(y, p, n_bins=BRIER_BINS)
    rows = np.histogram(p, bins=np.linspace(0, 1, BRIER_BINS + 1))[0]
    share = rows[rows > 0] / 500
    found = brier_parts(np.column_stack([1 - p, p]), y)
    assert found["reliability"] == pytest.approx(2 * np.sum(share * (mean - frequency) ** 2), rel=1e-6)


def test_a_constant_answer_at_the_base_rate_is_reliable_and_resolves_nothing():
    y = np.repeat([0, 1, 2], [10, 30, 60])
    parts = brier_parts(np.tile([0.1, 0.3, 0.6], (100, 1)), y)
    assert parts["reliability"] == pytest.approx(0)
    assert parts["resolution"] == pytest.approx(0)


def test_sharpness_of_one_hot_answers_is_exactly_zero_and_never_negative():
    assert mean_entropy(np.eye(3)) == 0.0
    assert mean_entropy(np.full((2, 4), 0.25)) == pytest.approx(np.log(4))
