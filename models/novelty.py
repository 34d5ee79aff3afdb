"""Novelty: how far a row lies from known ones, in the features that the deterministic prefix of the network makes.

A Mahalanobis distance by probabilistic principal components (Tipping & Bishop 1999): along the main axes of the known
rows by their variances, and off them by the variance that is left, so that what leaves their subspace is seen too.
Draws alone say little far from the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

Array = NDArray[Any]

# Rows that are looked at, at most; fewer than the least say nothing.
MOST_ROWS, MIN_ROWS = 5_000, 20
# Features: larger maps are averaged over squares first.
MOST_FEATURES = 4096
# Main axes, and numbers in all of them: 1.6 MB in the artifact.
_MOST_AXES, _MOST_NUMBERS = 64, 200_000
# Rows for each main axis: fewer would fit their own noise.
_ROWS_PER_AXIS = 5
# Least deviation of a feature, as a share of a usual one's: a unit that was never on is a strong sign, no infinite one.
_LEAST_DEVIATION = 0.1
# An offset beyond this is no farther: the distance is still a float32.
_FARTHEST = 1e15
# Least variance off the main axes, as a share of all.
_LEAST_RESIDUAL = 1e-3


def features(prefix: Sequence[tf.Tensor]) -> tf.Tensor | None:
    """What the suffix reads of each row, as float32 [N, D]; None where nothing of it is floating and of fixed size."""
    found = [
        _flat(tensor)
        for tensor in prefix
        if tensor.dtype.is_floating and tensor.shape.rank > 1 and None not in tensor.shape[1:] and not tensor.shape[0]
    ]
    if not found:
        return None
    joined = tf.concat(found, axis=1) if len(found) > 1 else found[0]
    return joined if joined.shape[1] <= MOST_FEATURES else None


class Novelty:
    """The distance, with what it takes as variables: every signature reads the same ones."""

    def __init__(self, rows: Array) -> None:
        """rows: features of known rows, [n, D], n at least MIN_ROWS."""
        rows = rows.astype(np.float64)
        centre, deviation = rows.mean(axis=0), rows.std(axis=0)
        # The median, as the features may be in units of their own: of a mean the largest would be all that is left.
        usual = float(np.median(deviation[deviation > 0])) if deviation.any() else 1.0
        scaled = (rows - centre) / np.maximum(deviation, _LEAST_DEVIATION * usual)
        count, size = scaled.shape
        kept = max(min(_MOST_AXES, size, count // _ROWS_PER_AXIS, _MOST_NUMBERS // size), 1)
        _, singular, axes = np.linalg.svd(scaled, full_matrices=False)
        variances = singular**2 / count
        total = float(variances.sum()) or 1.0
        off = (total - float(variances[:kept].sum())) / max(size - kept, 1)
        residual = max(off, _LEAST_RESIDUAL * total / size)
        self._build(
            centre,
            1 / np.maximum(deviation, _LEAST_DEVIATION * usual) / np.sqrt(residual),
            axes[:kept].T,
            residual / np.maximum(variances[:kept], residual) - 1,
        )
        distance = self.of(tf.constant(rows, tf.float32)).numpy()
        self.weights.assign(self.weights / (float(np.median(distance)) or 1.0))

    def _build(self, centre: Array, weights: Array, axes: Array, along: Array) -> None:
        def variable(values: Array, name: str) -> tf.Variable:
            return tf.Variable(values, dtype=tf.float64, trainable=False, name=f"novelty_{name}")

        self.centre, self.weights = variable(centre, "centre"), variable(weights, "weights")
        self.axes, self.along = variable(axes, "axes"), variable(along, "along")

    @property
    def variables(self) -> list[tf.Variable]:
        return [self.centre, self.weights, self.axes, self.along]

    def of(self, features: tf.Tensor) -> tf.Tensor:
        """The distance of rows [N, D]: float32 [N], 1 is the median of the known rows.

        In float64, as the two sums nearly cancel: in float32 a row's distance would depend on its batch mates, by some
        millionths.
        """
        values = tf.cast(features, tf.float64)
        offset = tf.clip_by_value((values - self.centre) * self.weights, -_FARTHEST, _FARTHEST)
        squares = tf.reduce_sum(tf.square(offset), axis=1)
        # Along a main axis a deviation counts for less.
        less = tf.reduce_sum(tf.square(tf.matmul(offset, self.axes)) * self.along, axis=1)
        return tf.cast(tf.sqrt(tf.maximum(squares + less, 0.0)), tf.float32)


def _flat(tensor: tf.Tensor) -> tf.Tensor:
    """[N, ...] as float32 [N, D]; of maps [N, H, W, C] as many numbers as are wanted at most."""
    values = tf.cast(tensor, tf.float32)
    shape = tensor.shape[1:].as_list()
    if len(shape) == 3:
        side = 1
        while -(-shape[0] // side) * -(-shape[1] // side) * shape[2] > MOST_FEATURES and side < max(shape[:2]):
            side += 1
        if side > 1:
            values = tf.nn.avg_pool2d(values, side, side, "SAME")
            shape = values.shape[1:].as_list()
    return tf.reshape(values, [-1, int(np.prod(shape))])
