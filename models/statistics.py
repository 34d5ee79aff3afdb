"""Statistics of draws: streaming moments, entropies, quantiles. Pure TensorFlow, on arrays [rows, draws, ...]."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# Quantiles are read from the first draws only, so that memory stays bounded however many draws are asked for.
QUANTILE_DRAWS = 1000
# Central share of the draws between `lower` and `upper`.
INTERVAL_COVERAGE = 0.9
# Its ends. A little outside of 5 % and 95 %: there the distribution of 100 draws with next to no noise is flat, and its
# quantile would be anything between two draws.
INTERVAL_LEVELS = (0.05 - 2e-5, 0.95 + 2e-5)
_TAIL = (1 - INTERVAL_COVERAGE) / 2
# Fewer draws cannot show the 5 % and 95 % quantiles.
MIN_QUANTILE_DRAWS = 20

SMALLEST_NORMAL = 1.1754944e-38


class Moments(NamedTuple):
    """What is kept of the draws seen so far; leading axis: rows."""

    mean: tf.Tensor
    # Sum of squared deviations from the mean.
    squares: tf.Tensor
    # Sum over draws of the entropy of each draw, nats; zeros for regression.
    entropy: tf.Tensor
    # The first QUANTILE_DRAWS draws, [rows, draws, ...].
    first: tf.Tensor


def entropy(probabilities: tf.Tensor, binary: bool) -> tf.Tensor:
    """Entropy in nats over the last axis; with `binary` the entries are probabilities of the second of two classes.

    0 log 0 is 0, exactly: the logarithm's argument is kept at the smallest normal number, where x log x vanishes.
    """
    terms = -probabilities * tf.math.log(tf.maximum(probabilities, SMALLEST_NORMAL))
    if binary:
        others = 1.0 - probabilities
        return terms - others * tf.math.log(tf.maximum(others, SMALLEST_NORMAL))
    return tf.reduce_sum(terms, axis=-1)


def of_draws(draws: tf.Tensor, first_draw: tf.Tensor | int, entropies: tf.Tensor | None) -> Moments:
    """Moments of one chunk of draws [rows, draws, ...]; `entropies` [rows, draws, ...] or None for regression."""
    mean = tf.reduce_mean(draws, axis=1)
    squares = tf.reduce_sum(tf.math.squared_difference(draws, mean[:, None]), axis=1)
    total = tf.zeros_like(mean) if entropies is None else tf.reduce_sum(entropies, axis=1)
    wanted = QUANTILE_DRAWS if isinstance(first_draw, int) else tf.maximum(QUANTILE_DRAWS - first_draw, 0)
    return Moments(mean, squares, total, draws[:, :wanted])


def merge(seen: Moments, seen_draws: tf.Tensor, new: Moments, new_draws: tf.Tensor) -> Moments:
    """Moments of both runs of draws together (Chan, Golub & LeVeque 1983)."""
    before, after = tf.cast(seen_draws, tf.float32), tf.cast(new_draws, tf.float32)
    share = after / (before + after)
    difference = new.mean - seen.mean
    return Moments(
        seen.mean + difference * share,
        seen.squares + new.squares + difference * difference * (before * share),
        seen.entropy + new.entropy,
        tf.concat([seen.first, new.first], axis=1),
    )


def standard_deviation(moments: Moments, num_draws: tf.Tensor | int) -> tf.Tensor:
    """Unbiased variance's root (divisor T - 1)."""
    return tf.sqrt(moments.squares / tf.cast(num_draws - 1, tf.float32))


def central_interval(
    first: tf.Tensor, num_draws: tf.Tensor | int, widest: tuple[float, float]
) -> tuple[tf.Tensor, tf.Tensor]:
    """The 5 % and 95 % quantiles over axis 1 of the first of `num_draws` draws, [rows, draws, ...], interpolated.

    With fewer than MIN_QUANTILE_DRAWS draws the tails are unknown: then the widest possible interval.
    A number of draws that is known while the graph is made leaves a dozen operations out of it.
    """
    last = first if first.shape.rank == 2 else tf.transpose(first, [0, *range(2, first.shape.rank), 1])
    if isinstance(num_draws, int):
        return _known_interval(last, min(num_draws, QUANTILE_DRAWS), widest)
    count = tf.shape(first)[1]
    rank = tf.cast(count - 1, tf.float32) * _TAIL
    whole = tf.floor(rank)
    weight = rank - whole
    outer = tf.cast(whole, tf.int32)
    inner = tf.minimum(outer + 1, count - 1)
    tails = _tails(last, inner + 1)
    ends = tf.gather(tails, tf.stack([outer, inner]), axis=-1)
    quantiles = ends[..., 0] + (ends[..., 1] - ends[..., 0]) * weight
    enough = count >= MIN_QUANTILE_DRAWS
    lower = tf.where(enough, -quantiles[0], widest[0])
    upper = tf.where(enough, quantiles[1], widest[1])
    return lower, upper


def _known_interval(last: tf.Tensor, count: int, widest: tuple[float, float]) -> tuple[tf.Tensor, tf.Tensor]:
    """`central_interval` of [..., draws] with `count` draws."""
    if count < MIN_QUANTILE_DRAWS:
        shape = tf.shape(last)[:-1]
        return tf.fill(shape, widest[0]), tf.fill(shape, widest[1])
    # In float32, as the graph of an unknown number has it.
    rank = float(np.float32(count - 1) * np.float32(_TAIL))
    outer = int(rank)
    inner = min(outer + 1, count - 1)
    tails = _tails(last, inner + 1)
    far, near = tails[..., outer], tails[..., inner]
    quantiles = far + (near - far) * (rank - outer)
    return -quantiles[0], quantiles[1]


def _tails(last: tf.Tensor, count: tf.Tensor | int) -> tf.Tensor:
    """The `count` outermost of [..., draws] at both ends, negated at the lower one: [2, ..., count].

    One partial sort for both: the largest of -x are the smallest of x.
    """
    return tf.math.top_k(tf.stack([-last, last]), count, sorted=True).values


def known_tails(first: tf.Tensor, quantiles: Callable[[], tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Both ends [N] of `quantiles` [N, 2], a mixture's over the draws [N, draws]; infinite where these are too few."""
    count = tf.shape(first)[1]
    infinite = tf.zeros_like(first[:, :1]) + tf.constant([-float("inf"), float("inf")])
    # Computed only where it is wanted: with few draws somebody only looks whether to go on.
    ends = tf.cond(count >= MIN_QUANTILE_DRAWS, quantiles, lambda: infinite)
    return ends[:, 0], ends[:, 1]
