"""Who runs, and what each one is asked: one Sonar row a request, or a thousand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from benchmarks.server.load import JSON_TYPE, Case, Server
from loadtest import rows

MANY_ROWS = 1_000
LONG_DRAWS = 10_000
GRPC_PREDICT = "/tensorflow.serving.PredictionService/Predict"

BENTO, BARE = "BentoML's port", "bare port"
PREDICT, TFS, UNCERTAINTY = "/predict", "TF Serving REST predict", "/uncertainty T=100"
GRPC = "gRPC Predict"
MANY_JSON, MANY_BINARY, MANY_GRPC = "V2, 1,000 rows, JSON", "V2, 1,000 rows, binary", "gRPC, 1,000 rows"
PLAIN, MLSERVER, CONSTANT = "plain BentoML", "MLServer, custom runtime", "uvicorn + Starlette, a constant"


def named(port: str, case: str) -> str:
    return f"{port}: {case}"


def sonar() -> np.ndarray:
    """float32 [208, 60]."""
    return np.array(rows.read_csv(rows.SONAR, rows.SONAR_TARGET)[1], np.float32)


def one_row() -> list[list[float | str]]:
    return [rows.read_csv(rows.SONAR, rows.SONAR_TARGET)[1][0]]


def dropserve(repository: Path) -> Server:
    predict = json.dumps({"instances": one_row()})
    uncertainty = json.dumps({"instances": one_row(), "num_samples": 100})
    cases = []
    for port, name in (("port", BENTO), ("rest", BARE)):
        cases += [
            Case(named(name, PREDICT), "/predict", predict, port=port),
            Case(named(name, TFS), "/v1/models/sonar:predict", predict, port=port),
            Case(named(name, UNCERTAINTY), "/uncertainty", uncertainty, port=port),
        ]
    many = np.resize(sonar(), (MANY_ROWS, 60))
    cases += [*_open_inference(many), *_grpc(many)]
    return Server(
        name="dropserve",
        command=[sys.executable, "-m", "dropserve", "serve", "--port", "{port}", "--model", "sonar"],
        environment={
            "DROPSERVE_REPOSITORY": str(repository),
            "DROPSERVE_GRPC_PORT": "{grpc}",
            "DROPSERVE_REST_PORT": "{rest}",
        },
        ready_path="/readyz",
        cases=cases,
        other_ports=("rest", "grpc"),
    )


def long_stream() -> Case:
    """Requests that take long, beside which others are answered."""
    body = json.dumps({"instances": one_row(), "num_samples": LONG_DRAWS, "seed": 1})
    return Case(f"/uncertainty T={LONG_DRAWS:,}", "/uncertainty", body, port="rest")


def _open_inference(many: np.ndarray) -> list[Case]:
    path = "/v2/models/sonar/infer"
    tensor = {"name": "features", "shape": list(many.shape), "datatype": "FP32"}
    as_json = json.dumps({"inputs": [{**tensor, "data": many.ravel().tolist()}]})
    raw = many.astype("<f4").tobytes()
    head = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return [
        Case(named(BARE, MANY_JSON), path, as_json, rows=MANY_ROWS, port="rest"),
        Case(named(BARE, MANY_BINARY), path, head + raw, headers, rows=MANY_ROWS, port="rest"),
    ]


def _grpc(many: np.ndarray) -> list[Case]:
    cases = []
    for name, values in ((GRPC, many[:1]), (MANY_GRPC, many)):
        asked = predict_pb2.PredictRequest()
        asked.model_spec.name = "sonar"
        # Raw bytes, not a list of floats.
        asked.inputs["features"].CopyFrom(tf.make_tensor_proto(values))
        body = asked.SerializeToString()
        cases.append(Case(name, GRPC_PREDICT, body, {}, rows=len(values), port="grpc", speaks_grpc=True))
    return cases


def plain(artifact: Path) -> Server:
    return Server(
        name=PLAIN,
        command=[
            *(sys.executable, "-m", "bentoml", "serve", "benchmarks.server.plain:Plain"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ],
        environment={"BENCHMARK_ARTIFACT": str(artifact), "BENTOML_DO_NOT_TRACK": "True"},
        ready_path="/readyz",
        cases=[Case(PLAIN, "/predict", json.dumps({"instances": one_row()}))],
    )


def constant() -> Server:
    return Server(
        name=CONSTANT,
        command=[
            *(sys.executable, "-m", "uvicorn", "benchmarks.server.constant:app", "--host", "127.0.0.1"),
            *("--port", "{port}", "--no-access-log", "--log-level", "warning"),
        ],
        environment={},
        ready_path="/readyz",
        cases=[Case(CONSTANT, "/predict", json.dumps({"instances": one_row()}))],
    )


def mlserver(python: Path, artifact: Path, folder: Path) -> Server:
    """python: of an environment with mlserver and tensorflow. folder: where its settings are written."""
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "mlserver_runtime.py", folder)
    settings = {
        "name": "sonar",
        "implementation": "mlserver_runtime.SavedModelRuntime",
        "max_batch_size": 100,
        "max_batch_time": 0.005,
    }
    (folder / "model-settings.json").write_text(json.dumps(settings))
    tensor = {"name": "features", "shape": [1, 60], "datatype": "FP32", "data": one_row()[0]}
    return Server(
        name=MLSERVER,
        # It cannot be run as a module; its command stands beside its Python.
        command=[str(python.parent / "mlserver"), "start", str(folder)],
        environment={
            "BENCHMARK_ARTIFACT": str(artifact),
            "PYTHONPATH": str(folder),
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_HTTP_PORT": "{port}",
            "MLSERVER_GRPC_PORT": "{grpc}",
            "MLSERVER_METRICS_PORT": "{metrics}",
            # In the process itself: a worker beside it would share its only core.
            "MLSERVER_PARALLEL_WORKERS": "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        ready_path="/v2/health/ready",
        cases=[Case(MLSERVER, "/v2/models/sonar/infer", json.dumps({"inputs": [tensor]}), {"Content-Type": JSON_TYPE})],
        other_ports=("grpc", "metrics"),
    )
