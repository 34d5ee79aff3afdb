"""A model with a class for each place of a row, as a server answers it by every protocol."""

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import httpx
import keras
import numpy as np
import pytest
from tensorflow.core.example.example_pb2 import Example
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    prediction_service_pb2_grpc,
)

from models.artifact import publish
from tests.models.artifacts import Artifact
from tests.models.networks import places_net
from tests.process import Served, bentoml_serve, free_port

LABELS = ["noun", "verb", "name", "other"]
X = np.random.default_rng(0).normal(size=(5, 6, 3)).round(3).astype(np.float32)


@dataclass(frozen=True)
class Tagger:
    """A served model of six places with four classes each."""

    net: keras.Model
    artifact: Artifact
    served: Served
    grpc_address: str
    http: httpx.Client
    stub: prediction_service_pb2_grpc.PredictionServiceStub


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Iterator[Tagger]:
    repository = tmp_path_factory.mktemp("places")
    net, port = places_net(4), str(free_port())
    artifact = Artifact(publish(net, name="tagger", repository=repository, labels=LABELS))
    log, address = tmp_path_factory.mktemp("tagger") / "log", f"127.0.0.1:{port}"
    with (
        bentoml_serve(repository, log, DROPSERVE_GRPC_PORT=port) as served,
        httpx.Client(base_url=served.url, timeout=60) as http,
        grpc.insecure_channel(address) as channel,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        yield Tagger(net, artifact, served, address, http, stub)


def examples(request):
    """The rows in a request of Classify or MultiInference."""
    for row in X:
        example = Example()
        example.features.feature["x"].float_list.value.extend(row.ravel().tolist())
        request.input.example_list.examples.append(example)
    return request


SCORES = r"Expected Tensor shape: [batch_size num_classes] but got [5,6,4]"


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
