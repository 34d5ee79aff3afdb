"""Each stochastic layer against its own definition: moments in closed form, or all masks enumerated, in NumPy."""

import itertools
import math
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from models.engine import Engine
from models.network import Network
from tests.models import networks, oracle

DRAWS, ROWS = 20_000, 2
# Standard errors of the mean and of the variance that an estimate may be off.
ERRORS = 4.5
ALPHA_PRIME = -1.7580993408473766

Moments = tuple[np.ndarray, np.ndarray]


def sampled(model: keras.Model, rows: np.ndarray) -> np.ndarray:
    """The engine's draws of a network with one output, [rows, draws]."""
    spec = tf.TensorSpec([None, *rows.shape[1:]], tf.float32)
    engine = Engine(Network(model), [spec], task="regression")

    @tf.function(input_signature=[spec], autograph=False)
    def draw(x):
        return engine.draws([x], tf.constant(DRAWS), tf.constant(3, tf.int64))

    (draws,) = draw(rows).values()
    return draws.numpy().astype(np.float64)


def assert_moments(draws: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> None:
    """Sample mean and variance over draws [rows, draws] lie within their standard errors of the exact ones [rows]."""
    assert (variance > 1e-3).all(), "nothing is shown"
    error = np.sqrt(variance / DRAWS)
    assert (np.abs(draws.mean(axis=1) - mean) < ERRORS * error).all()
    fourth = ((draws - draws.mean(axis=1, keepdims=True)) ** 4).mean(axis=1)
    of_variance = np.sqrt((fourth - variance**2) / DRAWS)
    assert (np.abs(draws.var(axis=1) - variance) < ERRORS * of_variance).all()


# Layers that multiply or add noise, read by a linear unit w: y = sum(w * layer(x)).


def grouped(rate: float, *shared: int) -> Callable[[np.ndarray, np.ndarray], Moments]:
    """Dropout whose mask is the same along the axes `shared` (of a row): what is dropped together adds up first."""

    def exact(x: np.ndarray, w: np.ndarray) -> Moments:
        parts = (w * x).sum(axis=tuple(axis + 1 for axis in shared), keepdims=True).reshape(len(x), -1)
        return parts.sum(axis=1), rate / (1 - rate) * (parts**2).sum(axis=1)

    return exact


def gaussian_dropout(rate: float) -> Callable[[np.ndarray, np.ndarray], Moments]:
    return grouped(rate)


def gaussian_noise(stddev: float) -> Callable[[np.ndarray, np.ndarray], Moments]:
    def exact(x: np.ndarray, w: np.ndarray) -> Moments:
        return (w * x).reshape(len(x), -1).sum(axis=1), np.full(len(x), stddev**2 * np.square(w).sum(), np.float64)

    return exact


def alpha_dropout(rate: float) -> Callable[[np.ndarray, np.ndarray], Moments]:
    """Dropped units become alpha'; then a x + b, which restores mean 0 and variance 1 (Klambauer et al. 2017)."""

    def exact(x: np.ndarray, w: np.ndarray) -> Moments:
        keep = 1 - rate
        a = 1 / math.sqrt(keep + ALPHA_PRIME**2 * keep * rate)
        b = -a * rate * ALPHA_PRIME
        mean = w * (a * (keep * x + rate * ALPHA_PRIME) + b)
        variance = w**2 * a**2 * keep * rate * (x - ALPHA_PRIME) ** 2
        return mean.reshape(len(x), -1).sum(axis=1), variance.reshape(len(x), -1).sum(axis=1)

    return exact


ELEMENTWISE = {
    "Dropout": (lambda: layers.Dropout(0.3), (6,), grouped(0.3)),
    "Dropout of a fine rate": (lambda: layers.Dropout(0.003), (6,), grouped(0.003)),
    "Dropout with noise_shape": (lambda: layers.Dropout(0.4, noise_shape=(None, 1, 3)), (4, 3), grouped(0.4, 0)),
    "SpatialDropout1D": (lambda: layers.SpatialDropout1D(0.4), (4, 3), grouped(0.4, 0)),
    "SpatialDropout2D": (lambda: layers.SpatialDropout2D(0.4), (3, 2, 3), grouped(0.4, 0, 1)),
    "SpatialDropout2D, channels first": (
        lambda: layers.SpatialDropout2D(0.4, data_format="channels_first"),
        (3, 3, 2),
        grouped(0.4, 1, 2),
    ),
    "SpatialDropout3D": (lambda: layers.SpatialDropout3D(0.4), (2, 2, 2, 3), grouped(0.4, 0, 1, 2)),
    "GaussianDropout": (lambda: layers.GaussianDropout(0.3), (6,), gaussian_dropout(0.3)),
    "GaussianNoise": (lambda: layers.GaussianNoise(0.7), (6,), gaussian_noise(0.7)),
    "AlphaDropout": (lambda: layers.AlphaDropout(0.3), (6,), alpha_dropout(0.3)),
}


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_moments_are_those_of_the_layers_definition(case):
    build, shape, exact = ELEMENTWISE[case]
    model = keras.Sequential([keras.Input(shape), build(), layers.Flatten(), layers.Dense(1, use_bias=False)])
    networks.scatter(model, scale=2.0)
    rows = np.random.default_rng(1).normal(1, 1, (ROWS, *shape)).astype(np.float32)
    weights = model.layers[-1].get_weights()[0].astype(np.float64).reshape(shape)
    assert_moments(sampled(model, rows), *exact(rows.astype(np.float64), weights))


# Recurrent layers: one mask for each gate and a sequence, all of them enumerated.

STEPS = 3
INPUT_RATE, RECURRENT_RATE = 0.25, 0.5


def _rnn(x, h, _, weights, dropped, forgotten):
    kernel, recurrent, bias = weights
    h = np.tanh(x * dropped[0] @ kernel + h * forgotten[0] @ recurrent + bias)
    return h, h


def _lstm(x, h, c, weights, dropped, forgotten):
    kernels, recurrents, biases = (np.split(weight, 4, axis=-1) for weight in weights)
    gates = [
        x * dropped[gate] @ kernels[gate] + h * forgotten[gate] @ recurrents[gate] + biases[gate] for gate in range(4)
    ]
    c = oracle.sigmoid(gates[1]) * c + oracle.sigmoid(gates[0]) * np.tanh(gates[2])
    return oracle.sigmoid(gates[3]) * np.tanh(c), c


def _gru(x, h, _, weights, dropped, forgotten):
    """With `reset_after`: the reset gate applies to the product, whose bias is its own."""
    kernels, recurrents = (np.split(weight, 3, axis=-1) for weight in weights[:2])
    of_input, of_state = (np.split(bias, 3, axis=-1) for bias in weights[2])
    update, reset = (
        oracle.sigmoid(x * dropped[g] @ kernels[g] + of_input[g] + h * forgotten[g] @ recurrents[g] + of_state[g])
        for g in (0, 1)
    )
    state = h * forgotten[2] @ recurrents[2] + of_state[2]
    candidate = np.tanh(x * dropped[2] @ kernels[2] + of_input[2] + reset * state)
    h = update * h + (1 - update) * candidate
    return h, h


RECURRENT = {"SimpleRNN": (layers.SimpleRNN, _rnn, 1), "LSTM": (layers.LSTM, _lstm, 4), "GRU": (layers.GRU, _gru, 3)}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_draws_have_the_moments_of_all_masks_enumerated(case):
    kind, step, gates = RECURRENT[case]
    options = {} if kind is layers.SimpleRNN else {"implementation": 1}
    cell = kind(1, dropout=INPUT_RATE, recurrent_dropout=RECURRENT_RATE, name="cell", **options)
    model = networks.scatter(keras.Sequential([keras.Input((STEPS, 1)), cell, layers.Dense(1)]), scale=3.0)
    rows = np.random.default_rng(2).normal(0, 1.5, (ROWS, STEPS, 1)).astype(np.float32)
    weights = [np.float64(weight) for weight in cell.get_weights()]
    kernel, bias = (np.float64(weight) for weight in model.layers[-1].get_weights())
    values, chances = [], []
    for mask in itertools.product([0, 1], repeat=2 * gates):
        dropped = np.array(mask[:gates]) / (1 - INPUT_RATE)
        forgotten = np.array(mask[gates:]) / (1 - RECURRENT_RATE)
        h = c = np.zeros((ROWS, 1))
        for at in range(STEPS):
            h, c = step(rows[:, at].astype(np.float64), h, c, weights, dropped, forgotten)
        values.append((h @ kernel + bias)[:, 0])
        kept = sum(mask[:gates])
        chances.append((1 - INPUT_RATE) ** kept * INPUT_RATE ** (gates - kept) * 0.5**gates)
    mean = np.average(values, axis=0, weights=chances)
    variance = np.average((values - mean) ** 2, axis=0, weights=chances)
    assert_moments(sampled(model, rows), mean, variance)


# Attention: 2 x 2 weights, dropped after the softmax and not normalised again.

ATTENTION_RATE = 0.3


def _head(x, weights):
    """Query, key and value of one head, and its way back: [2, width] each, from weights [inputs, 1, width]."""
    projected = [x @ kernel[:, 0] + bias[0] for kernel, bias in zip(weights[0:6:2], weights[1:6:2], strict=True)]
    return projected, lambda context: context @ weights[6][0] + weights[7]


def _multi_head(model, x):
    (query, key, value), back = _head(x, [np.float64(weight) for weight in model.get_layer("attend").get_weights()])
    return oracle.softmax(query @ key.T / math.sqrt(query.shape[-1])), value, back


def _dot(model, x):
    return oracle.softmax(x @ x.T), x, lambda context: context


def _additive(model, x):
    return oracle.softmax(np.tanh(x[:, None] + x[None]).sum(axis=-1)), x, lambda context: context


ATTENTION = {
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(1, 3, dropout=ATTENTION_RATE, name="attend"), _multi_head),
    "GroupQueryAttention": (
        lambda: layers.GroupQueryAttention(3, 1, 1, dropout=ATTENTION_RATE, name="attend"),
        _multi_head,
    ),
    "Attention": (lambda: layers.Attention(dropout=ATTENTION_RATE, name="attend"), _dot),
    "AdditiveAttention": (
        lambda: layers.AdditiveAttention(use_scale=False, dropout=ATTENTION_RATE, name="attend"),
        _additive,
    ),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_draws_have_the_moments_of_all_masks_enumerated(case):
    build, parts = ATTENTION[case]
    inputs = keras.Input((2, 2))
    attend = build()
    x = attend([inputs, inputs]) if parts in (_dot, _additive) else attend(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(1, name="read")(layers.Flatten()(x)))
    networks.scatter(model, scale=2.0)
    rows = np.random.default_rng(4).normal(0, 1.5, (ROWS, 2, 2)).astype(np.float32)
    kernel, bias = (np.float64(weight) for weight in model.get_layer("read").get_weights())
    masks = np.array(list(itertools.product([0, 1], repeat=4)), np.float64).reshape(-1, 2, 2)
    chances = np.prod(np.where(masks, 1 - ATTENTION_RATE, ATTENTION_RATE), axis=(1, 2))
    exact = []
    for row in rows.astype(np.float64):
        weights, value, back = parts(model, row)
        values = np.array(
            [(back(weights * mask / (1 - ATTENTION_RATE) @ value).ravel() @ kernel + bias)[0] for mask in masks]
        )
        mean = values @ chances
        exact.append((mean, (values - mean) ** 2 @ chances))
    assert_moments(sampled(model, rows), *map(np.array, zip(*exact, strict=True)))
