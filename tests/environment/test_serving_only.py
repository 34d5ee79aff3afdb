"""The artifact is all that passes from training to serving: a server without anything of training answers the same.

The environment is `.venv-serving`, made by `make serving-env` from requirements/serving.lock; CI makes it, and fails
without it. The folder holds what the server may import of this project, and no more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest
import tensorflow as tf

from loadtest import rows
from models import contract
from tests.process import ROOT, bentoml_serve

PYTHON = ROOT / ".venv-serving" / "bin" / "python"
NOT_FOR_SERVING = ["sklearn", "scipy", "pandas", "matplotlib", "locust", "pytest", "hypothesis", "mypy"]
NOT_OF_SERVING = ["training", "loadtest", "dropserve", "models.engine", "models.artifact"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The server's files: `serving`, and of `models` the contract alone."""
    if not PYTHON.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{PYTHON} is not there: `make serving-env`")
        pytest.skip("`make serving-env` makes the environment that this tests")
    folder = tmp_path_factory.mktemp("serving-only")
    shutil.copytree(ROOT / "serving", folder / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "bentofile.yaml", folder)
    (folder / "models").mkdir()
    for name in ("__init__.py", "contract.py"):
        shutil.copy(ROOT / "models" / name, folder / "models")
    return folder


@pytest.mark.parametrize("module", NOT_FOR_SERVING + NOT_OF_SERVING)
def test_nothing_of_training_can_be_imported(folder, module):
    done = subprocess.run([PYTHON, "-c", f"import {module}"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_server_answers_as_the_signatures_do(folder, trained_repository, tmp_path):
    features = np.array(rows.read_csv(rows.SONAR, rows.SONAR_TARGET)[1], np.float32)
    asked = {"instances": features.tolist()}
    drawn = {"num_samples": 200, "seed": 7}
    # The model store is empty: the repository alone is served.
    with bentoml_serve(
        trained_repository, tmp_path / "log", python=PYTHON, folder=folder, BENTOML_HOME=str(tmp_path / "bentoml")
    ) as served:
        predicted = httpx.post(f"{served.url}/predict", json=asked, timeout=60)
        sampled = httpx.post(f"{served.url}/uncertainty", json=asked | drawn, timeout=60)
    assert (predicted.status_code, sampled.status_code) == (200, 200), (predicted.text[:500], sampled.text[:500])

    artifact = trained_repository / "sonar" / "1"
    signatures = tf.saved_model.load(str(artifact)).signatures
    wanted = signatures[contract.SERVING_DEFAULT](features=features)
    wanted_draws = signatures[contract.MC_SAMPLE](
        features=features, num_samples=tf.constant(200, tf.int32), seed=tf.constant(7, tf.int64)
    )
    labels = contract.verify(artifact).outputs[0].labels
    predictions = json.loads(predicted.text)["predictions"]
    uncertainties = json.loads(sampled.text)["predictions"]
    np.testing.assert_allclose(_by_label(predictions, "probabilities", labels), wanted["probabilities"], atol=1e-6)
    for name in ("probabilities", "std", "standard_error"):
        np.testing.assert_allclose(_by_label(uncertainties, name, labels), wanted_draws[name], atol=1e-6)
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        np.testing.assert_allclose([row[name] for row in uncertainties], wanted_draws[name], atol=2e-6)


def _by_label(predictions, name, labels):
    return [[row[name][label] for label in labels] for row in predictions]
