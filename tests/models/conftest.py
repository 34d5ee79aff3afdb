import keras
import numpy as np
import pytest

from models.artifact import publish
from models.contract import Feature
from tests.models import networks
from tests.models.artifacts import Artifact
from training.datasets import load


@pytest.fixture(scope="session")
def sonar_rows() -> np.ndarray:
    """All 208 rows, float32 [208, 60]."""
    return load("sonar").x


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def sonar_model(sonar_rows) -> keras.Model:
    return networks.sonar_net(sonar_rows)


@pytest.fixture(scope="session")
def sonar(sonar_model, sonar_rows, repository) -> Artifact:
    folder = publish(
        sonar_model,
        name="sonar",
        repository=repository,
        labels=["mine", "rock"],
        features=[Feature(name=f"band_{number:02}", kind="numeric") for number in range(1, 61)],
        examples=sonar_rows[:2].tolist(),
    )
    return Artifact(folder)


@pytest.fixture(scope="session")
def tiny(repository) -> Artifact:
    return Artifact(publish(networks.tiny_net(), name="tiny", repository=repository))


@pytest.fixture(scope="session")
def norms(repository) -> Artifact:
    return Artifact(publish(networks.batch_norm_net(), name="norms", repository=repository))


@pytest.fixture(scope="session")
def branches(repository) -> Artifact:
    return Artifact(publish(networks.regression_net(), name="branches", repository=repository))
