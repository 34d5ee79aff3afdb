"""Examples, as TensorFlow Serving's classify takes them: flat lists, without booleans, by REST and by gRPC."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import httpx
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.example.example_pb2 import Example
from tensorflow_serving.apis import classification_pb2, inference_pb2, predict_pb2, prediction_service_pb2_grpc

from models.artifact import publish
from tests.process import bentoml_serve, free_port
from tests.serving.versions import publish_as

PIXELS = np.arange(6, dtype=np.uint8)
PATH = "/v1/models/scenes"


class Server(NamedTuple):
    http: httpx.Client
    grpc: prediction_service_pb2_grpc.PredictionServiceStub


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Of one image and a truth value a row; all that names no version goes to the canary, version 2."""
    image = keras.Input((2, 3, 1), dtype="uint8", name="image")
    seen = keras.Input((1,), dtype="bool", name="seen")
    pixels = keras.layers.Flatten()(keras.ops.cast(image, "float32"))
    features = keras.layers.Concatenate()([pixels, keras.ops.cast(seen, "float32")])
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(8, "tanh")(features))
    network = keras.Model([image, seen], keras.layers.Dense(2, "softmax")(hidden))
    repository = tmp_path_factory.mktemp("scenes")
    first = publish(network, name="scenes", repository=repository, labels=["day", "night"])
    publish_as(first, repository, 2)
    canary = {"pin": 1, "canary": {"version": 2, "share": 1.0}}
    (repository / "scenes" / "routing.json").write_text(json.dumps(canary))
    port = free_port()
    log = tmp_path_factory.mktemp("scenes-server") / "log"
    with (
        bentoml_serve(repository, log, DROPSERVE_GRPC_PORT=str(port)) as served,
        httpx.Client(base_url=served.url, timeout=60) as http,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Server(http, prediction_service_pb2_grpc.PredictionServiceStub(channel))


def probabilities(server: Server, seen: bool) -> list[float]:
    row = {"image": PIXELS.reshape(2, 3, 1).tolist(), "seen": [seen]}
    answer = server.http.post(f"{PATH}:predict", json={"instances": [row]})
    return answer.raise_for_status().json()["predictions"][0]


def example(seen: int) -> Example:
    made = Example()
    made.features.feature["image"].int64_list.value.extend(PIXELS)
    made.features.feature["seen"].int64_list.value.append(seen)
    return made


def classify(*examples: Example) -> Any:
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name = "scenes"
    request.input.example_list.examples.extend(examples)
    return request


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_a_list_of_rest_may_be_flat(server, nested):
    pixels = (PIXELS.reshape(2, 3, 1) if nested else PIXELS).tolist()
    examples = [{"image": pixels, "seen": [seen]} for seen in (False, True)]
    answer = server.http.post(f"{PATH}:classify", json={"examples": examples})
    assert answer.status_code == 200, answer.text
    for seen, found in zip((False, True), answer.json()["results"], strict=True):
        expected = dict(zip(["day", "night"], probabilities(server, seen), strict=True))
        assert dict(found) == pytest.approx(expected, abs=1e-6)


def test_a_flat_list_of_another_length_is_refused(server):
    answer = server.http.post(f"{PATH}:classify", json={"examples": [{"image": PIXELS[:5].tolist(), "seen": [True]}]})
    assert answer.status_code == 400
    assert "image" in answer.json()["error"]


def test_a_truth_value_of_grpc_is_the_integer_0_or_1(server):
    found = server.grpc.Classify(classify(example(0), example(1))).result.classifications
    for seen, row in zip((False, True), found, strict=True):
        assert [item.score for item in row.classes] == pytest.approx(probabilities(server, seen), abs=1e-6)
    assert probabilities(server, False) != pytest.approx(probabilities(server, True))
    with pytest.raises(grpc.RpcError, match="found 2, wanted true or false"):
        server.grpc.Classify(classify(example(2)))


@pytest.mark.parametrize("wrong", [256, -1])
def test_a_number_beyond_its_tensor_s_type_is_refused(server, wrong):
    """Bytes travel in a list of 32-bit integers."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "scenes"
    request.inputs["seen"].CopyFrom(tf.make_tensor_proto([[True]]))
    image = request.inputs["image"]
    image.dtype = tf.uint8.as_datatype_enum
    for size in (1, 2, 3, 1):
        image.tensor_shape.dim.add(size=size)
    image.int_val.extend(PIXELS)
    found = server.grpc.Predict(request).outputs["probabilities"].float_val
    assert list(found) == pytest.approx(probabilities(server, True), abs=1e-6)
    image.int_val[5] = wrong
    with pytest.raises(grpc.RpcError, match="found values outside of uint8"):
        server.grpc.Predict(request)


def test_a_canary_has_its_share_of_examples(server):
    assert server.grpc.Classify(classify(example(0))).model_spec.version.value == 2
    request = inference_pb2.MultiInferenceRequest(input=classify(example(0)).input)
    task = request.tasks.add(method_name="tensorflow/serving/classify")
    task.model_spec.name = "scenes"
    assert server.grpc.MultiInference(request).results[0].model_spec.version.value == 2
    named = classify(example(0))
    named.model_spec.version.value = 1
    assert server.grpc.Classify(named).model_spec.version.value == 1
