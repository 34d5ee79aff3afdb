"""Statistics of draws: streaming moments, entropies, quantiles. Pure TensorFlow, on arrays [rows, ..., draws]."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from models.contract import QUANTILE_DRAWS

# Central share of the draws between `lower` and `upper`.
INTERVAL_COVERAGE = 0.9
# Its ends. A little outside of 5 % and 95 %: there the distribution of 100 draws with next to no noise is flat, and its
# quantile would be anything between two draws.
INTERVAL_LEVELS = (0.05 - 2e-5, 0.95 + 2e-5)
_TAIL = (1 - INTERVAL_COVERAGE) / 2
# Fewer draws cannot show the 5 % and 95 % quantiles.
MIN_QUANTILE_DRAWS = 20

SMALLEST_NORMAL = 1.1754944e-38

# A sum of large draws would overflow in a long chunk and not in a short one. A power of two rounds nothing.
_SCALE = 2.0**-20


class Moments(NamedTuple):
    """What is kept of the draws seen so far; leading axis: rows."""

    mean: tf.Tensor
    # Sum of squared deviations from the mean.
    squares: tf.Tensor
    # Sum over draws of each draw's p log p over the classes, nats: minus its entropy; zeros for regression.
    negentropy: tf.Tensor
    # The first QUANTILE_DRAWS draws, [rows, ..., draws].
    first: tf.Tensor


def draws_last(draws: tf.Tensor) -> tf.Tensor:
    """[rows, draws, ...] -> [rows, ..., draws]."""
    return draws if draws.shape.rank == 2 else tf.transpose(draws, [0, *range(2, draws.shape.rank), 1])


def entropy(probabilities: tf.Tensor) -> tf.Tensor:
    """Entropy in nats over the last axis. 0 log 0 is 0, exactly."""
    return -tf.reduce_sum(tf.math.xlogy(probabilities, probabilities), axis=-1)


def of_draws(draws: tf.Tensor, first_draw: tf.Tensor | int | None, are_probabilities: bool) -> Moments:
    """Moments of one chunk of draws [rows, ..., draws]; of probabilities the axis before the draws is the classes'.

    first_draw: the chunk's first one; None where the chunk has at most QUANTILE_DRAWS and is the first.
    """
    mean = tf.reduce_mean(draws if are_probabilities else draws * _SCALE, axis=-1)
    mean = mean if are_probabilities else mean / _SCALE
    squares = tf.reduce_sum(tf.math.squared_difference(draws, mean[..., None]), axis=-1)
    negentropy = tf.reduce_sum(tf.math.xlogy(draws, draws), axis=[-2, -1]) if are_probabilities else tf.zeros_like(mean)
    if first_draw is None:
        return Moments(mean, squares, negentropy, draws)
    wanted = QUANTILE_DRAWS if isinstance(first_draw, int) else tf.maximum(QUANTILE_DRAWS - first_draw, 0)
    return Moments(mean, squares, negentropy, draws[..., :wanted])


def merge(seen: Moments, seen_draws: tf.Tensor, new: Moments, new_draws: tf.Tensor) -> Moments:
    """Moments of both runs of draws together (Chan, Golub & LeVeque 1983).

    Of infinite draws the mean is infinite, or NaN where they are of both signs; beside NaN it is NaN: in any chunks.
    """
    before, after = tf.cast(seen_draws, tf.float32), tf.cast(new_draws, tf.float32)
    share = after / (before + after)
    difference = new.mean - seen.mean
    # An infinite mean would cancel in the difference.
    usual, other = seen.mean + difference * share, seen.mean * (1 - share) + new.mean * share
    return Moments(
        tf.where(tf.math.is_finite(difference), usual, other),
        seen.squares + new.squares + difference * difference * (before * share),
        seen.negentropy + new.negentropy,
        tf.concat([seen.first, new.first], axis=-1),
    )


def standard_deviation(moments: Moments, num_draws: tf.Tensor | int) -> tf.Tensor:
    """Unbiased variance's root (divisor T - 1)."""
    return tf.sqrt(moments.squares / tf.cast(num_draws - 1, tf.float32))


def central_interval(
    first: tf.Tensor,
    num_draws: tf.Tensor | int,
    widest: tuple[float, float],
    enough: bool = False,
    mean: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The 5 % and 95 % quantiles over the last axis of the first of `num_draws` draws, interpolated.

    With fewer than MIN_QUANTILE_DRAWS draws the tails are unknown: then the widest possible interval. `enough` says
    that there are as many. mean: of draws that may be infinite; where it is NaN the ends are.
    """
    # One partial sort for both: the largest of -x are the smallest of x.
    below, above = tf.unstack(_upper(tf.stack([-first, first]), num_draws, mean))
    if enough:
        return -below, above
    known = _count(num_draws) >= MIN_QUANTILE_DRAWS
    return tf.where(known, -below, widest[0]), tf.where(known, above, widest[1])


def shared_interval(first: tf.Tensor, num_draws: tf.Tensor | int, enough: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
    """`central_interval` of two classes' probabilities [..., 2, draws]: what the one has less the other has more."""
    upper = _upper(first, num_draws)
    if not enough:
        upper = tf.where(_count(num_draws) >= MIN_QUANTILE_DRAWS, upper, 1.0)
    return 1.0 - tf.reverse(upper, [-1]), upper


def _count(num_draws: tf.Tensor | int) -> tf.Tensor | int:
    """Draws that quantiles are read from."""
    return min(num_draws, QUANTILE_DRAWS) if isinstance(num_draws, int) else tf.minimum(num_draws, QUANTILE_DRAWS)


def _upper(first: tf.Tensor, num_draws: tf.Tensor | int, mean: tf.Tensor | None = None) -> tf.Tensor:
    """The 95 % quantile over the last axis. A number that is known while the graph is made makes it leaner.

    mean: of draws that may be infinite; the quantile is NaN where it is, which the sort would pass over.
    """
    count = _count(num_draws)
    weight: tf.Tensor | float
    if isinstance(count, int):
        # In float32, as the graph of an unknown number has it.
        rank = float(np.float32(count - 1) * np.float32(_TAIL))
        weight, outer = rank - int(rank), int(rank)
    else:
        rank = tf.cast(count - 1, tf.float32) * _TAIL
        whole = tf.floor(rank)
        weight, outer = rank - whole, tf.cast(whole, tf.int32)
    # Of at least two draws the rank is at least one from the other end.
    tails = tf.math.top_k(first, outer + 2, sorted=True).values
    far, near = tails[..., -2], tails[..., -1]
    if mean is None:
        return far + (near - far) * weight
    # Nothing lies between an infinite draw and the next one.
    between = tf.where(tf.math.is_inf(far), far, far + tf.math.multiply_no_nan(near - far, weight))
    return tf.where(tf.math.is_nan(mean), mean, between)


def known_tails(
    first: tf.Tensor, quantiles: Callable[[], tf.Tensor], enough: bool = False
) -> tuple[tf.Tensor, tf.Tensor]:
    """Both ends [N] of `quantiles` [N, 2], a mixture's over the draws [N, draws]; infinite where these are too few.

    enough: they are not.
    """
    if enough:
        ends = quantiles()
        return ends[:, 0], ends[:, 1]
    count = tf.shape(first)[1]
    infinite = tf.zeros_like(first[:, :1]) + tf.constant([-float("inf"), float("inf")])
    # Computed only where it is wanted: with few draws somebody only looks whether to go on.
    ends = tf.cond(count >= MIN_QUANTILE_DRAWS, quantiles, lambda: infinite)
    return ends[:, 0], ends[:, 1]
