"""TensorFlow Serving's gRPC services of a real server, over a real socket, with the generated stubs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow.core.example.example_pb2 import Example
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tests.process import BENTOML_SERVE, ROOT, bentoml_serve, free_port
from tests.serving.samples import samples, total

LIMIT = 2**20


@dataclass(frozen=True)
class Stubs:
    predict: prediction_service_pb2_grpc.PredictionServiceStub
    models: model_service_pb2_grpc.ModelServiceStub
    channel: grpc.Channel
    address: str
    http: httpx.Client


@pytest.fixture(scope="module")
def stubs(trained, tmp_path_factory) -> Iterator[Stubs]:
    log = tmp_path_factory.mktemp("grpc") / "log"
    port = str(free_port())
    address = f"127.0.0.1:{port}"
    with (
        bentoml_serve(trained.repository, log, DROPSERVE_GRPC_PORT=port, DROPSERVE_MAX_BODY_BYTES=str(LIMIT)) as served,
        grpc.insecure_channel(address) as channel,
        httpx.Client(base_url=served.url, timeout=60) as http,
    ):
        yield Stubs(
            prediction_service_pb2_grpc.PredictionServiceStub(channel),
            model_service_pb2_grpc.ModelServiceStub(channel),
            channel,
            address,
            http,
        )


def request(rows: np.ndarray | None, signature: str = "", name: str = "sonar", **inputs: object):
    made = predict_pb2.PredictRequest()
    made.model_spec.name = name
    made.model_spec.signature_name = signature
    if rows is not None:
        made.inputs["features"].CopyFrom(tf.make_tensor_proto(rows))
    for key, value in inputs.items():
        made.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return made


def arrays(response) -> dict[str, np.ndarray]:
    return {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}


def assert_refused(call, status: grpc.StatusCode, *named: str) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        call()
    assert refusal.value.code() is status, refusal.value.details()
    for name in named:
        assert name in refusal.value.details()


def test_predict_equals_the_trained_network(stubs, trained):
    response = stubs.predict.Predict(request(trained.rows[:20]))
    assert (response.model_spec.name, response.model_spec.version.value) == ("sonar", 1)
    assert response.model_spec.signature_name == "serving_default"
    rock = trained.model.predict(trained.rows[:20], verbose=0)[:, 0]
    np.testing.assert_allclose(arrays(response)["probabilities"][:, 1], rock, atol=1e-6)
    # As TensorFlow Serving does, for clients that read the typed list.
    assert len(response.outputs["probabilities"].float_val) == 40


def test_typed_lists_and_tensor_content_give_the_same_answer(stubs, trained):
    rows = trained.rows[:3]
    by_content = request(rows)
    assert by_content.inputs["features"].tensor_content
    typed = request(None)
    tensor = typed.inputs["features"]
    tensor.dtype = tf.float32.as_datatype_enum
    for size in rows.shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.float_val.extend(rows.ravel())
    assert stubs.predict.Predict(typed) == stubs.predict.Predict(by_content)


@pytest.mark.parametrize("seed", [np.int64(2**40 + 3), np.int32(5)])
def test_uncertainty_equals_the_native_endpoint(stubs, trained, seed):
    rows = trained.rows[:6]
    body = {"instances": rows.tolist(), "num_samples": 64, "seed": int(seed)}
    native = stubs.http.post("/uncertainty", json=body).raise_for_status().json()["predictions"]
    found = arrays(stubs.predict.Predict(request(rows, "mc_sample", num_samples=np.int32(64), seed=seed)))
    for row, expected in enumerate(native):
        for name in ("probabilities", "std", "standard_error"):
            wanted = [expected[name][label] for label in ("mine", "rock")]
            np.testing.assert_allclose(found[name][row], wanted, atol=1e-6)
    draws = arrays(stubs.predict.Predict(request(rows, "mc_draws", num_samples=np.int32(64), seed=seed)))["draws"]
    np.testing.assert_allclose(draws.mean(axis=1), found["probabilities"], atol=1e-6)


def test_mc_predict_is_mc_sample_with_the_artifact_s_defaults(stubs, trained):
    rows = trained.rows[:4]
    default = arrays(stubs.predict.Predict(request(rows, "mc_predict")))
    named = arrays(stubs.predict.Predict(request(rows, "mc_sample", num_samples=np.int32(100), seed=np.int64(0))))
    for name, values in named.items():
        np.testing.assert_allclose(default[name], values, atol=1e-6)


def test_output_filter_selects_outputs(stubs, trained):
    asked = request(trained.rows[:1], "mc_predict")
    asked.output_filter.extend(["std", "mutual_information"])
    assert set(stubs.predict.Predict(asked).outputs) == {"std", "mutual_information"}
    asked.output_filter.append("nothing")
    assert_refused(lambda: stubs.predict.Predict(asked), grpc.StatusCode.INVALID_ARGUMENT, "nothing", "std")


def examples(target, rows: np.ndarray, named: bool = False):
    for row in rows:
        example = target.input.example_list.examples.add()
        if named:
            for number, value in enumerate(row, start=1):
                example.features.feature[f"band_{number:02}"].float_list.value.append(value)
        else:
            example.features.feature["features"].float_list.value.extend(row)
    return target


@pytest.mark.parametrize("named", [False, True])
def test_classify_gives_labels_and_scores(stubs, trained, named):
    rows = trained.rows[:5]
    asked = examples(classification_pb2.ClassificationRequest(), rows, named)
    asked.model_spec.name = "sonar"
    response = stubs.predict.Classify(asked)
    native = stubs.http.post("/predict", json={"instances": rows.tolist()}).json()["predictions"]
    for found, expected in zip(response.result.classifications, native, strict=True):
        scores = {entry.label: entry.score for entry in found.classes}
        assert scores == pytest.approx(expected["probabilities"], abs=1e-6)


def test_the_context_belongs_to_every_example(stubs, trained):
    context = Example()
    context.features.feature["features"].float_list.value.extend(trained.rows[0])
    asked = classification_pb2.ClassificationRequest()
    asked.model_spec.name = "sonar"
    asked.input.example_list_with_context.context.CopyFrom(context)
    asked.input.example_list_with_context.examples.add()
    alone = examples(classification_pb2.ClassificationRequest(), trained.rows[:1])
    alone.model_spec.name = "sonar"
    assert stubs.predict.Classify(asked) == stubs.predict.Classify(alone)


def test_regress_of_a_classification_model_is_refused(stubs, trained):
    asked = examples(regression_pb2.RegressionRequest(), trained.rows[:1])
    asked.model_spec.name = "sonar"
    assert_refused(lambda: stubs.predict.Regress(asked), grpc.StatusCode.INVALID_ARGUMENT, "classification", "Classify")


def inferences(rows, *signatures):
    """A MultiInferenceRequest that classifies the rows by each of these signatures of Sonar's."""
    asked = examples(inference_pb2.MultiInferenceRequest(), rows)
    for signature in signatures:
        task = asked.tasks.add(method_name="tensorflow/serving/classify")
        task.model_spec.name = "sonar"
        task.model_spec.signature_name = signature
    return asked


def test_multi_inference_answers_every_task(stubs, trained):
    asked = inferences(trained.rows[:2], "serving_default", "mc_predict")
    response = stubs.predict.MultiInference(asked)
    assert [result.model_spec.signature_name for result in response.results] == ["serving_default", "mc_predict"]
    assert response.results[0].classification_result != response.results[1].classification_result


def test_multi_inference_asks_one_model_and_each_signature_once(stubs, trained):
    asked = inferences(trained.rows[:1], "", "serving_default")
    twice = "Duplicate evaluation of signature: serving_default"
    assert_refused(lambda: stubs.predict.MultiInference(asked), grpc.StatusCode.INVALID_ARGUMENT, twice)
    asked.tasks[1].model_spec.name = "titanic"
    several = "All ModelSpecs in a MultiInferenceRequest must access the same model name."
    assert_refused(lambda: stubs.predict.MultiInference(asked), grpc.StatusCode.INVALID_ARGUMENT, several)


def test_multi_inference_by_another_method_is_refused_as_by_tensorflow_serving(stubs, trained):
    asked = inferences(trained.rows[:1], "serving_default", "mc_predict")
    asked.tasks[1].method_name = "tensorflow/serving/predict"

    def answered() -> float:
        return total(samples(stubs.http), "dropserve_rows_total")

    before = answered()
    assert_refused(
        lambda: stubs.predict.MultiInference(asked),
        grpc.StatusCode.UNIMPLEMENTED,
        "Unsupported signature method_name: tensorflow/serving/predict",
    )
    # Nor has the model worked for the first task.
    assert answered() == before
    # What else is wrong comes first.
    asked.tasks[1].model_spec.signature_name = "x"
    unknown = 'Serving signature name: "x" not found in signature def'
    assert_refused(lambda: stubs.predict.MultiInference(asked), grpc.StatusCode.INVALID_ARGUMENT, unknown)
    asked.tasks[0].model_spec.name = asked.tasks[1].model_spec.name = "titanic"
    assert_refused(lambda: stubs.predict.MultiInference(asked), grpc.StatusCode.NOT_FOUND, "titanic")


def test_metadata_is_the_saved_model_s_own(stubs, trained):
    asked = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    asked.model_spec.name = "sonar"
    response = stubs.predict.GetModelMetadata(asked)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    sample = signatures.signature_def["mc_sample"]
    assert set(sample.inputs) == {"features", "num_samples", "seed"}
    assert [axis.size for axis in sample.inputs["features"].tensor_shape.dim] == [-1, 60]
    assert sample.method_name == "tensorflow/serving/predict"
    asked.metadata_field[0] = "x"
    assert_refused(lambda: stubs.predict.GetModelMetadata(asked), grpc.StatusCode.INVALID_ARGUMENT, "x")


def test_status_and_reload(stubs):
    asked = get_model_status_pb2.GetModelStatusRequest()
    asked.model_spec.name = "sonar"
    (status,) = stubs.models.GetModelStatus(asked).model_version_status
    assert (status.version, status.state, status.status.error_code) == (1, 30, 0)
    asked.model_spec.version.value = 7
    assert_refused(lambda: stubs.models.GetModelStatus(asked), grpc.StatusCode.NOT_FOUND, "7")
    reload = model_management_pb2.ReloadConfigRequest()
    assert_refused(lambda: stubs.models.HandleReloadConfigRequest(reload), grpc.StatusCode.UNIMPLEMENTED)


def test_health_and_reflection(stubs):
    health = health_pb2_grpc.HealthStub(stubs.channel)
    for service in ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(stubs.channel)
    (listed,) = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in listed.list_services_response.service}
    assert {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"} <= names
    # Version 1 of reflection, by its name: the messages are the same.
    newer = stubs.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in sorted(names)]
    again, *described = newer(iter([reflection_pb2.ServerReflectionRequest(list_services=""), *asked]))
    assert again.list_services_response == listed.list_services_response
    # Who describes all that is listed finds all of it.
    assert [bool(answer.file_descriptor_response.file_descriptor_proto) for answer in described] == [True] * len(names)


def test_unknown_models_versions_and_labels(stubs, trained):
    row = trained.rows[:1]
    assert_refused(lambda: stubs.predict.Predict(request(row, name="titanic")), grpc.StatusCode.NOT_FOUND, "titanic")
    assert_refused(lambda: stubs.predict.Predict(request(row, name="")), grpc.StatusCode.INVALID_ARGUMENT, "name")
    asked = request(row)
    asked.model_spec.version.value = 1
    assert stubs.predict.Predict(asked).model_spec.version.value == 1
    asked.model_spec.version.value = 9
    assert_refused(lambda: stubs.predict.Predict(asked), grpc.StatusCode.NOT_FOUND, "9")
    asked.model_spec.version_label = "stable"
    assert_refused(lambda: stubs.predict.Predict(asked), grpc.StatusCode.INVALID_ARGUMENT, "stable")
    asked.model_spec.name = "titanic"
    assert_refused(lambda: stubs.predict.Predict(asked), grpc.StatusCode.INVALID_ARGUMENT, "stable")


TWO = np.full((2, 60), 0.1, np.float32)


def with_value(value: float) -> np.ndarray:
    rows = TWO.copy()
    rows[1, 6] = value
    return rows


def changed(**fields: object):
    """A request whose tensor is not what it says it is."""
    made = request(TWO)
    tensor = made.inputs["features"]
    for name, value in fields.items():
        if name == "rows":
            tensor.tensor_shape.dim[0].size = value
        else:
            setattr(tensor, name, value)
    return made


BAD = {
    "no input": (request(None), ["features", "nothing"]),
    "unknown input": (request(TWO, x=TWO), ['"x"', "unknown"]),
    "draws of serving_default": (request(TWO, num_samples=np.int32(9)), ["num_samples", "unknown"]),
    "doubles": (request(TWO.astype(np.float64)), ["DT_DOUBLE", "DT_FLOAT"]),
    "strings": (request(TWO.astype(str)), ["DT_STRING", "DT_FLOAT"]),
    "unknown type": (changed(dtype=0), ["DT_INVALID", "DT_FLOAT"]),
    "too narrow": (request(TWO[:, :59]), ["shape [2, 59]", "[any, 60]"]),
    "one axis": (request(TWO[0]), ["shape [60]"]),
    "no rows": (request(TWO[:0]), ["at least one row"]),
    "negative shape": (changed(rows=-1), ["shape [-1, 60]"]),
    "more rows than values": (changed(rows=3), ["tensor_content of 480 bytes", "720"]),
    "enormous shape": (changed(rows=2**60), ["tensor_content"]),
    "no values": (changed(tensor_content=b""), ["0 values", "120"]),
    "enormous padding": (changed(rows=2**60, tensor_content=b"", dtype=1), ["0 values"]),
    "NaN": (request(with_value(np.nan)), ['row 1, feature "band_07": found NaN, wanted a finite float32 number']),
    "infinity": (request(with_value(-np.inf)), ['row 1, feature "band_07": found -Infinity']),
    "unknown signature": (request(TWO, "train"), ['Serving signature name: "train" not found in signature def']),
    "no draws": (request(TWO, "mc_sample", seed=np.int64(0)), ["num_samples", "nothing"]),
    "one draw": (request(TWO, "mc_sample", num_samples=np.int32(1), seed=np.int64(0)), ["num_samples", "from 2 to"]),
    "a list of draws": (
        request(TWO, "mc_sample", num_samples=np.array([9], np.int32), seed=0),
        ["num_samples", "shape [1]"],
    ),
    "half a draw": (request(TWO, "mc_sample", num_samples=np.float32(9.5), seed=0), ["num_samples", "DT_FLOAT"]),
    "a large seed": (request(TWO, "mc_draws", num_samples=9, seed=np.uint64(2**63)), ["seed", "9223372036854775807"]),
    "rows x draws": (
        request(np.repeat(TWO, 150, axis=0), "mc_draws", num_samples=10_000, seed=0),
        ["300 rows x 10000 draws"],
    ),
}


@pytest.mark.parametrize(("asked", "named"), BAD.values(), ids=BAD)
def test_a_bad_request_is_refused(stubs, asked, named):
    assert_refused(lambda: stubs.predict.Predict(asked), grpc.StatusCode.INVALID_ARGUMENT, *named)


def test_the_last_value_of_a_short_list_goes_on_within_the_limit(stubs):
    asked = changed(tensor_content=b"")
    asked.inputs["features"].float_val.append(0.1)
    assert stubs.predict.Predict(asked) == stubs.predict.Predict(request(TWO))
    asked.inputs["features"].tensor_shape.dim[0].size = 2**60
    assert_refused(lambda: stubs.predict.Predict(asked), grpc.StatusCode.INVALID_ARGUMENT, "1 values")


def test_an_example_with_a_missing_feature_is_refused(stubs, trained):
    asked = examples(classification_pb2.ClassificationRequest(), trained.rows[:2], named=True)
    asked.model_spec.name = "sonar"
    del asked.input.example_list.examples[1].features.feature["band_33"]
    assert_refused(lambda: stubs.predict.Classify(asked), grpc.StatusCode.INVALID_ARGUMENT, "row 1", "band_33")


def test_a_message_over_the_limit_is_refused(stubs):
    assert_refused(
        lambda: stubs.predict.Predict(request(np.zeros((5000, 60), np.float32))), grpc.StatusCode.RESOURCE_EXHAUSTED
    )


def test_the_caller_s_deadline_holds(stubs):
    long = request(np.repeat(TWO, 100, axis=0), "mc_sample", num_samples=np.int32(10_000), seed=np.int64(1))
    assert_refused(lambda: stubs.predict.Predict(long, timeout=0.01), grpc.StatusCode.DEADLINE_EXCEEDED)
    assert stubs.predict.Predict(request(TWO)).outputs


def test_a_port_that_is_taken_ends_the_start_with_one_line(stubs, trained):
    port = stubs.address.rpartition(":")[2]
    ran = subprocess.run(
        [sys.executable, *BENTOML_SERVE, "--host", "127.0.0.1", "--port", str(free_port())],
        cwd=ROOT,
        env={**os.environ, "DROPSERVE_REPOSITORY": str(trained.repository), "DROPSERVE_GRPC_PORT": port},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2, ran.stdout + ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith("dropserve cannot start: ")]
    assert lines == [
        f"dropserve cannot start: cannot listen on 127.0.0.1:{port} for gRPC (Address already in use); "
        "choose another DROPSERVE_GRPC_PORT, or 0 for none"
    ]
