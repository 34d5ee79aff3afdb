"""Calibration inside an artifact: the graph answers what the manifest says."""

import keras
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import norm

from models.artifact import publish
from models.calibration_settings import CalibrationSettings
from models.contract import Noise, Temperature
from models.findings import sentences
from models.holdout import KnownRows
from tests.models import networks, oracle
from tests.models.artifacts import Artifact

ROWS = 300


def tiny_rows(count: int = ROWS, seed: int = 0) -> KnownRows:
    """Rows for `networks.tiny_net`, of classes that its answers overstate: a temperature above 1 is right."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 4)).astype(np.float32)
    logits = np.log(np.asarray(networks.tiny_net()(x, training=False))) / 2.5
    return KnownRows({"x": x}, [np.array([random.choice(3, p=row) for row in softmax(logits.astype(float), axis=1)])])


@pytest.fixture(scope="module")
def plain(repository) -> Artifact:
    return Artifact(publish(networks.tiny_net(), name="plain", repository=repository))


@pytest.fixture(scope="module", params=["lac", "aps", "class"])
def calibrated(repository, request) -> Artifact:
    return Artifact(
        publish(
            networks.tiny_net(),
            name=f"calibrated-{request.param}",
            repository=repository,
            holdout=tiny_rows(),
            calibration_settings=CalibrationSettings(sets=request.param),
        )
    )


def known(artifact: Artifact):
    assert artifact.manifest.calibration is not None
    [found] = artifact.manifest.calibration.outputs.values()
    return found


def test_draws_are_tempered_and_every_statistic_follows_from_them(calibrated, plain):
    fit = known(calibrated).fit
    assert isinstance(fit, Temperature)
    assert fit.value > 1.2
    assert fit.nll_after < fit.nll_before
    x = np.random.default_rng(5).normal(size=(7, 4)).astype(np.float32)
    draws = calibrated.draws(x, 100)
    expected = softmax(np.log(plain.draws(x, 100).astype(np.float64)) / fit.value, axis=-1)
    np.testing.assert_allclose(draws, expected, atol=1e-6)
    found, own = calibrated.answer("mc_predict", x), oracle.statistics(draws)
    np.testing.assert_allclose(found["probabilities"], draws.mean(axis=1), atol=2e-6)
    np.testing.assert_allclose(found["std"], draws.std(axis=1, ddof=1), atol=1e-5)
    for name in ("predictive_entropy", "mutual_information"):
        np.testing.assert_allclose(found[name], own[name], atol=2e-6)
    same = plain.answer("serving_default", x)["probabilities"]
    np.testing.assert_array_equal(calibrated.answer("serving_default", x)["probabilities"], same)


def test_sets_and_abstention_are_what_the_manifest_says(calibrated):
    learned, x = known(calibrated), np.random.default_rng(6).normal(size=(400, 4)).astype(np.float32)
    thresholds = learned.conformal.thresholds(0.9)
    for answer in (calibrated.answer("mc_predict", x), calibrated.sample(x, 100), calibrated.adaptive(x, 0.02, 300)):
        p = answer["probabilities"]
        scores = 1 - p
        if learned.conformal.kind == "aps":
            scores = ((p[:, None, :] >= p[:, :, None]) * p[:, None, :]).sum(axis=2)
        clear = np.abs(scores - thresholds) > 1e-6
        np.testing.assert_array_equal(answer["prediction_set"][clear], (scores <= thresholds)[clear])
        np.testing.assert_array_equal(answer["abstain"], p.max(axis=1) < np.float32(learned.abstention.threshold))
    assert 0.01 < answer["abstain"].mean() < 0.2


def test_figures_are_those_of_the_served_answers_to_the_calibration_rows(calibrated):
    rows, learned = tiny_rows(), known(calibrated)
    answer = calibrated.answer("mc_predict", rows.inputs["x"])
    given = ~answer["abstain"]
    right = answer["probabilities"].argmax(axis=1) == rows.targets[0]
    assert calibrated.manifest.calibration.rows == ROWS
    assert learned.abstention.answered_share == pytest.approx(0.95, abs=0.01)
    assert learned.abstention.answered_share == pytest.approx(given.mean())
    assert learned.abstention.error == pytest.approx(1 - right[given].mean())
    assert learned.reference.abstention_share == pytest.approx(1 - given.mean())
    for name in ("predictive_entropy", "mutual_information"):
        quantiles = np.quantile(answer[name], np.linspace(0, 1, 11))
        np.testing.assert_allclose(getattr(learned.reference, name), quantiles, atol=1e-5)
    # The rows themselves are covered as their rank says, or a little more often.
    covered = answer["prediction_set"][np.arange(ROWS), rows.targets[0]]
    assert covered.mean() >= 0.9


def test_a_row_is_answered_alike_alone_and_among_others(calibrated):
    x = np.random.default_rng(8).normal(size=(40, 4)).astype(np.float32)
    together = calibrated.sample(x, 60, 3)
    for rows in ([7], [3, 1, 30]):
        for name, values in calibrated.sample(x[rows], 60, 3).items():
            np.testing.assert_allclose(values.astype(float), together[name][rows].astype(float), atol=1e-6)


def test_with_too_few_rows_everything_stays_off_and_says_so(repository):
    few = Artifact(publish(networks.tiny_net(), name="few", repository=repository, holdout=tiny_rows(5)))
    learned = known(few)
    assert learned.fit.value == 1.0
    assert len(learned.warnings) == 2
    assert few.sample(np.zeros((3, 4), np.float32), 30)["prediction_set"].all()


@pytest.fixture(scope="module")
def regression(repository) -> Artifact:
    """`networks.regression_net` on targets that are its own answers with a noise of 0.5."""
    inputs, random = branch_rows(ROWS), np.random.default_rng(3)
    truth = np.asarray(networks.regression_net()([inputs["left"], inputs["right"]], training=False))[:, 0]
    rows = KnownRows(inputs, [truth + random.normal(0, 0.5, ROWS)])
    return Artifact(publish(networks.regression_net(), name="noisy", repository=repository, holdout=rows))


def branch_rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(count, size)).astype(np.float32) for name, size in (("left", 3), ("right", 2))}


def test_a_regressions_noise_adds_to_the_draws_variance(regression):
    learned, x = known(regression), branch_rows(50, seed=1)
    assert isinstance(learned.fit, Noise)
    assert learned.fit.std == pytest.approx(0.5, abs=0.1)
    assert regression.manifest.outputs[0].has_aleatoric
    draws = regression.draws(x, 100)
    for answer in (regression.answer("mc_predict", x), regression.sample(x, 100)):
        np.testing.assert_allclose(answer["epistemic_std"], draws.std(axis=1, ddof=1), atol=1e-5)
        np.testing.assert_allclose(answer["aleatoric_std"], np.full(50, learned.fit.std), rtol=1e-6)
        np.testing.assert_allclose(answer["std"], np.hypot(answer["epistemic_std"], answer["aleatoric_std"]), rtol=1e-5)
        for level, name in ((0.05, "lower"), (0.95, "upper")):
            below = norm.cdf(answer[name][:, None], draws, learned.fit.std).mean(axis=1)
            np.testing.assert_allclose(below, level, atol=1e-4)
    assert np.isinf(regression.sample(x, 5)["lower"]).all()
    assert regression.sample({name: values[:0] for name, values in x.items()}, 30)["lower"].shape == (0,)


def test_a_regressions_interval_and_abstention_are_what_the_manifest_says(regression):
    learned, x = known(regression), branch_rows(400, seed=2)
    [threshold] = learned.conformal.thresholds(0.9)
    for answer in (regression.answer("mc_predict", x), regression.adaptive(x, 0.02, 500)):
        reach = threshold * answer["std"]
        np.testing.assert_allclose(answer["interval_lower"], answer["mean"] - reach, atol=1e-5)
        np.testing.assert_allclose(answer["interval_upper"], answer["mean"] + reach, atol=1e-5)
        np.testing.assert_array_equal(answer["abstain"], answer["std"] > np.float32(learned.abstention.threshold))
    assert learned.reference.epistemic_std is not None
    assert learned.abstention.answered_share == pytest.approx(0.95, abs=0.01)


def test_the_coverage_asked_at_packaging_is_the_signatures_own(repository):
    net, settings = networks.tiny_net(), CalibrationSettings(coverage=0.625)
    folder = publish(net, name="narrow", repository=repository, holdout=tiny_rows(), calibration_settings=settings)
    artifact = Artifact(folder)
    assert artifact.manifest.calibration is not None
    assert artifact.manifest.calibration.coverage == 0.625
    assert any("at a coverage of 62.5%" in line for line in sentences(artifact.manifest.calibration))
    x, y = tiny_rows(2000, seed=7).inputs["x"], tiny_rows(2000, seed=7).targets[0]
    found = artifact.answer("mc_predict", x)
    [threshold] = known(artifact).conformal.thresholds(0.625)
    scores = 1 - found["probabilities"]
    clear = np.abs(scores - threshold) > 1e-6
    np.testing.assert_array_equal(found["prediction_set"][clear], (scores <= threshold)[clear])
    # Of 300 calibration rows, the share of 2000 others: three standard deviations of its law.
    assert found["prediction_set"][np.arange(2000), y].mean() == pytest.approx(0.625, abs=0.09)


def test_features_that_are_not_finite_cost_the_novelty_and_nothing_else(repository):
    """The logarithm of 0 and the root of -1, read behind the first dropout, of which 0 is made."""
    rows = tiny_rows()
    values = np.abs(rows.inputs["x"])
    values[::50, 0] = 0
    known_rows = KnownRows({"x": values}, rows.targets)
    finite = np.maximum(values, 1e-3)

    def published(name, *, inputs, holdout, made=keras.ops.log):
        x = keras.Input([4], name="x")
        behind = keras.layers.Add()([keras.layers.Dropout(0.3)(x), made(x)])
        answer = keras.layers.Dense(3, "softmax")(keras.ops.nan_to_num(behind, neginf=0.0))
        network = keras.Model(x, answer)
        return Artifact(
            publish(network, name=name, repository=repository, holdout=holdout, training_inputs={"x": inputs})
        )

    without = published("log", inputs=values, holdout=known_rows)
    found = known(without)
    assert [text for text in sentences(without.manifest.calibration) if "novelty" in text] == [
        "warning: no novelty: some rows have features, before the first stochastic layer, that are not finite"
    ]
    assert found.fit is not None
    assert found.conformal is not None
    assert found.abstention is not None
    assert found.reference.novelty is None
    assert "novelty" not in without.answer("mc_predict", values)
    # A row that is infinitely far from known ones has a finite distance.
    with_novelty = published("log-known", inputs=finite, holdout=known_rows)
    assert known(with_novelty).reference.novelty is not None
    assert np.isfinite(with_novelty.answer("mc_predict", values)["novelty"]).all()
    # One that has no distance is among the calibration rows only.
    negative = KnownRows({"x": np.where(values == 0, -1, values).astype(np.float32)}, rows.targets)
    assert known(published("root", inputs=finite, holdout=negative, made=keras.ops.sqrt)).reference.novelty is None
