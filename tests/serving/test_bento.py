"""A built Bento serves from any folder, without the repository and without the project."""

import httpx
import numpy as np

from tests import bentos
from tests.process import BENTOML_SERVE, bentoml_serve


def test_a_bento_serves_from_another_folder(trained, tmp_path):
    home = tmp_path / "bentoml"
    tag = bentos.build(trained.folder, home)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with bentoml_serve(
        None, tmp_path / "log", command=(*BENTOML_SERVE, tag), folder=elsewhere, BENTOML_HOME=str(home)
    ) as served:
        answer = httpx.post(f"{served.url}/predict", json={"instances": trained.instances}, timeout=60).json()
    rock = [row["probabilities"]["rock"] for row in answer["predictions"]]
    np.testing.assert_allclose(rock, trained.model.predict(trained.rows, verbose=0)[:, 0], atol=1e-6)
