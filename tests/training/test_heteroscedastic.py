"""`--heteroscedastic`: the noise of each row is learned, and Keras's own file gives it back without code of ours."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.stats import norm

from models.contract import Noise
from training.ensemble import single_networks
from training.fit import BetaNll
from training.pipeline import train
from training.plan import NoNoise, plan
from training.progress import Reporter


@pytest.fixture(scope="module")
def wedge(tmp_path_factory):
    """A table of one column whose target's noise grows with it: 0.1 + x."""
    folder = tmp_path_factory.mktemp("wedge")
    random = np.random.default_rng(0)
    x = random.uniform(0, 1, 1500)
    y = 3 * x + (0.1 + x) * random.normal(size=len(x))
    np.savetxt(folder / "wedge.csv", np.stack([x, y], axis=1), delimiter=",", header="x,y", comments="", fmt="%.5f")
    request = plan(
        str(folder / "wedge.csv"),
        target="y",
        repository=folder,
        seed=0,
        num_samples=50,
        epochs=60,
        heteroscedastic=True,
    )
    return train(request, Reporter(quiet=True))


def test_noise_of_each_row_is_learned_and_served_in_the_targets_unit(wedge):
    signatures = tf.saved_model.load(str(wedge.folder)).signatures
    x = np.array([[0.1], [0.5], [0.9]], np.float32)
    answer = {name: value.numpy() for name, value in signatures["mc_predict"](features=tf.constant(x)).items()}
    np.testing.assert_allclose(answer["aleatoric_std"], 0.1 + x[:, 0], rtol=0.35)
    assert (np.diff(answer["aleatoric_std"]) > 0.15).all()
    np.testing.assert_allclose(answer["std"], np.hypot(answer["epistemic_std"], answer["aleatoric_std"]), rtol=1e-5)

    scalars = {"num_samples": tf.constant(50), "seed": tf.constant(0, tf.int64)}
    drawn = {name: value.numpy() for name, value in signatures["mc_draws"](features=tf.constant(x), **scalars).items()}
    assert drawn["draws"].shape == drawn["aleatoric_draws"].shape == (3, 50)
    np.testing.assert_allclose(answer["mean"], drawn["draws"].mean(axis=1), atol=1e-5)
    squares = (drawn["aleatoric_draws"].astype(float) ** 2).mean(axis=1)
    np.testing.assert_allclose(answer["aleatoric_std"], np.sqrt(squares), rtol=1e-4)
    below = norm.cdf(answer["upper"][:, None], drawn["draws"], drawn["aleatoric_draws"]).mean(axis=1)
    np.testing.assert_allclose(below, 0.95, atol=1e-3)

    # Keras's own files: a mean, and the noise before calibration scales it.
    [output] = wedge.manifest.calibration.outputs.values()
    assert isinstance(output.fit, Noise)
    assert output.fit.std is None
    assert "column 1" in wedge.manifest.training["network_output"]
    plain = np.asarray(keras.models.load_model(wedge.folder / "model.keras", compile=False)(x, training=False))
    point = signatures["serving_default"](features=tf.constant(x))["mean"].numpy()
    np.testing.assert_allclose(plain[:, 0], point, atol=1e-5)
    np.testing.assert_allclose(plain[:, 1] * output.fit.scale, answer["aleatoric_std"], rtol=0.3)


@pytest.fixture(scope="module")
def together(wedge, tmp_path_factory):
    """The same with rates that are learned, as an ensemble, beside nets without dropout."""
    folder = tmp_path_factory.mktemp("together")
    request = plan(
        str(wedge.folder.parent.parent / "wedge.csv"),
        target="y",
        repository=folder,
        seed=0,
        num_samples=30,
        epochs=40,
        hidden_dropout=0.1,
        heteroscedastic=True,
        ensemble=2,
        concrete=True,
        compare=True,
    )
    return train(request, Reporter(quiet=True))


def test_members_of_an_ensemble_each_learn_the_noise(together):
    signatures = tf.saved_model.load(str(together.folder)).signatures
    x = np.array([[0.1], [0.5], [0.9]], np.float32)
    scalars = {"num_samples": tf.constant(30), "seed": tf.constant(0, tf.int64)}
    drawn = {name: value.numpy() for name, value in signatures["mc_draws"](features=tf.constant(x), **scalars).items()}
    answer = {name: value.numpy() for name, value in signatures["mc_predict"](features=tf.constant(x)).items()}
    assert together.manifest.members == 2
    # Draw t is member t mod 2's, each of which has seen that the noise grows.
    for member in range(2):
        own = drawn["aleatoric_draws"][:, member::2].mean(axis=1)
        assert (np.diff(own) > 0.1).all()
    squares = (drawn["aleatoric_draws"].astype(float) ** 2).mean(axis=1)
    np.testing.assert_allclose(answer["aleatoric_std"], np.sqrt(squares), rtol=1e-4)
    np.testing.assert_allclose(answer["aleatoric_std"], 0.1 + x[:, 0], rtol=0.4)
    np.testing.assert_allclose(answer["mean"], drawn["draws"].mean(axis=1), atol=1e-5)
    model = keras.models.load_model(together.folder / "model.keras", compile=False)
    alone = [np.asarray(one(x, training=False)) for one in single_networks(model, 2)]
    point = signatures["serving_default"](features=tf.constant(x))["mean"].numpy()
    np.testing.assert_allclose(point, np.mean(alone, axis=0)[:, 0], atol=1e-5)


def test_rates_are_learned_with_the_noise_and_set_beside_nets_without(together):
    assert together.manifest.training["concrete"]
    assert together.manifest.training["hidden_dropout"] != 0.1
    assert together.variants[1].name == "baseline"
    assert together.variants[1].metrics["rmse"] > 0


def test_its_loss_is_the_papers():
    random = np.random.default_rng(1)
    y, mean, std = random.normal(size=40), random.normal(size=40), random.uniform(0.2, 3, 40)
    found = BetaNll()(y.astype(np.float32), np.stack([mean, std], axis=1).astype(np.float32))
    constant = 0.5 * np.log(2 * np.pi)
    expected = (std * (-norm.logpdf(y, mean, std) - constant)).mean()
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_classes_have_no_noise(tmp_path):
    with pytest.raises(NoNoise, match="wanted a regression"):
        plan("sonar", repository=tmp_path, seed=0, num_samples=20, heteroscedastic=True)
