"""Starting: what cannot succeed exits at once, with one clear line and a code that is not 0."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from models.contract import SAVED_MODEL_FILE, file_digest, manifest_bytes, read_manifest
from serving.errors import StartError
from serving.settings import read_settings
from tests.process import (
    BENTOML_SERVE,
    DROPSERVE_SERVE,
    ROOT,
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    bentoml_serve,
    free_port,
    stop,
)
from tests.serving.versions import publish_as, wait_for

both_commands = pytest.mark.parametrize("command", [BENTOML_SERVE, DROPSERVE_SERVE], ids=["bentoml", "dropserve"])


def environment(repository: Path, **settings: str) -> dict[str, str]:
    return os.environ | {"DROPSERVE_REPOSITORY": str(repository)} | settings


def failed_start(command: Sequence[str], repository: Path, port: int | None = None, /, **settings: str) -> str:
    """The one line of ours on standard error; the exit code is checked, and that nothing was loaded."""
    ran = subprocess.run(
        [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port or free_port())],
        cwd=ROOT,
        env=environment(repository, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith(("dropserve cannot start: ", "error: "))]
    assert len(lines) == 1, ran.stderr
    assert "version ready" not in ran.stdout
    return lines[0]


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A repository of this test's own."""
    shutil.copytree(trained.repository, tmp_path / "artifacts")
    return tmp_path / "artifacts"


@both_commands
def test_without_a_model_the_start_is_refused(command, tmp_path):
    assert f"{tmp_path}: no model here" in failed_start(command, tmp_path)


@both_commands
def test_an_unknown_model_is_refused(command, trained):
    line = failed_start(command, trained.repository, DROPSERVE_MODEL="titanic")
    assert "no model 'titanic', wanted one of sonar" in line


@both_commands
def test_an_altered_file_is_refused_by_name(command, copy):
    path = next(copy.glob("sonar/1/variables/variables.data-*"))
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    assert f"{path}: altered since it was published" in failed_start(command, copy)


def test_a_graph_that_tensorflow_cannot_load_ends_the_server_too(copy):
    """The digests are right, so that only the worker can find out."""
    folder = copy / "sonar" / "1"
    manifest = read_manifest(folder)
    (folder / SAVED_MODEL_FILE).write_bytes(b"no graph")
    files = {**manifest.files, SAVED_MODEL_FILE: file_digest(folder / SAVED_MODEL_FILE)}
    resealed = manifest_bytes(manifest.model_copy(update={"files": files}))
    (folder / "manifest.json").write_bytes(resealed)
    assert "TensorFlow cannot load the graph" in failed_start(BENTOML_SERVE, copy)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("MAX_ROWS", "many"), ("DEVICE", "tpu"), ("MAX_NUM_SAMPLES", "1"), ("DEADLINE_MS", "-1"), ("GRACE_S", "inf")],
)
def test_a_wrong_setting_is_refused_by_name(trained, setting, value):
    assert f"DROPSERVE_{setting}='{value}'" in failed_start(
        BENTOML_SERVE, trained.repository, **{f"DROPSERVE_{setting}": value}
    )


def test_a_gpu_that_is_not_there_is_refused(trained):
    line = failed_start(BENTOML_SERVE, trained.repository, DROPSERVE_DEVICE="gpu", CUDA_VISIBLE_DEVICES="")
    assert "no NVIDIA GPU found" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # OpenTelemetry's own refusal, in the worker, of a queue that no setting of ours describes.
        ({"DROPSERVE_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "unexpected ValueError: "),
        ({"DROPSERVE_REST_PORT": "18501", "DROPSERVE_GRPC_PORT": "0", "DROPSERVE_HOST": "a..b"}, "is no host name"),
        ({"DROPSERVE_REST_PORT": "0", "DROPSERVE_GRPC_PORT": "18500", "DROPSERVE_HOST": "a..b"}, "is no host name"),
    ],
    ids=["unexpected", "rest", "grpc"],
)
def test_whatever_a_worker_stumbles_over_ends_the_server_too(trained, settings, said):
    assert said in failed_start(BENTOML_SERVE, trained.repository, **settings)


@pytest.mark.parametrize(
    ("variable", "found"),
    [
        ("DROPSERVE_MAX_ROWS", "0"),
        ("DROPSERVE_MAX_NUM_SAMPLES", "2147483648"),
        ("DROPSERVE_OTLP_ENDPOINT", "collector:4318"),
        ("DROPSERVE_ACCESS_LOG", "some"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told_by_its_variable(monkeypatch, variable, found):
    monkeypatch.setenv(variable, found)
    with pytest.raises(StartError) as refusal:
        read_settings()
    assert str(refusal.value).startswith(f"{variable}='{found}': ")


def test_an_endpoint_for_traces_without_the_exporter_is_refused(trained, tmp_path):
    """The extra `otel` is here: a folder that comes first stands in for its absence."""
    exporter = tmp_path / "opentelemetry" / "exporter"
    exporter.mkdir(parents=True)
    (exporter / "__init__.py").write_text("raise ImportError('no exporter')")
    line = failed_start(
        BENTOML_SERVE, trained.repository, DROPSERVE_OTLP_ENDPOINT="http://127.0.0.1:9", PYTHONPATH=str(tmp_path)
    )
    assert "no OpenTelemetry exporter here" in line
    assert "dropserve[otel]" in line


def test_a_port_that_is_taken_is_refused(trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = subprocess.run(
            [sys.executable, *DROPSERVE_SERVE, "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=environment(trained.repository),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ran.returncode == 2
    assert ran.stderr.strip() == (
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port or --host"
    )


@both_commands
def test_two_ports_that_are_one_are_refused_before_anything_is_loaded(command, trained):
    port = str(free_port())
    line = failed_start(command, trained.repository, DROPSERVE_REST_PORT=port, DROPSERVE_GRPC_PORT=port)
    assert f"port {port} is REST's already, and cannot be gRPC's; choose another DROPSERVE_GRPC_PORT" in line


@both_commands
@pytest.mark.parametrize("protocol", ["REST", "gRPC"])
def test_a_port_that_is_bentoml_s_own_is_refused_before_anything_is_loaded(command, trained, protocol):
    port = free_port()
    line = failed_start(command, trained.repository, port, **{f"DROPSERVE_{protocol.upper()}_PORT": str(port)})
    assert f"cannot listen on 127.0.0.1:{port} for {protocol} (Address already in use)" in line


@both_commands
def test_it_serves_from_the_project_root_and_says_that_there_is_no_gpu(command, trained, tmp_path):
    log = tmp_path / "log"
    with bentoml_serve(trained.repository, log, command=command, CUDA_VISIBLE_DEVICES="") as served:
        answer = httpx.post(f"{served.url}/predict", json={"instances": trained.instances[:1]}, timeout=60)
    assert answer.status_code == 200
    assert log.read_text().count("no GPU found: running on CPU") == 1


@both_commands
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_server_that_is_told_to_end_while_it_loads_loads_no_more(command, number, trained, tmp_path):
    """So many versions that they would load for a while."""
    versions = 8
    for version in range(1, versions + 1):
        publish_as(trained.folder, tmp_path, version)
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = psutil.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(free_port())],
            cwd=ROOT,
            env=environment(tmp_path, DROPSERVE_KEEP_VERSIONS=str(versions)),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "version ready" in log.read_text(), "the first version")
        family = process.children(recursive=True)
        # The terminal sends Ctrl-C to all of them.
        os.kill(process.pid, number) if number is signal.SIGTERM else os.killpg(process.pid, number)
        assert process.wait(START_TIMEOUT_S) == 0
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    finally:
        stop(process)
    said = log.read_text()
    assert said.count("version ready") < versions
    assert "Traceback" not in said
    assert [child for child in family if child.is_running()] == []
