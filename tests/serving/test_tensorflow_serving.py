"""TensorFlow Serving's REST API as its documentation and its sources have it: a table of requests and answers."""

import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

ROW = [0.1] * 60
PREDICT = "/v1/models/sonar:predict"


@pytest.fixture(scope="module")
def expected(trained):
    """TensorFlow's own answer of a signature on the first rows, by output."""
    loaded = tf.saved_model.load(str(trained.folder))

    def answer(signature: str, count: int, **scalars: int) -> dict[str, np.ndarray]:
        arguments = {
            name: tf.constant(value, {"seed": tf.int64}.get(name, tf.int32)) for name, value in scalars.items()
        }
        outputs = loaded.signatures[signature](features=tf.constant(trained.rows[:count]), **arguments)
        return {name: values.numpy() for name, values in outputs.items()}

    return answer


@pytest.mark.parametrize(
    "path", [PREDICT, "/v1/models/sonar/versions/1:predict", "/V1/MODELS/sonar:PREDICT", "/v1/models/%73onar:predict"]
)
def test_row_format(client, trained, expected, path):
    answer = client.post(path, json={"instances": trained.instances[:5]}).raise_for_status().json()
    assert list(answer) == ["predictions"]
    np.testing.assert_allclose(answer["predictions"], expected("serving_default", 5)["probabilities"], atol=1e-6)


def test_row_format_with_named_inputs(client, trained, expected):
    body = {"instances": [{"features": row} for row in trained.instances[:3]]}
    answer = client.post(PREDICT, json=body).json()
    np.testing.assert_allclose(answer["predictions"], expected("serving_default", 3)["probabilities"], atol=1e-6)


def test_row_format_has_an_object_a_row_where_there_are_several_outputs(client, trained, expected):
    answer = client.post(PREDICT, json={"signature_name": "mc_predict", "instances": trained.instances[:3]}).json()
    outputs = expected("mc_predict", 3)
    assert [set(row) for row in answer["predictions"]] == [set(outputs)] * 3
    for index, row in enumerate(answer["predictions"]):
        for name, values in outputs.items():
            np.testing.assert_allclose(row[name], values[index], atol=1e-6)


@pytest.mark.parametrize("named", [False, True])
def test_columnar_format(client, trained, expected, named):
    rows = trained.instances[:4]
    answer = client.post(PREDICT, json={"inputs": {"features": rows, "extra": 1} if named else rows}).json()
    assert list(answer) == ["outputs"]
    np.testing.assert_allclose(answer["outputs"], expected("serving_default", 4)["probabilities"], atol=1e-6)


@pytest.mark.parametrize("signature", ["mc_sample", "mc_draws"])
def test_draws_and_seed_reach_the_signature(client, trained, expected, signature):
    columnar = {"features": trained.instances[:2], "num_samples": 64, "seed": -5}
    answer = client.post(PREDICT, json={"signature_name": signature, "inputs": columnar}).raise_for_status().json()
    outputs = expected(signature, 2, num_samples=64, seed=-5)
    shown = answer["outputs"] if len(outputs) > 1 else {"draws": answer["outputs"]}
    for name, values in outputs.items():
        np.testing.assert_allclose(shown[name], values, atol=1e-6)
    rows = [{"features": row, "num_samples": 64, "seed": -5} for row in trained.instances[:2]]
    by_row = client.post(PREDICT, json={"signature_name": signature, "instances": rows}).raise_for_status().json()
    first = by_row["predictions"][0] if len(outputs) > 1 else {"draws": by_row["predictions"][0]}
    for name, values in outputs.items():
        np.testing.assert_allclose(first[name], values[0], atol=1e-6)


def test_classify(client, trained, expected):
    names = [feature.name for feature in trained.manifest.inputs[0].features]
    examples = [dict(zip(names, row, strict=True)) for row in trained.instances[:3]]
    answer = client.post("/v1/models/sonar:classify", json={"examples": examples}).raise_for_status().json()
    scores = expected("serving_default", 3)["probabilities"]
    assert [[label for label, _ in row] for row in answer["results"]] == [["mine", "rock"]] * 3
    np.testing.assert_allclose([[score for _, score in row] for row in answer["results"]], scores, atol=1e-6)
    # What the examples share may stand in `context`, and a value in a list of one.
    context = {name: examples[0][name] for name in names[:50]}
    rest = {name: [examples[0][name]] for name in names[50:]}
    again = client.post("/v1/models/sonar:classify", json={"context": context, "examples": [rest]}).json()
    np.testing.assert_allclose([score for _, score in again["results"][0]], scores[0], atol=1e-6)


def test_status(client):
    assert client.get("/v1/models/sonar").json() == {
        "model_version_status": [
            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    assert client.get("/v1/models/sonar/versions/1").json() == client.get("/v1/models/sonar").json()


def test_metadata(client):
    answer = client.get("/v1/models/sonar/metadata").raise_for_status().json()
    assert answer["model_spec"] == {"name": "sonar", "signature_name": "", "version": "1"}
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert set(signatures) >= {"serving_default", "mc_predict", "mc_sample", "mc_draws"}
    features = signatures["mc_sample"]["inputs"]["features"]
    assert features["dtype"] == "DT_FLOAT"
    assert features["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}, {"size": "60", "name": ""}],
        "unknown_rank": False,
    }
    assert signatures["mc_sample"]["inputs"]["seed"]["dtype"] == "DT_INT64"
    assert signatures["mc_sample"]["inputs"]["seed"]["tensor_shape"]["dim"] == []
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"
    assert client.get("/v1/models/sonar/versions/1/metadata").json() == answer


REFUSALS: dict[str, tuple[str, str, Any, int, str]] = {
    # Paths and methods.
    "no such path": ("POST", "/v1/models/sonar:explain", {}, 400, "Malformed request: POST /v1/models/sonar:explain"),
    "predict by GET": ("GET", PREDICT, None, 400, f"Malformed request: GET {PREDICT}"),
    "status by POST": ("POST", "/v1/models/sonar", {}, 400, "Malformed request: POST /v1/models/sonar"),
    "delete": ("DELETE", "/v1/models/sonar", None, 400, "Malformed request: DELETE /v1/models/sonar"),
    "no model": ("GET", "/v1/models", None, 400, "Missing model name in request."),
    "unknown model": (
        "POST",
        "/v1/models/titanic:predict",
        {"instances": [ROW]},
        404,
        "Servable not found for request: Latest(titanic)",
    ),
    "unknown version": (
        "POST",
        "/v1/models/sonar/versions/9:predict",
        {"instances": [ROW]},
        404,
        "Servable not found for request: Specific(sonar, 9)",
    ),
    "enormous version": (
        "POST",
        "/v1/models/sonar/versions/99999999999999999999:predict",
        {"instances": [ROW]},
        400,
        "Failed to convert version: 99999999999999999999 to numeric.",
    ),
    "unknown label": (
        "POST",
        "/v1/models/sonar/labels/stable:predict",
        {"instances": [ROW]},
        400,
        "Unrecognized servable version label: stable",
    ),
    "label of an unknown model": (
        "POST",
        "/v1/models/titanic/labels/stable:predict",
        {"instances": [ROW]},
        400,
        "Unrecognized servable version label: stable",
    ),
    "metadata by a label of an unknown model": (
        "GET",
        "/v1/models/titanic/labels/stable/metadata",
        None,
        400,
        "Unrecognized servable version label: stable",
    ),
    "status by a label of an unknown model": (
        "GET",
        "/v1/models/titanic/labels/stable",
        None,
        400,
        "Unrecognized servable version label: stable",
    ),
    "status of an unknown model": (
        "GET",
        "/v1/models/titanic",
        None,
        404,
        "Could not find any versions of model titanic",
    ),
    "status of an unknown version": (
        "GET",
        "/v1/models/sonar/versions/9",
        None,
        404,
        "Could not find version 9 of model sonar",
    ),
    # Bodies.
    "empty body": ("POST", PREDICT, "", 400, "JSON Parse error: The document is empty"),
    "broken JSON": ("POST", PREDICT, '{"instances": [', 400, "JSON Parse error: "),
    "no object": ("POST", PREDICT, [1], 400, "JSON Value: [1] Is not object"),
    "neither key": ("POST", PREDICT, {"rows": [ROW]}, 400, "Missing 'inputs' or 'instances' key"),
    "both keys": (
        "POST",
        PREDICT,
        {"inputs": [], "instances": []},
        400,
        "expecting only one of 'inputs' or 'instances'",
    ),
    "instances no list": ("POST", PREDICT, {"instances": 1}, 400, "Excepting 'instances' to be an list/array"),
    "no instances": ("POST", PREDICT, {"instances": []}, 400, "No values in 'instances' array"),
    "unknown signature": (
        "POST",
        PREDICT,
        {"signature_name": "x", "instances": [ROW]},
        400,
        'Serving signature name: "x" not found in signature def',
    ),
    "signature no string": (
        "POST",
        PREDICT,
        {"signature_name": 1, "instances": [ROW]},
        400,
        "'signature_name' key must be a string value.",
    ),
    "draws beyond int32": (
        "POST",
        PREDICT,
        {"signature_name": "mc_sample", "inputs": {"features": [ROW], "num_samples": 2**31, "seed": 1}},
        400,
        "num_samples: found 2147483648, wanted an integer from 2 to 10000",
    ),
    "plain rows for several inputs": (
        "POST",
        PREDICT,
        {"signature_name": "mc_sample", "instances": [ROW]},
        400,
        "instances is a plain list, but expecting list of objects as multiple input tensors required",
    ),
    "plain column for several inputs": (
        "POST",
        PREDICT,
        {"signature_name": "mc_sample", "inputs": [ROW]},
        400,
        "inputs is a plain value/list, but expecting an object as multiple input tensors required",
    ),
    "missing input": (
        "POST",
        PREDICT,
        {"signature_name": "mc_sample", "inputs": {"features": [ROW], "num_samples": 5}},
        400,
        "Missing named input: seed in 'inputs' object.",
    ),
    "unknown input": (
        "POST",
        PREDICT,
        {"instances": [{"rows": ROW}]},
        400,
        "Failed to process element: 0 key: rows of 'instances' list. "
        "Error: INVALID_ARGUMENT: JSON object: does not have named input: rows",
    ),
    "no input": ("POST", PREDICT, {"instances": [{}]}, 400, "keys must be equal to: features"),
    "object then list": (
        "POST",
        PREDICT,
        {"instances": [{"features": ROW}, ROW]},
        400,
        "Expecting object but got list at item 1 of input list",
    ),
    "list then object": (
        "POST",
        PREDICT,
        {"instances": [ROW, {"features": ROW}]},
        400,
        "Expecting value/list but got object at item 1 of input list",
    ),
    # Values.
    "string": (
        "POST",
        PREDICT,
        {"instances": [ROW, [*ROW[:59], "x"]]},
        400,
        "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
        'JSON Value: "x" Type: String is not of expected type: float',
    ),
    "boolean": (
        "POST",
        PREDICT,
        {"inputs": [[True, *ROW[1:]]]},
        400,
        "JSON Value: true Type: True is not of expected type",
    ),
    "null": (
        "POST",
        PREDICT,
        {"inputs": [[None, *ROW[1:]]]},
        400,
        "JSON Value: null Type: Null is not of expected type",
    ),
    "too large": ("POST", PREDICT, {"inputs": [[1e39, *ROW[1:]]]}, 400, "1e+39 to float without loss of precision."),
    "uneven rows": (
        "POST",
        PREDICT,
        {"inputs": [ROW, ROW[:59]]},
        400,
        "Encountered list at unexpected size: 59 at level: 1",
    ),
    "uneven depth": (
        "POST",
        PREDICT,
        {"inputs": [ROW, 1]},
        400,
        "JSON Value: 1 found at incorrect level: 2 in the JSON DOM",
    ),
    "too deep": ("POST", PREDICT, "".join([*['{"inputs":'], *["["] * 500, *["]"] * 500, "}"]), 400, "nested more than"),
    "short rows": ("POST", PREDICT, {"instances": [ROW[:59]]}, 400, 'input "features": found shape [1, 59]'),
    "no rows": ("POST", PREDICT, {"inputs": []}, 400, "at least one row"),
    "NaN": ("POST", PREDICT, '{"instances": [[NaN' + ", 0.1" * 59 + "]]}", 400, 'row 0, feature "band_01": found NaN'),
    "Infinity": ("POST", PREDICT, '{"inputs": [[-Infinity' + ", 0.1" * 59 + "]]}", 400, "found -Infinity"),
    "too few draws": (
        "POST",
        PREDICT,
        {"signature_name": "mc_sample", "inputs": {"features": [ROW], "num_samples": 1, "seed": 0}},
        400,
        "num_samples: found 1, wanted an integer from 2",
    ),
    "draws of a list": (
        "POST",
        PREDICT,
        {"signature_name": "mc_sample", "inputs": {"features": [ROW], "num_samples": [5], "seed": 0}},
        400,
        "Encountered list at unexpected level: 0 expected < 0",
    ),
    "two seeds": (
        "POST",
        PREDICT,
        {
            "signature_name": "mc_sample",
            "instances": [{"features": ROW, "num_samples": 5, "seed": seed} for seed in (0, 1)],
        },
        400,
        "seed holds for all instances",
    ),
    # Classify and regress.
    "regress by a classifier": (
        "POST",
        "/v1/models/sonar:regress",
        {"examples": [{"band_01": 1}]},
        400,
        "Expected regression signature method_name to be tensorflow/serving/regress. Was: tensorflow/serving/predict",
    ),
    "no examples": ("POST", "/v1/models/sonar:classify", {}, 400, "key 'examples' is expected and was not found"),
    "empty examples": (
        "POST",
        "/v1/models/sonar:classify",
        {"examples": []},
        400,
        "'examples' value is an empty array",
    ),
    "example no object": (
        "POST",
        "/v1/models/sonar:classify",
        {"examples": [ROW]},
        400,
        "Example must be JSON object but got JSON Array",
    ),
    "unknown feature": (
        "POST",
        "/v1/models/sonar:classify",
        {"examples": [{"band_61": 1.0}]},
        400,
        'row 0, feature "band_61": found an unknown feature',
    ),
}


@pytest.mark.parametrize(("method", "path", "body", "status", "error"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(client, method, path, body, status, error):
    content = None if body is None else body if isinstance(body, str) else json.dumps(body)
    answer = client.request(method, path, content=content)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert error in answer.json()["error"]
    assert client.post(PREDICT, json={"instances": [ROW]}).status_code == 200
