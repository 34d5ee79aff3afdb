"""Workers and GPUs: the plan, as no GPU is needed to make one; and several workers as one server."""

import functools
import socket
from typing import Any

import grpc
import httpx
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving.devices import Plan, pin, plan, visible
from serving.errors import StartError
from tests.process import BENTOML_SERVE, bentoml_serve, free_port
from tests.serving.samples import samples, total
from tests.serving.test_start import failed_start
from tests.serving.versions import wait_for


@pytest.mark.parametrize(
    ("wanted", "workers", "found", "planned"),
    [
        ("auto", None, [], Plan(1, 0)),
        ("auto", 3, [], Plan(3, 0)),
        ("auto", None, ["0", "1", "2", "3"], Plan(4, 4)),
        ("gpu", None, ["0"], Plan(1, 1)),
        ("gpu", 2, ["0", "1", "2"], Plan(2, 2)),
        ("gpu", 4, ["0", "1"], Plan(4, 2)),
        ("cpu", None, ["0", "1"], Plan(1, 0)),
    ],
)
def test_one_worker_for_each_gpu_unless_said_otherwise(wanted, workers, found, planned):
    assert plan(wanted, workers, found) == planned


def test_a_gpu_that_is_not_there_is_no_plan():
    with pytest.raises(StartError, match="DROPSERVE_DEVICE=gpu: no NVIDIA GPU found"):
        plan("gpu", None, [])


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("2,0", ["2", "0"]),
        ("1, 7, 2", ["1"]),
        ("-1", []),
        ("GPU-8932f937,MIG-4c0", ["GPU-8932f937", "MIG-4c0"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(chosen, names):
    assert visible(chosen, 4) == names


def test_every_worker_has_a_gpu_of_its_own_and_more_workers_take_turns():
    seen = []
    for worker in (1, 2, 3, 4):
        environment = {"CUDA_VISIBLE_DEVICES": "4,0,GPU-8932f937"}
        pin(environment, worker)
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "0", "GPU-8932f937", "4"]


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_where_there_is_no_gpu_nothing_is_pinned(environment):
    before = dict(environment)
    pin(environment, 1)
    assert environment == before


def test_several_workers_share_all_ports_and_count_together(trained, tmp_path):
    """Each connection may meet another worker; what they say of the whole is the same."""
    rest_port, grpc_port = free_port(), free_port()
    settings: dict[str, Any] = {
        "DROPSERVE_WORKERS": "2",
        "DROPSERVE_REST_PORT": str(rest_port),
        "DROPSERVE_GRPC_PORT": str(grpc_port),
    }
    body = {"instances": trained.instances[:2]}
    with bentoml_serve(trained.repository, tmp_path / "log", **settings) as served:
        wait_for(lambda: (tmp_path / "log").read_text().count('"event":"gRPC"') == 2, "both workers")
        urls = [served.url, f"http://127.0.0.1:{rest_port}"]
        for url in urls * 10:
            assert httpx.post(f"{url}/predict", json=body, timeout=60).status_code == 200
        asked = predict_pb2.PredictRequest()
        asked.model_spec.name = "sonar"
        asked.inputs["features"].CopyFrom(tf.make_tensor_proto(trained.rows[:1]))
        for _ in range(10):
            with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(asked, timeout=60)

        def is_counted(url: str) -> bool:
            with httpx.Client(base_url=url, timeout=60) as client:
                found = samples(client)
            requests = "dropserve_requests_total"
            counts = [total(found, requests, protocol=name) for name in ("native", "tensorflow_serving_grpc")]
            return counts == [20, 10]

        for url in urls * 4:
            wait_for(functools.partial(is_counted, url), "the counts of both workers")


def test_a_port_that_another_server_has_is_refused_by_several_workers_too(trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        settings = {"DROPSERVE_WORKERS": "2", "DROPSERVE_GRPC_PORT": port, "DROPSERVE_HOST": "127.0.0.1"}
        line = failed_start(BENTOML_SERVE, trained.repository, **settings)
    assert f"cannot listen on 127.0.0.1:{port} for gRPC" in line
