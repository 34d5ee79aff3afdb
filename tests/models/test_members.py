"""Ensembles: draw t is member t mod M's own, whatever it is asked with."""

import keras
import numpy as np
import pytest
from keras import layers

from models import engine
from models.artifact import publish
from models.contract import ArtifactError
from tests.models.artifacts import Artifact
from tests.models.networks import scatter
from tests.models.reference import Reference

MEMBERS = 3
ROWS = np.random.default_rng(8).normal(size=(4, 6)).astype("float32")
IMAGES = np.random.default_rng(9).normal(size=(4, 6, 6, 1)).astype("float32")


def ensemble(member, shape, members=MEMBERS):
    """Members with other weights each, scaling in front of them all."""
    inputs = keras.Input(shape, name="x")
    scaled = layers.Rescaling(0.5, name="scaling")(inputs)
    nets = [scatter(member(f"member_{number + 1}"), seed=number, scale=2.0) for number in range(members)]
    outputs = [net(scaled) for net in nets]
    return keras.Model(inputs, layers.Average(name="output")(outputs), name="ensemble"), nets


def dense(name):
    x = inputs = keras.Input((6,))
    x = layers.Dense(7, activation="relu", name="prefix")(x)
    x = layers.Dropout(0.3, name="first_dropout")(x)
    x = layers.Dropout(0.4, name="second_dropout")(layers.Dense(8, activation="relu", name="hidden")(x))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="answer")(x), name=name)


def convolutional(name):
    x = inputs = keras.Input((6, 6, 1))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="convolution")(x))
    x = layers.SpatialDropout2D(0.4, name="maps_dropout")(layers.MaxPooling2D(name="pooling")(layers.ReLU()(x)))
    return keras.Model(
        inputs, layers.Dense(1, activation="sigmoid", name="answer")(layers.Flatten(name="flatten")(x)), name=name
    )


def regression(name):
    x = inputs = keras.Input((6,))
    x = layers.Dropout(0.2, name="visible_dropout")(x)
    x = layers.Dense(1, name="answer")(layers.Dense(5, activation="tanh", name="hidden")(x))
    return keras.Model(inputs, layers.Rescaling(3.0, 10.0, name="target_scaling")(x), name=name)


def recurrent(name):
    """Of any length: its noise has no fixed shape."""
    x = inputs = keras.Input((None, 6))
    x = layers.Dropout(0.3, name="step_dropout")(x)
    x = layers.GRU(4, dropout=0.3, name="gru")(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax", name="answer")(x), name=name)


KINDS = {
    "dense": (dense, (6,), ROWS),
    "convolutional": (convolutional, (6, 6, 1), IMAGES),
    "regression": (regression, (6,), ROWS),
    "recurrent": (recurrent, (None, 6), ROWS.reshape(4, 1, 6).repeat(5, axis=1)),
}


@pytest.fixture(scope="module", params=KINDS)
def published(request, repository):
    member, shape, rows = KINDS[request.param]
    model, nets = ensemble(member, shape)
    folder = publish(model, name=f"ensemble-{request.param}", repository=repository, members=MEMBERS)
    return Artifact(folder), model, nets, rows


def as_reported(values, found):
    """A member's answers [rows, draws, units] as the artifact reports them."""
    if found.ndim == 2:
        return values[..., 0]
    return np.concatenate([1 - values, values], axis=-1) if values.shape[-1] == 1 else values


def test_draw_t_is_member_t_mod_m_with_masks_set_by_hand(published):
    artifact, _, nets, rows = published
    assert artifact.manifest.members == MEMBERS
    assert {layer.path.partition("/")[0] for layer in artifact.manifest.stochastic_layers} == {"member_1"}
    found = artifact.draws(rows, 8, seed=5)
    for number, net in enumerate(nets):
        [expected] = Reference(net, artifact.manifest).draws({"x": rows * np.float32(0.5)}, 8, seed=5)
        expected = as_reported(expected, found)
        np.testing.assert_allclose(found[:, number::MEMBERS], expected[:, number::MEMBERS], atol=1e-5, rtol=1e-5)
        others = np.delete(expected - found, np.s_[number::MEMBERS], axis=1)
        assert np.abs(others).max() > 1e-2, "the members do not differ: nothing is shown"


def test_deterministic_answer_is_the_mean_of_the_members_and_bit_equal_to_the_keras_model(published, tmp_path):
    artifact, model, nets, rows = published
    [(name, found)] = artifact.answer("serving_default", rows).items()
    plain = keras.ops.convert_to_numpy(model(rows, training=False))
    mean = np.mean([keras.ops.convert_to_numpy(net(rows * np.float32(0.5), training=False)) for net in nets], axis=0)
    if name == "mean":
        np.testing.assert_array_equal(found, plain[:, 0])
    else:
        np.testing.assert_array_equal(found[:, -1], plain[:, -1])
    np.testing.assert_allclose(plain, mean, atol=1e-5)
    for file in ("model.keras", "model.h5"):
        again = keras.models.load_model(artifact.folder / file)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(again(rows, training=False)), plain)


def test_fewer_draws_than_members_are_the_first_members_and_every_run_begins_with_them(published):
    artifact, _, _, rows = published
    whole = artifact.draws(rows, 50, seed=3)
    for count in (2, 3, 4, 7, 32):
        np.testing.assert_allclose(artifact.draws(rows, count, seed=3), whole[:, :count], atol=1e-6)


def test_row_answers_do_not_depend_on_batch_mates_and_statistics_are_those_of_the_draws(published):
    artifact, _, _, rows = published
    whole = artifact.draws(rows, 41)
    np.testing.assert_allclose(artifact.draws(rows[2:3], 41), whole[2:3], atol=2e-6, rtol=1e-6)
    name = "mean" if "mean" in artifact.sample(rows, 41) else "probabilities"
    std = "epistemic_std" if name == "mean" else "std"
    summary = artifact.sample(rows, 41)
    np.testing.assert_allclose(summary[name], whole.mean(axis=1), atol=2e-6, rtol=1e-6)
    np.testing.assert_allclose(summary[std], whole.std(axis=1, ddof=1), atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(summary["lower"], np.quantile(whole, 0.05, axis=1), atol=2e-6, rtol=1e-6)
    default = artifact.answer("mc_predict", rows)
    for key, values in artifact.sample(rows, 100, 0).items():
        np.testing.assert_allclose(values, default[key], atol=2e-6, rtol=1e-5)


def test_adaptive_answers_are_the_samples_of_as_many_draws(published):
    """The looks come after 32, 48, 72, ... draws: not at multiples of the members."""
    artifact, _, _, rows = published
    found = artifact.adaptive(rows, tolerance=0.05, max_samples=400)
    name = "mean" if "mean" in found else "probabilities"
    for row, count in enumerate(found["num_samples"].tolist()):
        expected = artifact.sample(rows[row : row + 1], count)
        np.testing.assert_allclose(found[name][row], expected[name][0], atol=2e-6, rtol=1e-6)
        np.testing.assert_allclose(found["standard_error"][row], expected["standard_error"][0], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("folded_rows", [1, 6, 10])
def test_answers_do_not_depend_on_the_chunks(folded_rows, repository, monkeypatch):
    """One, four and seven draws a chunk of four rows."""
    model, _ = ensemble(dense, (6,))
    usual = Artifact(publish(model, name="usual-chunks", repository=repository, members=MEMBERS))
    monkeypatch.setattr(engine, "CHUNK_FLOATS", 1)
    monkeypatch.setattr(engine, "MIN_FLAT_CHUNK_ROWS", folded_rows)
    small = Artifact(publish(model, name=f"chunks-of-{folded_rows}", repository=repository, members=MEMBERS))
    np.testing.assert_allclose(small.draws(ROWS, 23, 4), usual.draws(ROWS, 23, 4), atol=1e-6)
    for key, values in usual.sample(ROWS, 23, 0).items():
        np.testing.assert_allclose(small.sample(ROWS, 23, 0)[key], values, atol=2e-6)


def test_what_is_no_ensemble_is_refused(repository):
    model, _ = ensemble(dense, (6,))
    with pytest.raises(ArtifactError, match="not an ensemble of 4 members"):
        publish(model, name="refused", repository=repository, members=4)
    with pytest.raises(ArtifactError, match="not an ensemble of 2 members"):
        publish(dense("alone"), name="refused", repository=repository, members=2)
    inputs = keras.Input((6,))
    outer = layers.Dropout(0.2, name="outer")(inputs)
    mixed = keras.Model(inputs, layers.Average()([dense("one")(outer), dense("other")(outer)]))
    with pytest.raises(ArtifactError, match="stochastic layers outside of its members"):
        publish(mixed, name="refused", repository=repository, members=2)
    unlike = keras.Sequential(
        [keras.Input((6,)), layers.Dropout(0.1), layers.Dense(3, activation="softmax")], name="unlike"
    )
    mixed = keras.Model(inputs, layers.Average()([dense("one")(inputs), unlike(inputs)]))
    with pytest.raises(ArtifactError, match="member 'unlike' has other stochastic layers than 'one'"):
        publish(mixed, name="refused", repository=repository, members=2)
    assert not (repository / "refused").exists()
