import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.training.passengers import namesakes
from training.concrete import LENGTH_SCALE, START_RATE, concrete, learn_rates
from training.datasets import load
from training.networks import answer
from training.recipes import DEFAULTS, recipe_of
from training.splits import split

ROOT = Path(__file__).parents[2]


def network(name, **changes):
    data = load(name)
    chosen = replace(DEFAULTS[name], visible_dropout=0.2, hidden_dropout=0.4, **changes)
    inputs = keras.Input(data.x.shape[1:])
    return keras.Model(inputs, answer(inputs, data, chosen)), data


@pytest.mark.parametrize("name", ["wine", "digits"])
def test_every_dropout_is_exchanged_and_two_rates_are_learned(name):
    plain, _ = network(name)
    clone, logits = concrete(plain, 100, 0)
    assert set(logits) == {"visible", "hidden"}
    np.testing.assert_allclose(keras.ops.sigmoid(logits["visible"]), 0.2, atol=1e-6)
    np.testing.assert_allclose(keras.ops.sigmoid(logits["hidden"]), 0.4, atol=1e-6)
    names = [layer.name for layer in plain.layers if isinstance(layer, keras.layers.Dropout)]
    assert [layer.name for layer in clone.layers if type(layer).__name__ == "ConcreteDropout"] == names
    assert sum(variable is logit for variable in clone.trainable_variables for logit in logits.values()) == 2


def test_a_column_may_be_called_as_the_dropout_is():
    data = namesakes()
    inputs = keras.Input((5,))
    chosen = replace(recipe_of(data), visible_dropout=0.2, hidden_dropout=0.4)
    _, logits = concrete(keras.Model(inputs, answer(inputs, data, chosen)), 100, 0)
    np.testing.assert_allclose(keras.ops.sigmoid(logits["visible"]), 0.2, atol=1e-6)
    np.testing.assert_allclose(keras.ops.sigmoid(logits["hidden"]), 0.4, atol=1e-6)


def test_the_added_loss_is_the_paper_s():
    """Entropy of the masks and prior of the weights, written out in NumPy."""
    plain, data = network("wine", hidden_units=(4,))
    clone, _ = concrete(plain, 100, 0)
    clone(data.x[:5], training=True)
    kernels = {layer.name: np.array(layer.kernel) for layer in clone.layers if hasattr(layer, "kernel")}
    expected = 0.0
    for rate, units, kernel in [(0.2, 13, kernels["hidden_1"]), (0.4, 4, kernels["output"])]:
        expected += units * (rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) / 100
        expected += LENGTH_SCALE**2 * np.square(kernel).sum() / (2 * (1 - rate) * 100)
    assert float(sum(clone.losses)) == pytest.approx(expected, rel=1e-5)


def test_each_layer_has_noise_of_its_own():
    plain, _ = network("wine", hidden_units=(13, 13))
    clone, _ = concrete(plain, 100, 2**32 - 1)
    ones = np.ones((50, 13), np.float32)
    layers = [layer for layer in clone.layers if type(layer).__name__ == "ConcreteDropout"]
    # At one rate: what is dropped where differs by the noise alone.
    for layer in layers:
        layer.logit.assign(0.0)
    visible, first, second = (np.array(layer(ones, training=True)) < 0.5 for layer in layers)
    for one, other in ((visible, first), (visible, second), (first, second)):
        assert (one == other).mean() < 0.6


def test_relaxed_masks_drop_at_the_rate_and_are_off_outside_of_training():
    plain, _ = network("wine", hidden_units=(4,))
    clone, _ = concrete(plain, 100, 0)
    layer = clone.get_layer("visible_dropout")
    ones = np.ones((20_000, 13), np.float32)
    masked = np.array(layer(ones, training=True))
    # Nearer to dropped than to kept: the relaxation passes its middle with the rate's probability.
    assert (masked < 0.5 / 0.8).mean() == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / masked.size))
    assert masked.mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(layer(ones, training=False), ones)


def test_more_rows_are_worth_less_dropout():
    """The paper's figure 2: with data, epistemic uncertainty and with it the rate goes down."""
    data = load("digits")
    chosen = replace(DEFAULTS["digits"], architecture="dense", visible_dropout=0.1, learning_rate=0.01, epochs=60)
    few = learn_rates(data, np.arange(60), replace(chosen, epochs=600), seed=0)
    many = learn_rates(data, np.arange(1200), replace(chosen, epochs=30), seed=0)
    assert many.hidden_dropout < few.hidden_dropout
    assert many.visible_dropout < few.visible_dropout


def test_only_training_rows_and_the_seed_matter():
    data = load("wine")
    rows = split(data.y, data.task)
    spoilt = replace(data, x=data.x.copy(), y=data.y.copy())
    spoilt.x[rows.test] += 1000
    spoilt.y[rows.test] = 0
    chosen = replace(DEFAULTS["wine"], epochs=10)
    first = learn_rates(data, rows.train, chosen, seed=1)
    assert first == learn_rates(spoilt, rows.train, chosen, seed=1)
    assert (first.visible_dropout, first.hidden_dropout) != (0.1, 0.2)
    # Nowhere but where the recipe has dropout.
    assert learn_rates(data, rows.train, replace(chosen, visible_dropout=0.0), seed=1).visible_dropout == 0


def test_learning_begins_at_a_rate_that_is_given():
    data = load("wine")
    rows, chosen = split(data.y, data.task).train, replace(DEFAULTS["wine"], visible_dropout=0.3, epochs=1)
    learned = learn_rates(data, rows, chosen, seed=0, begin={"visible_dropout": 0.3})
    # In one epoch they move little.
    assert (learned.visible_dropout, learned.hidden_dropout) == pytest.approx((0.3, START_RATE), abs=0.05)


def test_rates_of_convolutional_nets_are_learned():
    """One for the pixels, one for the feature maps and the dense layer behind them; both move from where they start."""
    data = load("digits")
    chosen = replace(DEFAULTS["digits"], visible_dropout=0.1, learning_rate=0.01, epochs=5)
    learned = learn_rates(data, np.arange(300), chosen, seed=0)
    assert chosen.architecture == learned.architecture == "convolutional"
    for rate in (learned.visible_dropout, learned.hidden_dropout):
        assert 0 <= rate < 0.9
        assert abs(rate - START_RATE) > 1e-3


def test_the_artifact_serves_ordinary_dropout_at_the_learned_rates(tmp_path):
    command = [sys.executable, "-m", "dropserve", "train", "wine", "--concrete", "--epochs", "20", "--json"]
    command += ["--hidden-dropout", "0.6"]
    command += ["--repository", str(tmp_path / "artifacts")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found["training"]["concrete"]
    rates = found["training"]["visible_dropout"], found["training"]["hidden_dropout"]
    assert rates != (DEFAULTS["wine"].visible_dropout, DEFAULTS["wine"].hidden_dropout)
    assert {layer["kind"] for layer in found["stochastic_layers"]} == {"Dropout"}
    assert {layer["settings"]["rate"] for layer in found["stochastic_layers"]} == set(rates) - {0.0}
    data = load("wine")
    chosen = replace(DEFAULTS["wine"], epochs=20)
    learned = learn_rates(data, split(data.y, data.task).train, chosen, seed=0, begin={"hidden_dropout": 0.6})
    assert rates == pytest.approx((learned.visible_dropout, learned.hidden_dropout), abs=1e-3)
