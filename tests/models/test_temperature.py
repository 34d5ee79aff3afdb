"""The temperature of draws against SciPy's minimiser and scikit-learn's likelihood."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold

from models import temperature
from models.reliability import expected_calibration_error


def made_up(rows: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws [rows, 30, 3] whose logits are `sharpness` times those that made the classes."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (rows, 1, 3)) + random.normal(0, 0.5, (rows, 30, 3))
    mean = softmax(logits, axis=-1).mean(axis=1)
    classes = np.array([random.choice(3, p=row) for row in mean])
    return softmax(sharpness * logits, axis=-1).astype(np.float32), classes


def tempered(draws: np.ndarray, value: float) -> np.ndarray:
    return softmax(np.log(draws.astype(np.float64)) / value, axis=-1).mean(axis=1)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_it_is_the_minimiser_and_undoes_a_sharpening(sharpness):
    draws, classes = made_up(2000, sharpness)
    found, _ = temperature.fit(draws, classes)

    def cost(value):
        return log_loss(classes, tempered(draws, value)) * len(classes) + (np.log(value) / 0.5) ** 2 / 2

    expected = minimize_scalar(cost, bounds=(0.25, 4), method="bounded", options={"xatol": 1e-6}).x
    if found.value != 1.0:
        assert found.value == pytest.approx(expected, rel=2e-3)
        assert found.value == pytest.approx(sharpness, rel=0.15)
    assert (found.value == 1.0) == (sharpness == 1.0 and found.nll_after >= found.nll_before)
    assert found.nll_before == pytest.approx(log_loss(classes, draws.mean(axis=1, dtype=np.float64)), abs=1e-6)


def test_places_of_a_row_count_each_and_stay_in_one_fold():
    flat, of_places = made_up(120, 2.5)
    draws, classes = flat.reshape(40, 3, 30, 3).transpose(0, 2, 1, 3), of_places.reshape(40, 3)
    found, _ = temperature.fit(draws, classes)
    alone, _ = temperature.fit(flat, of_places)
    assert found.value == pytest.approx(alone.value, rel=1e-3)
    assert found.nll_before == pytest.approx(alone.nll_before)
    held_out = np.empty(120)
    for rest, fold in KFold(5, shuffle=True, random_state=0).split(classes):
        value, _ = temperature.fit(draws[rest], classes[rest])
        chosen = draws[fold].transpose(0, 2, 1, 3).reshape(-1, 30, 3)
        own = tempered(chosen, value.value)[np.arange(len(chosen)), classes[fold].ravel()]
        held_out[(fold[:, None] * 3 + np.arange(3)).ravel()] = -np.log(own)
    assert found.nll_after == pytest.approx(held_out.mean(), rel=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_on_only_where_cross_validation_shows_a_lower_likelihood(seed):
    random = np.random.default_rng(seed)
    draws, classes = made_up(int(random.integers(10, 60)), random.uniform(0.7, 1.5), seed)
    found, reason = temperature.fit(draws, classes)
    is_on = found.value != 1.0
    assert is_on == (found.nll_after < found.nll_before)
    assert is_on == (reason is None)
    if reason is not None:
        assert "stays off" in reason


def test_of_more_rows_than_are_used_no_class_is_left_out(monkeypatch):
    """A file may be sorted by class."""
    draws, classes = made_up(2000, 2.5)
    order = np.argsort(classes, kind="stable")
    monkeypatch.setattr(temperature, "MOST_NUMBERS", 600 * 30 * 3)
    found, _ = temperature.fit(draws[order], classes[order])
    assert found.value == pytest.approx(2.5, rel=0.15)
    assert found.nll_before == pytest.approx(log_loss(classes, draws.mean(axis=1, dtype=np.float64)), rel=0.05)


def test_too_few_rows_leave_it_off_with_the_reason():
    found, reason = temperature.fit(*made_up(9, 3.0))
    assert found.value == 1.0
    assert reason == "temperature stays off: 9 calibration rows found, 10 wanted at least"


def test_rows_that_are_all_right_do_not_make_votes_of_the_draws():
    draws, _ = made_up(40, 3.0)
    found, _ = temperature.fit(draws, draws.mean(axis=1).argmax(axis=1))
    assert 0.25 < found.value < 1


@pytest.mark.parametrize("value", [0.3, 0.9, 2.5])
def test_the_graph_tempers_as_numpy_does_with_zeros_and_ones(value):
    draws, _ = made_up(50, 4.0)
    draws[0, 0] = [1, 0, 0]
    expected = temperature.answers(temperature.logarithms(draws), value)
    found = temperature.applied(tf.constant(draws), value, binary=False).numpy()
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(found.mean(axis=1), expected, atol=1e-6)
    two = np.stack([1 - draws[..., 0], draws[..., 0]], axis=-1)
    second = temperature.applied(tf.constant(draws[..., 0]), value, binary=True).numpy()
    np.testing.assert_allclose(
        second.mean(axis=1), temperature.answers(temperature.logarithms(two), value)[:, 1], atol=1e-6
    )


def test_calibration_error_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.2, 0.8]])
    classes = np.array([0, 1, 1, 1])
    # Bins of a fifteenth: the two of 0.9 with accuracy 1/2; 0.55 and 0.8, each right.
    expected = (2 * abs(0.5 - 0.9) + abs(1 - 0.55) + abs(1 - 0.8)) / 4
    assert expected_calibration_error(probabilities, classes) == pytest.approx(expected)
