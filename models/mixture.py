"""Quantiles of a mixture of Gaussians, one for each draw, in the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import tensorflow as tf

# Safeguarded Newton steps, then bisections of what is left: 25 leave 3e-8 of the first bracket.
_NEWTON_STEPS, _BISECTIONS = 10, 25
# Of a step, in standard deviations of the mixture; Newton's next one would be its square.
_TOLERANCE = 1e-4


def quantiles(means: tf.Tensor, stds: tf.Tensor, mean: tf.Tensor, std: tf.Tensor, levels: Sequence[float]) -> tf.Tensor:
    """[N, levels]. means: of the draws, [N, T]; stds: [N, T] or [N, 1], above 0; mean, std: of the mixture, about, [N].

    The quantile of a mixture lies between the smallest and the largest quantile of its parts: there a root of the
    distribution function is looked for. Every row stops at its own step.
    """
    # In standard deviations from the mean: float32 then has its digits where they are wanted.
    centres = ((means - mean[:, None]) / std[:, None])[:, None, :]
    widths = (stds / std[:, None])[:, None, :]
    level = tf.constant(levels, tf.float32)
    normal = tf.constant([NormalDist().inv_cdf(value) for value in levels], tf.float32)
    ends = centres + widths * normal[:, None]
    lower, upper = tf.reduce_min(ends, axis=-1), tf.reduce_max(ends, axis=-1)
    start = tf.clip_by_value(tf.zeros_like(lower) + normal, lower, upper)

    def step(number: tf.Tensor, x: tf.Tensor, lower: tf.Tensor, upper: tf.Tensor, active: tf.Tensor) -> Any:
        scaled = (x[:, :, None] - centres) / widths
        over = tf.reduce_mean(tf.math.erf(scaled * math.sqrt(0.5)), axis=-1) * 0.5 + (0.5 - level)
        density = tf.reduce_mean(tf.exp(scaled * scaled * -0.5) / widths, axis=-1) * (1 / math.sqrt(2 * math.pi))
        is_over = over > 0
        lower, upper = tf.where(is_over, lower, x), tf.where(is_over, x, upper)
        newton = x - over / density
        inside = tf.logical_and(newton >= lower, newton <= upper)
        following = tf.where(tf.logical_and(inside, number < _NEWTON_STEPS), newton, (lower + upper) * 0.5)
        moved = tf.where(active, following, x)
        return number + 1, moved, lower, upper, tf.logical_and(active, tf.abs(moved - x) > _TOLERANCE)

    _, found, *_ = tf.while_loop(
        lambda number, x, lower, upper, active: tf.reduce_any(active),
        step,
        [tf.constant(0), start, lower, upper, tf.ones_like(start, tf.bool)],
        maximum_iterations=_NEWTON_STEPS + _BISECTIONS,
        parallel_iterations=1,
    )
    return found * std[:, None] + mean[:, None]
