"""For the whole suite: no settings and no model store of the user's; a server that the tests share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything is imported: BentoML reads these once.
for _name in [name for name in os.environ if name.startswith("DROPSERVE_")]:
    del os.environ[_name]
# Several servers run at once, and nobody outside of this machine has a say in tests.
os.environ |= {"DROPSERVE_REST_PORT": "0", "DROPSERVE_GRPC_PORT": "0", "DROPSERVE_HOST": "127.0.0.1"}
os.environ["BENTOML_HOME"] = tempfile.mkdtemp(prefix="dropserve-tests-bentoml-")
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
# Started in the background by a shell, pytest ignores Ctrl-C, and so would all that it starts: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# TensorFlow's graphs are hundreds of thousands of objects that stay; to look through them as often as Python usually
# does takes a tenth of the time.
gc.set_threshold(50_000, 5, 5)
# The command line chooses it, and its tests want to see that.
os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)

import pytest  # noqa: E402

from tests.process import ROOT, Served, bentoml_serve  # noqa: E402


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["BENTOML_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def trained_repository(tmp_path_factory) -> Path:
    """A model repository with what `dropserve train sonar` publishes."""
    repository = tmp_path_factory.mktemp("trained") / "artifacts"
    command = [sys.executable, "-m", "dropserve", "train", "sonar", "--repository", str(repository)]
    subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    return repository


@pytest.fixture(scope="session")
def sonar_server(trained_repository, tmp_path_factory) -> Iterator[Served]:
    """`bentoml serve` from the project root, over `trained_repository`; shared, so leave it as it was."""
    with bentoml_serve(trained_repository, tmp_path_factory.mktemp("sonar-server") / "log") as served:
        yield served
