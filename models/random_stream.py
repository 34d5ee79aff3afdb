"""The random numbers behind the masks: a counter-based stream addressed by (seed, stream, draw).

Philox 4x32-10 (Salmon et al. 2011) under TensorFlow's `StatelessRandom...V2` kernels. The key is the seed, the upper
half of the 128-bit counter is the stream (one for each call of a stochastic layer), the lower half advances by a fixed
stride a draw. A run of draws t0 .. t0 + C - 1 is therefore one contiguous read, and equals the same draws read one by
one, in other chunks, in another process or on another device.
"""

from __future__ import annotations

import tensorflow as tf

PHILOX = 1
# One counter step yields 4 words of 32 bits, 8 half-words of 16 bits, or 4 normal numbers.
_WORDS_PER_STEP = 4
_HALF_WORDS_PER_STEP = 8


def _counter(stream: int, first_draw: tf.Tensor, steps_per_draw: tf.Tensor) -> tf.Tensor:
    """Counter [2] uint64 at which `first_draw` (int32 []) begins in `stream`."""
    low = tf.cast(first_draw, tf.int64) * tf.cast(steps_per_draw, tf.int64)
    return tf.bitcast(tf.stack([low, tf.constant(stream, tf.int64)]), tf.uint64)


def _key(seed: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(tf.reshape(seed, [1]), tf.uint64)


def half_words(
    seed: tf.Tensor, stream: int, first_draw: tf.Tensor, num_draws: tf.Tensor, count: tf.Tensor
) -> tf.Tensor:
    """Uniform 16-bit integers. Returns uint16 [num_draws, count] for the draws from `first_draw` on."""
    steps = (count + _HALF_WORDS_PER_STEP - 1) // _HALF_WORDS_PER_STEP
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=tf.stack([num_draws * steps * _WORDS_PER_STEP]),
        key=_key(seed),
        counter=_counter(stream, first_draw, steps),
        alg=PHILOX,
        dtype=tf.uint32,
    )
    halves = tf.reshape(tf.bitcast(words, tf.uint16), tf.stack([num_draws, steps * _HALF_WORDS_PER_STEP]))
    return halves[:, :count]


def words(seed: tf.Tensor, stream: int, first_draw: tf.Tensor, num_draws: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Uniform 32-bit integers. Returns uint32 [num_draws, count] for the draws from `first_draw` on."""
    steps = (count + _WORDS_PER_STEP - 1) // _WORDS_PER_STEP
    flat = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=tf.stack([num_draws * steps * _WORDS_PER_STEP]),
        key=_key(seed),
        counter=_counter(stream, first_draw, steps),
        alg=PHILOX,
        dtype=tf.uint32,
    )
    return tf.reshape(flat, tf.stack([num_draws, steps * _WORDS_PER_STEP]))[:, :count]


def normals(seed: tf.Tensor, stream: int, first_draw: tf.Tensor, num_draws: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Standard normal numbers. Returns float32 [num_draws, count] for the draws from `first_draw` on."""
    steps = (count + _WORDS_PER_STEP - 1) // _WORDS_PER_STEP
    flat = tf.raw_ops.StatelessRandomNormalV2(
        shape=tf.stack([num_draws * steps * _WORDS_PER_STEP]),
        key=_key(seed),
        counter=_counter(stream, first_draw, steps),
        alg=PHILOX,
        dtype=tf.float32,
    )
    return tf.reshape(flat, tf.stack([num_draws, steps * _WORDS_PER_STEP]))[:, :count]
