import keras
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from training.datasets import load
from training.evaluation import evaluate, evaluate_constant
from training.fit import fit
from training.recipes import recipe
from training.splits import split


def outcome(name):
    data = load(name)
    rows = split(data.y, data.task)
    model = fit(data, rows.train, recipe(name, epochs=5), seed=0).model
    answer = keras.ops.convert_to_numpy(model(data.x[rows.test])).astype(np.float64)
    return evaluate(model, data, rows.test), answer, data.y[rows.test]


def test_binary_metrics_are_their_definitions():
    metrics, answer, y = outcome("sonar")
    rock = answer[:, 0]
    assert metrics["accuracy"] == np.mean((rock > 0.5) == y)
    assert metrics["nll"] == pytest.approx(-np.mean(np.log(np.where(y == 1, rock, 1 - rock))))
    assert metrics["brier"] == pytest.approx(2 * np.mean((rock - y) ** 2))


def test_multi_class_metrics_are_their_definitions():
    metrics, answer, y = outcome("wine")
    assert metrics["accuracy"] == np.mean(answer.argmax(axis=1) == y)
    assert metrics["nll"] == pytest.approx(-np.mean(np.log(answer[np.arange(len(y)), y])), rel=1e-6)
    assert metrics["brier"] == pytest.approx(np.mean(((answer - np.eye(3)[y]) ** 2).sum(axis=1)), rel=1e-6)
    answer /= answer.sum(axis=1, keepdims=True)
    assert metrics["brier"] == pytest.approx(brier_score_loss(y, answer, scale_by_half=False))


def test_regression_metrics_are_in_the_target_s_unit():
    metrics, answer, y = outcome("diabetes")
    error = answer[:, 0] - y
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert metrics["mae"] == pytest.approx(np.mean(np.abs(error)))
    assert metrics["mae"] > 10


def test_constant_answer_is_that_of_the_training_targets():
    data = load("sonar")
    rows = split(data.y, data.task)
    rock = data.y[rows.train].mean()
    y = data.y[rows.test]
    metrics = evaluate_constant(data, rows.train, rows.test)
    assert metrics["accuracy"] == np.mean(y == 0)
    assert metrics["nll"] == pytest.approx(-np.mean(np.where(y == 1, np.log(rock), np.log(1 - rock))))
    data = load("diabetes")
    rows = split(data.y, data.task)
    error = data.y[rows.test] - data.y[rows.train].mean()
    metrics = evaluate_constant(data, rows.train, rows.test)
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)


def test_dropout_is_off():
    data = load("sonar")
    rows = split(data.y, data.task)
    model = fit(data, rows.train, recipe("sonar", epochs=5), seed=0).model
    assert evaluate(model, data, rows.test) == evaluate(model, data, rows.test)
    noisy = keras.ops.convert_to_numpy(model(data.x[rows.test], training=True))
    assert not np.array_equal(noisy, keras.ops.convert_to_numpy(model(data.x[rows.test])))
