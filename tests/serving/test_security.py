"""API keys and TLS on every port of one server; what a browser is told; what a start refuses."""

import base64
import hashlib
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests.process import BENTOML_SERVE, DROPSERVE_SERVE, Served, bentoml_serve, free_port
from tests.serving.test_start import failed_start

KEY = "key-of-the-environment"
FILE_KEYS = ("first-key-of-the-file", "second-key-of-the-file")
WRONG = KEY[:-1] + "x"


class Secured(NamedTuple):
    served: Served
    urls: list[str]
    """BentoML's port and the REST port."""
    grpc_place: str
    context: ssl.SSLContext
    authority: bytes


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        [*command.split(), *names, "-out", str(files[0]), "-keyout", str(files[1])], check=True, capture_output=True
    )
    return files


@pytest.fixture(scope="module")
def secured(trained, certificate, tmp_path_factory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    keys = folder / "keys"
    keys.write_text("# whose key is whose\n" + "\n".join(FILE_KEYS) + "\n\n")
    rest_port, grpc_port = free_port(), free_port()
    settings: dict[str, Any] = {
        "DROPSERVE_API_KEYS": f"{KEY},another-key",
        "DROPSERVE_API_KEYS_FILE": str(keys),
        "DROPSERVE_TLS_CERTFILE": str(certificate[0]),
        "DROPSERVE_TLS_KEYFILE": str(certificate[1]),
        "DROPSERVE_REST_PORT": str(rest_port),
        "DROPSERVE_GRPC_PORT": str(grpc_port),
    }
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with bentoml_serve(trained.repository, folder / "log", verify=context, **settings) as served:
        urls = [served.url, f"https://127.0.0.1:{rest_port}"]
        yield Secured(served, urls, f"127.0.0.1:{grpc_port}", context, certificate[0].read_bytes())


PATHS = ["/predict", "/uncertainty", "/v1/models/sonar:predict", "/v2/models/sonar/infer", "/nothing", "/schema.json"]


def test_without_a_key_or_with_a_wrong_one_nothing_but_probes_and_metrics_is_answered(secured):
    for url in secured.urls:
        with httpx.Client(base_url=url, verify=secured.context, timeout=60) as client:
            for headers in ({}, {"x-api-key": WRONG}, {"authorization": f"Bearer {WRONG}"}, {"authorization": KEY}):
                for path in PATHS:
                    answer = client.post(path, json={"instances": []}, headers=headers)
                    assert answer.status_code == 401, (url, path, headers)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert "API key" in answer.json()["error"]
                assert client.get("/docs", headers=headers).status_code == 401
            for path in ("/livez", "/readyz", "/metrics", "/v2/health/ready"):
                assert client.get(path).status_code == 200


@pytest.mark.parametrize("key", [KEY, "another-key", *FILE_KEYS])
def test_every_key_opens_every_port(secured, key, trained):
    body = {"instances": trained.instances[:1]}
    for url in secured.urls:
        with httpx.Client(base_url=url, verify=secured.context, timeout=60) as client:
            for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
                assert client.post("/predict", json=body, headers=headers).status_code == 200
    with grpc.secure_channel(secured.grpc_place, grpc.ssl_channel_credentials(secured.authority)) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        asked = predict_pb2.PredictRequest()
        asked.model_spec.name = "sonar"
        asked.inputs["features"].CopyFrom(tf.make_tensor_proto(trained.rows[:1]))
        for metadata in (("x-api-key", key), ("authorization", f"Bearer {key}")):
            assert stub.Predict(asked, metadata=[metadata]).model_spec.version.value == 1
        for wrong in ([], [("x-api-key", WRONG)], [("authorization", key)]):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Predict(asked, metadata=wrong)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        healthy = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert healthy.status == health_pb2.HealthCheckResponse.SERVING


def test_no_port_speaks_plain_text(secured):
    for url in secured.urls:
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url.replace('https', 'http')}/livez", timeout=10)
    with grpc.insecure_channel(secured.grpc_place) as channel, pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)


class Guarded(NamedTuple):
    """A server that wants a certificate of its clients, and takes few calls at a time."""

    url: str
    grpc_place: str
    context: ssl.SSLContext
    certificate: bytes
    key: bytes


@pytest.fixture(scope="module")
def guarded(trained, certificate, tmp_path_factory) -> Iterator[Guarded]:
    """The certificate is its own authority, and the client's too."""
    grpc_port = free_port()
    settings: dict[str, Any] = {
        "DROPSERVE_TLS_CERTFILE": str(certificate[0]),
        "DROPSERVE_TLS_KEYFILE": str(certificate[1]),
        "DROPSERVE_TLS_CLIENT_CA": str(certificate[0]),
        "DROPSERVE_GRPC_PORT": str(grpc_port),
        "DROPSERVE_MAX_CONCURRENCY": "2",
        "DROPSERVE_MAX_ROW_DRAWS": str(10**9),
    }
    context = ssl.create_default_context(cafile=str(certificate[0]))
    context.load_cert_chain(*certificate)
    log = tmp_path_factory.mktemp("guarded") / "log"
    with bentoml_serve(trained.repository, log, verify=context, **settings) as served:
        contents = (path.read_bytes() for path in certificate)
        yield Guarded(served.url, f"127.0.0.1:{grpc_port}", context, *contents)


def long_request(trained) -> predict_pb2.PredictRequest:
    asked = predict_pb2.PredictRequest()
    asked.model_spec.name = "sonar"
    asked.model_spec.signature_name = "mc_sample"
    asked.inputs["features"].CopyFrom(tf.make_tensor_proto(trained.rows[:100]))
    asked.inputs["num_samples"].CopyFrom(tf.make_tensor_proto(np.int32(10_000)))
    asked.inputs["seed"].CopyFrom(tf.make_tensor_proto(np.int64(1)))
    return asked


def test_without_a_client_certificate_no_port_speaks(guarded):
    stranger = ssl.create_default_context(cadata=guarded.certificate.decode())
    assert httpx.get(f"{guarded.url}/livez", verify=guarded.context, timeout=60).status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{guarded.url}/livez", verify=stranger, timeout=10)
    for pair, welcome in (((guarded.key, guarded.certificate), True), ((None, None), False)):
        credentials = grpc.ssl_channel_credentials(guarded.certificate, *pair)
        with grpc.secure_channel(guarded.grpc_place, credentials) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            if welcome:
                assert check(health_pb2.HealthCheckRequest(), timeout=60).status == 1
            else:
                with pytest.raises(grpc.RpcError) as refused:
                    check(health_pb2.HealthCheckRequest(), timeout=10)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_more_grpc_calls_at_once_than_the_limit_are_refused_and_later_ones_served(guarded, trained):
    credentials = grpc.ssl_channel_credentials(guarded.certificate, guarded.key, guarded.certificate)
    with grpc.secure_channel(guarded.grpc_place, credentials) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        calls = [stub.Predict.future(long_request(trained), timeout=120) for _ in range(20)]
        codes = [call.code() for call in calls]
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert codes.count(grpc.StatusCode.OK) < len(codes) / 2
        assert stub.Predict(long_request(trained), timeout=120).model_spec.version.value == 1


def test_no_key_is_in_the_log_or_in_the_metrics(secured):
    metrics = httpx.get(f"{secured.urls[0]}/metrics", verify=secured.context, timeout=60).text
    said = secured.served.log.read_text() + metrics
    for key in (KEY, *FILE_KEYS, WRONG):
        assert key not in said


def test_answers_tell_browsers_to_keep_frame_and_guess_nothing(client, trained):
    for answer in (client.post("/predict", json={"instances": trained.instances[:1]}), client.get("/v2/nothing")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    page = client.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "unsafe-inline" not in policy
    assert "default-src 'none'" in policy


def test_the_page_may_run_its_own_script_and_style(client):
    """The policy's digests are those of what the page holds, computed here as a browser does."""
    page = client.get("/docs")
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in page.headers["content-security-policy"]


both_commands = pytest.mark.parametrize("command", [BENTOML_SERVE, DROPSERVE_SERVE], ids=["bentoml", "dropserve"])


@both_commands
def test_keys_and_certificates_that_cannot_be_used_are_refused_without_a_key_in_the_line(
    command, trained, tmp_path, certificate
):
    absent = tmp_path / "absent"
    line = failed_start(command, trained.repository, DROPSERVE_API_KEYS_FILE=str(absent))
    assert f"{absent}: not readable (No such file or directory)" in line
    line = failed_start(command, trained.repository, DROPSERVE_API_KEYS="good-key,bad key")
    assert "DROPSERVE_API_KEYS: key 2 has other characters" in line
    assert "bad" not in line
    line = failed_start(command, trained.repository, DROPSERVE_TLS_CERTFILE=str(certificate[0]))
    assert "TLS wants DROPSERVE_TLS_CERTFILE and DROPSERVE_TLS_KEYFILE" in line
    files = {"DROPSERVE_TLS_CERTFILE": str(certificate[1]), "DROPSERVE_TLS_KEYFILE": str(certificate[1])}
    assert "wanted a certificate and its key" in failed_start(command, trained.repository, **files)
