"""Rates that are learned with the weights, in place of a search: Concrete Dropout.

A mask of zeros and ones lets no gradient through to its rate; its continuous relaxation does. What keeps the rate from
falling to 0 is the prior: the entropy of the masks, and the weights behind them, larger the more is dropped.
Source: Gal, Hron & Kendall 2017, "Concrete Dropout", eq. 3 to 5.

One rate is learned for the visible layer and one for all hidden layers, dense or convolutional: those two are what a
recipe has. They then train a network, and are served, as ordinary Dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from numpy.typing import NDArray

from training.datasets import Dataset
from training.errors import InputError
from training.fit import OnEpoch, batches, loss, optimizer, report, targets
from training.networks import VISIBLE, answer
from training.preprocessing import Preprocessor
from training.recipes import Recipe

# Where learning begins, unless another rate is given.
START_RATE = 0.1
# Of the relaxation: the authors' own.
TEMPERATURE = 0.1
# Of the prior on the weights: the authors' own.
LENGTH_SCALE = 1e-4
# A rate that was learned as less is none.
LEAST_RATE = 0.01
MOST_RATE = 0.9


class RatesVanished(InputError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: Concrete Dropout learned rates below {LEAST_RATE}, so that there is nothing to draw; "
            "wanted fewer --epochs, or rates of --visible-dropout and --hidden-dropout without --concrete"
        )


class ConcreteDropout(keras.layers.Layer):
    """Dropout whose rate is `sigmoid(logit)`; adds the masks' entropy to the loss, by the number of training rows."""

    def __init__(self, logit: keras.Variable, rows: int, seed: int, name: str) -> None:
        super().__init__(name=name)
        self.logit = logit
        self.rows = rows
        self.seeds = keras.random.SeedGenerator(seed)

    @property
    def rate(self) -> Any:
        return ops.sigmoid(self.logit)

    def call(self, inputs: Any, training: bool = False) -> Any:
        if not training:
            return inputs
        rate = self.rate
        units = int(np.prod(inputs.shape[1:]))
        entropy = rate * ops.log(rate) + (1 - rate) * ops.log(1 - rate)
        self.add_loss(units * entropy / self.rows)
        noise = keras.random.uniform(ops.shape(inputs), 1e-7, 1 - 1e-7, seed=self.seeds)
        dropped = ops.sigmoid((self.logit + ops.log(noise) - ops.log(1 - noise)) / TEMPERATURE)
        return inputs * (1 - dropped) / (1 - rate)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class PriorOfWeights(keras.regularizers.Regularizer):
    """`l² ||W||² / (2 (1 - rate) N)`: of the weights that a dropout stands before."""

    def __init__(self, layer: ConcreteDropout) -> None:
        self.layer = layer

    def __call__(self, weights: Any) -> Any:
        return LENGTH_SCALE**2 * ops.sum(ops.square(weights)) / (2 * (1 - self.layer.rate) * self.layer.rows)


def learn_rates(
    data: Dataset,
    train_rows: NDArray[np.int64],
    recipe: Recipe,
    *,
    seed: int,
    begin: Mapping[str, float] = MappingProxyType({}),
    on_epoch: OnEpoch | None = None,
) -> Recipe:
    """The recipe with the rates that its network learns on `train_rows`; no other row is looked at.

    begin: rates to begin at, "visible_dropout" and "hidden_dropout"; START_RATE for one that is not there.
    A place where the recipe has no dropout gets none. The process's random state is set as `training.fit` sets it.
    """
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    preprocessor = Preprocessor.fit(data, train_rows)
    x = preprocessor.encode(data.x[train_rows])
    inputs = keras.Input(x.shape[1:])
    start = replace(
        recipe,
        visible_dropout=begin.get("visible_dropout", START_RATE) if recipe.visible_dropout else 0.0,
        hidden_dropout=begin.get("hidden_dropout", START_RATE) if recipe.hidden_dropout else 0.0,
    )
    network, logits = concrete(keras.Model(inputs, answer(inputs, data, start)), len(train_rows), seed)
    y, _, _ = targets(data, train_rows)
    steps = -(-len(train_rows) // recipe.batch_size)
    network.compile(
        optimizer=optimizer(recipe),
        loss=loss(data, recipe.heteroscedastic),
        steps_per_execution=steps,
        jit_compile=False,
    )
    network.fit(
        batches([x], y[train_rows], recipe.batch_size, seed),
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[] if on_epoch is None else [report(on_epoch)],
    )
    learned = {place: float(ops.sigmoid(logit)) for place, logit in logits.items()}
    return replace(
        recipe,
        visible_dropout=_kept(learned.get("visible", 0.0)),
        hidden_dropout=_kept(learned.get("hidden", 0.0)),
    )


def concrete(network: keras.Model, rows: int, seed: int) -> tuple[keras.Model, dict[str, keras.Variable]]:
    """The network with ConcreteDropout for Dropout; the logits of its two rates, "visible" and "hidden"."""
    logits: dict[str, keras.Variable] = {}
    # Noise of its own for each layer.
    seeds = count(seed)

    def exchange(layer: keras.layers.Layer) -> keras.layers.Layer:
        if not isinstance(layer, keras.layers.Dropout):
            return layer.__class__.from_config(layer.get_config())
        # A column may have the layer's name, which then ends in another.
        place = "visible" if layer.name.partition(".")[0] == VISIBLE else "hidden"
        if place not in logits:
            logit = np.log(layer.rate / (1 - layer.rate))
            logits[place] = keras.Variable(np.float32(logit), name=f"{place}_logit")
        return ConcreteDropout(logits[place], rows, next(seeds), layer.name)

    clone = keras.models.clone_model(network, clone_function=exchange)
    for layer in clone.layers:
        before = _before(layer) if hasattr(layer, "kernel") else None
        if before is not None:
            layer.kernel.regularizer = PriorOfWeights(before)
    return clone, logits


def _before(layer: keras.layers.Layer) -> ConcreteDropout | None:
    """The dropout that stands before a layer's weights, with nothing between that has weights of its own."""
    operation = layer
    while True:
        operation = operation.input._keras_history.operation
        if isinstance(operation, ConcreteDropout):
            return operation
        if hasattr(operation, "kernel") or isinstance(operation, keras.layers.InputLayer):
            return None


def _kept(rate: float) -> float:
    return 0.0 if rate < LEAST_RATE else round(min(rate, MOST_RATE), 4)
