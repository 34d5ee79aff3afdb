"""Random words addressed by (seed, purpose, index, step): each replica's own, whatever is trained beside it.

Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), in
additions, rotations and exclusive ors only, which XLA fuses into one loop over the whole tensor.
"""

from __future__ import annotations

import tensorflow as tf

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ROUNDS = 20


def threefry(key: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Two words for each counter. All uint32, of shapes that broadcast against each other."""
    exclusive_or = tf.bitwise.bitwise_xor
    schedule = (*key, exclusive_or(exclusive_or(*key), tf.constant(_PARITY, tf.uint32)))
    first, second = counter[0] + schedule[0], counter[1] + schedule[1]
    for number in range(_ROUNDS):
        first = first + second
        second = exclusive_or(_rotate(second, _ROTATIONS[number // 4 % 2][number % 4]), first)
        if number % 4 == 3:
            injection = number // 4 + 1
            first = first + schedule[injection % 3]
            second = second + schedule[(injection + 1) % 3] + tf.constant(injection, tf.uint32)
    return first, second


def _rotate(word: tf.Tensor, bits: int) -> tf.Tensor:
    left = tf.bitwise.left_shift(word, tf.constant(bits, tf.uint32))
    return tf.bitwise.bitwise_or(left, tf.bitwise.right_shift(word, tf.constant(32 - bits, tf.uint32)))
