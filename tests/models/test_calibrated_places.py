"""Calibration of models that answer with a class, or a number, for each place of a row."""

import numpy as np
import pytest
from scipy.special import softmax

from models import calibration, temperature
from models.artifact import publish
from models.calibration_settings import CalibrationSettings, SettingsError
from models.contract import OutputCalibration, Temperature
from models.findings import sentences
from models.holdout import Holdout, KnownRows, PlacesError
from models.package import package
from tests.models import networks
from tests.models.artifacts import Artifact

ROWS = 60
# Units, shape of the network's input, activation, shape of a row.
NETS = {
    "sequence": (4, (6, 3), "softmax", (6, 3)),
    "map": (3, (5, 4, 2), "softmax", (5, 4, 2)),
    "yes or no": (1, (6, 3), "sigmoid", (6, 3)),
    "free": (4, (None, 3), "softmax", (7, 3)),
}


def overstated(net, shape: tuple[int, ...]) -> KnownRows:
    """Rows whose classes the network's answers overstate by 2.5."""
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, *shape)).astype(np.float32)
    found = np.asarray(net(x, training=False), np.float64)
    found = np.concatenate([1 - found, found], axis=-1) if found.shape[-1] == 1 else found
    p = softmax(np.log(found) / 2.5, axis=-1)
    chosen = (random.random((*p.shape[:-1], 1)) > p.cumsum(axis=-1)[..., :-1]).sum(axis=-1)
    return KnownRows({"x": x}, [chosen])


def known(artifact: Artifact) -> OutputCalibration:
    assert artifact.manifest.calibration is not None
    [found] = artifact.manifest.calibration.outputs.values()
    return found


@pytest.mark.parametrize("name", NETS)
def test_one_temperature_is_fitted_to_all_places_and_no_more_is_promised(name, repository):
    units, given, activation, shape = NETS[name]
    net = networks.places_net(units, given, activation)
    rows = overstated(net, shape)
    plain = Artifact(publish(net, name="plain-places", repository=repository))
    tempered = Artifact(publish(net, name="tempered-places", repository=repository, holdout=rows))
    learned, fit, calibrated = known(tempered), known(tempered).fit, tempered.manifest.calibration
    assert calibrated is not None
    assert isinstance(fit, Temperature)
    assert fit.value > 1.3
    assert fit.nll_after < fit.nll_before
    assert learned.conformal is None
    assert learned.abstention is None
    assert learned.reference.predictive_entropy is None
    output = tempered.manifest.outputs[0]
    assert learned.warnings == [
        f"neither prediction sets nor abstention: a row has several classes (shape {output.shape})"
    ]
    assert any(f"temperature {fit.value:.3g}" in line for line in sentences(calibrated))
    x = np.random.default_rng(5).normal(size=(3, *shape)).astype(np.float32)
    draws = tempered.draws(x, 100)
    expected = softmax(np.log(plain.draws(x, 100).astype(np.float64)) / fit.value, axis=-1)
    np.testing.assert_allclose(draws, expected, atol=2e-6)
    answer = tempered.answer("mc_predict", x)
    np.testing.assert_allclose(answer["probabilities"], draws.mean(axis=1), atol=2e-6)
    assert {"prediction_set", "abstain"}.isdisjoint(answer)
    # The figures are of the served answers to all places.
    served = plain.answer("mc_predict", rows.inputs["x"])["probabilities"]
    chosen = np.take_along_axis(served, rows.targets[0][..., None], axis=-1)
    assert fit.nll_before == pytest.approx(-np.log(chosen).mean(), rel=1e-5)


def test_of_many_places_some_are_enough(repository, monkeypatch):
    net = networks.places_net(3, (5, 4, 2))
    monkeypatch.setattr(temperature, "MOST_NUMBERS", 10 * 100 * 7 * 3)
    some = Artifact(publish(net, name="some-places", repository=repository, holdout=overstated(net, (5, 4, 2))))
    fit = known(some).fit
    assert isinstance(fit, Temperature)
    assert fit.value > 1.1
    # Draws of a row larger than what one call may return.
    monkeypatch.setattr(calibration, "MOST_NUMBERS", 5_999)
    off = known(Artifact(publish(net, name="wide", repository=repository, holdout=overstated(net, (5, 4, 2)))))
    assert off.fit is None
    assert off.warnings[1:] == ["temperature stays off: 100 draws of a row are 6,000 numbers, at most 5,999 wanted"]


@pytest.mark.parametrize("asked", [{"max_error": 0.1}, {"cost_ratio": 5.0}])
def test_what_is_promised_of_one_class_a_row_is_refused(asked, repository):
    net = networks.places_net(4)
    settings = CalibrationSettings(**asked)
    with pytest.raises(SettingsError, match="only for one class a row"):
        publish(net, name="bold", repository=repository, holdout=overstated(net, (6, 3)), calibration_settings=settings)
    assert not (repository / "bold").exists()


@pytest.mark.parametrize(("units", "activation"), [(4, "softmax"), (1, "linear")])
def test_answers_of_another_count_of_places_are_refused(units, activation, repository, tmp_path):
    net = networks.places_net(units, (None, 3), activation)
    net.save(tmp_path / "net.keras")
    np.savez(tmp_path / "rows.npz", x=np.zeros((20, 7, 3), np.float32), y=np.zeros((20, 6), int))
    with pytest.raises(PlacesError, match=r"output 'answer': shape \(20, 6\) found, \(20, 7\) wanted"):
        package(tmp_path / "net.keras", name="short", repository=repository, calibration=tmp_path / "rows.npz")
    assert not (repository / "short").exists()


def test_answers_of_all_places_are_read_as_numbers_names_or_one_hot(tmp_path):
    manifest = Artifact(publish(networks.places_net(4), name="net", repository=tmp_path, labels=list("abcd"))).manifest
    wanted = np.random.default_rng(0).integers(0, 4, (20, 6))
    for y in (wanted, np.array(list("abcd"))[wanted], np.eye(4)[wanted], wanted[..., None]):
        np.savez(tmp_path / "rows.npz", x=np.zeros((20, 6, 3), np.float32), y=y)
        rows = Holdout.read(tmp_path / "rows.npz").matched(manifest.inputs, manifest.outputs)
        np.testing.assert_array_equal(rows.targets[0], wanted)
