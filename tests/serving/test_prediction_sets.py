"""Sets, intervals and abstention from a manifest's scores, against what their definitions say, class by class."""

import itertools
import math

import numpy as np
import pytest

from models.contract import Abstention, ConformalScores, Manifest, ModelOutput
from serving.prediction_sets import (
    KEPT_COVERAGES,
    PredictionSets,
    cumulative,
    interval,
    prediction_set,
    withheld,
)
from tests.serving.manifests import made_up_manifest


def manifest(output: ModelOutput, **calibrated) -> Manifest:
    calibration = {"rows": 9, "outputs": {output.name: calibrated}} if calibrated else None
    return made_up_manifest(outputs=[output], calibration=calibration)


KIND = ModelOutput(name="kind", task="classification", shape=[3], labels=["a", "b", "c"])
SIZE = ModelOutput(name="size", task="regression", shape=[])


def rows_of_probabilities() -> np.ndarray:
    """Random ones, and all those with ties that thirds, quarters and zeros make."""
    random = np.random.default_rng(0).dirichlet(np.ones(3), 500)
    tied = [row for row in itertools.product([0, 0.25, 1 / 3, 0.5, 1], repeat=3) if math.isclose(sum(row), 1)]
    return np.concatenate([random, tied]).astype(np.float32)


def test_a_class_s_cumulative_score_is_the_sum_of_all_that_are_at_least_as_probable():
    rows = rows_of_probabilities()
    for row, found in zip(rows, cumulative(rows), strict=True):
        wanted = [sum(other for other in row.tolist() if other >= own) for own in row.tolist()]
        assert found == pytest.approx(wanted, abs=3e-7)


def test_a_set_holds_the_classes_whose_own_score_is_at_most_the_threshold():
    rows = rows_of_probabilities()
    for threshold in (0.0, 0.3, 2 / 3, 0.95, 1.0, math.inf):
        found = prediction_set("lac", rows, np.array([threshold], np.float32))
        np.testing.assert_array_equal(found, np.float32(1) - rows <= np.float32(threshold))
    by_class = np.array([0.2, 0.9, math.inf], np.float32)
    found = prediction_set("lac", rows, by_class)
    for index, threshold in enumerate(by_class):
        np.testing.assert_array_equal(found[:, index], np.float32(1) - rows[:, index] <= threshold)
    # The most probable classes first, until the coverage's score is passed.
    assert prediction_set("aps", np.array([[0.6, 0.1, 0.3]], np.float32), np.array([0.95])).tolist() == [
        [True, False, True]
    ]


def test_sets_hold_the_truth_as_often_as_promised():
    """On fresh rows of the same kind, within the noise of 200,000 of them and of 999 calibration rows."""
    random = np.random.default_rng(3)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = random.dirichlet(np.ones(3), count)
        truth = (rows.cumsum(axis=1) > random.uniform(size=(count, 1))).argmax(axis=1)
        return rows.astype(np.float32), truth

    known, truth = drawn(999)
    for kind in ("lac", "aps"):
        every = 1 - known if kind == "lac" else cumulative(known)
        scores = sorted(every[np.arange(999), truth].astype(float).tolist())
        sets = PredictionSets(manifest(KIND, conformal=ConformalScores(kind=kind, scores=[scores])))
        fresh, fresh_truth = drawn(200_000)
        for coverage in (0.5, 0.8, 0.9, 0.99):
            members = sets.at(coverage).apply({"probabilities": fresh})["prediction_set"]
            held = members[np.arange(len(fresh)), fresh_truth].mean()
            # The coverage of split conformal sets is Beta(k, n + 1 - k): its deviation, four times.
            noise = 4 * math.sqrt(coverage * (1 - coverage) / 1000)
            assert held >= coverage - noise
            # The least probable class's sum is always 1: where that is the threshold, APS promises more than asked.
            if kind == "lac":
                assert held <= coverage + noise


def test_an_interval_is_the_mean_and_so_many_deviations():
    sets = PredictionSets(manifest(SIZE, conformal=ConformalScores(kind="interval", scores=[[0.5, 1.0, 1.5, 2.0]])))
    arrays = {"mean": np.array([1, -2], np.float32), "std": np.array([1, 4], np.float32)}
    found = sets.at(0.6).apply(arrays)
    np.testing.assert_allclose(found["interval_lower"], [-0.5, -8])
    np.testing.assert_allclose(found["interval_upper"], [2.5, 4])
    lower, upper = interval(np.zeros(2, np.float32), np.zeros(2, np.float32), np.array([math.inf], np.float32))
    assert lower.tolist() == [-math.inf] * 2
    assert upper.tolist() == [math.inf] * 2


def test_each_of_several_numbers_has_the_interval_of_its_own_scores():
    pair = ModelOutput(name="pair", task="regression", shape=[2])
    scores = ConformalScores(kind="interval", scores=[[0.5, 1.0, 1.5, 2.0], [0.1, 0.2, 0.3, 0.4]])
    sets = PredictionSets(manifest(pair, conformal=scores))
    arrays = {"mean": np.array([[1, -2]], np.float32), "std": np.array([[1, 0]], np.float32)}
    for coverage, reach in ((0.6, [1.5, 0.0]), (0.9, [math.inf, math.inf])):
        found = sets.at(coverage).apply(arrays)
        np.testing.assert_allclose(found["interval_lower"], arrays["mean"] - [reach])
        np.testing.assert_allclose(found["interval_upper"], arrays["mean"] + [reach])
    assert [tensor.shape for tensor in sets.at().tensors] == [[None, 2]] * 2
    assert sets.at(0.9).warnings == ("coverage 0.9: 9 calibration rows wanted, there are 4; intervals have no ends",)


def test_too_few_rows_are_the_full_set_and_are_told():
    nine = [0.1 * index for index in range(9)]
    sets = PredictionSets(manifest(KIND, conformal=ConformalScores(kind="lac", scores=[nine])))
    assert sets.at(0.9).warnings == ()
    few = sets.at(0.99)
    assert few.apply({"probabilities": rows_of_probabilities()})["prediction_set"].all()
    assert few.warnings == ("coverage 0.99: 99 calibration rows wanted, there are 9; every set is the full one",)
    by_class = ConformalScores(kind="lac", scores=[nine, nine[:3], nine], by_class=True)
    found = PredictionSets(manifest(KIND, conformal=by_class)).at(0.9)
    assert found.warnings == ("coverage 0.9: 9 calibration rows of 'b' wanted, there are 3; 'b' is in every set",)
    one = found.apply({"probabilities": np.array([[1, 0, 0]], np.float32)})["prediction_set"]
    assert one.tolist() == [[True, True, False]]


def test_what_the_signatures_carry_stands_at_the_artifact_s_own_coverage_only():
    sets = PredictionSets(manifest(KIND, conformal=ConformalScores(kind="lac", scores=[[0.5] * 9])))
    carried = {"probabilities": np.array([[0.6, 0.3, 0.1]], np.float32), "prediction_set": np.ones((1, 3), bool)}
    for coverage in (None, 0.9):
        assert sets.at(coverage).apply(carried) is carried
    assert sets.at(0.8).apply(carried)["prediction_set"].tolist() == [[True, False, False]]


def test_an_answer_is_withheld_beyond_the_threshold_and_not_at_it():
    unsure = Abstention(statistic="confidence", threshold=0.5, answered_share=0.9)
    rows = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], np.float32)
    assert withheld(KIND, unsure, {"probabilities": rows}).tolist() == [False, True]
    wide = Abstention(statistic="std", threshold=2.0, answered_share=0.9)
    assert withheld(SIZE, wide, {"std": np.array([2, 2.5], np.float32)}).tolist() == [False, True]


def test_a_coverage_of_a_model_without_scores_is_warned_of_and_gives_no_sets():
    sets = PredictionSets(manifest(KIND))
    assert sets.at().apply({}) == {}
    assert sets.at().warnings == ()
    assert sets.at(0.8).apply({}) == {}
    assert sets.at(0.8).warnings == ("coverage 0.8: this model has no calibration scores to promise it by",)


def test_coverages_that_are_kept_are_bounded():
    sets = PredictionSets(manifest(KIND, conformal=ConformalScores(kind="lac", scores=[[0.5] * 9])))
    assert sets.at(0.8) is sets.at(0.8)
    for coverage in np.linspace(0.1, 0.9, 10 * KEPT_COVERAGES).tolist():
        sets.at(coverage)
    assert len(sets._kept) <= KEPT_COVERAGES
