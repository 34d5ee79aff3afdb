"""Draws that are infinite or no numbers: a row's answer is the same beside any mates and in any chunks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from models import conformal, engine, statistics
from models.artifact import publish
from models.contract import ConformalScores
from tests.models.artifacts import Artifact

INF, NAN = np.inf, np.nan
DRAWS = 40


def with_draws(*special: float) -> list[float]:
    return [*special, *np.linspace(1, 2, DRAWS - len(special))]


# Draws of a row, and their mean, lower and upper end, deviation.
ROWS: dict[str, tuple[list[float], list[float | None]]] = {
    "one infinite": (with_draws(INF), [INF, None, None, NAN]),
    "some infinite": (with_draws(INF, INF, INF, INF), [INF, None, INF, NAN]),
    "most infinite": ([INF] * (DRAWS - 1) + [1.0], [INF, INF, INF, NAN]),
    "all infinite": ([-INF] * DRAWS, [-INF, -INF, -INF, NAN]),
    "of both signs": (with_draws(INF, -INF), [NAN, NAN, NAN, NAN]),
    "one that is none": (with_draws(NAN), [NAN, NAN, NAN, NAN]),
    "large": ([1e38] * DRAWS, [1e38, 1e38, 1e38, 0]),
    "large ones of both signs": ([3e38, -3e38] * (DRAWS // 2), [0, None, None, INF]),
}


@pytest.mark.parametrize("name", ROWS)
def test_statistics_are_the_same_in_any_chunks(name):
    row, wanted = ROWS[name]
    for order in (row, row[::-1]):
        draws = tf.constant([order], tf.float32)
        for size in (1, 7, 20, DRAWS):
            moments = statistics.of_draws(draws[:, :size], 0, False)
            for seen in range(size, DRAWS, size):
                chunk = draws[:, seen : seen + size]
                new = statistics.of_draws(chunk, seen, False)
                moments = statistics.merge(moments, tf.constant(seen), new, tf.constant(chunk.shape[1]))
            ends = statistics.central_interval(moments.first, DRAWS, (-INF, INF), True, moments.mean)
            found = [moments.mean, *ends, statistics.standard_deviation(moments, DRAWS)]
            for value, expected in zip(found, wanted, strict=True):
                if expected is None:
                    assert np.isfinite(value), (size, found)
                else:
                    atol = 1e32 if "large" in name else 0
                    np.testing.assert_allclose(value, [expected], rtol=1e-5, atol=atol, err_msg=f"{name} by {size}")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Artifact:
    """Of some rows no draw overflows, of some a few, of some all."""
    row = keras.Input((4,), name="row")
    x = layers.Dropout(0.4)(row)
    answer = layers.Dense(1, activation="exponential", kernel_initializer="ones", name="answer")(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CHUNK_FLOATS", 64 * 64)
        patch.setattr(engine, "MIN_FLAT_CHUNK_ROWS", 1)
        folder = publish(keras.Model(row, answer), name="overflowing", repository=tmp_path_factory.mktemp("overflow"))
    return Artifact(folder)


@pytest.mark.parametrize(("count", "seed"), [(40, 0), (40, 3), (150, 0)])
def test_answers_of_an_overflowing_network_are_those_of_each_row_alone(overflowing, count, seed):
    rows = np.linspace(1, 40, 60, dtype="float32")[:, None] * np.ones((1, 4), "float32")
    alone = [overflowing.sample(row[None], count, seed) for row in rows]
    together = overflowing.sample(rows, count, seed)
    assert 0 < np.isfinite(together["epistemic_std"]).sum() < len(rows)
    assert np.isinf(together["mean"]).any()
    assert not np.isnan(together["mean"]).any()
    stopped = [overflowing.adaptive(row[None], 0.1, 100, seed) for row in rows]
    for found, apart in [(together, alone), (overflowing.adaptive(rows, 0.1, 100, seed), stopped)]:
        for name, values in found.items():
            expected = np.concatenate([answer[name] for answer in apart])
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["lac", "aps"])
def test_a_row_without_probabilities_has_the_full_set_and_its_mates_have_theirs(kind):
    scores = ConformalScores(kind=kind, scores=[[0.6] * 50])
    probabilities = tf.constant([[0.5, 0.3, 0.2], [NAN, NAN, NAN], [0.9, 0.05, 0.05]], tf.float32)
    found = conformal.prediction_set(probabilities, scores, 0.9).numpy()
    assert found[1].all()
    mates = conformal.prediction_set(tf.gather(probabilities, [0, 2]), scores, 0.9).numpy()
    np.testing.assert_array_equal(found[[0, 2]], mates)
