"""Against the definitions by pairs and thresholds, written out."""

import numpy as np
import pytest

from training.outlier_scores import outlier_scores

GENERATOR = np.random.default_rng(2)


@pytest.mark.parametrize("decimals", [1, 12])
def test_scores_are_their_definitions(decimals):
    known = np.round(GENERATOR.normal(0, 1, 200), decimals)
    outliers = np.round(GENERATOR.normal(1, 1, 120), decimals)
    found = outlier_scores(known, outliers)
    wins = np.mean((outliers[:, None] > known) + 0.5 * (outliers[:, None] == known))
    assert found["auroc"] == pytest.approx(wins)
    thresholds = [value for value in outliers if np.mean(outliers >= value) >= 0.95]
    assert found["fpr95"] == pytest.approx(np.mean(known >= max(thresholds)))
    precision, recall, area = 0.0, 0.0, 0.0
    for value in np.unique(np.concatenate([known, outliers]))[::-1]:
        hits, alarms = np.sum(outliers >= value), np.sum(known >= value)
        precision = hits / (hits + alarms)
        area += precision * (hits / 120 - recall)
        recall = hits / 120
    assert found["aupr"] == pytest.approx(area)


def test_perfect_and_useless_scores():
    assert outlier_scores(np.zeros(5), np.ones(5)) == {"auroc": 1.0, "aupr": 1.0, "fpr95": 0.0}
    assert outlier_scores(np.zeros(5), np.zeros(15)) == {"auroc": 0.5, "aupr": 0.75, "fpr95": 1.0}
