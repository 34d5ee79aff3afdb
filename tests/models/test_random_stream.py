"""The random stream against Philox's published test vectors and an independent implementation."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from models import random_stream
from models.stochastic import Noise
from tests.models import oracle

# Random123's known answers (kat_vectors, philox4x32 10): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

RATES = [1e-6, 0.003, 0.008, 0.2, 0.995, 0.9999]
# Of a half, quarters, sixteenths and 256ths: with so few bits a coin.
EXACT_RATES = {0.5: 1, 0.25: 2, 0.75: 2, 0.125: 4, 0.875: 4, 0.3125: 4, 1 / 256: 8, 51 / 256: 8}

seeds = st.one_of(st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]), st.integers(-(2**63), 2**63 - 1))
streams = st.builds(oracle.stream, st.integers(0, 2**20), st.integers(0, 2**16 - 1), st.integers(0, 255))


def hexadecimal(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_oracle_is_philox(counter, key, expected):
    found = oracle.philox(tuple(hexadecimal(key)), np.array([hexadecimal(counter)], np.uint32))
    assert found[0].tolist() == hexadecimal(expected)


@settings(deadline=None, max_examples=25)
@given(
    seed=seeds,
    stream=streams,
    first=st.one_of(st.integers(0, 100), st.integers(2**31 - 50, 2**31 - 10)),
    draws=st.integers(1, 5),
    count=st.integers(1, 70),
)
def test_numbers_are_those_of_the_definition(seed, stream, first, draws, count):
    arguments = (tf.constant(seed, tf.int64), stream, tf.constant(first), tf.constant(draws), tf.constant(count))
    which = range(first, first + draws)
    np.testing.assert_array_equal(random_stream.words(*arguments), oracle.words(seed, stream, which, count))
    expected = oracle.normals(seed, stream, which, count)
    np.testing.assert_allclose(random_stream.normals(*arguments), expected, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, rate=st.sampled_from([*RATES, *EXACT_RATES]), count=st.integers(1, 200))
def test_masks_are_those_of_the_definition(seed, rate, count):
    noise = Noise(oracle.stream(3, 1, 2), "keep", rate, 1.0, (count, 2))
    found = noise.draw(tf.constant(seed, tf.int64), tf.constant(7), tf.constant(4))
    expected = oracle.kept(seed, oracle.stream(3, 1, 2), range(7, 11), (count, 2), rate)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rate", "bits"), EXACT_RATES.items())
def test_coins_take_no_more_bits_than_their_rate_needs(rate, bits):
    assert random_stream.coin_bits(rate) == bits
    # Exactly the rate, over all numbers of so many bits.
    assert sum(number < round(rate * 2**bits) for number in range(2**bits)) == rate * 2**bits


@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_coins_of_few_bits_do_not_depend_on_each_other(rate):
    """Of all pairs of units and of neighbouring draws: correlations as large as independent coins have them."""
    draws, units = 20_000, 100
    kept = random_stream.coins(
        tf.constant(5, tf.int64), 3, tf.constant(0), tf.constant(draws), tf.constant(units), rate
    ).numpy()
    found = np.corrcoef(kept.T.astype(np.float64))[np.triu_indices(units, 1)] * np.sqrt(draws)
    assert abs(found.std() - 1) < 0.05
    assert np.abs(found).max() < 5.5
    after = [np.corrcoef(kept[:-1, unit], kept[1:, unit])[0, 1] * np.sqrt(draws) for unit in range(units)]
    assert np.abs(after).max() < 5


@pytest.mark.parametrize("rate", [0.0001, 0.0076, 0.2, 0.25, 0.5, 0.9, 0.9999])
def test_the_rate_is_met_to_a_thousandth_of_itself(rate):
    """Of the drop rate and of the keep rate, whichever is smaller; 10 million draws see the quantisation alone."""
    noise = Noise(0, "keep", rate, 1.0, (1000,))
    draws = 10_000
    dropped = 1 - float(tf.reduce_mean(noise.draw(tf.constant(1, tf.int64), tf.constant(0), tf.constant(draws))))
    wanted = 1e-3 * min(rate, 1 - rate)
    sampling = 5 * np.sqrt(rate * (1 - rate) / (draws * 1000))
    assert abs(dropped - rate) <= wanted + sampling


def test_layers_calls_and_parts_have_streams_of_their_own():
    numbers = {
        (layer, call, part): oracle.words(0, oracle.stream(layer, call, part), [0], 4).tobytes()
        for layer in (0, 1, 300)
        for call in (0, 1, 300)
        for part in (0, 1, 128, 131)
    }
    assert len(set(numbers.values())) == len(numbers)
