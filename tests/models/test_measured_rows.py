"""Figures of held-out rows are those of all of them, whatever is in memory at one time."""

import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, root_mean_squared_error

from models.contract import ModelInput, ModelOutput
from models.holdout import KnownRows, NotFinite

CLASSES = 8


def test_large_maps_are_measured_a_part_at_a_time():
    random = np.random.default_rng(0)
    x = random.normal(size=(100, 64, 64, CLASSES)).astype(np.float32)
    y = random.integers(0, CLASSES, (100, 64, 64))
    output = ModelOutput(
        name="class", task="classification", shape=[64, 64, CLASSES], labels=[str(label) for label in range(CLASSES)]
    )
    rows = KnownRows({"x": x}, [y]).matched([ModelInput(name="x", dtype="float32", shape=[64, 64, CLASSES])], [output])
    specs = [tf.TensorSpec([None, 64, 64, CLASSES], tf.float32)]
    tracemalloc.start()
    try:
        found = rows.figures(lambda inputs: {"probabilities": tf.nn.softmax(inputs[0])}, specs)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    p = tf.nn.softmax(x).numpy().reshape(-1, CLASSES).astype(np.float64)
    p /= p.sum(axis=1, keepdims=True)
    assert found["accuracy"] == pytest.approx(accuracy_score(y.ravel(), p.argmax(axis=1)))
    assert found["nll"] == pytest.approx(log_loss(y.ravel(), p), rel=1e-6)
    assert found["brier"] == pytest.approx(np.square(p - np.eye(CLASSES)[y.ravel()]).sum(axis=1).mean(), rel=1e-6)
    # All rows at once took 216 MiB.
    assert most < 100 * 2**20


def regression(x: np.ndarray, y: np.ndarray):
    output = ModelOutput(name="size", task="regression", shape=[])
    return KnownRows({"x": x}, [y]).matched([ModelInput(name="x", dtype="float32", shape=[])], [output])


def test_parts_of_unequal_rows_have_the_root_of_the_mean_over_all_rows():
    random = np.random.default_rng(1)
    x = random.normal(size=300).astype(np.float32)
    y = x + random.normal(size=300) * np.where(np.arange(300) < 256, 1, 9)
    found = regression(x, y).figures(lambda inputs: {"mean": inputs[0]}, [tf.TensorSpec([None], tf.float32)])
    assert found["rmse"] == pytest.approx(root_mean_squared_error(y, x))
    assert found["mae"] == pytest.approx(mean_absolute_error(y, x))


def test_the_row_without_an_answer_is_named_by_its_number_among_all():
    x = np.ones(300, np.float32)
    x[270] = 0
    with pytest.raises(NotFinite, match=r"^row 270: "):
        regression(x, x).figures(lambda inputs: {"mean": 1 / inputs[0]}, [tf.TensorSpec([None], tf.float32)])
