"""A SavedModel in a session: which form of `mc_predict` answers how many rows, and that all of them answer alike."""

from pathlib import Path

import numpy as np
import pytest

from models.artifact import publish
from serving.graph import Graph
from tests.models.artifacts import Artifact
from tests.models.networks import regression_net, scatter, sonar_net, tiny_net


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    rows = np.random.default_rng(1).normal(size=(50, 60)).astype("float32")
    return publish(scatter(sonar_net(rows)), name="sonar", repository=tmp_path_factory.mktemp("graph"))


def test_each_number_of_rows_has_its_form_and_the_signatures_answers(folder):
    artifact, graph = Artifact(folder), Graph(folder)
    ends = sorted(artifact.forms)
    assert len(ends) == 2
    last = ends[-1][1]
    assert graph.form_rows == [least for least, _ in ends]
    rows = np.random.default_rng(2).normal(size=(3 * last + 1, 60)).astype("float32")
    for count in (0, 1, ends[0][1], ends[1][0], last, last + 1, 2 * last, 3 * last + 1):
        expected = artifact.answer("mc_predict", rows[:count])
        found = graph.run("mc_predict", {"features": rows[:count]})
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_allclose(found[name], values, atol=5e-6, rtol=2e-5, err_msg=f"{name} of {count}")


def test_rows_beyond_the_only_form_are_the_signatures(tmp_path):
    """A network without a layer that could hold masks: its chunk is as large as ever."""
    folder = publish(regression_net(), name="one-form", repository=tmp_path)
    artifact, graph = Artifact(folder), Graph(folder)
    [(_, most)] = artifact.forms
    assert graph.form_rows == [1, most + 1]
    random = np.random.default_rng(4)
    for count in (0, 1, most, most + 1):
        rows = {
            item.name: random.normal(size=(count, *(size or 1 for size in item.shape))).astype(item.dtype)
            for item in artifact.manifest.inputs
        }
        found = graph.run("mc_predict", rows)
        for name, values in artifact.answer("mc_predict", rows).items():
            np.testing.assert_allclose(found[name], values, atol=5e-6, rtol=2e-5, err_msg=f"{name} of {count}")


def test_an_artifact_without_forms_answers_by_its_signature(tmp_path, monkeypatch):
    monkeypatch.setattr("models.engine.Engine.forms", lambda engine: [])
    folder = publish(tiny_net(), name="older", repository=tmp_path)
    artifact, graph = Artifact(folder), Graph(folder)
    assert (artifact.forms, graph.form_rows) == ({}, [])
    rows = np.random.default_rng(3).normal(size=(9, 4)).astype("float32")
    found = graph.run("mc_predict", {artifact.manifest.inputs[0].name: rows})
    for name, values in artifact.answer("mc_predict", rows).items():
        np.testing.assert_allclose(found[name], values, atol=2e-6, err_msg=name)


def test_forms_are_made_for_who_calls_mc_predict_only(folder):
    assert Graph(folder, ["serving_default"]).form_rows == []
