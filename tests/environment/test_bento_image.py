"""The Bentos' generated Dockerfiles, carried out without a container engine: the same files in a fresh folder, the
environment of the lock file, the same variables and entry point; and the server that comes of it is asked.

The environment is `.venv-serving`, once it is shown that the Bento's requirements are that environment's lock file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import tensorflow as tf

from loadtest import rows
from models import contract
from tests import bentos
from tests.process import ROOT, bentoml_serve

ENVIRONMENT = ROOT / ".venv-serving"
LOCKS = {"cpu": "serving.lock", "gpu": "serving-gpu.lock"}
OPTIONS = {"cpu": (), "gpu": ("-f", "bentofile-gpu.yaml")}
VENV_OWN = ("pip", "setuptools")
INSTALLED = """
import importlib.metadata, json
print(json.dumps({d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}))
"""


@pytest.fixture(scope="module", params=LOCKS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def image(kind, trained_repository, tmp_path_factory) -> bentos.Image:
    folder = tmp_path_factory.mktemp(f"image-{kind}")
    tag = bentos.build(trained_repository / "sonar" / "1", folder / "bentoml", *OPTIONS[kind])
    source = bentos.context(tag, folder / "bentoml", folder / "context")
    return bentos.Image.of(source, folder / "root")


def lock(kind: str) -> dict[str, frozenset[str]]:
    return bentos.pins((ROOT / "requirements" / LOCKS[kind]).read_text())


def test_it_installs_the_lock_file_every_hash_of_it(kind, image):
    assert image.base == f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    assert image.installs
    installed = bentos.pins(image.place("env/python/requirements.txt").read_text())
    assert len(installed) > 50
    assert all(installed.values())
    assert installed == lock(kind)


def test_the_model_is_inside_and_nothing_of_training(image):
    files = [path for path in image.place(".").rglob("*") if path.is_file()]
    model = [path for path in files if path.is_relative_to(image.place("models"))]
    assert {"saved_model.pb", "manifest.json"} <= {path.name for path in model}
    own = {path.relative_to(image.place("src")).parts[0] for path in files if path.is_relative_to(image.place("src"))}
    assert own <= {"serving", "models", "requirements", "README.md", "LICENSE", "bentofile.yaml"}
    assert sum(path.stat().st_size for path in files if path not in model) < 3e6


def test_gpu_lock_is_the_other_with_cuda_and_nothing_else():
    added = lock("gpu").keys() - lock("cpu").keys()
    assert len(added) >= 10
    assert all(name.startswith("nvidia-") for name in added), added
    assert lock("cpu").items() <= lock("gpu").items()


@pytest.mark.parametrize("name", ["all.lock", *LOCKS.values()])
def test_lock_files_name_no_package_index(name):
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    assert not [line for line in text.splitlines() if line.startswith("-")]


def test_the_server_of_the_image_answers(kind, image, trained_repository, tmp_path):
    _check_environment()
    _put_in_place(image)
    variables = {name: image.outside(name) for name in image.env}
    command = [str(image.place(part)) for part in image.entrypoint]
    if kind == "gpu":
        _is_refused_without_a_gpu(command, image, variables)
        return
    features = np.array(rows.read_csv(rows.SONAR, rows.SONAR_TARGET)[1], np.float32)
    with bentoml_serve(
        None, tmp_path / "log", python=Path("/bin/bash"), command=command, folder=image.place("."), **variables
    ) as served:
        answer = httpx.post(f"{served.url}/uncertainty", json={"instances": features.tolist()}, timeout=60)
    assert answer.status_code == 200, answer.text[:500]
    artifact = trained_repository / "sonar" / "1"
    wanted = tf.saved_model.load(str(artifact)).signatures[contract.MC_PREDICT](features=features)
    found = [row["mutual_information"] for row in answer.json()["predictions"]]
    np.testing.assert_allclose(found, wanted["mutual_information"], atol=2e-6)


def _check_environment() -> None:
    """What is installed has the versions of the lock file."""
    done = subprocess.run([_python(), "-c", INSTALLED], capture_output=True, text=True, check=True)
    installed = {name: version for name, version in json.loads(done.stdout).items() if name not in VENV_OWN}
    assert len(installed) > 50
    # One package may have a version for each Python.
    pinned = {pin.partition(";")[0] for pin in lock("cpu")}
    assert {f"{name}=={version}" for name, version in installed.items()} <= pinned


def _is_refused_without_a_gpu(command: list[str], image: bentos.Image, variables: dict[str, str]) -> None:
    """The image ends at once, rather than answer slowly."""
    assert variables["DROPSERVE_DEVICE"] == "gpu"
    done = subprocess.run(
        ["/bin/bash", *command],
        cwd=image.place("."),
        env=os.environ | variables | {"CUDA_VISIBLE_DEVICES": "", "DROPSERVE_REST_PORT": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "dropserve cannot start: DROPSERVE_DEVICE=gpu: " in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def _python() -> Path:
    if not ENVIRONMENT.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{ENVIRONMENT} is not there: `make serving-env`")
        pytest.skip("`make serving-env` makes the environment that this tests")
    return ENVIRONMENT / "bin" / "python"


def _put_in_place(image: bentos.Image) -> None:
    """The environment, where the image has it."""
    place = image.place(image.env["VIRTUAL_ENV"])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(ENVIRONMENT.resolve())
