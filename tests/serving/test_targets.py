"""A calibrated regression of several numbers a row, as a server answers it by every protocol."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet
import pytest

from loadtest.answers import AnswerError, Memory
from models.artifact import publish
from models.holdout import KnownRows
from tests.models.artifacts import Artifact
from tests.models.networks import targets_net
from tests.process import ROOT, bentoml_serve

ROWS = 60
X = np.random.default_rng(5).normal(size=(7, 4)).round(3).astype(np.float32)
STATISTICS = ("mean", "epistemic_std", "aleatoric_std", "std", "standard_error")
ENDS = ("lower", "upper")


@dataclass(frozen=True)
class Served:
    """`targets`, three numbers a row, and a model for each of them alone, from the same weights and rows."""

    artifact: Artifact
    repository: Path
    http: httpx.Client


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("targets")
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 4)).astype(np.float32)
    y = np.asarray(targets_net()(x, training=False)) + random.normal(size=(ROWS, 3)) * [0.5, 3.0, 0.02]
    folder = publish(targets_net(), name="targets", repository=repository, holdout=KnownRows({"x": x}, [y]))
    for place in range(3):
        rows = KnownRows({"x": x}, [y[:, place]])
        publish(targets_net([place]), name=f"alone-{place}", repository=repository, holdout=rows)
    log = tmp_path_factory.mktemp("targets-log") / "log"
    with (
        bentoml_serve(repository, log, DROPSERVE_MODEL="targets") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield Served(Artifact(folder), repository, client)


def asked(served: Served, **settings: object) -> dict:
    return served.http.post("/uncertainty", json={"instances": X.tolist(), **settings}).raise_for_status().json()


def inferred(served: Served, model: str, coverage: float) -> dict[str, dict]:
    """Open Inference's outputs by name."""
    tensor = {"name": "x", "shape": list(X.shape), "datatype": "FP32", "data": X.ravel().tolist()}
    body = {"inputs": [tensor], "parameters": {"coverage": coverage}}
    content = served.http.post(f"/v2/models/{model}/infer", json=body).raise_for_status().json()
    return {item["name"]: item for item in content["outputs"]}


@pytest.mark.parametrize("settings", [{}, {"coverage": 0.6, "num_samples": 50, "seed": 4}], ids=["own", "asked"])
def test_the_answer_is_the_signature_s_with_intervals_of_each_number(served, settings):
    answer = asked(served, **settings)
    assert "warnings" not in answer
    arrays = served.artifact.sample(X, settings.get("num_samples", 100), settings.get("seed", 0))
    assert served.artifact.manifest.calibration is not None
    scores = served.artifact.manifest.calibration.outputs["targets"].conformal
    assert scores is not None
    coverage = settings.get("coverage", 0.9)
    reach = np.array(scores.thresholds(coverage)) * arrays["std"]
    for row, found in enumerate(answer["predictions"]):
        assert set(found) == {*STATISTICS, "interval", "novelty", "num_samples", "converged"}
        for name in STATISTICS:
            assert found[name] == pytest.approx(arrays[name][row].tolist(), rel=1e-5, abs=1e-5)
        interval = found["interval"]
        assert list(interval) == ["lower", "upper", "coverage"]
        assert interval["coverage"] == coverage
        for end, sign in (("lower", -1), ("upper", 1)):
            assert interval[end] == pytest.approx(arrays["mean"][row] + sign * reach[row], rel=1e-5, abs=1e-5)


def test_each_number_is_answered_as_by_a_model_of_its_own(served):
    together = inferred(served, "targets", coverage=0.8)
    for place in range(3):
        alone = inferred(served, f"alone-{place}", coverage=0.8)
        assert together.keys() == alone.keys() - {"abstain"}
        for name in together.keys() - {"novelty"}:
            found = np.reshape(together[name]["data"], (len(X), 3))[:, place]
            np.testing.assert_allclose(found, alone[name]["data"], rtol=2e-4, atol=2e-4, err_msg=name)


def test_intervals_without_ends_are_null_and_warned_of_once(served):
    answer = asked(served, coverage=0.99)
    wanted = {"lower": [None] * 3, "upper": [None] * 3, "coverage": 0.99}
    assert all(row["interval"] == wanted for row in answer["predictions"])
    assert answer["warnings"] == ["coverage 0.99: 99 calibration rows wanted, there are 60; intervals have no ends"]


@pytest.mark.parametrize("coverage", [0.9, 0.6, 0.99])
def test_v2_and_v1_answer_with_the_same_ends(served, coverage):
    native = asked(served, coverage=coverage)["predictions"]
    found = inferred(served, "targets", coverage)
    for end in ENDS:
        item = found[f"interval_{end}"]
        assert (item["shape"], item["datatype"]) == ([len(X), 3], "FP32")
        assert item["data"] == [value for row in native for value in row["interval"][end]]
    if coverage == 0.9:
        body = {"signature_name": "mc_predict", "inputs": {"x": X.tolist()}}
        outputs = served.http.post("/v1/models/targets:predict", json=body).raise_for_status().json()["outputs"]
        for end in ENDS:
            np.testing.assert_allclose(outputs[f"interval_{end}"], [row["interval"][end] for row in native], rtol=1e-5)


def test_the_document_says_what_the_answers_have(served):
    operation = served.http.get("/openapi.json").json()["paths"]["/uncertainty"]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    row = schema["properties"]["predictions"]["items"]
    answer = asked(served)
    assert set(answer["predictions"][0]) == set(row["properties"])
    assert set(row["required"]) >= {*STATISTICS, "interval", "novelty"}
    for end in ENDS:
        found = row["properties"]["interval"]["properties"][end]
        assert (found["type"], found["minItems"], found["maxItems"]) == ("array", 3, 3)
        assert found["items"]["type"] == ["number", "null"]


@pytest.mark.parametrize("coverage", [0.9, 0.99])
def test_the_load_test_takes_the_answers_and_sees_a_wrong_one(served, coverage):
    answer = asked(served, coverage=coverage)
    rows = list(range(len(X)))
    Memory().check_uncertainty(json.dumps(answer).encode(), rows, 100, 0)
    answer["predictions"][2]["interval"]["lower"][1] = 1e6
    with pytest.raises(AnswerError, match=r"wanted the mean in it|one end"):
        Memory().check_uncertainty(json.dumps(answer).encode(), rows, 100, 0)
    answer["predictions"][2]["interval"]["lower"] = [0.0]
    with pytest.raises(AnswerError, match="wanted the same places"):
        Memory().check_uncertainty(json.dumps(answer).encode(), rows, 100, 0)


def test_scoring_has_a_column_for_each_number_s_ends(served, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"x": X.tolist()}), tmp_path / "in.parquet")
    asked_for = ["--model", "targets", "--coverage", "0.6", "--repository", str(served.repository)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "dropserve.py"), "score", "in.parquet", "out.parquet", *asked_for],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scored = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert "abstain" not in scored.column_names
    native = asked(served, coverage=0.6)["predictions"]
    for place in range(3):
        for end in ENDS:
            wanted = [row["interval"][end][place] for row in native]
            np.testing.assert_allclose(scored[f"interval_{end}_{place}"].to_numpy(), wanted, rtol=1e-5, atol=1e-6)
