"""Fit one network, the same one for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.sampling import some
from training.datasets import Dataset
from training.networks import answer, in_target_units, model
from training.preprocessing import Preprocessor
from training.recipes import Recipe

# Of the training rows as the preprocessor encodes them.
MOST_ENCODED_BYTES = 2**29

# Watched rows at most: they show where the held-out loss turns, and cost a pass each epoch.
WATCHED_ROWS = 10_000

# Called after each epoch with its number, from 1, and its mean training loss.
OnEpoch = Callable[[int, float], None]


@dataclass(frozen=True)
class Fitted:
    """A trained network: raw features in, probabilities or the target in its own unit out."""

    model: keras.Model
    # Mean training loss of each epoch, dropout on: nats, or squared standard deviations of the target.
    losses: list[float]
    # Loss on rows that were only watched, after each epoch, dropout off; empty where none were.
    watched_losses: list[float]


def fit(
    data: Dataset,
    train_rows: NDArray[np.int64],
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: OnEpoch | None = None,
    watch: NDArray[np.int64] | None = None,
    most_encoded_bytes: int = MOST_ENCODED_BYTES,
) -> Fitted:
    """Fit the recipe's network on `train_rows` of the data; no other row has a say in it.

    The loss on the rows of `watch` is recorded after each epoch, and changes nothing. Training rows that would take
    more than `most_encoded_bytes` once encoded are encoded batch by batch, which is slower and gives the same network.

    The same seed gives bit-identical weights on the same machine and library versions. For that, this sets the
    process's random seeds and turns on TensorFlow's deterministic ops, which TensorFlow cannot turn off again.
    seed: 0 .. 2**32 - 1.
    """
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()

    preprocessor = Preprocessor.fit(data, train_rows)
    target, mean, scale = targets(data, train_rows)
    inputs = preprocessor.inputs()
    encoded = preprocessor.layers(inputs)
    output = answer(encoded, data, recipe)
    # Once, not once an epoch.
    is_encoded = math.prod(encoded.shape[1:]) * 4 * len(train_rows) <= most_encoded_bytes
    network = keras.Model(encoded, output) if is_encoded else model(inputs, output, data)

    def network_input(rows: NDArray[np.int64]) -> list[NDArray[Any]]:
        return [preprocessor.encode(data.x[rows])] if is_encoded else list(data.tensors(rows).values())

    steps = -(-len(train_rows) // recipe.batch_size)
    # Many steps in one call of the graph: a step of these nets costs less than its Python.
    network.compile(
        optimizer=optimizer(recipe),
        loss=loss(data, recipe.heteroscedastic),
        steps_per_execution=steps,
        jit_compile=False,
    )
    watched: list[float] = []
    callbacks = [] if on_epoch is None else [report(on_epoch)]
    if watch is not None:
        rows = some(watch, WATCHED_ROWS)
        callbacks.append(
            _watch(network, loss(data, recipe.heteroscedastic), network_input(rows), target[rows], watched)
        )
    history = network.fit(
        batches(network_input(train_rows), target[train_rows], recipe.batch_size, seed),
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    trained = model(inputs, output, data)
    if data.task == "regression":
        trained = in_target_units(trained, mean, scale)
    return Fitted(trained, [float(value) for value in history.history["loss"]], watched)


def targets(data: Dataset, train_rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], float, float]:
    """What the networks learn: float32 [N], a regression target standardised; and its training mean and scale.

    Raises ConstantTarget.
    """
    mean, scale = data.target_scale(train_rows)
    return ((data.y.astype(np.float32) - mean) / scale).astype(np.float32), mean, scale


def batches(x: list[NDArray[Any]], y: NDArray[np.float32], batch_size: int, seed: int) -> tf.data.Dataset:
    """Endless shuffled epochs from one iterator: making an iterator costs more than an epoch of these nets.

    x: the network's inputs [n, ...]. Row numbers are shuffled, not rows: no second copy of these is made.
    """
    inputs, targets = [tf.constant(values) for values in x], tf.constant(y)

    def gather(rows: tf.Tensor) -> tuple[Any, tf.Tensor]:
        chosen = tuple(tf.gather(values, rows) for values in inputs)
        return chosen[0] if len(chosen) == 1 else chosen, tf.gather(targets, rows)

    numbers = tf.data.Dataset.range(len(y)).shuffle(len(y), seed=seed, reshuffle_each_iteration=True)
    return numbers.batch(batch_size).repeat().map(gather)


class BetaNll(keras.losses.Loss):
    """Gaussian likelihood of a mean and a standard deviation [n, 2], each row weighted by the latter:
    rows that seem noisy are learned from still (Seitzer et al. 2022, eq. 5, beta = 0.5).
    """

    def call(self, y_true: Any, y_pred: Any) -> Any:
        variance = keras.ops.square(y_pred[:, 1])
        distance = keras.ops.square(keras.ops.reshape(y_true, (-1,)) - y_pred[:, 0])
        weight = keras.ops.stop_gradient(y_pred[:, 1])
        return weight * 0.5 * (keras.ops.log(variance) + distance / variance)


def loss(data: Dataset, heteroscedastic: bool = False) -> keras.losses.Loss:
    if heteroscedastic:
        return BetaNll(name="beta_nll")
    if data.task == "regression":
        return keras.losses.MeanSquaredError()
    return keras.losses.BinaryCrossentropy() if len(data.labels) == 2 else keras.losses.SparseCategoricalCrossentropy()


def optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(recipe.learning_rate)
    return keras.optimizers.SGD(recipe.learning_rate, momentum=recipe.momentum)


def report(on_epoch: OnEpoch) -> keras.callbacks.Callback:
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: on_epoch(epoch + 1, float(logs["loss"])))


def _watch(
    network: keras.Model,
    measure: keras.losses.Loss,
    x: list[NDArray[Any]],
    y: NDArray[np.float32],
    losses: list[float],
) -> keras.callbacks.Callback:
    """Adds the loss on these rows to `losses` after each epoch. With dropout off nothing random is drawn."""
    inputs, targets = [tf.constant(values) for values in x], tf.constant(y[:, np.newaxis])
    rows = inputs[0] if len(inputs) == 1 else inputs

    @tf.function(autograph=False)
    def watched() -> tf.Tensor:
        return measure(targets, network(rows, training=False))

    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: losses.append(float(watched())))
