"""The random numbers behind the masks: a counter-based stream addressed by (seed, stream, draw).

Philox 4x32-10 (Salmon et al. 2011) under TensorFlow's `StatelessRandom...V2` kernels. The key is the seed, the upper
half of the 128-bit counter is the stream (one for each call of a stochastic layer), the lower half advances by a fixed
stride a draw. A run of draws t0 .. t0 + C - 1 is therefore one contiguous read, and equals the same draws read one by
one, in other chunks, in another process or on another device.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

PHILOX = 1
# One counter step yields 4 words of 32 bits, or 4 normal numbers.
_WORDS_PER_STEP, _WORD_BITS = 4, 32
_BITS_PER_STEP = _WORDS_PER_STEP * _WORD_BITS
# Rates finer than this are drawn from 32-bit words: with 16 bits they would be off by more than a thousandth.
_COARSE_RATE = 1e3 / 2.0**17


def _counter(stream: int, first_draw: tf.Tensor, steps_per_draw: tf.Tensor) -> tf.Tensor:
    """Counter [2] uint64 at which `first_draw` (int32 []) begins in `stream`."""
    low = tf.cast(first_draw, tf.int64) * tf.cast(steps_per_draw, tf.int64)
    return tf.bitcast(tf.stack([low, tf.constant(stream, tf.int64)]), tf.uint64)


def _key(seed: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(tf.reshape(seed, [1]), tf.uint64)


def coins(
    seed: tf.Tensor, stream: int, first_draw: tf.Tensor, num_draws: tf.Tensor, count: tf.Tensor, rate: float
) -> tf.Tensor:
    """False with probability `rate`. Returns bool [num_draws, count] for the draws from `first_draw` on.

    Rates such as 1/2, 1/4 or 3/8 are exact with few bits a coin, and drawing them is most of what a coin costs.
    """
    bits = coin_bits(rate)
    threshold = min(round(rate * 2**bits), 2**bits - 1)
    # Coins of 1, 2 or 4 bits share bytes: the draw's first coins have the lowest bits of all its bytes.
    shared = max(1, 8 // bits)
    per_step = _BITS_PER_STEP // bits
    steps = (count + per_step - 1) // per_step
    drawn = _full_words(seed, stream, first_draw, num_draws, steps)
    if bits == _WORD_BITS:
        numbers, least = drawn, tf.constant(threshold, tf.uint32)
    else:
        dtype = tf.uint16 if bits > 8 else tf.uint8
        numbers, least = tf.bitcast(drawn, dtype), tf.constant(threshold, dtype)
    if shared > 1:
        shifts = np.arange(shared, dtype=np.uint8)[:, np.newaxis] * np.uint8(bits)
        apart = tf.reshape(numbers, tf.stack([num_draws, 1, steps * (_BITS_PER_STEP // 8)]))
        numbers = tf.bitwise.bitwise_and(apart, tf.constant(np.uint8(2**bits - 1) << shifts))
        least = tf.constant(np.uint8(threshold) << shifts)
    return tf.reshape(numbers >= least, tf.stack([num_draws, steps * per_step]))[:, :count]


def coin_bits(rate: float) -> int:
    """Bits of a coin: 1, 2, 4 or 8 where they give the rate exactly; else 16, or 32 where those are too coarse."""
    for bits in (1, 2, 4, 8):
        if float(rate * 2**bits).is_integer():
            return bits
    return 16 if _COARSE_RATE <= rate <= 1 - _COARSE_RATE else _WORD_BITS


def words(seed: tf.Tensor, stream: int, first_draw: tf.Tensor, num_draws: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Uniform 32-bit integers. Returns uint32 [num_draws, count] for the draws from `first_draw` on."""
    steps = (count + _WORDS_PER_STEP - 1) // _WORDS_PER_STEP
    flat = _full_words(seed, stream, first_draw, num_draws, steps)
    return tf.reshape(flat, tf.stack([num_draws, steps * _WORDS_PER_STEP]))[:, :count]


def _full_words(
    seed: tf.Tensor, stream: int, first_draw: tf.Tensor, num_draws: tf.Tensor, steps: tf.Tensor
) -> tf.Tensor:
    """Uniform 32-bit integers: uint32 [num_draws * steps * 4]."""
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=tf.stack([num_draws * steps * _WORDS_PER_STEP]),
        key=_key(seed),
        counter=_counter(stream, first_draw, steps),
        alg=PHILOX,
        dtype=tf.uint32,
    )


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
