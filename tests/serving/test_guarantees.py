"""What a trained artifact promises, held against what its server answers: the same rows, the same draws, over HTTP."""

import math
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from models.contract import ConformalScores, OutputCalibration, read_manifest
from serving.prediction_sets import prediction_set
from tests.process import bentoml_serve, free_port
from training.datasets import load
from training.pipeline import train
from training.plan import plan
from training.progress import Reporter
from training.splits import split

# Scores are kept in steps of this, one step up.
STEP = 1e-6
LABELS = ("mine", "rock")
COVERAGES = (0.5, 0.8, 0.9, 0.95)


@pytest.fixture(scope="module")
def known(trained) -> OutputCalibration:
    return trained.manifest.calibrated(trained.manifest.outputs[0])


@pytest.fixture(scope="module")
def scores(known) -> ConformalScores:
    assert known.conformal is not None
    return known.conformal


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Numbers of the calibration rows."""
    data = load("sonar")
    return split(data.y, data.task).calibration


@pytest.fixture(scope="module")
def truth(rows) -> list[str]:
    return [LABELS[index] for index in load("sonar").y[rows]]


def asked(client: httpx.Client, instances: list, **settings: object) -> list[dict]:
    body = {"instances": instances, **settings}
    return client.post("/uncertainty", json=body).raise_for_status().json()["predictions"]


def test_the_manifest_s_scores_are_those_of_the_served_answers(client, trained, rows, truth, scores):
    """Each row asked alone, with no setting at all: as a user would."""
    answers = [asked(client, trained.rows[[row]].tolist())[0] for row in rows]
    found = np.sort([1 - answer["probabilities"][label] for answer, label in zip(answers, truth, strict=True)])
    [kept] = scores.scores
    above = np.array(kept) - found
    assert above.min() > 0
    assert above.max() < 2 * STEP


@pytest.mark.parametrize("coverage", COVERAGES)
def test_of_the_calibration_rows_as_many_are_in_their_own_set_as_the_rank_says(
    client, trained, rows, truth, scores, coverage
):
    answers = asked(client, trained.rows[rows].tolist(), coverage=coverage)
    held = sum(label in answer["prediction_set"] for answer, label in zip(answers, truth, strict=True))
    rank = math.ceil(round((len(rows) + 1) * coverage, 9))
    # More only where several rows have the threshold's own score.
    [threshold] = scores.thresholds(coverage)
    assert held == sum(score <= threshold + STEP for score in scores.scores[0]) >= rank


def test_the_graph_s_own_sets_are_those_of_the_manifest_s_scores(client, trained, scores, known):
    """All 208 rows, in another precision than the graph's only where JSON's digits are."""
    answers = asked(client, trained.instances)
    found = np.array([[answer["probabilities"][label] for label in LABELS] for answer in answers], np.float32)
    members = prediction_set("lac", found, np.array(scores.thresholds(0.9), np.float32))
    assert [answer["prediction_set"] for answer in answers] == [
        [label for label, inside in zip(LABELS, row, strict=True) if inside] for row in members
    ]
    assert [answer["abstain"] for answer in answers] == (found.max(axis=1) < known.abstention.threshold).tolist()


def test_the_share_that_is_withheld_of_the_calibration_rows_is_the_reference(client, trained, rows, known):
    withheld = [answer["abstain"] for answer in asked(client, trained.rows[rows].tolist())]
    assert np.mean(withheld) == pytest.approx(known.reference.abstention_share)
    assert 1 - np.mean(withheld) == pytest.approx(known.abstention.answered_share)


def test_every_protocol_gives_the_same_sets_as_truth_values(trained, tmp_path):
    port = free_port()
    instances = trained.instances[:20]
    with (
        bentoml_serve(trained.repository, tmp_path / "log", DROPSERVE_GRPC_PORT=str(port)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        native = asked(client, instances)
        members = [[label in answer["prediction_set"] for label in LABELS] for answer in native]
        withheld = [answer["abstain"] for answer in native]

        body: dict[str, object] = {"signature_name": "mc_predict", "inputs": {"features": instances}}
        columns = client.post("/v1/models/sonar:predict", json=body).raise_for_status().json()["outputs"]
        assert columns["prediction_set"] == members
        assert columns["abstain"] == withheld
        body = {"signature_name": "mc_predict", "instances": instances}
        by_row = client.post("/v1/models/sonar:predict", json=body).raise_for_status().json()["predictions"]
        assert [row["prediction_set"] for row in by_row] == members
        assert [row["abstain"] for row in by_row] == withheld
        named = [feature.name for feature in trained.manifest.inputs[0].features]
        examples = [dict(zip(named, row, strict=True)) for row in instances]
        body = {"signature_name": "mc_predict", "examples": examples}
        classified = client.post("/v1/models/sonar:classify", json=body).raise_for_status().json()["results"]
        assert [[label for label, _ in row] for row in classified] == [list(LABELS)] * 20

        tensor = {"name": "features", "shape": [20, 60], "datatype": "FP32", "data": instances}
        body = {"inputs": [tensor], "parameters": {"signature": "mc_predict"}}
        content = client.post("/v2/models/sonar/infer", json=body).raise_for_status().json()
        found = {tensor["name"]: tensor for tensor in content["outputs"]}
        assert found["prediction_set"]["datatype"] == found["abstain"]["datatype"] == "BOOL"
        assert found["prediction_set"]["data"] == [inside for row in members for inside in row]
        assert found["abstain"]["data"] == withheld

        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = "sonar", "mc_predict"
        request.inputs["features"].CopyFrom(tf.make_tensor_proto(trained.rows[:20]))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            outputs = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request).outputs
        for name, values in (("prediction_set", members), ("abstain", withheld)):
            assert outputs[name].dtype == tf.bool.as_datatype_enum
            assert tf.make_ndarray(outputs[name]).tolist() == values


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory) -> Path:
    repository = tmp_path_factory.mktemp("diabetes")
    return train(
        plan("diabetes", repository=repository, seed=0, num_samples=100, epochs=30), Reporter(quiet=True)
    ).folder


def test_a_regression_s_scores_and_intervals_are_those_of_the_served_answers(diabetes, tmp_path):
    manifest = read_manifest(diabetes)
    known = manifest.calibrated(manifest.outputs[0])
    assert known is not None
    assert known.conformal is not None
    assert known.abstention is not None
    data = load("diabetes")
    rows = split(data.y, data.task).calibration
    with (
        bentoml_serve(diabetes.parents[1], tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        answers = [asked(client, data.x[[row]].tolist())[0] for row in rows]
        scores = sorted(
            abs(y - answer["mean"]) / answer["std"] for y, answer in zip(data.y[rows].tolist(), answers, strict=True)
        )
        [kept] = known.conformal.scores
        np.testing.assert_allclose(kept, scores, atol=3 * STEP, rtol=1e-5)
        for coverage in (None, *COVERAGES):
            settings = {} if coverage is None else {"coverage": coverage}
            inside = 0
            [threshold] = known.conformal.thresholds(coverage or 0.9)
            for y, answer in zip(data.y[rows].tolist(), asked(client, data.x[rows].tolist(), **settings), strict=True):
                interval = answer["interval"]
                reach = threshold * answer["std"]
                ends = {"lower": answer["mean"] - reach, "upper": answer["mean"] + reach, "coverage": coverage or 0.9}
                # float32 numbers of hundreds, whose difference may be near 0.
                assert interval == pytest.approx(ends, rel=1e-5, abs=1e-4)
                inside += interval["lower"] <= y <= interval["upper"]
            assert inside == math.ceil(round((len(rows) + 1) * (coverage or 0.9), 9))
        for answer in answers:
            assert answer["std"] == pytest.approx(
                math.hypot(answer["epistemic_std"], answer["aleatoric_std"]), rel=1e-5
            )
            assert answer["abstain"] == (answer["std"] > known.abstention.threshold)
