"""`dropserve evaluate` of models with a class for each place of a row: figures of places, intervals of rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy.special import xlogy
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from models.artifact import publish
from models.contract import Temperature, read_manifest
from models.holdout import KnownRows
from tests.models.artifacts import Artifact
from tests.models.networks import places_net
from training import artifact_answers, assessment_summary, held_out
from training.artifact_answers import Artifact as Answering
from training.assessment import assess
from training.bootstrap import intervals
from training.judged import Judged

CLASSES = 3


def rows_of(net, shape, count, seed):
    """Rows, and classes of their places that are less certain than the network says: it wants a temperature."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, *shape)).astype(np.float32)
    logs = 0.3 * np.log(np.asarray(net(x, training=False)))
    return x, (logs + random.gumbel(size=logs.shape)).argmax(axis=-1)


@dataclass(frozen=True)
class Case:
    """A packaged network with a temperature, and what is found of 50 other rows."""

    artifact: Artifact
    x: np.ndarray
    y: np.ndarray
    held: held_out.HeldOut
    found: Judged
    # As a script sees it.
    document: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.y.shape[1:]


@pytest.fixture(scope="module", params=[(6,), (3, 5)], ids=["sequences", "maps"])
def case(request, tmp_path_factory) -> Case:
    folder, shape = tmp_path_factory.mktemp("places"), request.param
    net = places_net(CLASSES, (*shape, 2))
    known, classes = rows_of(net, (*shape, 2), 80, 1)
    holdout = KnownRows({"x": known}, [classes])
    published = publish(net, name="net", repository=folder, num_samples=40, holdout=holdout)
    x, y = rows_of(net, (*shape, 2), 50, 2)
    np.savez(folder / "rows.npz", x=x, y=y)
    manifest = read_manifest(published)
    held = held_out.read(str(folder / "rows.npz"), manifest)
    [found] = assess(Answering(published, manifest), held, {"far": {"x": far(x)}})
    return Case(Artifact(published), x, y, held, found, assessment_summary.document(manifest, held, [found]))


def far(x: np.ndarray) -> np.ndarray:
    return (20 * x[:30]).astype(np.float32)


def test_figures_are_those_of_all_places(case):
    found, count = case.document, case.y.size
    assert found["places"] == {"shape": list(case.shape), "judged": count // 50, "left_out": 0}
    fit = case.artifact.manifest.calibration.outputs["answer"].fit
    assert isinstance(fit, Temperature)
    assert fit.value != 1
    warm = case.artifact.draws(case.x, 40).astype(np.float64) ** fit.value
    oracles = {
        "deterministic": case.artifact.answer("serving_default", case.x)["probabilities"],
        "mc": (warm / warm.sum(axis=-1, keepdims=True)).mean(axis=1),
        "mc_calibrated": case.artifact.answer("mc_predict", case.x)["probabilities"],
    }
    assert list(found["answers"]) == list(oracles)
    for kind, oracle in oracles.items():
        figures, p = found["answers"][kind], oracle.reshape(-1, CLASSES).astype(np.float64)
        p /= p.sum(axis=1, keepdims=True)
        truth = case.y.reshape(-1)
        assert figures["accuracy"] == pytest.approx(accuracy_score(truth, p.argmax(axis=1)), abs=1e-9)
        assert figures["nll"] == pytest.approx(log_loss(truth, p), rel=1e-5)
        assert figures["brier"] == pytest.approx(np.square(p - np.eye(CLASSES)[truth]).sum(axis=1).mean(), rel=1e-5)
        assert figures["sharpness"] == pytest.approx(-xlogy(p, p).sum(axis=1).mean(), rel=1e-5)
        assert sum(figures["reliability_curve"]["places"]) == count
    by_class = {label: group["places"] for label, group in found["by_class"].items()}
    assert by_class == {str(number): int((case.y == number).sum()) for number in range(CLASSES)}
    assert found["coverage"] == []
    assert found["abstention"] is None


def test_intervals_are_of_other_rows_and_not_of_other_places(case):
    right = case.artifact.answer("mc_predict", case.x)["probabilities"].argmax(axis=-1) == case.y
    oracle = intervals(lambda rows: {"accuracy": float(right[rows].mean())}, 50)
    assert case.found.intervals["mc_calibrated"]["accuracy"] == pytest.approx(oracle["accuracy"])


def test_outliers_are_told_by_the_mean_over_their_places(case):
    own, strange = (
        case.artifact.answer("mc_predict", rows)["mutual_information"].reshape(len(rows), -1).mean(axis=1)
        for rows in (case.x, far(case.x))
    )
    auroc = roc_auc_score(np.repeat([0, 1], [50, 30]), np.concatenate([own, strange]))
    assert case.document["outliers"]["far"]["mutual_information"]["auroc"] == pytest.approx(auroc, abs=1e-3)
    assert case.found.outliers["far"].keys() >= {"predictive_entropy", "novelty"}


def test_it_is_said_that_figures_are_of_places(case):
    each, count = case.y[0].size, case.y.size
    said = (
        f"figures are of places: {each} of each row, {count} in all; intervals are of other rows, not other places, "
        "as the places of a row depend on each other"
    )
    assert said in case.document["notes"]
    assert said in assessment_summary.sentences(case.held, case.found)
    title = assessment_summary.title(case.artifact.manifest, case.held, case.found, several=False)
    shape = " x ".join(map(str, case.shape))
    assert title == f"net 1 on all 50 rows of rows.npz, each of {shape} places; 40 draws, seed 0"
    headings = [table.columns[0].header for table in assessment_summary.tables(case.held, case.found)]
    assert "most doubtful places rejected" in headings


def test_of_large_maps_some_places_are_judged_and_the_words_say_so(tmp_path):
    shape = (64, 64)
    net = places_net(CLASSES, (*shape, 2))
    x, y = rows_of(net, (*shape, 2), 40, 0)
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    folder = publish(net, name="net", repository=tmp_path, num_samples=4)
    manifest = read_manifest(folder)
    held = held_out.read(str(tmp_path / "rows.npz"), manifest)
    answering = Answering(folder, manifest)
    [answers] = answering.answers(held.inputs, held.targets)
    assert answers.places is not None
    most = artifact_answers.JUDGED_PLACES // 40
    assert answers.deterministic.shape == (40, most, CLASSES)
    every = np.asarray(net(x, training=False)).reshape(40, -1, CLASSES)
    np.testing.assert_allclose(answers.deterministic, every[:, answers.places.judged], atol=1e-6)
