"""Metrics, access log, request ids and traces of a real server, compared with what was really asked and answered."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from models.contract import REFERENCE_LEVELS, Calibration
from serving.drift import bins, stability_index
from tests.process import Served, bentoml_serve, free_port
from tests.serving.samples import samples, total
from tests.serving.versions import publish_as, wait_for

WINDOW_ROWS = 300
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


class Collector(http.server.BaseHTTPRequestHandler):
    """What an OpenTelemetry collector does with what it is sent: decode it."""

    spans: list[Any] = []

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in sent.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def default_answers(trained) -> dict[str, np.ndarray]:
    """What the artifact itself says of all rows, with its default draws."""
    loaded = tf.saved_model.load(str(trained.folder))
    outputs = loaded.signatures["mc_predict"](features=tf.constant(trained.rows))
    return {name: values.numpy() for name, values in outputs.items()}


@pytest.fixture(scope="module")
def reference(default_answers) -> dict[str, list[float]]:
    return {
        name: np.quantile(default_answers[name].astype(float), REFERENCE_LEVELS).tolist()
        for name in ("predictive_entropy", "mutual_information")
    }


@pytest.fixture(scope="module")
def repository(trained, reference, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("watched")
    output = trained.manifest.outputs[0].name
    calibration = Calibration.model_validate({"rows": 42, "outputs": {output: {"reference": reference}}})
    publish_as(trained.folder, root, 1, calibration=calibration)
    return root


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def served(repository, collector, grpc_port, tmp_path_factory) -> Iterator[Served]:
    settings = {
        "DROPSERVE_DRIFT_WINDOW_ROWS": str(WINDOW_ROWS),
        "DROPSERVE_OTLP_ENDPOINT": collector,
        "DROPSERVE_GRPC_PORT": str(grpc_port),
        "DROPSERVE_POLL_S": "0.2",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with bentoml_serve(repository, tmp_path_factory.mktemp("log") / "log", **settings) as server:
        yield server


@pytest.fixture
def client(served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as connection:
        yield connection


def test_every_protocol_counts_its_requests_rows_and_draws(client, grpc_port, trained):
    before = samples(client)
    rows = trained.instances[:5]
    for _ in range(3):
        assert client.post("/predict", json={"instances": rows[:2]}).status_code == 200
    for _ in range(2):
        assert client.post("/uncertainty", json={"instances": rows, "num_samples": 50}).status_code == 200
    assert client.post("/predict", json={"instances": []}).status_code == 400
    assert client.post("/v1/models/sonar:predict", json={"instances": rows}).status_code == 200
    assert client.post("/v1/models/absent:predict", json={"instances": rows}).status_code == 404
    tensor = {"name": "features", "shape": [5, 60], "datatype": "FP32", "data": rows}
    assert client.post("/v2/models/sonar/infer", json={"inputs": [tensor]}).status_code == 200
    asked = predict_pb2.PredictRequest()
    asked.model_spec.name = "sonar"
    asked.inputs["features"].CopyFrom(tf.make_tensor_proto(trained.rows[:5]))
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        stub.Predict(asked)
        asked.model_spec.name = "absent"
        with pytest.raises(grpc.RpcError):
            stub.Predict(asked)
    # The client may have its answer before the server has counted it.
    by_grpc = {"protocol": "tensorflow_serving_grpc"}
    wanted = total(before, "dropserve_requests_total", **by_grpc) + 2
    wait_for(lambda: total(samples(client), "dropserve_requests_total", **by_grpc) >= wanted, "both calls counted")
    after = samples(client)

    def grown(metric: str, **labels: str) -> float:
        return total(after, metric, **labels) - total(before, metric, **labels)

    version = {"model": "sonar", "version": "1"}
    expected: dict[tuple[str, str, str], int] = {
        ("native", "predict", "200"): 3,
        ("native", "predict", "400"): 1,
        ("native", "uncertainty", "200"): 2,
        ("tensorflow_serving", "predict", "200"): 1,
        ("open_inference", "infer", "200"): 1,
        ("tensorflow_serving_grpc", "Predict", "OK"): 1,
    }
    for (protocol, operation, code), count in expected.items():
        labels = {"protocol": protocol, "operation": operation, **version}
        assert grown("dropserve_requests_total", code=code, **labels) == count, labels
        answered = sum(found for key, found in expected.items() if key[:2] == (protocol, operation))
        assert grown("dropserve_request_seconds_count", **labels) == answered
        assert grown("dropserve_request_seconds_sum", **labels) > 0
    nobody = {"model": "", "version": ""}
    assert grown("dropserve_requests_total", protocol="tensorflow_serving", code="404", **nobody) == 1
    assert grown("dropserve_requests_total", protocol="tensorflow_serving_grpc", code="NOT_FOUND", **nobody) == 1
    # What the model really did: 3 x 2 rows natively, 5 for each of the others.
    calls = {**version, "signature": "serving_default"}
    assert grown("dropserve_rows_total", **calls) == 3 * 2 + 3 * 5
    assert grown("dropserve_batch_rows_sum", **calls) == 3 * 2 + 3 * 5
    assert grown("dropserve_queue_seconds_count", **calls) == 6
    assert grown("dropserve_batch_requests_sum", **calls) == 6
    draws = {**version, "signature": "mc_sample"}
    assert grown("dropserve_row_draws_total", **draws) == 2 * 5 * 50
    assert grown("dropserve_call_seconds_count", **draws) == 2
    assert total(after, "dropserve_open_requests") == 0


def test_histograms_of_uncertainty_are_those_of_the_answers(client, trained):
    before = samples(client)
    body = {"instances": trained.instances, "num_samples": 30, "seed": 5}
    answers = client.post("/uncertainty", json=body).json()["predictions"]
    after = samples(client)
    for statistic in ("predictive_entropy", "mutual_information"):
        values = [answer[statistic] for answer in answers]
        metric = f"dropserve_{statistic}"
        bounds = {dict(labels)["le"] for name, labels in after if name == f"{metric}_bucket"}
        assert len(bounds) > 10
        for bound in bounds:
            grown = total(after, f"{metric}_bucket", le=bound) - total(before, f"{metric}_bucket", le=bound)
            assert grown == sum(value <= float(bound) for value in values), bound
        grown = total(after, f"{metric}_sum") - total(before, f"{metric}_sum")
        assert grown == pytest.approx(sum(values), rel=1e-5)


def test_the_drift_score_is_that_of_the_last_answers(client, trained, reference, default_answers):
    """Rows like those of the reference: none. Noise in place of echoes: a large one, whatever came before."""

    def score(statistic: str) -> float:
        return total(samples(client), "dropserve_drift_score", statistic=statistic, model="sonar", version="1")

    # Twice the window, whole: what other tests asked with default draws is out of it.
    for _ in range(4):
        assert client.post("/uncertainty", json={"instances": trained.instances[:150]}).status_code == 200
    for statistic, quantiles in reference.items():
        seen = bins(quantiles).counts(default_answers[statistic][:150]).tolist()
        expected = stability_index([4 * count for count in seen], bins(quantiles).expected)
        assert score(statistic) == pytest.approx(expected, abs=1e-6)
        assert score(statistic) < 0.25
    # Other draws say nothing of drift: mutual information depends on their number.
    before = score("mutual_information")
    noise = np.random.default_rng(0).uniform(size=(150, 60)).tolist()
    client.post("/uncertainty", json={"instances": noise, "num_samples": 10})
    assert score("mutual_information") == before
    for _ in range(4):
        client.post("/uncertainty", json={"instances": noise})
    assert score("predictive_entropy") > 0.25


def test_versions_that_are_loaded_and_broken_are_counted(client, repository):
    before = samples(client)
    broken = repository / "sonar" / "2"
    # Renamed into place: the server looks once, and there is something to see.
    staging = repository / "sonar" / ".staging-2"
    staging.mkdir()
    (staging / "manifest.json").write_text("{}")
    staging.rename(broken)

    def grown(result: str) -> float:
        return total(samples(client), "dropserve_reloads_total", model="sonar", result=result) - total(
            before, "dropserve_reloads_total", model="sonar", result=result
        )

    wait_for(lambda: grown("refused") == 1, "the refusal")
    assert total(samples(client), "dropserve_broken_versions", model="sonar") == 1
    assert total(samples(client), "dropserve_version_state", version="2", state="END") == 1
    assert total(samples(client), "dropserve_version_state", version="1", state="AVAILABLE") == 1
    (broken / "manifest.json").unlink()
    broken.rmdir()
    wait_for(lambda: total(samples(client), "dropserve_version_state", version="2") == 0, "its end")
    assert total(samples(client), "dropserve_broken_versions", model="sonar") == 0


def lines(served: Served, request_id: str) -> list[dict[str, Any]]:
    """The access log's lines of one request; there is at least one, soon."""

    def found() -> list[dict[str, Any]]:
        return [json.loads(line) for line in served.log.read_text().splitlines() if f'"{request_id}"' in line]

    wait_for(lambda: bool(found()), f"the log of {request_id}")
    return found()


def test_calls_that_no_handler_was_given_are_counted_and_logged(client, served, grpc_port):
    calls = {
        "/tensorflow.serving.PredictionService/Predict": (bytes(33 * 2**20), "RESOURCE_EXHAUSTED"),
        "/tensorflow.serving.PredictionService/Absent": (b"", "UNIMPLEMENTED"),
    }

    def counted(code: str) -> float:
        return total(samples(client), "dropserve_requests_total", code=code)

    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        for path, (message, code) in calls.items():
            before = counted(code)
            with pytest.raises(grpc.RpcError) as refusal:
                channel.unary_unary(path)(message, metadata=[("x-request-id", f"refused-{code}")], timeout=60)
            assert refusal.value.code().name == code
            assert counted(code) == before + 1
    (large,), (absent,) = (lines(served, f"refused-{code}") for _, code in calls.values())
    assert (large["protocol"], large["operation"], large["path"]) == ("tensorflow_serving_grpc", "Predict", "/Predict")
    assert (absent["protocol"], absent["operation"]) == ("none", "")
    assert absent["path"] == "/tensorflow.serving.PredictionService/Absent"


def test_a_path_with_a_line_in_it_forges_no_line_of_the_log(client, served):
    assert client.get("/x%0d%0aforged%20line").status_code == 404
    wait_for(lambda: "forged line" in served.log.read_text(), "the line in the log")
    lines = served.log.read_bytes().splitlines()
    assert not [line for line in lines if line.startswith(b"forged")]


def test_the_access_log_says_who_answered_and_nothing_of_the_payload(client, served, trained):
    row = [0.123454321, *trained.instances[0][1:]]
    headers = {"x-request-id": "order-66/a", "traceparent": TRACEPARENT, "authorization": "Bearer secret-of-mine"}
    answer = client.post("/uncertainty?token=secret-in-query", json={"instances": [row]}, headers=headers)
    assert answer.headers["x-request-id"] == "order-66/a"
    (line,) = lines(served, "order-66/a")
    assert (line["event"], line["protocol"], line["operation"]) == ("request", "native", "uncertainty")
    assert (line["model"], line["version"], line["code"]) == ("sonar", "1", "200")
    assert line["trace_id"] == TRACE
    assert line["path"] == "/uncertainty"
    assert line["duration_ms"] > 0
    refused = client.post("/predict", json={"instances": [["0.123454321"]]}, headers={"x-request-id": "refused-1"})
    assert refused.status_code == 400
    assert lines(served, "refused-1")[0]["code"] == "400"
    for secret in ("0.1234543", "secret-of-mine", "secret-in-query"):
        assert secret not in served.log.read_text()


@pytest.mark.parametrize(
    "given", [None, "", "a b", 'quote"', "x" * 129], ids=["none", "empty", "space", "quote", "long"]
)
def test_a_request_without_a_usable_id_is_given_one(client, served, given):
    headers = {} if given is None else {"x-request-id": given}
    ids = {client.get("/livez", headers=headers).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert given not in ids
    assert len(lines(served, ids.pop())) == 1


def test_the_trace_of_the_caller_goes_on_in_the_answer_and_in_an_exported_span(client, grpc_port):
    answer = client.post("/predict", json={}, headers={"traceparent": TRACEPARENT, "x-request-id": "spanned"})
    version, trace, span, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "00f067aa0ba902b7"

    def exported() -> list[Any]:
        return [found for found in Collector.spans if found.span_id.hex() == span]

    wait_for(lambda: bool(exported()), "the span")
    (found,) = exported()
    assert found.trace_id.hex() == TRACE
    assert found.parent_span_id.hex() == "00f067aa0ba902b7"
    assert found.name == "native predict"
    assert {item.key: item.value.string_value for item in found.attributes}["code"] == "400"
    asked = predict_pb2.PredictRequest()
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Predict(asked, metadata=[("traceparent", TRACEPARENT), ("x-request-id", "over-grpc")])
    given_back = {item.key: item.value for item in refused.value.trailing_metadata()}
    assert given_back["x-request-id"] == "over-grpc"
    assert given_back["traceparent"].split("-")[1] == TRACE


@pytest.mark.parametrize("sampled", ["00", "01"])
def test_without_an_endpoint_the_trace_goes_on_and_nothing_is_exported(server, sampled):
    parent = f"00-{TRACE}-00f067aa0ba902b7-{sampled}"
    shown = httpx.get(f"{server.url}/livez", headers={"traceparent": parent}, timeout=60).headers["traceparent"]
    assert shown.startswith(f"00-{TRACE}-")
    assert shown.endswith(f"-{sampled}")
    assert shown != parent


@pytest.mark.parametrize("parent", ["", "00-abc", f"00-{'0' * 32}-00f067aa0ba902b7-01", TRACEPARENT.upper()])
def test_a_trace_context_that_is_none_is_ignored(server, parent):
    answer = httpx.get(f"{server.url}/livez", headers={"traceparent": parent}, timeout=60)
    assert "traceparent" not in answer.headers
