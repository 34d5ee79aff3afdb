"""The Open Inference Protocol of a real server, over real sockets: raw requests, and Triton's own client."""

import json
import struct

import httpx
import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

INFER = "/v2/models/sonar/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"


def tensor(rows: np.ndarray, **changes: object) -> dict:
    return {"name": "features", "shape": list(rows.shape), "datatype": "FP32", "data": rows.tolist(), **changes}


def body(rows: np.ndarray, **members: object) -> dict:
    return {"inputs": [tensor(rows)], **members}


def outputs(answer: httpx.Response) -> dict[str, np.ndarray]:
    assert answer.status_code == 200, answer.text
    return {
        output["name"]: np.array(output["data"], np.float32).reshape(output["shape"])
        for output in answer.json()["outputs"]
    }


def binary_post(client, head: dict, tail: bytes, length: int | str | None = None) -> httpx.Response:
    raw = json.dumps(head).encode()
    headers = {
        "content-type": "application/octet-stream",
        HEADER_LENGTH: str(len(raw) if length is None else length),
    }
    return client.post(INFER, content=raw + tail, headers=headers)


@pytest.fixture
def triton(server):
    with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as connection:
        yield connection


def triton_input(rows: np.ndarray, binary: bool) -> list[tritonclient.http.InferInput]:
    given = tritonclient.http.InferInput("features", list(rows.shape), "FP32")
    given.set_data_from_numpy(rows, binary_data=binary)
    return [given]


def test_server_health_and_model_metadata(client):
    server = client.get("/v2").json()
    assert server["name"] == "dropserve"
    assert server["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/sonar").json() == {
        "name": "sonar",
        "versions": ["1"],
        "platform": "tensorflow_savedmodel",
        "inputs": [{"name": "features", "datatype": "FP32", "shape": [-1, 60]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}],
    }
    assert client.get("/v2/models/sonar/versions/1").json() == client.get("/v2/models/sonar").json()
    assert client.get("/v2/models/sonar/ready").json() == {"name": "sonar", "ready": True}


@pytest.mark.parametrize("found", [1, ["a"], {"a": 1}, 2**65])
def test_an_id_that_is_no_text_is_refused(client, trained, found):
    answer = client.post(INFER, content=json.dumps(body(trained.rows[:1]) | {"id": found}).encode())
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("id: found ")


def test_infer_equals_the_trained_network_nested_or_flat(client, trained):
    rows = trained.rows[:5]
    nested = client.post(INFER, json=body(rows, id="42"))
    flat = client.post(f"{INFER}", json={"id": "42", "inputs": [tensor(rows, data=rows.ravel().tolist())]})
    assert nested.json() == flat.json()
    content = nested.json()
    assert (content["model_name"], content["model_version"], content["id"]) == ("sonar", "1", "42")
    assert content["outputs"][0]["datatype"] == "FP32"
    rock = trained.model.predict(rows, verbose=0)[:, 0]
    np.testing.assert_allclose(outputs(nested)["probabilities"][:, 1], rock, atol=1e-6)
    versioned = client.post("/v2/models/sonar/versions/1/infer", json=body(rows, id="42"))
    assert versioned.json() == content


def test_uncertainty_through_parameters_equals_the_native_endpoint(client, trained):
    rows = trained.rows[:6]
    settings = {"num_samples": 64, "seed": 7}
    native = client.post("/uncertainty", json={"instances": rows.tolist(), **settings}).json()["predictions"]
    answer = client.post(INFER, json=body(rows, parameters={"signature": "mc_sample", **settings}))
    assert answer.json()["parameters"] == {"signature": "mc_sample", **settings}
    found = outputs(answer)
    for row, expected in enumerate(native):
        for name in ("probabilities", "std", "standard_error"):
            wanted = [expected[name][label] for label in ("mine", "rock")]
            np.testing.assert_allclose(found[name][row], wanted, atol=1e-6)
        assert found["mutual_information"][row] == pytest.approx(expected["mutual_information"], abs=1e-6)
    # Who names draws wants uncertainty.
    assert outputs(client.post(INFER, json=body(rows, parameters=settings))).keys() == found.keys()


def test_the_draws_have_the_mean_and_deviation_that_mc_sample_reports(client, trained):
    rows = trained.rows[:4]
    settings = {"num_samples": 50, "seed": 3}
    draws = outputs(client.post(INFER, json=body(rows, parameters={"signature": "mc_draws", **settings})))["draws"]
    sample = outputs(client.post(INFER, json=body(rows, parameters={"signature": "mc_sample", **settings})))
    assert draws.shape == (4, 50, 2)
    np.testing.assert_allclose(draws.mean(axis=1), sample["probabilities"], atol=1e-6)
    np.testing.assert_allclose(draws.std(axis=1, ddof=1), sample["std"], atol=1e-5)


def test_outputs_have_the_manifest_s_order(client, trained):
    wanted = [item.name for item in trained.manifest.signatures["mc_predict"].outputs]
    body = {"inputs": [tensor(trained.rows[:1])], "parameters": {"signature": "mc_predict"}}
    found = client.post(INFER, json=body).raise_for_status().json()["outputs"]
    assert [output["name"] for output in found] == wanted
    body = {"instances": trained.instances[:1], "signature_name": "mc_predict"}
    rows = client.post("/v1/models/sonar:predict", json=body).raise_for_status().json()["predictions"]
    assert list(rows[0]) == wanted


def test_only_the_outputs_asked_for_are_returned(client, trained):
    wanted = [{"name": "mutual_information"}, {"name": "std"}]
    answer = client.post(INFER, json=body(trained.rows[:2], outputs=wanted, parameters={"signature": "mc_predict"}))
    assert list(outputs(answer)) == ["mutual_information", "std"]


def test_an_optional_member_that_is_null_is_one_that_is_not_there(client, trained):
    rows = trained.rows[:2]
    plain = client.post(INFER, json=body(rows)).raise_for_status().json()
    nulls = {"signature": None, "num_samples": None, "seed": None, "coverage": None, "binary_data_output": None}
    empty = client.post(INFER, json=body(rows, id=None, outputs=None, parameters=nulls))
    assert empty.raise_for_status().json() == plain
    wanted = [{"name": "probabilities", "parameters": {"binary_data": None}}]
    assert client.post(INFER, json=body(rows, outputs=wanted)).raise_for_status().json() == plain
    raw = rows.astype("<f4").tobytes()
    given = tensor(rows, data=None, parameters={"binary_data_size": len(raw)})
    assert binary_post(client, {"inputs": [given]}, raw).raise_for_status().json() == plain


def test_the_binary_extension_both_ways(client, trained):
    rows = trained.rows[:3]
    raw = rows.astype("<f4").tobytes()
    given = {k: v for k, v in tensor(rows, parameters={"binary_data_size": len(raw)}).items() if k != "data"}
    as_json = client.post(INFER, json=body(rows, parameters={"num_samples": 20}))
    in_binary = binary_post(client, {"inputs": [given], "parameters": {"num_samples": 20}}, raw)
    assert in_binary.json() == as_json.json()

    head = {
        "inputs": [given],
        "parameters": {"num_samples": 20, "binary_data_output": True},
        "outputs": [{"name": "std"}, {"name": "probabilities", "parameters": {"binary_data": False}}],
    }
    answer = binary_post(client, head, raw)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[HEADER_LENGTH])
    std, probabilities = json.loads(answer.content[:length])["outputs"]
    assert std["parameters"] == {"binary_data_size": len(answer.content) - length}
    assert "data" not in std
    np.testing.assert_array_equal(
        np.frombuffer(answer.content[length:], "<f4").reshape(std["shape"]), outputs(as_json)["std"]
    )
    np.testing.assert_array_equal(
        np.array(probabilities["data"], np.float32), outputs(as_json)["probabilities"].ravel()
    )


def test_triton_s_client_reads_metadata_and_readiness(triton):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("sonar")
    assert triton.is_model_ready("sonar", "1")
    assert not triton.is_model_ready("titanic")
    assert not triton.is_model_ready("sonar", "2")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert triton.get_model_metadata("sonar")["inputs"][0]["shape"] == [-1, 60]


@pytest.mark.parametrize("binary_input", [False, True])
@pytest.mark.parametrize("binary_output", [False, True])
def test_triton_s_client_gets_the_native_answer(triton, client, trained, binary_input, binary_output):
    rows = trained.rows[:8]
    native = client.post("/uncertainty", json={"instances": rows.tolist(), "num_samples": 30, "seed": 5}).json()
    answer = triton.infer(
        "sonar",
        triton_input(rows, binary_input),
        model_version="1",
        request_id="a",
        outputs=[
            tritonclient.http.InferRequestedOutput(name, binary_data=binary_output) for name in ("std", "probabilities")
        ],
        parameters={"signature": "mc_sample", "num_samples": 30, "seed": 5},
    )
    assert answer.get_response()["id"] == "a"
    for name in ("std", "probabilities"):
        wanted = [[row[name][label] for label in ("mine", "rock")] for row in native["predictions"]]
        np.testing.assert_allclose(answer.as_numpy(name), wanted, atol=1e-6)


def test_triton_s_client_reads_a_refusal(triton, trained):
    rows = trained.rows[:2].copy()
    rows[1, 6] = np.nan
    with pytest.raises(InferenceServerException, match='row 1, feature "band_07": found NaN') as refusal:
        triton.infer("sonar", triton_input(rows, True))
    assert refusal.value.status() == "400"


ROW = np.full((1, 60), 0.1, np.float32)
TWO = np.full((2, 60), 0.1, np.float32)


def with_value(value: object) -> list[list[object]]:
    data: list[list[object]] = [list(row) for row in TWO.tolist()]
    data[1][6] = value
    return data


BAD = {
    "no inputs": ({}, ["inputs", "nothing"]),
    "inputs is an object": ({"inputs": {}}, ["inputs", "an object of 0"]),
    "an input is a number": ({"inputs": [1]}, ["inputs"]),
    "no tensors": ({"inputs": []}, ["features", "nothing"]),
    "no name": ({"inputs": [tensor(ROW, name=None)]}, ["name", "null"]),
    "unknown input": ({"inputs": [tensor(ROW), tensor(ROW, name="x")]}, ['"x"', "unknown", "features"]),
    "twice": ({"inputs": [tensor(ROW), tensor(ROW)]}, ["features", "two tensors"]),
    "bytes for numbers": ({"inputs": [tensor(ROW, datatype="BYTES")]}, ["BYTES", "FP32"]),
    "unknown datatype": ({"inputs": [tensor(ROW, datatype="FP33")]}, ["FP33", "FP32"]),
    "too narrow": ({"inputs": [tensor(ROW[:, :59])]}, ["shape [1, 59]", "[any, 60]"]),
    "no rows": ({"inputs": [tensor(ROW[:0])]}, ["shape [0, 60]", "at least one row"]),
    "one axis": ({"inputs": [tensor(ROW[0])]}, ["shape [60]"]),
    "shape of text": ({"inputs": [tensor(ROW, shape="x")]}, ["shape", '"x"']),
    "negative shape": ({"inputs": [tensor(ROW, shape=[-1, 60])]}, ["shape [-1, 60]"]),
    "enormous shape": ({"inputs": [tensor(ROW, shape=[10**15, 60], data=[0.1])]}, ["1 values"]),
    "rows unlike shape": ({"inputs": [tensor(TWO, shape=[3, 60])]}, ["2 rows", "3"]),
    "short flat data": ({"inputs": [tensor(ROW, data=[0.1] * 59)]}, ["59 values", "60"]),
    "ragged data": ({"inputs": [tensor(TWO, data=[[0.1] * 60, [0.1] * 59])]}, ["row 1", "band_60"]),
    "no data": ({"inputs": [tensor(ROW, data=None)]}, ["data", "null"]),
    "a string": ({"inputs": [tensor(TWO, data=with_value("0.5"))]}, ["row 1", "band_07", "0.5"]),
    "a boolean": ({"inputs": [tensor(TWO, data=with_value(True))]}, ["row 1", "band_07", "true"]),
    "null": ({"inputs": [tensor(TWO, data=with_value(None))]}, ["row 1", "band_07", "null"]),
    "NaN": ({"inputs": [tensor(TWO, data=with_value(float("nan")))]}, ["row 1", "band_07", "NaN"]),
    "infinity": ({"inputs": [tensor(TWO, data=with_value(float("inf")))]}, ["row 1", "band_07", "Infinity"]),
    "too large": ({"inputs": [tensor(TWO, data=with_value(1e39))]}, ["row 1", "band_07", "1e+39"]),
    "one draw": (body(ROW, parameters={"num_samples": 1}), ["num_samples", "1", "from 2 to 10000"]),
    "too many draws": (body(ROW, parameters={"num_samples": 10_001}), ["num_samples", "10001", "10000"]),
    "draws of text": (body(ROW, parameters={"num_samples": "9"}), ["num_samples", '"9"']),
    "a true seed": (body(ROW, parameters={"seed": True}), ["seed", "true"]),
    "a large seed": (body(ROW, parameters={"seed": 2**63}), ["seed", "9223372036854775807"]),
    "a tolerance": (body(ROW, parameters={"tolerance": 0.01}), ["tolerance", "0.01", "wanted nothing", "/uncertainty"]),
    "a bound for a tolerance": (
        body(ROW, parameters={"num_samples": 9, "max_samples": 90}),
        ["max_samples", "90", "wanted nothing", "/uncertainty"],
    ),
    "draws without draws": (
        body(ROW, parameters={"num_samples": 9, "signature": "serving_default"}),
        ["num_samples", "9", "serving_default"],
    ),
    "rows x draws": (
        body(np.repeat(ROW, 300, axis=0), parameters={"num_samples": 10_000, "signature": "mc_draws"}),
        ["300 rows x 10000 draws"],
    ),
    "unknown signature": (body(ROW, parameters={"signature": "train"}), ["signature", "train", "mc_sample"]),
    "signature is a list": (body(ROW, parameters={"signature": []}), ["signature", "a list of 0"]),
    "parameters is a list": (body(ROW, parameters=[]), ["parameters", "a list of 0"]),
    "unknown output": (body(ROW, outputs=[{"name": "std"}]), ["std", "probabilities"]),
    "outputs of text": (body(ROW, outputs="std"), ["outputs", "std"]),
    "bytes without a header": (
        {
            "inputs": [
                {**{k: v for k, v in tensor(ROW).items() if k != "data"}, "parameters": {"binary_data_size": 240}}
            ]
        },
        ["binary_data_size", "240", "0"],
    ),
}


@pytest.mark.parametrize(("content", "named"), BAD.values(), ids=BAD)
def test_a_bad_request_is_refused(client, content, named):
    answer = client.post(INFER, content=json.dumps(content), headers={"content-type": "application/json"})
    assert_refused(answer, 400, named)


def assert_refused(answer: httpx.Response, status: int, named: list[str]) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert isinstance(error, str)
    for name in named:
        assert name in error


def binary_tensor(size: object, **changes: object) -> dict:
    given = tensor(ROW, parameters={"binary_data_size": size}, **changes)
    if "data" not in changes:
        del given["data"]
    return {"inputs": [given]}


BAD_BINARY = {
    "short": (binary_tensor(240), ROW.tobytes()[:-1], None, ["binary_data_size", "240", "239"]),
    "long": (binary_tensor(240), ROW.tobytes() + b"x", None, ["1 bytes follow"]),
    "wrong size": (binary_tensor(236), ROW.tobytes()[:236], None, ["236", "240", "FP32"]),
    "negative size": (binary_tensor(-1), ROW.tobytes(), None, ["-1"]),
    "size of text": (binary_tensor("240"), ROW.tobytes(), None, ['"240"']),
    "data too": (binary_tensor(240, data=[1.0]), ROW.tobytes(), None, ["both"]),
    "header over the end": (binary_tensor(240), b"", 10**6, [HEADER_LENGTH, "1000000"]),
    "header of text": (binary_tensor(240), b"", "x", [HEADER_LENGTH]),
    "header too short": (binary_tensor(240), ROW.tobytes(), 5, ["not JSON"]),
    "infinity": (binary_tensor(240), struct.pack("<60f", *[0.1] * 59, float("-inf")), None, ["band_60", "-Infinity"]),
}


@pytest.mark.parametrize(("head", "tail", "length", "named"), BAD_BINARY.values(), ids=BAD_BINARY)
def test_a_bad_binary_request_is_refused(client, head, tail, length, named):
    assert_refused(binary_post(client, head, tail, length), 400, named)


@pytest.mark.parametrize(
    ("method", "path", "status", "named"),
    [
        ("GET", "/v2/models/titanic", 404, ["titanic", "sonar"]),
        ("GET", "/v2/models/sonar/versions/9", 404, ["sonar", "version", "9"]),
        ("GET", f"/v2/models/sonar/versions/{'9' * 5_000}", 404, ["sonar", "version", "9"]),
        ("POST", "/v2/models/titanic/infer", 404, ["titanic"]),
        ("POST", "/v2/models/sonar/versions/x/infer", 404, ["sonar", "version", "x"]),
        ("GET", "/v2/models", 404, ["/v2/models"]),
        ("GET", "/v2/models/sonar/infer", 405, ["POST"]),
        ("POST", "/v2/health/live", 405, ["GET"]),
    ],
)
def test_unknown_paths_models_and_methods_are_refused(client, method, path, status, named):
    assert_refused(client.request(method, path, json={} if method == "POST" else None), status, named)
