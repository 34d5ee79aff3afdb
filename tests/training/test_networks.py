from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training.passengers import namesakes
from training.datasets import DATASETS, load
from training.networks import build, in_target_units
from training.recipes import DEFAULTS, SONAR_BASELINE, recipe, recipe_of
from training.splits import split


def layers(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def untrained(name, chosen=None):
    data = load(name)
    rows = split(data.y, data.task)
    return build(data, rows.train, chosen or DEFAULTS[name]), data, rows


def test_sonar_net_is_60_60_30_1_with_dropout_between():
    model, _, _ = untrained("sonar")
    assert model.input_shape == (None, 60)
    assert [layer.units for layer in layers(model, keras.layers.Dense)] == [60, 30, 1]
    assert [layer.rate for layer in layers(model, keras.layers.Dropout)] == [0.2, 0.2, 0.2]
    bounds = [layer.kernel_constraint for layer in layers(model, keras.layers.Dense)]
    assert [bound and bound.max_value for bound in bounds] == [3.0, 3.0, None]


@pytest.mark.parametrize("name", ["_rows.csv", "(2).csv", "übung.csv", "表", "__"])
def test_a_file_may_have_any_name(name):
    data = replace(load("sonar"), name=name)
    model = build(data, split(data.y, data.task).train, DEFAULTS["sonar"])
    # The name is a TensorFlow scope where it is traced.
    answer = tf.function(lambda x: model(x, training=False)).get_concrete_function(tf.TensorSpec([None, 60]))
    assert answer.structured_outputs.shape[1] == 1


def test_dropout_on_the_visible_layer_comes_after_the_scaling():
    model, _, _ = untrained("sonar")
    names = [layer.name for layer in model.layers]
    assert names[:4] == ["features", "scaling", "visible_dropout", "hidden_1"]


def test_baseline_has_neither_dropout_nor_bound():
    model, _, _ = untrained("sonar", SONAR_BASELINE)
    assert not layers(model, keras.layers.Dropout)
    assert all(layer.kernel_constraint is None for layer in layers(model, keras.layers.Dense))


@pytest.mark.parametrize(
    ("visible", "hidden", "expected"),
    [
        (0.3, 0.0, ["visible_dropout"]),
        (0.0, 0.4, ["hidden_1_dropout", "hidden_2_dropout"]),
        (0.3, 0.4, ["visible_dropout", "hidden_1_dropout", "hidden_2_dropout"]),
    ],
)
def test_dropout_is_where_the_recipe_puts_it(visible, hidden, expected):
    model, _, _ = untrained("sonar", recipe("sonar", visible_dropout=visible, hidden_dropout=hidden))
    found = layers(model, keras.layers.Dropout)
    assert [layer.name for layer in found] == expected
    assert {layer.name: layer.rate for layer in found} == {
        name: visible if name == "visible_dropout" else hidden for name in expected
    }


def test_digits_net_is_a_cnn_with_dropout_behind_convolution_and_dense():
    model, _, _ = untrained("digits")
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == [
        *("InputLayer", "Rescaling", "Conv2D", "MaxPooling2D", "Dropout", "Flatten", "Dense", "Dropout", "Dense")
    ]
    assert model.input_shape == (None, 8, 8, 1)


@pytest.mark.parametrize("name", DATASETS)
def test_output_fits_the_task(name):
    model, data, rows = untrained(name)
    answer = keras.ops.convert_to_numpy(model(data.x[rows.test[:5]]))
    if data.task == "regression":
        assert answer.shape == (5, 1)
        return
    assert answer.min() >= 0
    assert answer.max() <= 1
    assert answer.shape == (5, 1 if len(data.labels) == 2 else len(data.labels))
    if answer.shape[1] > 1:
        np.testing.assert_allclose(answer.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_scaling_statistics_are_those_of_the_training_rows(name):
    model, data, rows = untrained(name)
    scaling = model.get_layer("scaling")
    train = data.x[rows.train].astype(np.float64)
    np.testing.assert_array_equal(np.ravel(scaling.mean), train.mean(axis=0).astype(np.float32))
    np.testing.assert_array_equal(np.ravel(scaling.variance), train.var(axis=0).astype(np.float32))
    # All rows together have other statistics: the comparison above can tell.
    everything = data.x.astype(np.float64)
    assert not np.allclose(np.ravel(scaling.mean), everything.mean(axis=0), rtol=1e-5)


def test_target_scaling_takes_the_answer_back_to_its_unit():
    model, data, rows = untrained("diabetes")
    served = in_target_units(model, mean=150.0, scale=77.0)
    x = data.x[rows.test]
    inner = keras.ops.convert_to_numpy(model(x)).astype(np.float64)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(served(x)), 150 + 77 * inner, rtol=1e-6, atol=1e-4)
    assert isinstance(served.layers[-1], keras.layers.Rescaling)


@pytest.mark.parametrize("name", ["sonar", "digits", "diabetes"])
@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_saved_network_reloads_with_its_scaling(name, suffix, tmp_path):
    model, data, rows = untrained(name)
    path = tmp_path / f"model.{suffix}"
    model.save(path)
    x = data.x[rows.test]
    np.testing.assert_array_equal(keras.models.load_model(path)(x), model(x))


def test_only_training_rows_are_looked_at():
    data = load("wine")
    rows = split(data.y, data.task)
    moved = data.x.copy()
    moved[rows.test] += 1000
    moved[rows.calibration] -= 1000
    other = replace(data, x=moved)
    keras.utils.set_random_seed(0)
    first = build(data, rows.train, DEFAULTS["wine"])
    keras.utils.set_random_seed(0)
    second = build(other, rows.train, DEFAULTS["wine"])
    np.testing.assert_array_equal(first(data.x), second(data.x))


@pytest.mark.parametrize("heteroscedastic", [False, True])
def test_columns_may_be_called_as_layers_are(heteroscedastic, tmp_path):
    data = namesakes()
    # Keras counts the names that it gives up: here they begin anew.
    keras.utils.clear_session()
    model = build(data, np.arange(40), replace(recipe_of(data), visible_dropout=0.1, heteroscedastic=heteroscedastic))
    model = in_target_units(model, 5, 2)
    assert [tensor.name for tensor in model.inputs] == list(data.columns)
    model.save(tmp_path / "model.keras")
    rows = data.network_input(np.arange(60))
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(rows), model(rows))
