"""Options that trade exactness for speed or for less Monte Carlo noise: balanced kept masks, half precision."""

import keras
import numpy as np
import pytest

from models import engine
from models.artifact import publish
from models.contract import ArtifactError
from tests.models import networks
from tests.models.artifacts import Artifact

ROWS = np.random.default_rng(5).normal(size=(6, 4)).astype("float32")


@pytest.fixture(scope="module")
def usual(repository):
    return Artifact(publish(networks.tiny_net(), name="usual", repository=repository))


@pytest.fixture(scope="module")
def balanced(repository):
    return Artifact(publish(networks.tiny_net(), name="balanced", repository=repository, masks="balanced"))


def test_balanced_masks_drop_each_unit_in_its_share_of_the_draws(balanced):
    assert balanced.manifest.masks == "balanced"
    for kept, rate in zip(balanced.loaded.kept_masks, (0.25, 0.5), strict=True):
        values = kept.numpy()
        assert len(values) == balanced.manifest.num_samples
        np.testing.assert_array_equal((values == 0).sum(axis=0), rate * len(values))
        np.testing.assert_allclose(values[values != 0], 1 / (1 - rate), rtol=1e-6)
        # Each unit is permuted on its own: no two are dropped in the same draws.
        columns = values.reshape(len(values), -1).T
        assert len({tuple(column) for column in columns}) == len(columns)


def test_balanced_masks_lower_the_error_of_the_mean(balanced, usual):
    """Against the exact mean (200,000 independent draws); averaged over rows and classes."""
    exact = usual.sample(ROWS, 200_000, 3)["probabilities"]

    def error(artifact):
        return np.sqrt(np.mean((artifact.answer("mc_predict", ROWS)["probabilities"] - exact) ** 2))

    independent = np.sqrt(
        np.mean([np.mean((usual.sample(ROWS, 100, seed)["probabilities"] - exact) ** 2) for seed in range(30)])
    )
    assert error(balanced) < 0.8 * independent


def test_balanced_answers_keep_the_invariants(balanced):
    whole = balanced.draws(ROWS, 250)
    np.testing.assert_array_equal(balanced.draws(ROWS, 70), whole[:, :70])
    np.testing.assert_allclose(balanced.draws(ROWS[2:3], 250), whole[2:3], atol=1e-6)
    summary = balanced.sample(ROWS, 250)
    np.testing.assert_allclose(summary["probabilities"], whole.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(summary["std"], whole.std(axis=1, ddof=1), atol=1e-6)
    default = balanced.answer("mc_predict", ROWS)
    np.testing.assert_allclose(default["probabilities"], whole[:, :100].mean(axis=1), atol=1e-6)


def test_other_seeds_are_independent_draws_even_where_masks_are_balanced(balanced, usual):
    np.testing.assert_array_equal(balanced.draws(ROWS, 120, 9), usual.draws(ROWS, 120, 9))


def test_balanced_masks_that_cannot_be_kept_are_refused(repository):
    inputs = keras.Input((4000,), name="x")
    wide = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(keras.layers.Dropout(0.5)(inputs)))
    with pytest.raises(ArtifactError, match=f"at most {engine.KEPT_BYTES}"):
        publish(wide, name="wide", repository=repository, masks="balanced", num_samples=1000)
    noisy = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(keras.layers.GaussianNoise(0.5)(inputs)))
    with pytest.raises(ArtifactError, match="only for dropout"):
        publish(noisy, name="noisy", repository=repository, masks="balanced")


def test_bfloat16_draws_are_near_the_float32_ones_and_the_deterministic_answer_is_the_same(repository, usual):
    half = Artifact(publish(networks.tiny_net(), name="half", repository=repository, precision="bfloat16"))
    assert half.manifest.precision == "bfloat16"
    deterministic = half.answer("serving_default", ROWS)["probabilities"]
    np.testing.assert_array_equal(deterministic, usual.answer("serving_default", ROWS)["probabilities"])
    gap = np.abs(half.sample(ROWS, 100)["probabilities"] - usual.sample(ROWS, 100)["probabilities"]).max()
    # 8 bits of mantissa: not equal, and within a percent.
    assert 0 < gap < 1e-2


def test_bfloat16_is_refused_where_there_is_no_graph(repository):
    @keras.saving.register_keras_serializable("options")
    class Whole(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.drop, self.answer = keras.layers.Dropout(0.5), keras.layers.Dense(1)

        def call(self, x):
            return self.answer(self.drop(x))

    model = Whole()
    model(ROWS)
    with pytest.raises(ArtifactError, match="bfloat16 needs a graph"):
        publish(model, name="whole", repository=repository, precision="bfloat16")
