"""Prediction sets against their definition in NumPy, and their coverage against the Beta law of the theory."""

import numpy as np
import pytest
import tensorflow as tf

from models import conformal
from models.contract import ConformalScores
from models.sampling import some


def rows(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(classes, 0.4), count).astype(np.float32)
    return probabilities, np.array([random.choice(classes, p=row / row.sum()) for row in probabilities.astype(float)])


def own_scores(probabilities: np.ndarray, kind: str) -> np.ndarray:
    p = probabilities.astype(np.float64)
    if kind == "lac":
        return 1 - p
    return ((p[:, None, :] >= p[:, :, None]) * p[:, None, :]).sum(axis=2)


@pytest.mark.parametrize("kind", ["lac", "aps"])
@pytest.mark.parametrize("classes", [2, 7])
def test_scores_of_the_graph_are_those_of_the_definition(kind, classes):
    probabilities, _ = rows(200, classes)
    probabilities[0] = 1 / classes
    found = conformal.class_scores(tf.constant(probabilities), kind).numpy()
    np.testing.assert_allclose(found, own_scores(probabilities, kind), atol=1e-6)


@pytest.mark.parametrize("sets", ["lac", "aps", "class"])
@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_set_of_the_graph_is_what_the_scores_say(sets, coverage):
    probabilities, classes = rows(300, 3)
    scores = conformal.of_classes(probabilities, classes, sets)
    others, _ = rows(500, 3, seed=1)
    found = conformal.prediction_set(tf.constant(others), scores, coverage).numpy()
    kind = "aps" if sets == "aps" else "lac"
    own = own_scores(probabilities, kind)[np.arange(300), classes]
    for label in range(3):
        of_label = np.sort(own[classes == label] if sets == "class" else own)
        threshold = of_label[int(np.ceil((len(of_label) + 1) * coverage - 1e-9)) - 1]
        distance = own_scores(others, kind)[:, label] - threshold
        clear = np.abs(distance) > 2e-6
        # Ties, of rows whose classes sum to 1 for one, are inside.
        assert found[np.abs(distance) < 2e-7, label].all()
        np.testing.assert_array_equal(found[clear, label], distance[clear] <= 0)


@pytest.mark.parametrize("order", ["by class", "by score"])
def test_of_many_rows_those_that_are_kept_are_like_all(order):
    """Sorted files are usual: their first rows would be easy ones, or of few classes."""
    probabilities, classes = rows(4 * conformal.MOST_ROWS, 5)
    own = own_scores(probabilities, "lac")[np.arange(len(classes)), classes]
    sorted_rows = np.argsort(classes if order == "by class" else own, kind="stable")
    scores = conformal.of_classes(probabilities[sorted_rows], classes[sorted_rows], "lac")
    assert len(scores.scores[0]) == conformal.MOST_ROWS
    assert np.mean(own <= scores.thresholds(0.9)[0]) == pytest.approx(0.9, abs=0.015)
    by_class = conformal.of_classes(probabilities[sorted_rows], classes[sorted_rows], "class").scores
    assert min(map(len, by_class)) > 0.1 * conformal.MOST_ROWS


def test_the_least_coverage_has_the_least_threshold():
    scores = ConformalScores(kind="lac", scores=[[0.1, 0.5, 0.9]])
    assert scores.thresholds(1e-12) == scores.thresholds(0.2) == [0.1]


def test_too_few_rows_are_the_full_set_and_a_sentence():
    probabilities, classes = rows(8, 3)
    scores = conformal.of_classes(probabilities, classes, "lac")
    assert conformal.prediction_set(tf.constant(probabilities), scores, 0.9).numpy().all()
    assert conformal.too_few(scores, 0.9, ["a", "b", "c"]) == (
        "at a coverage of 90% the prediction set holds every class: 8 calibration rows found, 9 wanted"
    )
    assert conformal.too_few(scores, 0.8, ["a", "b", "c"]) is None
    by_class = conformal.of_classes(probabilities, np.array([0] * 8), "class")
    assert "always holds 'a', 'b', 'c': 8 calibration rows of class 'a' found" in str(
        conformal.too_few(by_class, 0.9, ["a", "b", "c"])
    )


def test_scores_are_a_step_up_and_ten_thousand_at_most():
    probabilities, classes = rows(10_050, 2)
    scores = conformal.of_classes(probabilities, classes, "lac").scores[0]
    own = np.sort(some(own_scores(probabilities, "lac")[np.arange(10_050), classes], 10_000))
    assert len(scores) == 10_000
    assert (np.array(scores) >= own - 1e-7).all()
    assert (np.array(scores) <= own + 2e-6).all()
    ConformalScores(kind="lac", scores=[scores])
