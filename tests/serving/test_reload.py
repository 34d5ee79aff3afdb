"""Versions come and go under a running server, and nobody notices but by the version in the answer."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.process import ROOT, bentoml_serve
from tests.serving.versions import publish_as, wait_for

# Often enough that a test need not wait.
POLL_S = "0.1"


@dataclass
class Repository:
    """A repository whose odd versions are one network and whose even versions are another."""

    root: Path
    folders: tuple[Path, Path]
    rock: tuple[np.ndarray, np.ndarray]
    """Both networks' probability of `rock` for the first rows."""
    instances: list[list[float]]
    versions: list[int] = field(default_factory=list)

    def publish(self) -> int:
        version = max(self.versions, default=0) + 1
        publish_as(self.folders[version % 2 == 0], self.root, version)
        self.versions.append(version)
        return version

    @property
    def body(self) -> dict:
        return {"instances": self.instances}

    def assert_from_one_version(self, answer: dict) -> int:
        """The version that the answer says it is from, which all of its numbers must be from."""
        version = int(answer["model"]["version"])
        found = [row["probabilities"]["rock"] for row in answer["predictions"]]
        np.testing.assert_allclose(found, self.rock[version % 2 == 0], atol=1e-6)
        return version


@pytest.fixture
def repository(trained, other, tmp_path) -> Repository:
    rows = trained.rows[:3]
    networks = (trained.model, other.variants[0].model)
    rock = tuple(network.predict(rows, verbose=0)[:, 0] for network in networks)
    assert np.abs(rock[0] - rock[1]).max() > 0.01
    made = Repository(tmp_path / "artifacts", (trained.folder, other.folder), rock, rows.tolist())
    made.publish()
    return made


@pytest.fixture
def served(repository, tmp_path) -> Iterator[httpx.Client]:
    with (
        bentoml_serve(repository.root, tmp_path / "log", DROPSERVE_POLL_S=POLL_S) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        yield client


def version_of(client: httpx.Client, repository: Repository) -> int:
    return repository.assert_from_one_version(client.post("/predict", json=repository.body).raise_for_status().json())


def is_current(client: httpx.Client, repository: Repository, version: int) -> bool:
    return version_of(client, repository) == version


@dataclass
class Load:
    """What users saw who kept asking, each in turn: versions by user, and whatever was not a 200."""

    seen: list[list[int]]
    failures: list[str] = field(default_factory=list)

    def lasts(self, answers: int) -> bool:
        return all(len(versions) >= answers for versions in self.seen)


@contextlib.contextmanager
def load(served: httpx.Client, repository: Repository) -> Iterator[Load]:
    """Two users of `/predict` and one of `/uncertainty`, for as long as the block takes."""
    finished = threading.Event()
    paths = ["/predict", "/predict", "/uncertainty"]
    found = Load([[] for _ in paths])

    def user(versions: list[int], path: str) -> None:
        with httpx.Client(base_url=served.base_url, timeout=60) as client:
            while not finished.is_set():
                try:
                    answer = client.post(path, json=repository.body)
                    answer.raise_for_status()
                    if path == "/predict":
                        versions.append(repository.assert_from_one_version(answer.json()))
                    else:
                        versions.append(int(answer.json()["model"]["version"]))
                except (httpx.HTTPError, AssertionError) as error:
                    found.failures.append(repr(error))
                # Two cores have to load the versions, too.
                time.sleep(0.005)

    users = [
        threading.Thread(target=user, args=(versions, path)) for versions, path in zip(found.seen, paths, strict=True)
    ]
    for thread in users:
        thread.start()
    try:
        yield found
    finally:
        finished.set()
        for thread in users:
            thread.join()


@pytest.mark.alone
def test_ten_version_changes_under_load_disturb_no_request(repository, served):
    with load(served, repository) as users:
        for _ in range(10):
            version = repository.publish()
            wait_for(partial(is_current, served, repository, version), f"version {version}")
    assert users.failures == []
    for versions in users.seen:
        assert versions == sorted(versions)
        assert len(set(versions)) > 5


def status_of(client: httpx.Client, version: int) -> tuple[str, str]:
    """State and error of a version; ("", "") while it is unknown."""
    for found in client.get("/v1/models/sonar").raise_for_status().json()["model_version_status"]:
        if found["version"] == str(version):
            return found["state"], found["status"]["error_message"]
    return "", ""


def is_refused(client: httpx.Client, version: int, reason: str) -> bool:
    """For this reason: what is seen of a version while it is copied may be refused for others first."""
    state, error = status_of(client, version)
    return state == "END" and reason in error


@pytest.mark.alone
def test_broken_and_deleted_versions_under_load_disturb_no_request(repository, served, tmp_path):
    """Half copied, corrupt, and taken away while it answers: the old one goes on, and what comes next is taken."""
    elsewhere, here = tmp_path / "elsewhere", repository.root / "sonar"
    with load(served, repository) as users:
        half = publish_as(repository.folders[1], elsewhere, 2)
        shutil.copytree(half, here / "2", ignore=shutil.ignore_patterns("variables"))
        wait_for(partial(is_refused, served, 2, "missing"), "the refusal of version 2")
        corrupt = publish_as(repository.folders[0], elsewhere, 3)
        graph = corrupt / "saved_model.pb"
        graph.write_bytes(graph.read_bytes()[::-1])
        shutil.copytree(corrupt, here / "3")
        wait_for(partial(is_refused, served, 3, "altered since"), "the refusal of version 3")
        wait_for(partial(users.lasts, 20), "answers")
        assert {version for versions in users.seen for version in versions} == {1}
        publish_as(repository.folders[1], repository.root, 4)
        wait_for(partial(is_current, served, repository, 4), "version 4")
        shutil.rmtree(here / "4")
        wait_for(partial(is_current, served, repository, 1), "version 1 again")
        publish_as(repository.folders[1], repository.root, 6)
        wait_for(partial(is_current, served, repository, 6), "version 6")
        # All of it: what is loaded needs no files.
        shutil.rmtree(repository.root)
        answered = len(users.seen[0])
        wait_for(partial(users.lasts, answered + 20), "answers without any file")
    assert users.failures == []
    assert {version for versions in users.seen for version in versions} == {1, 4, 6}


# A publisher that may write no file longer than its first argument, as on a disk that is full.
FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
import dropserve
dropserve.main()
"""


# Keras's file is cut short, then TensorFlow's variables.
@pytest.mark.alone
@pytest.mark.parametrize("longest_file", [20_000, 100_000])
def test_a_disk_that_is_full_while_a_version_is_published_changes_nothing(repository, served, longest_file):
    before = sorted(repository.root.rglob("*"))
    with load(served, repository) as users:
        publisher = subprocess.run(
            [
                *(sys.executable, "-c", FULL_DISK, str(longest_file)),
                *("package", str(repository.folders[0] / "model.keras"), "--name", "sonar"),
                *("--repository", str(repository.root)),
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        wait_for(partial(users.lasts, 20), "answers")
    assert publisher.returncode == 2, publisher.stderr
    assert "Traceback" not in publisher.stderr
    last = publisher.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large" in last
    assert sorted(repository.root.rglob("*")) == before
    assert users.failures == []
    assert {version for versions in users.seen for version in versions} == {1}


def test_a_broken_version_leaves_the_old_one_answering_until_it_is_repaired(repository, served):
    source = repository.folders[1]
    broken = repository.root / "sonar" / "2"
    staging = publish_as(source, repository.root.parent / "elsewhere", 2)
    # Half copied: the manifest is there, the graph is not yet.
    broken.mkdir()
    shutil.copy(staging / "manifest.json", broken)
    wait_for(partial(is_refused, served, 2, "missing"), "the refusal of version 2")
    assert version_of(served, repository) == 1
    # The copy goes on, and is complete.
    shutil.copytree(staging, broken, dirs_exist_ok=True)
    wait_for(lambda: version_of(served, repository) == 2, "version 2")
    # An altered one.
    third = publish_as(source, repository.root.parent / "elsewhere", 3)
    data = next(third.glob("variables/variables.data-*"))
    data.write_bytes(bytes(byte ^ 255 for byte in data.read_bytes()))
    shutil.copytree(third, repository.root / "sonar" / "3")
    wait_for(partial(is_refused, served, 3, "altered since"), "the refusal of version 3")
    assert version_of(served, repository) == 2


def test_a_version_that_is_deleted_gives_way_to_an_older_one_and_the_last_one_stays(repository, served):
    repository.publish()
    wait_for(lambda: version_of(served, repository) == 2, "version 2")
    shutil.rmtree(repository.root / "sonar" / "2")
    wait_for(lambda: version_of(served, repository) == 1, "version 1")
    shutil.rmtree(repository.root / "sonar")
    for _ in range(20):
        assert version_of(served, repository) == 1
    shutil.rmtree(repository.root)
    assert version_of(served, repository) == 1


def test_labels_pins_and_canaries_follow_the_file(repository, served):
    routing = repository.root / "sonar" / "routing.json"
    for _ in range(3):
        repository.publish()
    wait_for(lambda: version_of(served, repository) == 4, "version 4")

    def labelled(label: str) -> httpx.Response:
        return served.post(f"/v1/models/sonar/labels/{label}:predict", json=repository.body)

    assert labelled("stable").status_code == 400
    # A label keeps an old version loaded; one that is not there moves nowhere.
    routing.write_text(json.dumps({"labels": {"stable": 1, "canary": 3, "next": 9}}))
    wait_for(lambda: labelled("stable").status_code == 200, "label stable")
    wait_for(lambda: labelled("canary").status_code == 200, "label canary")
    assert labelled("next").status_code == 400
    for label, version in (("stable", 1), ("canary", 3)):
        found = [row[1] for row in labelled(label).json()["predictions"]]
        np.testing.assert_allclose(found, repository.rock[version % 2 == 0], atol=1e-6)
    # A pin answers what names no version.
    routing.write_text(json.dumps({"pin": 2, "canary": {"version": 3, "share": 0.4}}))
    wait_for(lambda: version_of(served, repository) in (2, 3), "the pin")
    bodies = [{"instances": [[index / 500, *repository.instances[0][1:]]]} for index in range(200)]
    first = [served.post("/predict", json=body).json()["model"]["version"] for body in bodies]
    again = [served.post("/predict", json=body).json()["model"]["version"] for body in bodies]
    assert first == again
    assert set(first) == {"2", "3"}
    assert 40 <= first.count("3") <= 120
    # A file that cannot be read changes nothing.
    routing.write_text('{"pin": "two"}')
    for _ in range(20):
        assert [served.post("/predict", json=body).json()["model"]["version"] for body in bodies[:5]] == first[:5]
    routing.unlink()
    wait_for(lambda: version_of(served, repository) == 4, "version 4 again")


def test_a_label_or_a_pin_to_a_broken_version_leaves_the_good_one(repository, served):
    """Versions 1, labelled, and 2, pinned, are no newest ones: only the routing keeps them."""
    routing = repository.root / "sonar" / "routing.json"
    for _ in range(4):
        repository.publish()
    (repository.root / "sonar" / "3" / "saved_model.pb").write_bytes(b"no graph")
    wait_for(lambda: version_of(served, repository) == 5, "version 5")

    def labelled() -> str:
        answer = served.get("/v1/models/sonar/labels/stable").json()
        return answer["model_version_status"][0]["version"] if "error" not in answer else answer["error"]

    routing.write_text(json.dumps({"labels": {"stable": 1}, "pin": 2}))
    wait_for(lambda: version_of(served, repository) == 2 and labelled() == "1", "the pin and the label")
    routing.write_text(json.dumps({"labels": {"stable": 3}, "pin": 3}))
    wait_for(lambda: status_of(served, 3)[0] == "END", "the refusal of version 3")
    # Several looks at the repository.
    for _ in range(20):
        assert (version_of(served, repository), labelled()) == (2, "1")
        time.sleep(float(POLL_S) / 2)


def test_a_start_passes_over_a_broken_newest_version(repository, tmp_path):
    repository.publish()
    (repository.root / "sonar" / "2" / "saved_model.pb").unlink()
    with bentoml_serve(repository.root, tmp_path / "log", DROPSERVE_POLL_S=POLL_S) as served:
        answer = httpx.post(f"{served.url}/predict", json=repository.body, timeout=60).json()
    assert repository.assert_from_one_version(answer) == 1
    assert "saved_model.pb: missing" in (tmp_path / "log").read_text()


def test_a_new_model_is_served_without_a_restart_and_the_default_stays(repository, served):
    publish_as(repository.folders[1], repository.root, 1, name="second")
    wait_for(lambda: "AVAILABLE" in served.get("/v1/models/second").text, "the second model")
    answer = served.post("/v1/models/second:predict", json=repository.body).raise_for_status().json()
    np.testing.assert_allclose([row[1] for row in answer["predictions"]], repository.rock[1], atol=1e-6)
    assert version_of(served, repository) == 1


def test_a_model_that_is_loading_is_told_so_and_not_that_there_is_none(repository, served):
    """By the Open Inference Protocol; TensorFlow Serving itself has not found it."""
    tensor = {"name": "features", "shape": [1, 60], "datatype": "FP32", "data": repository.body["instances"][0]}
    seen: dict[int, httpx.Response] = {}
    by_tensorflow_serving: dict[int, str] = {}

    def answers() -> bool:
        answer = served.post("/v2/models/second/infer", json={"inputs": [tensor]})
        other = served.post("/v1/models/second:predict", json={"instances": repository.body["instances"][:1]})
        by_tensorflow_serving[other.status_code] = other.text
        return seen.setdefault(answer.status_code, answer).status_code == 200

    publish_as(repository.folders[1], repository.root, 1, name="second")
    wait_for(answers, "the second model")
    assert seen.keys() <= {404, 503, 200}
    assert seen[503].json()["error"] == 'model "second": its first version is loading, try again later'
    assert seen[503].headers["retry-after"] == "1"
    assert by_tensorflow_serving.keys() <= {404, 200}
    assert "Servable not found for request: Latest(second)" in by_tensorflow_serving[404]


def test_with_several_models_a_path_without_a_name_needs_a_choice(repository, tmp_path):
    publish_as(repository.folders[1], repository.root, 1, name="second")
    with bentoml_serve(repository.root, tmp_path / "log") as served:
        refused = httpx.post(f"{served.url}/predict", json=repository.body, timeout=60)
        named = httpx.post(f"{served.url}/v1/models/second:predict", json=repository.body, timeout=60)
    assert refused.status_code == 404
    assert "second, sonar" in refused.json()["error"]
    assert named.status_code == 200
    with bentoml_serve(repository.root, tmp_path / "log", DROPSERVE_MODEL="second") as served:
        chosen = httpx.post(f"{served.url}/predict", json=repository.body, timeout=60)
    assert chosen.json()["model"]["name"] == "second"
