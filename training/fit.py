"""Fit one network, the same one for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from training.datasets import Dataset
from training.networks import build, in_target_units
from training.recipes import Recipe

# Called after each epoch with its number, from 1, and its mean training loss.
OnEpoch = Callable[[int, float], None]


@dataclass(frozen=True)
class Fitted:
    """A trained network: raw features in, probabilities or the target in its own unit out."""

    model: keras.Model
    # Mean training loss of each epoch, dropout on: nats, or squared standard deviations of the target.
    losses: list[float]


def fit(
    data: Dataset,
    train_rows: NDArray[np.int64],
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: OnEpoch | None = None,
) -> Fitted:
    """Fit the recipe's network on `train_rows` of the data; no other row is looked at.

    The same seed gives bit-identical weights on the same machine and library versions. For that, this sets the
    process's random seeds and turns on TensorFlow's deterministic ops, which TensorFlow cannot turn off again.
    seed: 0 .. 2**32 - 1.
    """
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()

    x, y = data.x[train_rows], data.y[train_rows].astype(np.float32)
    mean, scale = 0.0, 1.0
    if data.task == "regression":
        mean, scale = float(y.mean(dtype=np.float64)), float(y.std(dtype=np.float64))
        y = ((y - mean) / scale).astype(np.float32)

    model = build(data, train_rows, recipe)
    steps = -(-len(x) // recipe.batch_size)
    # All steps of an epoch in one call of the graph: a step of these nets costs less than its Python.
    model.compile(optimizer=optimizer(recipe), loss=loss(data), steps_per_execution=steps, jit_compile=False)
    history = model.fit(
        batches(x, y, recipe.batch_size, seed),
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[] if on_epoch is None else [_report(on_epoch)],
    )
    if data.task == "regression":
        model = in_target_units(model, mean, scale)
    return Fitted(model=model, losses=[float(value) for value in history.history["loss"]])


def batches(x: NDArray[np.float32], y: NDArray[np.float32], batch_size: int, seed: int) -> tf.data.Dataset:
    """Endless shuffled epochs from one iterator: making an iterator costs more than an epoch of these nets."""
    rows = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed, reshuffle_each_iteration=True)
    return rows.batch(batch_size).repeat()


def loss(data: Dataset) -> keras.losses.Loss:
    if data.task == "regression":
        return keras.losses.MeanSquaredError()
    return keras.losses.BinaryCrossentropy() if len(data.labels) == 2 else keras.losses.SparseCategoricalCrossentropy()


def optimizer(recipe: Recipe) -> keras.optimizers.Optimizer:
    if recipe.optimizer == "adam":
        return keras.optimizers.Adam(recipe.learning_rate)
    return keras.optimizers.SGD(recipe.learning_rate, momentum=recipe.momentum)


def _report(on_epoch: OnEpoch) -> keras.callbacks.Callback:
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: on_epoch(epoch + 1, float(logs["loss"])))
