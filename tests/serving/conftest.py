"""One trained artifact and one server for all tests of serving: starting a server takes seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import keras
import numpy as np
import pytest

from models.contract import Manifest, read_manifest
from tests.process import Served, bentoml_serve
from training.datasets import load
from training.pipeline import train
from training.plan import plan
from training.progress import Reporter


@dataclass(frozen=True)
class Trained:
    """What `dropserve train sonar` published, briefly trained, and the rows that it may be asked about."""

    repository: Path
    folder: Path
    manifest: Manifest
    model: keras.Model
    rows: np.ndarray
    """All 208 rows, float32 [208, 60]."""

    @property
    def instances(self) -> list[list[float]]:
        return self.rows.tolist()


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    repository = tmp_path_factory.mktemp("artifacts")
    published = train(plan("sonar", repository=repository, seed=0, num_samples=100, epochs=40), Reporter(quiet=True))
    network = published.variants[0].model
    return Trained(repository, published.folder, read_manifest(published.folder), network, load("sonar").x)


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another network on the same data, published as some other repository's version 1."""
    repository = tmp_path_factory.mktemp("other")
    return train(plan("sonar", repository=repository, seed=1, num_samples=100, epochs=2), Reporter(quiet=True))


@pytest.fixture(scope="session")
def server(trained, tmp_path_factory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("server") / "log"
    with bentoml_serve(trained.repository, log, DROPSERVE_MAX_BODY_BYTES=str(2**20)) as served:
        yield served


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as connection:
        yield connection
