"""Small Keras networks with fixed random weights that several test modules share."""

from collections.abc import Sequence

import keras
import numpy as np


def scatter(model: keras.Model, seed: int = 0, scale: float = 1.0) -> keras.Model:
    """Give every weight a fixed random value of the size its layer expects; variances stay positive."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        fan_in = int(np.prod(weight.shape[:-1])) or 1
        values = random.normal(0, scale / np.sqrt(fan_in) if len(weight.shape) > 1 else 0.3, weight.shape)
        weight.assign(np.abs(values) + 0.5 if "variance" in weight.name else values)
    return model


def sonar_net(rows: np.ndarray) -> keras.Model:
    """60-60-30-1, dropout 0.2 on the visible and 0.3 on the hidden layers, scaling inside."""
    scaling = keras.layers.Normalization(name="scaling")
    scaling.adapt(rows)
    moments = scaling.get_weights()
    model = keras.Sequential(
        [
            keras.Input((rows.shape[1],), name="features"),
            scaling,
            keras.layers.Dropout(0.2, name="visible_dropout"),
            keras.layers.Dense(60, activation="relu", name="hidden_1"),
            keras.layers.Dropout(0.3, name="hidden_1_dropout"),
            keras.layers.Dense(30, activation="relu", name="hidden_2"),
            keras.layers.Dropout(0.3, name="hidden_2_dropout"),
            keras.layers.Dense(1, activation="sigmoid", name="rock"),
        ],
        name="sonar",
    )
    scatter(model, scale=1.5)
    scaling.set_weights(moments)
    return model


def tiny_net() -> keras.Model:
    """3-6-3 with ten droppable units in all, three classes."""
    return scatter(
        keras.Sequential(
            [
                keras.Input((4,), name="x"),
                keras.layers.Dropout(0.25, name="first"),
                keras.layers.Dense(6, activation="tanh", name="hidden"),
                keras.layers.Dropout(0.5, name="second"),
                keras.layers.Dense(3, activation="softmax", name="answer"),
            ],
            name="tiny",
        ),
        scale=2.0,
    )


def places_net(units: int, shape: tuple[int | None, ...] = (6, 3), activation: str = "softmax") -> keras.Model:
    """An answer of `units` numbers for each place of a row: of [S, F] a sequence, of [H, W, F] a map."""
    inputs = keras.Input(shape, name="x")
    hidden = keras.layers.Dropout(0.4)(keras.layers.Dense(8, activation="tanh")(inputs))
    answer = keras.layers.Dense(units, activation=activation, name="answer")(hidden)
    return scatter(keras.Model(inputs, answer, name="places"), scale=2.0)


def batch_norm_net() -> keras.Model:
    """Images 8x8x1, convolutions with BatchNormalization before, between and after dropout; three classes."""
    x = inputs = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Conv2D(4, 3, activation="relu")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.SpatialDropout2D(0.3)(x)
    x = keras.layers.Conv2D(4, 3)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Activation("relu")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(0.4)(x)
    x = keras.layers.BatchNormalization()(x)
    return scatter(keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x), name="norms"), scale=1.5)


def targets_net(places: Sequence[int] = (0, 1, 2)) -> keras.Model:
    """A regression of three numbers a row, or of some of them, each with the weights that it has among all."""
    inputs = keras.Input((4,), name="x")
    hidden = keras.layers.Dropout(0.3)(keras.layers.Dense(8, activation="tanh")(inputs))
    whole = scatter(keras.Model(inputs, keras.layers.Dense(3, name="targets")(hidden), name="targets"))
    if list(places) == [0, 1, 2]:
        return whole
    some = keras.Model(inputs, keras.layers.Dense(len(places), name="some")(hidden), name="targets")
    kernel, bias = whole.layers[-1].get_weights()
    some.layers[-1].set_weights([kernel[:, list(places)], bias[list(places)]])
    return some


def regression_net() -> keras.Model:
    """Two inputs, one target; dropout on one branch only, a skip connection around it."""
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    x = keras.layers.Concatenate()([left, right])
    hidden = keras.layers.Dense(8, activation="relu")(x)
    dropped = keras.layers.Dropout(0.4)(hidden)
    x = keras.layers.Add()([hidden, dropped])
    return scatter(keras.Model([left, right], keras.layers.Dense(1, name="target")(x), name="branches"))
