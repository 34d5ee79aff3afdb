"""`dropserve evaluate` of an ensemble: each member alone, against its own Keras network and its own draws."""

import keras
import numpy as np
import pytest
from sklearn.metrics import log_loss, root_mean_squared_error

from tests.models.artifacts import Artifact
from training import assessment_summary, held_out
from training.artifact_answers import Artifact as Answering
from training.artifact_answers import temperature, without_temperature
from training.assessment import assess
from training.datasets import load
from training.ensemble import single_networks
from training.pipeline import train
from training.plan import plan
from training.progress import Reporter
from training.splits import split

MEMBERS, DRAWS = 3, 20


def ensemble(data, repository):
    request = plan(data, repository=repository, seed=0, num_samples=DRAWS, epochs=8, ensemble=MEMBERS)
    return train(request, Reporter(quiet=True))


def judged(published, data):
    """What the command prints with --json, the tables as text, and the members' networks."""
    held = held_out.read(data, published.manifest)
    [found] = assess(Answering(published.folder, published.manifest), held)
    tables = [column.header for table in assessment_summary.tables(held, found) for column in table.columns]
    networks = single_networks(keras.models.load_model(published.folder / "model.keras", compile=False), MEMBERS)
    return assessment_summary.document(published.manifest, held, [found]), tables, networks


def test_classes_by_each_member_alone(tmp_path):
    published = ensemble("sonar", tmp_path)
    found, headings, networks = judged(published, "sonar")
    data, artifact = load("sonar"), Artifact(published.folder)
    rows = split(data.y, data.task).test
    x, y = data.x[rows], data.y[rows]
    draws, value = artifact.draws(x, DRAWS * MEMBERS), temperature(published.manifest, published.manifest.outputs[0])
    for number, network in enumerate(networks):
        p = np.asarray(network(x, training=False))[:, 0].astype(np.float64)
        assert found["members"]["deterministic"]["each"][number]["nll"] == pytest.approx(log_loss(y, p), rel=1e-5)
        own = without_temperature(draws[:, number::MEMBERS], value)
        assert own.shape == (len(rows), 2)
        assert found["members"]["mc"]["each"][number]["nll"] == pytest.approx(log_loss(y, own[:, 1]), rel=1e-4)
    for kind in ("deterministic", "mc"):
        each = [figures["nll"] for figures in found["members"][kind]["each"]]
        assert len(set(each)) == MEMBERS
        assert found["members"][kind]["mean"]["nll"] == pytest.approx(np.mean(each))
        # The mean answer is no worse than the mean of the answers: Jensen's inequality, of a convex score.
        assert found["answers"]["deterministic"]["nll"] <= found["members"]["deterministic"]["mean"]["nll"]
    assert {"mean ± std of 3 members", "one, deterministic", "one, mc", "all, deterministic", "all, mc"} <= set(
        headings
    )
    page = (published.folder / "report.html").read_text()
    assert "its 3 members alone" in page
    assert "one, dropout off" in page


def test_a_number_by_each_member_alone(tmp_path):
    published = ensemble("diabetes", tmp_path)
    found, _, networks = judged(published, "diabetes")
    data, artifact = load("diabetes"), Artifact(published.folder)
    rows = split(data.y, data.task).test
    x, y = data.x[rows], data.y[rows].astype(np.float64)
    draws = artifact.draws(x, DRAWS * MEMBERS).astype(np.float64)
    for number, network in enumerate(networks):
        off = root_mean_squared_error(y, np.asarray(network(x, training=False))[:, 0])
        assert found["members"]["deterministic"]["each"][number]["rmse"] == pytest.approx(off, rel=1e-5)
        own = draws[:, number::MEMBERS]
        mean = root_mean_squared_error(y, own.mean(axis=1))
        assert found["members"]["mc"]["each"][number]["rmse"] == pytest.approx(mean, rel=1e-5)
        pairs = np.abs(own[:, :, None] - own[:, None]).mean(axis=(1, 2))
        crps = np.mean(np.abs(own - y[:, None]).mean(axis=1) - pairs / 2)
        assert found["members"]["mc"]["each"][number]["crps"] == pytest.approx(crps, rel=1e-5)


def test_a_single_network_has_no_members(tmp_path):
    request = plan("sonar", repository=tmp_path, seed=0, num_samples=DRAWS, epochs=2)
    published = train(request, Reporter(quiet=True))
    held = held_out.read("sonar", published.manifest)
    [found] = assess(Answering(published.folder, published.manifest), held)
    assert assessment_summary.document(published.manifest, held, [found])["members"] is None
    assert "members alone" not in (published.folder / "report.html").read_text()
