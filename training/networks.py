"""The networks that `dropserve train` fits: raw features in, answers out, the scaling inside the graph."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from training.datasets import Dataset
from training.recipes import Recipe

# Grey levels of scikit-learn's digits are 0..16.
DIGITS_WHITE = 16.0


def build(data: Dataset, train_rows: NDArray[np.int64], recipe: Recipe) -> keras.Model:
    """An untrained network: input as in `data.x`, output a probability or a standardised target.

    Binary classification: one sigmoid unit, the probability of `labels[1]`; more classes: a softmax over them;
    regression: one linear unit, in standard deviations of the training target from its mean.
    Only `train_rows` of `data` are looked at.
    """
    layers = {"dense": dense, "convolutional": convolutional}[recipe.architecture]
    inputs = keras.Input(shape=data.x.shape[1:], dtype="float32", name=data.input_name)
    hidden = layers(inputs, data.x[train_rows], recipe)
    if data.task == "regression":
        output = keras.layers.Dense(1, name="output")(hidden)
    elif len(data.labels) == 2:
        output = keras.layers.Dense(1, activation="sigmoid", name="output")(hidden)
    else:
        output = keras.layers.Dense(len(data.labels), activation="softmax", name="output")(hidden)
    return keras.Model(inputs, output, name=data.name)


def dense(inputs: Any, x: NDArray[np.float32], recipe: Recipe) -> Any:
    """Dense layers on standardised columns, dropout on the visible layer and behind every hidden one."""
    # After the scaling, so that a dropped input stands at its column's mean and not at a raw 0 far outside the data.
    hidden = visible_dropout(normalization(x)(inputs), recipe)
    for number, units in enumerate(recipe.hidden_units, start=1):
        hidden = keras.layers.Dense(
            units, activation="relu", kernel_constraint=max_norm(recipe), name=f"hidden_{number}"
        )(hidden)
        hidden = hidden_dropout(hidden, recipe, f"hidden_{number}_dropout")
    return hidden


def convolutional(inputs: Any, x: NDArray[np.float32], recipe: Recipe) -> Any:
    """A small CNN: convolution, pooling, dropout, dense, dropout. Grey levels are scaled to 0..1, whatever the rows."""
    hidden = visible_dropout(keras.layers.Rescaling(1 / DIGITS_WHITE, name="scaling")(inputs), recipe)
    hidden = keras.layers.Conv2D(32, 3, padding="same", activation="relu", name="convolution")(hidden)
    hidden = keras.layers.MaxPooling2D(2, name="pooling")(hidden)
    hidden = hidden_dropout(hidden, recipe, "convolution_dropout")
    hidden = keras.layers.Flatten(name="flatten")(hidden)
    for number, units in enumerate(recipe.hidden_units, start=1):
        hidden = keras.layers.Dense(
            units, activation="relu", kernel_constraint=max_norm(recipe), name=f"hidden_{number}"
        )(hidden)
        hidden = hidden_dropout(hidden, recipe, f"hidden_{number}_dropout")
    return hidden


def normalization(x: NDArray[np.float32]) -> keras.layers.Normalization:
    """Standardise each column of x [N, F].

    The statistics stand in the layer's configuration and not in weights that `adapt` fills: they survive legacy HDF5,
    which restores such weights without the constants made from them.
    """
    mean = x.mean(axis=0, dtype=np.float64)
    variance = x.var(axis=0, dtype=np.float64)
    # A constant column has nothing to scale; dividing by its variance of about 0 would turn any other value into 1e7.
    variance[x.min(axis=0) == x.max(axis=0)] = 1.0
    return keras.layers.Normalization(axis=-1, mean=mean, variance=variance, name="scaling")


def visible_dropout(inputs: Any, recipe: Recipe) -> Any:
    if recipe.visible_dropout == 0:
        return inputs
    return keras.layers.Dropout(recipe.visible_dropout, name="visible_dropout")(inputs)


def hidden_dropout(hidden: Any, recipe: Recipe, name: str) -> Any:
    if recipe.hidden_dropout == 0:
        return hidden
    return keras.layers.Dropout(recipe.hidden_dropout, name=name)(hidden)


def max_norm(recipe: Recipe) -> keras.constraints.MaxNorm | None:
    return None if recipe.max_norm is None else keras.constraints.MaxNorm(recipe.max_norm)


def in_target_units(model: keras.Model, mean: float, scale: float) -> keras.Model:
    """A regression network on the standardised target, with its answer taken back to the target's own unit."""
    output = keras.layers.Rescaling(scale=scale, offset=mean, name="target_scaling")(model.output)
    return keras.Model(model.input, output, name=model.name)
