"""A model with a class for each place of a row, as a server answers it by every protocol."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import keras
import numpy as np
import pytest
import schemathesis
import tensorflow as tf
from tensorflow.core.example.example_pb2 import Example
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from models.artifact import publish
from models.holdout import KnownRows
from tests.models.artifacts import Artifact
from tests.models.networks import places_net, scatter
from tests.process import ROOT, bentoml_serve, free_port
from tests.serving.samples import samples, total
from tests.serving.versions import wait_for

LABELS = ["noun", "verb", "name", "other"]
X = np.random.default_rng(0).normal(size=(5, 6, 3)).round(3).astype(np.float32)
DRAWN = {"num_samples": 40, "seed": 7}
BY_LABEL = ("probabilities", "std", "standard_error")
BY_PLACE = ("predictive_entropy", "expected_entropy", "mutual_information")


@dataclass(frozen=True)
class Tagger:
    """A served model of six places with four classes each, calibrated; another version is its shadow."""

    net: keras.Model
    artifact: Artifact
    shadow: Artifact
    url: str
    grpc_address: str
    http: httpx.Client
    stub: prediction_service_pb2_grpc.PredictionServiceStub


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Iterator[Tagger]:
    repository = tmp_path_factory.mktemp("places")
    random, net = np.random.default_rng(1), places_net(4)
    known = {"x": random.normal(size=(60, 6, 3)).astype(np.float32)}
    holdout = KnownRows(known, [random.integers(0, 4, (60, 6))])
    first, second = [
        Artifact(publish(one, name="tagger", repository=repository, labels=LABELS, holdout=holdout))
        for one in (net, scatter(places_net(4), seed=1, scale=2.0))
    ]
    # The second answers for half as many places.
    for step in (1, 2):
        publish(stepped(step), name="stream", repository=repository)
    for name in ("tagger", "stream"):
        routed = ["route", name, "--pin", "1", "--shadow", "2", "--repository", str(repository)]
        subprocess.run([sys.executable, "-m", "dropserve", *routed], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    log, address = tmp_path_factory.mktemp("tagger") / "log", f"127.0.0.1:{free_port()}"
    settings = {"DROPSERVE_MODEL": "tagger", "DROPSERVE_GRPC_PORT": address.rpartition(":")[2]}
    with (
        bentoml_serve(repository, log, **settings) as served,  # type: ignore[arg-type]
        httpx.Client(base_url=served.url, timeout=60) as http,
        grpc.insecure_channel(address) as channel,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        yield Tagger(net, first, second, served.url, address, http, stub)


def stepped(step: int) -> keras.Model:
    """It has an answer for every place, or for every second one."""
    inputs = keras.Input((None, 3), name="x")
    return keras.Model(inputs, places_net(4, (None, 3))(keras.layers.AveragePooling1D(step)(inputs)))


def by_label(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """[N, S, K] of native answers."""
    return np.array([[row[name][label] for label in LABELS] for row in rows]).swapaxes(1, 2)


def test_predict_is_keras_s_own_answer(tagger):
    rows = tagger.http.post("/predict", json={"instances": X.tolist()}).raise_for_status().json()["predictions"]
    expected = tagger.net.predict(X, verbose=0)
    np.testing.assert_allclose(by_label(rows, "probabilities"), expected, atol=1e-6)
    assert [row["label"] for row in rows] == np.array(LABELS)[expected.argmax(-1)].tolist()


def test_uncertainty_is_the_signature_s_answer(tagger):
    body = {"instances": X.tolist(), **DRAWN}
    rows = tagger.http.post("/uncertainty", json=body).raise_for_status().json()["predictions"]
    expected = tagger.artifact.sample(X, **DRAWN)
    for name in BY_LABEL:
        np.testing.assert_allclose(by_label(rows, name), expected[name], atol=1e-6)
    for name in (*BY_PLACE, "novelty"):
        np.testing.assert_allclose([row[name] for row in rows], expected[name], atol=1e-5)
    assert [row["label"] for row in rows] == np.array(LABELS)[expected["probabilities"].argmax(-1)].tolist()
    assert {"prediction_set", "abstain"}.isdisjoint(rows[0])


def test_a_coverage_is_not_promised_though_there_were_calibration_rows(tagger):
    answer = tagger.http.post("/uncertainty", json={"instances": X[:1].tolist(), "coverage": 0.9}).json()
    assert answer["warnings"] == ["coverage 0.9: this model has no calibration scores to promise it by"]
    assert "prediction_set" not in answer["predictions"][0]


def test_draws_until_every_place_is_known_to_the_tolerance(tagger):
    body = {"instances": X.tolist(), "tolerance": 0.03, "max_samples": 5_000}
    for row in tagger.http.post("/uncertainty", json=body).raise_for_status().json()["predictions"]:
        assert row["converged"]
        assert np.max(list(row["standard_error"].values())) <= 0.03


def test_the_other_protocols_give_the_same_numbers(tagger):
    expected = tagger.artifact.sample(X, **DRAWN)
    body: dict[str, Any] = {"signature_name": "mc_sample", "inputs": {"x": X.tolist(), **DRAWN}}
    found = tagger.http.post("/v1/models/tagger:predict", json=body).raise_for_status().json()["outputs"]
    assert_same({name: np.array(values) for name, values in found.items()}, expected)

    tensor = {"name": "x", "shape": list(X.shape), "datatype": "FP32", "data": X.ravel().tolist()}
    body = {"inputs": [tensor], "parameters": DRAWN}
    answers = tagger.http.post("/v2/models/tagger/infer", json=body).raise_for_status().json()["outputs"]
    assert_same({one["name"]: np.reshape(one["data"], one["shape"]) for one in answers}, expected)

    request = predict_pb2.PredictRequest(model_spec={"name": "tagger", "signature_name": "mc_sample"})
    given = {"x": X, "num_samples": np.int32(DRAWN["num_samples"]), "seed": np.int64(DRAWN["seed"])}
    for name, value in given.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    outputs = tagger.stub.Predict(request).outputs
    assert_same({name: tf.make_ndarray(one) for name, one in outputs.items()}, expected)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        np.testing.assert_allclose(found[name], values, atol=1e-5)


def examples(request):
    """The rows in a request of Classify or MultiInference."""
    for row in X:
        example = Example()
        example.features.feature["x"].float_list.value.extend(row.ravel().tolist())
        request.input.example_list.examples.append(example)
    return request


SCORES = "Expected Tensor shape: [batch_size num_classes] but got [5,6,4]"


@pytest.mark.parametrize("signature", ["serving_default", "mc_sample"])
def test_classify_is_refused_in_tensorflow_serving_s_words(tagger, signature):
    body = {"signature_name": signature, "examples": [{"x": row.tolist()} for row in X]}
    refused = tagger.http.post("/v1/models/tagger:classify", json=body)
    assert (refused.status_code, refused.json()) == (400, {"error": SCORES})
    spec = {"name": "tagger", "signature_name": signature}
    one = examples(classification_pb2.ClassificationRequest(model_spec=spec))
    several = examples(inference_pb2.MultiInferenceRequest())
    several.tasks.add(model_spec=spec, method_name="tensorflow/serving/classify")
    for call, request in ((tagger.stub.Classify, one), (tagger.stub.MultiInference, several)):
        with pytest.raises(grpc.RpcError) as error:
            call(request)
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, SCORES)


def test_answers_are_as_the_served_document_says(tagger):
    described = schemathesis.openapi.from_url(f"{tagger.url}/openapi.json")
    document = tagger.http.get("/openapi.json").json()
    for path in ("/predict", "/uncertainty"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        for instances in (body["instances"], X.tolist()):
            answer = tagger.http.post(path, json={**body, "instances": instances}).raise_for_status()
            described[path]["POST"].validate_response(answer)


def test_only_what_is_one_number_a_row_is_watched(tagger):
    def count(statistic: str) -> float:
        return total(samples(tagger.http), f"dropserve_{statistic}_count", model="tagger", version="1")

    before = count("novelty")
    tagger.http.post("/uncertainty", json={"instances": X.tolist()}).raise_for_status()
    assert count("novelty") - before == 5
    assert count("predictive_entropy") == count("mutual_information") == 0


def test_a_shadow_agrees_on_a_row_where_it_agrees_on_all_its_places(tagger):
    # The places of a row are alike but for the last one.
    random = np.random.default_rng(3)
    rows = random.normal(size=(400, 1, 3)).repeat(6, axis=1).astype(np.float32)
    rows[:, 5] = random.normal(size=(400, 3))
    ours, theirs = (
        one.answer("serving_default", rows)["probabilities"].argmax(-1) for one in (tagger.artifact, tagger.shadow)
    )
    agreeing, anywhere = int((ours == theirs).all(axis=1).sum()), int((ours == theirs).any(axis=1).sum())
    assert 0 < agreeing < anywhere < 400

    def count(agrees: str) -> float:
        return total(samples(tagger.http), "dropserve_shadow_rows_total", model="tagger", agrees=agrees)

    before = {agrees: count(agrees) for agrees in ("true", "false")}
    tagger.http.post("/predict", json={"instances": rows.tolist()}).raise_for_status()
    wait_for(lambda: sum(count(agrees) - before[agrees] for agrees in before) >= 400, "the comparison")
    assert {agrees: count(agrees) - before[agrees] for agrees in before} == {"true": agreeing, "false": 400 - agreeing}


def test_a_shadow_that_answers_for_other_places_has_failed(tagger):
    body = {"instances": X.tolist()}
    answer = tagger.http.post("/v1/models/stream:predict", json=body).raise_for_status().json()["predictions"]
    assert np.shape(answer) == (5, 6, 4)

    def count(result: str) -> float:
        return total(samples(tagger.http), "dropserve_shadow_requests_total", model="stream", result=result)

    wait_for(lambda: count("failed") > 0, "the comparison")
    assert count("compared") == 0


def test_the_load_test_finds_nothing_wrong(tagger):
    grpc_user = ("--profile", "mixed", "--users", "8", "--grpc", tagger.grpc_address)
    for options in (("--users", "4"), grpc_user):
        command = ["-m", "dropserve", "loadtest", "--host", tagger.url, "--run-time", "4s", "--json", *options]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        verdict = json.loads(done.stdout)
        # Others may be using the machine: how long it took is not this test's.
        assert [error for error, _ in verdict["errors"] if not error.startswith("all: p")] == []
        assert all(kind["requests"] > 0 for kind in verdict["endpoints"])
    assert len(verdict["endpoints"]) == 6
