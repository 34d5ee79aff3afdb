"""Figures of resampled rows are those of the answers that were drawn, one by one."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss

from models import reliability
from models.contract import NO_CLASS
from training.class_outcomes import Outcomes
from training.selection import risk_coverage

ROWS, CLASSES = 40, 4


@pytest.mark.parametrize("places", [(), (6,)], ids=["rows", "places, some without a class"])
def test_a_resample_has_the_figures_of_its_own_answers(places):
    random = np.random.default_rng(0)
    # Of few values, so that confidences are tied.
    probabilities = softmax(random.integers(0, 3, (ROWS, *places, CLASSES)).astype(float), axis=-1)
    y = random.integers(0, CLASSES, (ROWS, *places))
    if places:
        y[:, 4:][random.random((ROWS, 2)) < 0.5] = NO_CLASS
    outcomes = Outcomes(probabilities, y)
    for rows in (None, random.integers(0, ROWS, ROWS), np.full(ROWS, 7)):
        p, truth = (probabilities, y) if rows is None else (probabilities[rows], y[rows])
        p, truth = p[truth != NO_CLASS], truth[truth != NO_CLASS]
        confidence, right = p.max(axis=1), p.argmax(axis=1) == truth
        wanted = {
            "accuracy": accuracy_score(truth, p.argmax(axis=1)),
            "nll": log_loss(truth, p, labels=range(CLASSES)),
            "brier": np.square(p - np.eye(CLASSES)[truth]).sum(axis=1).mean(),
            "ece": reliability.expected_calibration_error(p, truth),
            "adaptive_ece": reliability.adaptive_calibration_error(p, truth),
            "aurc": risk_coverage(1 - confidence, ~right).area,
        }
        assert outcomes.figures(rows) == pytest.approx(wanted, rel=1e-12)
