"""The networks that `dropserve train` fits: raw features in, answers out, the scaling inside the graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from training.convolutions import KERNEL, POOL, convolutions
from training.datasets import Dataset, layer_name
from training.preprocessing import Preprocessor
from training.recipes import Recipe

# Of a noise's standard deviation, in those of the training target.
LEAST_NOISE = 1e-3

# Names a layer.
Naming = Callable[[str], str]
# Name of the dropout on the encoded rows.
VISIBLE = "visible_dropout"


def build(data: Dataset, train_rows: NDArray[np.int64], recipe: Recipe) -> keras.Model:
    """An untrained network: inputs as `data.network_input`, output as `answer`.

    Only `train_rows` of `data` are looked at.
    """
    preprocessor = Preprocessor.fit(data, train_rows)
    inputs = preprocessor.inputs()
    return model(inputs, answer(preprocessor.layers(inputs), data, recipe), data)


def model(inputs: list[Any], output: Any, data: Dataset) -> keras.Model:
    """The model between these tensors, which takes `data.network_input`."""
    # Keras makes a TensorFlow scope of it, which begins with a letter or digit.
    name = re.sub(r"[^A-Za-z0-9]+", "_", data.name).lstrip("_") or "network"
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, output, name=name)


def answer(encoded: Any, data: Dataset, recipe: Recipe) -> Any:
    """The recipe's layers on rows that the preprocessor encoded: a probability or a standardised target.

    Binary classification: one sigmoid unit, the probability of `labels[1]`; more classes: a softmax over them;
    regression: one linear unit, in standard deviations of the training target from its mean; heteroscedastic: beside it
    the standard deviation of the row's noise, in the same. Layers' names depend on the data's inputs alone.
    """

    def named(layer: str) -> str:
        return layer_name(layer, [item.name for item in data.inputs])

    hidden = {"dense": dense, "convolutional": convolutional}[recipe.architecture](encoded, recipe, named)
    if data.task == "regression" and recipe.heteroscedastic:
        mean = keras.layers.Dense(1, name=named("mean"))(hidden)
        std = keras.layers.Dense(1, activation="softplus", name=named("noise"))(hidden)
        std = keras.layers.Rescaling(1.0, offset=LEAST_NOISE, name=named("least_noise"))(std)
        return keras.layers.Concatenate(name=named("output"))([mean, std])
    if data.task == "regression":
        return keras.layers.Dense(1, name=named("output"))(hidden)
    if len(data.labels) == 2:
        return keras.layers.Dense(1, activation="sigmoid", name=named("output"))(hidden)
    return keras.layers.Dense(len(data.labels), activation="softmax", name=named("output"))(hidden)


def dense(encoded: Any, recipe: Recipe, named: Naming) -> Any:
    """Dense layers, dropout on the visible layer and behind every hidden one.

    The visible layer is behind the scaling, so that a dropped input stands at its column's mean (a dropped category at
    no known one) and not at a raw 0 far outside the data. Images become rows of pixels.
    """
    hidden = encoded if len(encoded.shape) == 2 else keras.layers.Flatten(name=named("flatten"))(encoded)
    return hidden_layers(visible_dropout(hidden, recipe, named), recipe, named)


def convolutional(encoded: Any, recipe: Recipe, named: Naming) -> Any:
    """A small CNN: convolution, pooling and dropout until the maps are small; dense, dropout."""
    hidden = visible_dropout(encoded, recipe, named)
    for number, layer in enumerate(convolutions(encoded.shape[1:]), start=1):
        suffix = "" if number == 1 else f"_{number}"
        convolution = keras.layers.Conv2D(
            layer.filters, KERNEL, padding="same", activation="relu", name=named(f"convolution{suffix}")
        )
        hidden = keras.layers.MaxPooling2D(POOL, name=named(f"pooling{suffix}"))(convolution(hidden))
        hidden = hidden_dropout(hidden, recipe, named(f"convolution_dropout{suffix}"))
    return hidden_layers(keras.layers.Flatten(name=named("flatten"))(hidden), recipe, named)


def hidden_layers(hidden: Any, recipe: Recipe, named: Naming) -> Any:
    for number, units in enumerate(recipe.hidden_units, start=1):
        hidden = keras.layers.Dense(
            units, activation="relu", kernel_constraint=max_norm(recipe), name=named(f"hidden_{number}")
        )(hidden)
        hidden = hidden_dropout(hidden, recipe, named(f"hidden_{number}_dropout"))
    return hidden


def visible_dropout(inputs: Any, recipe: Recipe, named: Naming) -> Any:
    if recipe.visible_dropout == 0:
        return inputs
    return keras.layers.Dropout(recipe.visible_dropout, name=named(VISIBLE))(inputs)


def hidden_dropout(hidden: Any, recipe: Recipe, name: str) -> Any:
    if recipe.hidden_dropout == 0:
        return hidden
    return keras.layers.Dropout(recipe.hidden_dropout, name=name)(hidden)


def max_norm(recipe: Recipe) -> keras.constraints.MaxNorm | None:
    return None if recipe.max_norm is None else keras.constraints.MaxNorm(recipe.max_norm)


def in_target_units(network: keras.Model, mean: float, scale: float) -> keras.Model:
    """A regression network on the standardised target, with its answer taken back to the target's own unit."""
    columns = network.output.shape[-1]
    scaling: dict[str, Any] = {"scale": scale, "offset": mean}
    if columns == 2:
        scaling = {"scale": [scale, scale], "offset": [mean, 0.0]}
    name = layer_name("target_scaling", [tensor.name for tensor in network.inputs])
    output = keras.layers.Rescaling(**scaling, name=name)(network.output)
    return keras.Model(network.input, output, name=network.name)
