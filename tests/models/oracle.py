"""An independent NumPy implementation of a draw: random numbers, masks, dense networks, statistics.

Shares no code with `models`; it follows the stream's definition only. Stream number: layer << 24 | call << 8 | part.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import xlogy

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(key: tuple[int, int], counters: np.ndarray) -> np.ndarray:
    """Philox 4x32-10 (Salmon et al. 2011) of counters uint32 [n, 4]. Returns uint32 [n, 4]."""
    c0, c1, c2, c3 = (counters[:, column].astype(np.uint64) for column in range(4))
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        product0, product1 = np.uint64(_MULTIPLIERS[0]) * c0, np.uint64(_MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def words(seed: int, stream: int, draws: Sequence[int], count: int) -> np.ndarray:
    """uint32 [draws, count]: the counter's lower half is draw * steps + step, its upper half the stream."""
    steps = -(-count // 4)
    positions = np.array([draw * steps + step for draw in draws for step in range(steps)], dtype=np.uint64)
    counters = np.empty((len(positions), 4), np.uint32)
    counters[:, 0] = positions & np.uint64(0xFFFFFFFF)
    counters[:, 1] = positions >> np.uint64(32)
    counters[:, 2] = stream & 0xFFFFFFFF
    counters[:, 3] = stream >> 32
    unsigned = seed % 2**64
    numbers = philox((unsigned & 0xFFFFFFFF, unsigned >> 32), counters)
    return numbers.reshape(len(draws), steps * 4)[:, :count]


def half_words(seed: int, stream: int, draws: Sequence[int], count: int) -> np.ndarray:
    """uint16 [draws, count]: both halves of each 32-bit word, the lower one first."""
    whole = words(seed, stream, draws, 4 * -(-count // 8))
    return whole.astype("<u4").view("<u2")[:, :count]


def few_bits(seed: int, stream: int, draws: Sequence[int], count: int, bits: int) -> np.ndarray:
    """Numbers of 1, 2, 4 or 8 bits, [draws, count]: the lowest bits of all of a draw's bytes first, then the next.

    Of as many counter steps, of 16 bytes each, as the numbers need.
    """
    steps = -(-count * bits // 128)
    octets = words(seed, stream, draws, 4 * steps).astype("<u4").view("u1")
    numbers = [[octet >> shift & (1 << bits) - 1 for shift in range(0, 8, bits) for octet in row] for row in octets]
    return np.array(numbers).reshape(len(draws), -1)[:, :count]


def normals(seed: int, stream: int, draws: Sequence[int], count: int) -> np.ndarray:
    """float64 [draws, count]: Box-Muller on pairs of words, 23 bits each, as TensorFlow defines it."""
    whole = words(seed, stream, draws, 4 * -(-count // 4))
    uniform = (whole & np.uint32(0x7FFFFF)).astype(np.float64) / 2**23
    radius = np.sqrt(-2 * np.log(np.maximum(uniform[:, 0::2], 1e-7)))
    angle = 2 * np.pi * uniform[:, 1::2]
    pairs = np.stack([np.sin(angle) * radius, np.cos(angle) * radius], axis=-1)
    return pairs.reshape(len(draws), -1)[:, :count]


def stream(layer: int, call: int = 0, part: int = 0) -> int:
    return layer << 24 | call << 8 | part


def kept(seed: int, stream: int, draws: Sequence[int], shape: Sequence[int], rate: float) -> np.ndarray:
    """bool [draws, *shape]: which units a draw keeps.

    Rates that 1, 2, 4 or 8 bits give exactly take so many; those that a 16-bit number is too coarse for take 32.
    """
    count = int(np.prod(shape))
    coarse = 1e3 / 2**17
    exact = [bits for bits in (1, 2, 4, 8) if rate * 2**bits == round(rate * 2**bits)]
    if exact:
        mask = few_bits(seed, stream, draws, count, exact[0]) >= round(rate * 2 ** exact[0])
    elif coarse <= rate <= 1 - coarse:
        mask = half_words(seed, stream, draws, count) >= round(rate * 2**16)
    else:
        mask = words(seed, stream, draws, count) >= min(round(rate * 2**32), 2**32 - 1)
    return mask.reshape(len(draws), *shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    return -xlogy(probabilities, probabilities).sum(axis=-1)


def statistics(draws: np.ndarray) -> dict[str, np.ndarray]:
    """What `mc_sample` reports of class probabilities [rows, draws, classes], in double precision."""
    draws = draws.astype(np.float64)
    count = draws.shape[1]
    mean, std = draws.mean(axis=1), draws.std(axis=1, ddof=1)
    predictive, expected = entropy(mean), entropy(draws).mean(axis=1)
    return {
        "probabilities": mean,
        "std": std,
        "standard_error": std / np.sqrt(count),
        "predictive_entropy": predictive,
        "expected_entropy": expected,
        "mutual_information": np.maximum(predictive - expected, 0),
        "lower": np.quantile(draws[:, :1000], 0.05, axis=1),
        "upper": np.quantile(draws[:, :1000], 0.95, axis=1),
    }
