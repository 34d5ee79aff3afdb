"""A built Bento serves from any folder, without the repository and without the project."""

import os
import subprocess
import sys

import httpx
import numpy as np

from tests.process import BENTOML_SERVE, ROOT, bentoml_serve

# In a process of its own, which reads BENTOML_HOME anew.
IMPORT = """
import pathlib, sys
from models.bento_store import import_artifact
import_artifact(pathlib.Path(sys.argv[1]))
"""


def test_a_bento_serves_from_another_folder(trained, tmp_path):
    home = str(tmp_path / "bentoml")
    store = os.environ | {"BENTOML_HOME": home}
    subprocess.run([sys.executable, "-c", IMPORT, str(trained.folder)], cwd=ROOT, env=store, check=True)
    built = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--output", "tag"],
        cwd=ROOT,
        env=store,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    tag = built.stdout.strip().removeprefix("__tag__:")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with bentoml_serve(
        None, tmp_path / "log", command=(*BENTOML_SERVE, tag), folder=elsewhere, BENTOML_HOME=home
    ) as served:
        answer = httpx.post(f"{served.url}/predict", json={"instances": trained.instances}, timeout=60).json()
    rock = [row["probabilities"]["rock"] for row in answer["predictions"]]
    np.testing.assert_allclose(rock, trained.model.predict(trained.rows, verbose=0)[:, 0], atol=1e-6)
