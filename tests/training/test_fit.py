import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.training.passengers import passengers
from training.concrete import learn_rates
from training.datasets import DATASETS, ConstantTarget, load
from training.fit import fit
from training.recipes import DEFAULTS, SONAR, recipe, recipe_of
from training.splits import split

ROOT = Path(__file__).parents[2]


def weights(fitted):
    return b"".join(value.tobytes() for value in fitted.model.get_weights())


def fitted(name, *, seed=0, epochs=3, **changes):
    data = load(name)
    chosen = replace(DEFAULTS[name], epochs=epochs, **changes)
    return fit(data, split(data.y, data.task).train, chosen, seed=seed)


@pytest.mark.parametrize("name", DATASETS)
def test_same_seed_gives_the_same_weights_bit_for_bit(name):
    first = weights(fitted(name, seed=7))
    fitted(name, seed=8)
    assert weights(fitted(name, seed=7)) == first


def test_a_target_that_is_the_same_in_every_training_row_is_refused_in_a_line():
    data = load("diabetes")
    rows = split(data.y, data.task)
    flat = replace(data, y=np.zeros_like(data.y))
    flat.y[rows.test[0]] = 2.5
    line = "diabetes: target 'progression' is 0 in 441 of 442 rows, and in all 266 that would train a network; wanted"
    for function in (fit, learn_rates):
        with pytest.raises(ConstantTarget, match=line):
            function(flat, rows.train, DEFAULTS["diabetes"], seed=0)


def test_other_seed_gives_other_weights():
    assert weights(fitted("sonar", seed=1)) != weights(fitted("sonar", seed=2))


def test_a_second_process_gives_the_same_weights():
    code = """
import hashlib
from dataclasses import replace
from training.datasets import load
from training.fit import fit
from training.recipes import SONAR
from training.splits import split
data = load("sonar")
model = fit(data, split(data.y, data.task).train, replace(SONAR, epochs=20), seed=3).model
print(hashlib.sha256(b"".join(value.tobytes() for value in model.get_weights())).hexdigest())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashlib.sha256(weights(fitted("sonar", seed=3, epochs=20))).hexdigest()


@pytest.mark.parametrize("name", ["sonar", "diabetes"])
def test_rows_held_out_change_nothing_that_is_fitted(name):
    data = load(name)
    rows = split(data.y, data.task)
    held_out = np.concatenate([rows.calibration, rows.test])
    x, y = data.x.copy(), data.y.copy()
    x[held_out] += 1000
    y[held_out] = 0
    chosen = replace(DEFAULTS[name], epochs=3)
    first = fit(data, rows.train, chosen, seed=0).model
    second = fit(replace(data, x=x, y=y), rows.train, chosen, seed=0).model
    # The same function on any rows: weights, scaling of the columns and scaling of the target.
    np.testing.assert_array_equal(first(data.x), second(data.x))


def test_a_table_of_every_type_trains_the_same_whatever_its_test_rows_hold():
    data = passengers()
    rows = split(data.y, data.task)
    chosen = replace(recipe_of(data), epochs=3)
    first = fit(data, rows.train, chosen, seed=0)
    assert weights(fit(data, rows.train, chosen, seed=0)) == weights(first)
    x = data.x.copy()
    held_out = np.concatenate([rows.calibration, rows.test])
    x["age"][held_out] = np.nan
    x["fare"][held_out] += 1000
    x["alone"][held_out] = False
    x["port of call"][held_out] = "Atlantis"
    second = fit(replace(data, x=x), rows.train, chosen, seed=0)
    everything = data.network_input(np.arange(len(data.x)))
    np.testing.assert_array_equal(second.model(everything), first.model(everything))


def test_rows_too_wide_for_memory_train_the_same_network_batch_by_batch():
    data = passengers()
    rows = split(data.y, data.task)
    chosen = replace(recipe_of(data), epochs=3)
    at_once = fit(data, rows.train, chosen, seed=0, watch=rows.calibration)
    by_batch = fit(data, rows.train, chosen, seed=0, watch=rows.calibration, most_encoded_bytes=0)
    np.testing.assert_allclose(by_batch.losses, at_once.losses, rtol=1e-5)
    np.testing.assert_allclose(by_batch.watched_losses, at_once.watched_losses, rtol=1e-5)
    everything = data.network_input(np.arange(len(data.x)))
    np.testing.assert_allclose(by_batch.model(everything), at_once.model(everything), atol=1e-5)


@pytest.mark.parametrize("name", ["sonar", "digits", "diabetes"])
def test_rows_that_are_watched_change_nothing_and_show_their_loss(name):
    data = load(name)
    rows = split(data.y, data.task)
    chosen = replace(DEFAULTS[name], epochs=4)
    alone = fit(data, rows.train, chosen, seed=0)
    watched = fit(data, rows.train, chosen, seed=0, watch=rows.calibration)
    assert weights(watched) == weights(alone)
    assert watched.losses == alone.losses
    assert alone.watched_losses == []
    assert len(watched.watched_losses) == 4
    # The last one is the loss of the network as it is.
    answer = keras.ops.convert_to_numpy(watched.model(data.x[rows.calibration])).astype(np.float64)
    y = data.y[rows.calibration]
    if data.task == "regression":
        loss = np.mean((answer[:, 0] - y) ** 2) / data.y[rows.train].std(dtype=np.float64) ** 2
    else:
        both = np.hstack([1 - answer, answer]) if len(data.labels) == 2 else answer
        loss = -np.log(both[np.arange(len(y)), y]).mean()
    assert watched.watched_losses[-1] == pytest.approx(loss, rel=1e-4)


def test_training_lowers_the_loss_to_a_useful_net():
    data = load("sonar")
    rows = split(data.y, data.task)
    result = fit(data, rows.train, recipe("sonar", epochs=100), seed=0)
    assert len(result.losses) == 100
    assert np.mean(result.losses[-10:]) < 0.5 * result.losses[0]
    # Calling "mine" always is right in 53 % of the rows.
    right = (keras.ops.convert_to_numpy(result.model(data.x[rows.test]))[:, 0] > 0.5) == data.y[rows.test]
    assert right.mean() > 0.7


def test_max_norm_bounds_the_hidden_weights():
    result = fitted("sonar", epochs=20, max_norm=0.5)
    for name in ("hidden_1", "hidden_2"):
        norms = np.linalg.norm(result.model.get_layer(name).kernel, axis=0)
        assert norms.max() <= 0.5 + 1e-5
    free = fitted("sonar", epochs=20, max_norm=None)
    assert np.linalg.norm(free.model.get_layer("hidden_1").kernel, axis=0).max() > 0.6


def test_epochs_are_whole_passes_over_the_training_rows():
    """Two epochs of plain SGD from known weights, recomputed in NumPy for a net without hidden layers."""
    data = load("sonar")
    train = split(data.y, data.task).train
    linear = replace(
        SONAR, hidden_units=(), visible_dropout=0.0, hidden_dropout=0.0, momentum=0.0, learning_rate=0.1, epochs=2
    )
    one_batch = replace(linear, batch_size=len(train))
    model = fit(data, train, one_batch, seed=0).model
    keras.utils.set_random_seed(0)
    x, y = data.x[train].astype(np.float64), data.y[train].astype(np.float64)
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    kernel = start = initial_kernel(data, train, one_batch)
    bias = 0.0
    for _ in range(one_batch.epochs):
        error = 1 / (1 + np.exp(-(scaled @ kernel + bias))) - y
        kernel, bias = kernel - 0.1 * scaled.T @ error / len(y), bias - 0.1 * error.mean()
    assert not np.allclose(kernel, start, atol=1e-3)
    np.testing.assert_allclose(model.get_layer("output").kernel[:, 0], kernel, atol=1e-5)
    np.testing.assert_allclose(model.get_layer("output").bias[0], bias, atol=1e-6)


def initial_kernel(data, train, chosen):
    from training.networks import build

    keras.utils.set_random_seed(0)
    return np.array(build(data, train, chosen).get_layer("output").kernel, np.float64)[:, 0]


def test_regression_answers_in_the_target_s_unit():
    data = load("diabetes")
    train = split(data.y, data.task).train
    model = fit(data, train, recipe("diabetes", epochs=30), seed=0).model
    answer = keras.ops.convert_to_numpy(model(data.x[train]))[:, 0]
    assert abs(answer.mean() - data.y[train].mean()) < 0.2 * data.y[train].std()
    assert np.corrcoef(answer, data.y[train])[0, 1] > 0.6


def test_every_epoch_is_reported_once():
    seen = []
    data = load("sonar")
    rows = split(data.y, data.task)
    result = fit(
        data, rows.train, recipe("sonar", epochs=5), seed=0, on_epoch=lambda epoch, loss: seen.append((epoch, loss))
    )
    assert seen == list(enumerate(result.losses, start=1))
