"""Thresholds of abstention: the promise holds in as many splits as it says; the bound is SciPy's."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from models import abstention
from models.calibration_settings import CalibrationSettings, SettingsError


def rows(count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Answers whose confidence is right: as many are right as it says."""
    confidence = 1 - 0.5 * random.beta(0.6, 3, count)
    return confidence.astype(np.float32), random.uniform(size=count) < confidence


def bound(wrong: int, count: int) -> float:
    return float(abstention.upper_bound(np.array(wrong), np.array(count), 0.95))


def test_bound_is_the_exact_one():
    for wrong, count in ((0, 30), (3, 100), (100, 100)):
        expected = binomtest(wrong, count, alternative="less").proportion_ci(0.95, method="exact").high
        assert bound(wrong, count) == pytest.approx(expected, abs=1e-6)
    assert abstention.rows_wanted(0.02, 0.95) == 149
    assert bound(0, 149) <= 0.02 < bound(0, 148)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_promised_error_holds_in_the_promised_share_of_500_splits(level):
    random = np.random.default_rng(0)
    everything, right = rows(200_000, random)
    broken = answered = 0
    for _ in range(500):
        chosen = random.integers(0, len(everything), 400)
        rule, _ = abstention.of_max_error(everything[chosen], right[chosen], 0.05, level)
        given = everything >= np.float32(rule.threshold)
        answered += bool(given.any())
        broken += bool(given.any() and 1 - right[given].mean() > 0.05)
    assert answered > 400
    # At most as many broken promises as the level allows, up to the chance of 500 trials.
    assert broken <= binom.ppf(0.995, 500, 1 - level)


def test_without_rows_enough_everything_is_withheld_and_a_sentence_says_how_many_are_wanted():
    confidence, _ = rows(100, np.random.default_rng(1))
    rule, reason = abstention.of_max_error(confidence, np.ones(100, bool), 0.02, 0.95)
    assert rule.threshold > 1
    assert (rule.answered_share, rule.error, rule.max_error, rule.confidence) == (0, None, 0.02, 0.95)
    assert reason is not None
    assert "at least 149 confident ones" in reason


def test_rows_that_are_all_right_are_all_answered():
    confidence, _ = rows(200, np.random.default_rng(2))
    rule, reason = abstention.of_max_error(confidence, np.ones(200, bool), 0.02, 0.95)
    assert reason is None
    assert rule.answered_share == 1


def test_chows_rule_is_the_cheapest_threshold_of_honest_confidences():
    confidence, right = rows(400_000, np.random.default_rng(3))
    rule = abstention.of_cost_ratio(confidence, right, 10.0)
    assert rule.threshold == pytest.approx(0.9)

    def cost(threshold: float) -> float:
        given = confidence >= threshold
        return float((10 * (given & ~right) + ~given).mean())

    assert cost(rule.threshold) <= min(cost(threshold) for threshold in np.linspace(0.5, 1, 51)) * 1.01


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"max_error": 0.0}, "max-error 0: wanted a share above 0 and below 1"),
        ({"max_error": 0.1, "cost_ratio": 5.0}, "wanted one of them"),
        ({"cost_ratio": 1.0}, "cost-ratio 1: wanted a number above 1"),
        ({"coverage": 1.0}, "coverage 1: wanted a share above 0 and below 1"),
        ({"coverage": float("nan")}, "coverage nan: wanted a share"),
        ({"confidence": 1.0}, "confidence 1: wanted a probability"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(options, found):
    with pytest.raises(SettingsError, match=found):
        CalibrationSettings(**options)
    with pytest.raises(SettingsError, match="only for classes"):
        CalibrationSettings(max_error=0.1).check_task(is_classification=False)
