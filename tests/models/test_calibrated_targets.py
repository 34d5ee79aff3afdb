"""Calibration of a regression that answers with several numbers a row: each is a target of its own."""

import keras
import numpy as np
import pytest

from models import calibration, conformal
from models.artifact import publish
from models.calibration_settings import CalibrationSettings, SettingsError
from models.contract import ConformalScores, Noise, OutputCalibration, TargetNoises
from models.findings import sentences
from models.holdout import KnownRows
from tests.models.artifacts import Artifact
from tests.models.networks import targets_net

ROWS = 300
# Of the targets' own noise, in units that differ.
NOISES = (0.5, 3.0, 0.02)


def rows_of(targets: list[int], count: int = ROWS, seed: int = 0) -> KnownRows:
    """Rows whose answers are those of `targets_net` with a noise; of one target alone as [N]."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 4)).astype(np.float32)
    truth = np.asarray(targets_net()(x, training=False)) + random.normal(size=(count, 3)) * NOISES
    return KnownRows({"x": x}, [truth[:, targets] if len(targets) > 1 else truth[:, targets[0]]])


def known(artifact: Artifact) -> OutputCalibration:
    assert artifact.manifest.calibration is not None
    [found] = artifact.manifest.calibration.outputs.values()
    return found


def scores(artifact: Artifact) -> ConformalScores:
    found = known(artifact).conformal
    assert found is not None
    return found


@pytest.fixture(scope="module")
def together(repository) -> Artifact:
    return Artifact(publish(targets_net(), name="together", repository=repository, holdout=rows_of([0, 1, 2])))


@pytest.fixture(scope="module")
def alone(repository) -> list[Artifact]:
    """A model for each of the numbers, with the same weights and so the same draws."""
    return [
        Artifact(publish(targets_net([place]), name=f"alone-{place}", repository=repository, holdout=rows_of([place])))
        for place in range(3)
    ]


@pytest.mark.parametrize("signature", ["mc_predict", "mc_sample", "mc_adaptive", "few"])
def test_the_answer_is_that_of_a_model_for_each_number(together, alone, signature):
    x = np.random.default_rng(5).normal(size=(40, 4)).astype(np.float32)

    def answer(artifact: Artifact) -> dict[str, np.ndarray]:
        if signature == "mc_adaptive":
            return artifact.adaptive(x, 1e-9, 150)
        # Of many draws there are several chunks; few have no quantiles.
        draws = {"mc_sample": 2500, "few": 5}.get(signature)
        return artifact.answer(signature, x) if draws is None else artifact.sample(x, draws, 3)

    found, wanted = answer(together), [answer(artifact) for artifact in alone]
    assert found.keys() == wanted[0].keys() - {"abstain"}
    for name in found.keys() - {"novelty", "num_samples", "converged"}:
        assert found[name].shape == (40, 3)
        own = np.stack([one[name] for one in wanted], axis=1)
        np.testing.assert_allclose(found[name], own, rtol=2e-5, atol=2e-5, err_msg=name)


def test_the_manifest_has_each_number_s_noise_and_scores(together, alone):
    learned, fit, output = known(together), known(together).fit, together.manifest.outputs[0]
    assert isinstance(fit, TargetNoises)
    assert (output.shape, output.has_aleatoric) == ([3], True)
    assert [len(own) for own in scores(together).scores] == [ROWS] * 3
    assert learned.abstention is None
    assert learned.reference.epistemic_std is None
    assert learned.warnings[0] == "no abstention: a row has several numbers (shape [3])"
    for place, one in enumerate(alone):
        noise, single = fit.targets[place], known(one).fit
        assert isinstance(single, Noise)
        assert noise.std == pytest.approx(single.std, rel=1e-3)
        assert noise.nll_after == pytest.approx(single.nll_after, rel=1e-3, abs=1e-4)
        np.testing.assert_allclose(scores(together).scores[place], scores(one).scores[0], rtol=2e-3, atol=2e-3)
    # The draws have a spread of their own; the second number's noise is far beyond it.
    assert fit.targets[1].std == pytest.approx(NOISES[1], rel=0.1)
    said = sentences(together.manifest.calibration)
    for place, noise in enumerate(fit.targets):
        assert any(line.startswith(f"number {place}: noise {noise.std:.4g}: NLL") for line in said)
    assert "intervals of each of 3 numbers by itself from 300 rows, at a coverage of 90%" in said


def test_each_number_is_covered_as_often_as_promised_and_all_at_once_less_often(together):
    fresh = rows_of([0, 1, 2], 4000, seed=9)
    answer = together.answer("mc_predict", fresh.inputs["x"])
    thresholds = scores(together).thresholds(0.9)
    for end, sign in (("interval_lower", -1), ("interval_upper", 1)):
        wanted = answer["mean"] + sign * np.array(thresholds) * answer["std"]
        np.testing.assert_allclose(answer[end], wanted, rtol=1e-5, atol=1e-5)
    inside = (fresh.targets[0] >= answer["interval_lower"]) & (fresh.targets[0] <= answer["interval_upper"])
    # Of 300 calibration rows: three deviations of Beta(271, 30).
    assert inside.mean(axis=0) == pytest.approx([0.9] * 3, abs=0.055)
    assert inside.all(axis=1).mean() < 0.85


def test_a_row_is_answered_alike_alone_and_among_others(together):
    x = np.random.default_rng(8).normal(size=(40, 4)).astype(np.float32)
    every = together.sample(x, 60, 3)
    for rows in ([7], [3, 1, 30], []):
        for name, values in together.sample(x[rows], 60, 3).items():
            np.testing.assert_allclose(values, every[name][rows], rtol=1e-5, atol=1e-6)


def test_with_too_few_rows_noise_and_intervals_stay_off_and_it_is_said_once(repository):
    few = Artifact(publish(targets_net(), name="few", repository=repository, holdout=rows_of([0, 1, 2], 5)))
    assert known(few).warnings == [
        "no abstention: a row has several numbers (shape [3])",
        "noise is not known: 5 calibration rows found, 10 wanted at least",
    ]
    assert {"std", "aleatoric_std", "interval_lower"}.isdisjoint(few.sample(np.zeros((3, 4), np.float32), 30))


def test_intervals_without_ends_are_infinite_and_it_is_said_once(repository):
    folder = publish(
        targets_net(),
        name="endless",
        repository=repository,
        holdout=rows_of([0, 1, 2], 30),
        calibration_settings=CalibrationSettings(coverage=0.99),
    )
    endless = Artifact(folder)
    [said] = [text for text in known(endless).warnings if "infinite" in text]
    assert said == "at a coverage of 99% the interval is infinite: 30 calibration rows found, 99 wanted"
    answer = endless.sample(np.zeros((3, 4), np.float32), 30)
    assert (answer["interval_lower"] == -np.inf).all()
    assert (answer["interval_upper"] == np.inf).all()


def test_of_very_many_numbers_none_is_calibrated(repository, monkeypatch):
    monkeypatch.setattr(calibration, "MOST_TARGETS", 2)
    many = Artifact(publish(targets_net(), name="many", repository=repository, holdout=rows_of([0, 1, 2])))
    assert known(many).warnings == [
        "not calibrated: a row has several numbers (shape [3]); at most 2 along one fixed axis wanted"
    ]
    assert not many.manifest.outputs[0].has_aleatoric


def test_numbers_along_several_axes_or_a_free_one_are_not_calibrated_and_the_manifest_says_so(repository):
    hidden = keras.layers.Dropout(0.3)(inputs := keras.Input((None, 4), name="x"))
    free = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    hidden = keras.layers.Dropout(0.3)(inputs := keras.Input((5, 4), name="x"))
    several = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    x = np.random.default_rng(0).normal(size=(30, 5, 4)).astype(np.float32)
    for net, targets in ((free, np.zeros((30, 5))), (several, np.zeros((30, 5, 2)))):
        rows = KnownRows({"x": x}, [targets])
        found = Artifact(publish(net, name="axes", repository=repository, holdout=rows))
        assert "not calibrated: a row has several numbers (shape [" in known(found).warnings[0]
        assert {"std", "aleatoric_std", "abstain", "interval_lower"}.isdisjoint(found.sample(x, 30))


def test_scores_of_many_numbers_are_bounded():
    random = np.random.default_rng(0)
    count = conformal.MOST_ROWS + 5
    means, stds = random.normal(size=(count, 50)), np.ones((count, 50))
    many = conformal.of_values(means, stds, np.zeros((count, 50))).scores
    assert [len(own) for own in many] == [conformal.MOST_SCORES // 50] * 50
    assert len(conformal.of_values(means[:, 0], stds[:, 0], np.zeros(count)).scores[0]) == conformal.MOST_ROWS


def test_promises_of_right_answers_are_refused(repository):
    settings = CalibrationSettings(max_error=0.1)
    with pytest.raises(SettingsError, match="only for classes"):
        publish(
            targets_net(), name="bold", repository=repository, holdout=rows_of([0, 1, 2]), calibration_settings=settings
        )
