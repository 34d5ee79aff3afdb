"""`dropserve evaluate` of rows whose sequences were padded: places without a class (-1) are in no figure."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from models.artifact import publish
from models.contract import read_manifest
from models.holdout import Holdout, HoldoutError, KnownRows
from models.package import package
from tests.models.artifacts import Artifact
from tests.models.networks import places_net, tiny_net
from tests.process import ROOT
from training import artifact_answers, assessment_summary, held_out
from training.artifact_answers import Artifact as Answering
from training.assessment import assess
from training.bootstrap import intervals
from training.judged import Judged

CLASSES, ROWS = 3, 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    random, net = np.random.default_rng(0), places_net(CLASSES, (6, 2))
    x = random.normal(size=(80, 6, 2)).astype(np.float32)
    logs = 0.3 * np.log(np.asarray(net(x, training=False)))
    holdout = KnownRows({"x": x}, [(logs + random.gumbel(size=logs.shape)).argmax(axis=-1)])
    publish(net, name="net", repository=folder, num_samples=40, holdout=holdout)
    return folder


def padded(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of 0 to 6 places; behind them are values that the network knows nothing of."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(ROWS, 6, 2)).astype(np.float32)
    y = random.integers(0, CLASSES, (ROWS, 6))
    lengths = random.integers(1, 7, ROWS)
    lengths[:2] = 0
    behind = np.arange(6) >= lengths[:, None]
    x[behind] = 50
    y[behind] = -1
    return x, y


def judged(folder: Path, x: np.ndarray, y: np.ndarray, **strangers) -> tuple[held_out.HeldOut, Judged]:
    np.savez(folder / "rows.npz", x=x, y=y)
    manifest = read_manifest(folder / "net" / "1")
    held = held_out.read(str(folder / "rows.npz"), manifest)
    [found] = assess(Answering(folder / "net" / "1", manifest), held, strangers)
    return held, found


def accuracy(right: np.ndarray, known: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    return {"accuracy": right[rows].sum() / known[rows].sum()}


def test_places_without_a_class_are_in_no_figure(folder):
    x, y = padded()
    held, found = judged(folder, x, y)
    manifest, known, count = read_manifest(folder / "net" / "1"), y >= 0, int((y >= 0).sum())
    document = assessment_summary.document(manifest, held, [found])
    assert document["places"] == {"shape": [6], "judged": 6, "left_out": y.size - count}
    artifact = Artifact(folder / "net" / "1")
    for kind, name in (("deterministic", "serving_default"), ("mc_calibrated", "mc_predict")):
        p = artifact.answer(name, x)["probabilities"].astype(np.float64)[known]
        p /= p.sum(axis=1, keepdims=True)
        figures = document["answers"][kind]
        assert figures["accuracy"] == pytest.approx(accuracy_score(y[known], p.argmax(axis=1)))
        assert figures["nll"] == pytest.approx(log_loss(y[known], p), rel=1e-5)
        assert figures["brier"] == pytest.approx(np.square(p - np.eye(CLASSES)[y[known]]).sum(axis=1).mean(), rel=1e-5)
        assert sum(figures["reliability_curve"]["places"]) == count
        right = known & (artifact.answer(name, x)["probabilities"].argmax(axis=-1) == y)
        oracle = intervals(partial(accuracy, right[2:], known[2:]), ROWS - 2)
        assert found.intervals[kind]["accuracy"] == pytest.approx(oracle["accuracy"])
    by_class = {label: group["places"] for label, group in document["by_class"].items()}
    assert by_class == {str(number): int((y == number).sum()) for number in range(CLASSES)}


def test_what_stands_at_such_places_changes_nothing(folder):
    """The network answers each place by itself."""
    x, y = padded()
    others = np.where((y < 0)[..., None], -7, x).astype(np.float32)
    _, first = judged(folder, x, y)
    _, second = judged(folder, others, y)
    assert first.figures.keys() == second.figures.keys()
    for kind, figures in first.figures.items():
        assert second.figures[kind] == pytest.approx(figures, abs=1e-6)


def test_rows_unlike_these_are_told_by_the_places_with_a_class(folder):
    x, y = padded()
    far = (20 * np.random.default_rng(2).normal(size=(30, 6, 2))).astype(np.float32)
    _, found = judged(folder, x, y, far={"x": far})
    artifact, known = Artifact(folder / "net" / "1"), (y >= 0)[2:]
    own = artifact.answer("mc_predict", x)["mutual_information"][2:]
    own = (own * known).sum(axis=1) / known.sum(axis=1)
    strange = artifact.answer("mc_predict", far)["mutual_information"].mean(axis=1)
    auroc = roc_auc_score(np.repeat([0, 1], [ROWS - 2, 30]), np.concatenate([own, strange]))
    assert found.outliers["far"]["mutual_information"]["auroc"] == pytest.approx(auroc, abs=1e-3)
    assert "of rows unlike these all places count: nobody says which of them were padded" in found.notes


def test_of_places_at_random_some_have_a_class(folder, monkeypatch):
    """One place of fifty rows, where only the last one has a class."""
    monkeypatch.setattr(artifact_answers, "JUDGED_PLACES", ROWS)
    x, y = padded()
    y[:, :5] = -1
    _, found = judged(folder, x, y)
    assert found.places is not None
    assert found.places.judged.tolist() == [5]
    assert found.places.left_out == int((y[:, 5] < 0).sum())


def test_the_command_says_how_many_are_left_out(folder, tmp_path):
    x, y = padded()
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    command = [sys.executable, str(ROOT / "dropserve.py"), "evaluate", "net", str(tmp_path / "rows.npz")]
    done = subprocess.run(
        [*command, "--repository", str(folder)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    said = f"300 in all, of which {int((y < 0).sum())} have no class (y is -1) and are left out"
    assert said in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-2, r"y: -2 found in row 3, whole numbers from 0 to 2 wanted, or -1 for a place that has none$"),
        (3, r"y: 3 found in row 3, .* wanted, or -1 for a place that has none$"),
        (-1.5, r"y: -1.5 found in row 3"),
    ],
)
def test_other_numbers_are_refused_as_before(folder, value, said):
    x, y = padded()
    y = y.astype(type(value))
    y[3, 0] = value
    with pytest.raises(HoldoutError, match=said):
        judged(folder, x, y)


def test_rows_without_any_class_are_refused(folder):
    x, y = padded()
    with pytest.raises(HoldoutError, match="y: -1 found at every place, a class at one of them wanted"):
        judged(folder, x, np.full_like(y, -1))


def test_where_a_row_has_one_class_and_where_rows_calibrate_it_is_refused(folder, tmp_path):
    tiny = read_manifest(publish(tiny_net(), name="tiny", repository=tmp_path))
    np.savez(tmp_path / "tiny.npz", x=np.zeros((20, 4), np.float32), y=np.full(20, -1))
    wanted = r"y: -1 found in row 0, whole numbers from 0 to 2 wanted$"
    with pytest.raises(HoldoutError, match=wanted):
        held_out.read(str(tmp_path / "tiny.npz"), tiny)
    x, y = padded()
    np.savez(tmp_path / "places.npz", x=x, y=y)
    manifest = read_manifest(folder / "net" / "1")
    with pytest.raises(HoldoutError, match=wanted):
        Holdout.read(tmp_path / "places.npz").matched(manifest.inputs, manifest.outputs)
    places_net(CLASSES, (6, 2)).save(tmp_path / "net.keras")
    with pytest.raises(HoldoutError, match=wanted):
        package(tmp_path / "net.keras", name="net", repository=tmp_path, calibration=tmp_path / "places.npz")
