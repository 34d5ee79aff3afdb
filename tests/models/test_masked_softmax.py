"""A Softmax layer that is handed a sequence mask: each row has its own, as where Keras runs the row alone."""

import keras
import numpy as np
import pytest
from keras import layers

from models.artifact import publish
from models.contract import ArtifactError
from tests.models.artifacts import Artifact
from tests.models.networks import scatter
from tests.models.reference import Reference


def masked(shape: tuple[int | None, ...], *parts: layers.Layer) -> keras.Model:
    stack = [keras.Input(shape, name="x"), layers.Masking(), *parts]
    return scatter(keras.Sequential(stack), scale=1.5)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((6,), [layers.Dropout(0.4), layers.Softmax(), layers.Dense(2)]),
        ((6,), [layers.Softmax(), layers.Dropout(0.4), layers.Dense(2)]),
        ((6,), [layers.Dropout(0.4), layers.Dense(4), layers.Softmax(name="answer")]),
        ((4, 4), [layers.Dropout(0.4), layers.Softmax(), layers.Dense(2)]),
    ],
)
def test_draws_are_those_of_masks_set_by_hand_row_by_row(repository, shape, parts):
    model = masked(shape, *parts)
    name = f"masked-softmax-{len(shape)}-{'-'.join(type(part).__name__.lower() for part in parts)}"
    artifact = Artifact(publish(model, name=name, repository=repository, task="regression"))
    rows = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    rows[0] = 0
    rows[1, :2] = 0
    [expected] = Reference(model, artifact.manifest).draws({"x": rows}, 8, seed=2)
    assert np.ptp(expected, axis=1).max() > 1e-2
    np.testing.assert_allclose(artifact.draws(rows, 8, seed=2), expected, atol=2e-6)
    plain = artifact.answer("serving_default", rows)["mean"]
    alone = np.concatenate([model(row[None], training=False).numpy() for row in rows])
    np.testing.assert_allclose(plain, alone, atol=1e-6)


def test_masks_that_keras_cannot_run_are_refused_by_name(repository):
    model = masked((5, 4), layers.Dropout(0.4), layers.Softmax(name="over"), layers.Dense(2))
    with pytest.raises(ArtifactError, match=r"^layer 'over': a sequence mask of shape \(None, 5\) falls on [^\n]*$"):
        publish(model, name="unfit", repository=repository, task="regression")
