"""Whatever bytes come in, over every protocol: no 500, no hang, no traceback, no memory that stays.

2,000 cases, the same in every run; `FUZZ_CASES=20000 pytest tests/serving/test_fuzz.py` sends more, and `FUZZ_SEED=1`
others.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import hypothesis
import numpy as np
import psutil
import pytest
import schemathesis
import tensorflow as tf
from schemathesis.core.result import Ok
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    predict_pb2,
    regression_pb2,
)

from tests.process import bentoml_serve, free_port
from tests.serving.mutation import mutated

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
# Far above what any case takes: only a hang needs as long.
HANG_S = 60
MAX_GROWTH_MB = 16
# How often all cases are sent until one time leaves the memory as it was: the allocator's own may take a few.
MEMORY_PASSES = 5

# Rules that no schema can state; one of them, that 5.0 is no integer.
BEYOND_A_SCHEMA = re.compile(
    r"max_samples: found \d+, wanted at least num_samples|the network overflows|found -?[\d.e+]+, wanted an integer"
)

JSON = {"content-type": "application/json"}
GOOD = {200}
REFUSED = {400, 404, 405, 413, 415, 429}


@dataclass(frozen=True)
class Target:
    """A running server, by all of its ports."""

    urls: tuple[str, str]
    """BentoML's port and the REST port."""
    grpc_address: str
    process: psutil.Popen
    log: Path

    def resident_mb(self) -> float:
        return max(child.memory_info().rss for child in self.process.children(recursive=True)) / 1e6


@pytest.fixture(scope="module")
def target(trained, tmp_path_factory) -> Iterator[Target]:
    rest, rpc = free_port(), free_port()
    log = tmp_path_factory.mktemp("fuzz") / "log"
    with bentoml_serve(
        trained.repository,
        log,
        DROPSERVE_REST_PORT=str(rest),
        DROPSERVE_GRPC_PORT=str(rpc),
        DROPSERVE_MAX_BODY_BYTES=str(2**20),
    ) as served:
        yield Target((served.url, f"http://127.0.0.1:{rest}"), f"127.0.0.1:{rpc}", served.process, log)


@dataclass(frozen=True)
class Seed:
    path: str
    body: bytes
    headers: dict[str, str]


def as_json(path: str, *bodies: object) -> list[Seed]:
    return [Seed(path, json.dumps(body).encode(), JSON) for body in bodies]


ROW = [round(0.01 * (index % 50), 2) for index in range(60)]
NAMED = {f"band_{index:02}": value for index, value in enumerate(ROW, start=1)}
RAW = np.array([ROW, ROW], "<f4").tobytes()


def tensor(**changes: object) -> dict[str, object]:
    return {"name": "features", "shape": [2, 60], "datatype": "FP32", **changes}


def in_binary(head: dict[str, object]) -> Seed:
    text = json.dumps(head).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(text))}
    return Seed("/v2/models/sonar/infer", text + RAW, headers)


SEEDS: dict[str, list[Seed]] = {
    "native": [
        *as_json("/predict", {"instances": [ROW, ROW]}, {"instances": [NAMED]}),
        *as_json(
            "/uncertainty",
            {"instances": [ROW], "num_samples": 20, "seed": 3},
            {"instances": [NAMED], "tolerance": 0.05, "max_samples": 100, "coverage": 0.9},
        ),
    ],
    "tensorflow serving": [
        *as_json(
            "/v1/models/sonar:predict",
            {"instances": [ROW, ROW]},
            {"signature_name": "mc_sample", "instances": [{"features": ROW, "num_samples": 5, "seed": 1}]},
            {"signature_name": "mc_draws", "inputs": {"features": [ROW], "num_samples": 5, "seed": 1}},
        ),
        *as_json("/v1/models/sonar/versions/1:predict", {"inputs": [ROW]}),
        *as_json("/v1/models/sonar:classify", {"context": {"band_01": 0.1}, "examples": [NAMED]}),
        *as_json("/v1/models/sonar:regress", {"examples": [NAMED]}),
    ],
    "open inference": as_json(
        "/v2/models/sonar/infer",
        {"id": "1", "inputs": [tensor(data=[ROW, ROW])]},
        {"inputs": [tensor(data=[*ROW, *ROW])], "parameters": {"signature": "mc_sample", "num_samples": 9, "seed": 1}},
        {"inputs": [tensor(shape=[1, 60], data=[ROW])], "outputs": [{"name": "probabilities", "parameters": {}}]},
    ),
    "open inference in binary": [
        in_binary({"inputs": [tensor(parameters={"binary_data_size": len(RAW)})]}),
        in_binary(
            {
                "inputs": [tensor(parameters={"binary_data_size": len(RAW)})],
                "outputs": [{"name": "std", "parameters": {"binary_data": True}}],
                "parameters": {"num_samples": 7, "binary_data_output": True},
            }
        ),
    ],
}


def send_bodies(target: Target, name: str, cases: int) -> set[int]:
    """Requests whose length is right and whose body is not; the statuses that were seen."""
    chosen = random.Random(f"{name} {SEED}")
    seeds = SEEDS[name]
    bodies = [seed.body for seed in seeds]
    seen = set()
    with httpx.Client(timeout=HANG_S) as client:
        for _ in range(cases):
            seed = chosen.choice(seeds)
            body = mutated(chosen, seed.body, bodies)
            headers = dict(seed.headers)
            if "inference-header-content-length" in headers and chosen.random() < 0.3:
                headers["inference-header-content-length"] = str(chosen.choice(["", "x", -1, 0, 3, len(body), 10**30]))
            answer = client.post(chosen.choice(target.urls) + seed.path, content=body, headers=headers)
            seen.add(answer.status_code)
            assert answer.status_code in GOOD | REFUSED, (seed.path, body, answer.text)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert isinstance(error, str), (seed.path, body, answer.text)
                assert error, (seed.path, body)
    return seen


def send_requests(target: Target, cases: int) -> set[int]:
    """Requests of which every byte may be wrong, the head's too; the statuses that were seen."""
    chosen = random.Random(f"requests {SEED}")
    seeds = [_on_the_wire(seed) for several in SEEDS.values() for seed in several]
    seen = set()
    for _ in range(cases):
        request = mutated(chosen, chosen.choice(seeds), seeds)
        host, port = chosen.choice(target.urls).removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
            answer = _exchange(connection, request, pieces=chosen.randint(1, 3))
        # Several, where a part of it was taken for a request of its own.
        statuses = {int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)}
        assert not {status for status in statuses if status >= 500}, (request, answer)
        seen |= statuses
    return seen


def _on_the_wire(seed: Seed) -> bytes:
    headers = {"host": "localhost", "content-length": str(len(seed.body)), **seed.headers}
    head = "\r\n".join([f"POST {seed.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())])
    return head.encode() + b"\r\n\r\n" + seed.body


def _exchange(connection: socket.socket, request: bytes, pieces: int) -> bytes:
    """Send in pieces, say that no more comes, and read until the server closes; a hang is a TimeoutError."""
    answer = b""
    size = -(-len(request) // pieces) or 1
    try:
        for start in range(0, len(request), size):
            connection.sendall(request[start : start + size])
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65_536):
            answer += part
    except TimeoutError:
        raise
    except OSError:
        # Refused, and closed, before it was read to its end.
        pass
    return answer


def _messages() -> dict[str, list[bytes]]:
    """Serialized requests by gRPC method, the same bytes in every process: the cases are made of them."""

    def serialized(request: Any) -> bytes:
        return request.SerializeToString(deterministic=True)

    predict = predict_pb2.PredictRequest()
    predict.model_spec.name = "sonar"
    predict.inputs["features"].CopyFrom(tf.make_tensor_proto(np.array([ROW, ROW], np.float32)))
    typed = predict_pb2.PredictRequest()
    typed.CopyFrom(predict)
    typed.inputs["features"].tensor_content = b""
    typed.inputs["features"].float_val.extend(ROW)
    drawn = predict_pb2.PredictRequest()
    drawn.CopyFrom(predict)
    drawn.model_spec.signature_name = "mc_sample"
    drawn.inputs["num_samples"].CopyFrom(tf.make_tensor_proto(np.int32(5)))
    drawn.inputs["seed"].CopyFrom(tf.make_tensor_proto(np.int64(3)))
    drawn.output_filter.append("std")
    classify = classification_pb2.ClassificationRequest()
    classify.model_spec.name = "sonar"
    classify.input.example_list.examples.add().features.feature["features"].float_list.value.extend(ROW)
    regress = regression_pb2.RegressionRequest.FromString(serialized(classify))
    several = inference_pb2.MultiInferenceRequest()
    several.tasks.add(method_name="tensorflow/serving/classify").model_spec.name = "sonar"
    several.input.CopyFrom(classify.input)
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    metadata.model_spec.name = "sonar"
    status = get_model_status_pb2.GetModelStatusRequest()
    status.model_spec.name = "sonar"
    status.model_spec.version.value = 1
    service = "/tensorflow.serving.PredictionService"
    return {
        f"{service}/Predict": [serialized(message) for message in (predict, typed, drawn)],
        f"{service}/Classify": [serialized(classify)],
        f"{service}/Regress": [serialized(regress)],
        f"{service}/MultiInference": [serialized(several)],
        f"{service}/GetModelMetadata": [serialized(metadata)],
        "/tensorflow.serving.ModelService/GetModelStatus": [serialized(status)],
    }


def send_messages(target: Target, cases: int) -> set[grpc.StatusCode]:
    """gRPC messages of which every byte may be wrong; the status codes that were seen."""
    chosen = random.Random(f"messages {SEED}")
    messages = _messages()
    every = [message for several in messages.values() for message in several]
    # Predict more often than the others.
    methods = [*messages, *["/tensorflow.serving.PredictionService/Predict"] * 4]
    allowed = {
        *(grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
        # The last one: of MultiInference, by a method that nobody does.
        *(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED),
    }
    seen = set()
    with grpc.insecure_channel(target.grpc_address) as channel:
        for _ in range(cases):
            method = chosen.choice(methods)
            message = mutated(chosen, chosen.choice(messages[method]), every)
            call = channel.unary_unary(method)
            outcome = call.future(message, timeout=HANG_S)
            assert outcome.code() in allowed, (method, message, outcome.details())
            seen.add(outcome.code())
    return seen


def send_noise(target: Target, cases: int) -> None:
    """Bytes that are no HTTP/2 on the gRPC port: it closes the connection, or waits for more that does not come."""
    chosen = random.Random(f"noise {SEED}")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    host, port = target.grpc_address.split(":")
    for _ in range(cases):
        noise = mutated(chosen, preface, [preface, *_messages()["/tensorflow.serving.PredictionService/Predict"]])
        with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
            _exchange(connection, noise, pieces=1)


SENDERS: dict[str, Callable[[Target, int], set]] = {
    **{name: lambda target, cases, name=name: send_bodies(target, name, cases) for name in SEEDS},  # type: ignore[misc]
    "requests": send_requests,
    "messages": send_messages,
}
# Schemathesis has an equal share.
SHARE = max(1, CASES // (len(SENDERS) + 1))


def test_bytes_that_are_no_http_2_disturb_nobody(target):
    send_noise(target, max(5, SHARE // 10))
    assert_well(target)


@pytest.mark.parametrize("name", SENDERS)
def test_mutated_requests_are_answered_or_refused(target, name):
    seen = SENDERS[name](target, SHARE)
    # The cases are near enough to valid requests that some are answered, and far enough that most are not.
    assert len(seen) > 1
    assert_well(target)


def test_what_the_openapi_document_allows_and_what_it_does_not(target):
    schema = schemathesis.openapi.from_url(f"{target.urls[0]}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert {operation.path for operation in operations} >= {"/predict", "/uncertainty"}
    for operation in operations:
        posted = operation.method.lower() == "post"
        for mode in schemathesis.GenerationMode if posted else [schemathesis.GenerationMode.POSITIVE]:
            _conforms(operation, mode, cases=SHARE // 4 if posted else 1)
    assert_well(target)


def _conforms(operation: schemathesis.APIOperation, mode: schemathesis.GenerationMode, cases: int) -> None:
    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=max(1, cases), deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        answer = case.call(timeout=HANG_S)
        excluded = []
        if BEYOND_A_SCHEMA.search(answer.text):
            excluded.append(schemathesis.checks.positive_data_acceptance)
        if answer.status_code == 413:
            # A refusal too, though Schemathesis does not count it as one.
            excluded.append(schemathesis.checks.negative_data_rejection)
        case.validate_response(answer, excluded_checks=excluded)

    run()


def test_the_same_cases_again_take_no_more_memory(target):
    def resident_mb() -> float:
        for sender in SENDERS.values():
            sender(target, SHARE)
        return target.resident_mb()

    found = [resident_mb()]
    while len(found) < MEMORY_PASSES:
        found.append(resident_mb())
        if found[-1] - found[-2] < MAX_GROWTH_MB:
            return
    pytest.fail(f"each time of these took more memory, in MB: {found}")


def assert_well(target: Target) -> None:
    """Both ports answer a good request, and nothing unexpected is in the log."""
    for url in target.urls:
        assert httpx.post(f"{url}/predict", json={"instances": [ROW]}, timeout=HANG_S).status_code == 200
    said = target.log.read_text(errors="replace")
    assert "Traceback" not in said, said[-4000:]
    assert "unexpected error" not in said, said[-4000:]
