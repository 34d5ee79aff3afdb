"""`dropserve route` and shadow traffic: what is written, what a running server makes of it, what it says of both."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.process import ROOT, bentoml_serve
from tests.serving.samples import Samples, samples, total
from tests.serving.versions import publish_as, wait_for


@pytest.fixture(scope="module")
def root(trained, other, tmp_path_factory) -> Path:
    """Versions 1 and 2 are one network, version 3 is another."""
    repository = tmp_path_factory.mktemp("routed")
    for version, folder in ((1, trained.folder), (2, trained.folder), (3, other.folder)):
        publish_as(folder, repository, version)
    return repository


@pytest.fixture(scope="module")
def client(root, tmp_path_factory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("log") / "log"
    with (
        bentoml_serve(root, log, DROPSERVE_POLL_S="0.1", DROPSERVE_KEEP_VERSIONS="3") as served,
        httpx.Client(base_url=served.url, timeout=60) as connection,
    ):
        yield connection


def route(root: Path, *options: str, name: str = "sonar") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dropserve", "route", name, *options, "--repository", str(root)]
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def current(client: httpx.Client, body: dict) -> str:
    return client.post("/predict", json=body).raise_for_status().json()["model"]["version"]


def compared(found: Samples, shadow: str) -> float:
    return total(found, "dropserve_shadow_requests_total", shadow=shadow, result="compared")


def test_a_shadow_is_compared_and_answers_nobody(client, root, trained, other):
    body = {"instances": trained.instances[:50]}
    assert route(root, "--pin", "1", "--shadow", "3").returncode == 0
    wait_for(lambda: current(client, body) == "1", "the pin")
    wait_for(lambda: compared(samples(client), "3") > 0, "the shadow")
    before = samples(client)
    for _ in range(4):
        assert current(client, body) == "1"
    drawn = [client.post("/uncertainty", json=body).json() for _ in range(2)]
    assert {answer["model"]["version"] for answer in drawn} == {"1"}
    # A version that is named is not shadowed.
    assert client.post("/v1/models/sonar/versions/2:predict", json=body).status_code == 200
    wait_for(lambda: compared(samples(client), "3") >= compared(before, "3") + 6, "the comparisons")
    after = samples(client)

    def grown(metric: str, **labels: str) -> float:
        return total(after, metric, **labels) - total(before, metric, **labels)

    assert grown("dropserve_shadow_requests_total") == 6
    # The candidate has worked as much, and nobody got its answers.
    for version in ("1", "3"):
        assert grown("dropserve_rows_total", version=version) == 6 * 50
        assert grown("dropserve_predictive_entropy_count", version=version) == 2 * 50 * (version == "1")
        assert grown("dropserve_requests_total", version=version, operation="uncertainty") == 2 * (version == "1")
    # By both networks themselves, dropout off; `mc_predict` of both by the artifacts' own answers below.
    ours, theirs = (
        np.hstack([1 - rock, rock])
        for rock in (
            network.predict(trained.rows[:50], verbose=0) for network in (trained.model, other.variants[0].model)
        )
    )
    agreeing = int((ours.argmax(1) == theirs.argmax(1)).sum())
    assert 0 < agreeing < 50
    mine = [row["label"] for row in drawn[0]["predictions"]]
    asked = {"inputs": body["instances"], "signature_name": "mc_predict"}
    other_answer = client.post("/v1/models/sonar/versions/3:predict", json=asked).json()["outputs"]["probabilities"]
    labels = trained.manifest.outputs[0].labels
    drawn_agreeing = sum(labels[int(np.argmax(row))] == label for row, label in zip(other_answer, mine, strict=True))
    assert grown("dropserve_shadow_rows_total", agrees="true") == 4 * agreeing + 2 * drawn_agreeing
    assert grown("dropserve_shadow_rows_total") == 6 * 50
    assert grown("dropserve_shadow_difference_count", statistic="predictive_entropy") == 2 * 50
    probabilities = [list(row["probabilities"].values()) for row in drawn[0]["predictions"]]
    difference = (
        4 * np.abs(ours - theirs).max(1).sum() + 2 * np.abs(np.subtract(probabilities, other_answer)).max(1).sum()
    )
    assert grown("dropserve_shadow_difference_sum", statistic="probabilities") == pytest.approx(difference, rel=1e-4)


def test_a_shadow_that_is_the_same_network_always_agrees_on_its_share(client, root, trained):
    body = {"instances": trained.instances[:10]}
    assert route(root, "--shadow", "2:0.5").returncode == 0
    wait_for(lambda: (current(client, body), compared(samples(client), "2"))[1] > 0, "the shadow")
    before = samples(client)
    for _ in range(10):
        current(client, body)
    wait_for(lambda: compared(samples(client), "2") >= compared(before, "2") + 5, "the comparisons")
    after = samples(client)
    assert compared(after, "2") == compared(before, "2") + 5
    assert total(after, "dropserve_shadow_rows_total", shadow="2", agrees="false") == 0
    assert total(after, "dropserve_shadow_difference_sum", shadow="2") == pytest.approx(0, abs=1e-5)


def test_the_command_moves_labels_pins_and_canaries_and_says_what_holds(client, root, trained):
    body = {"instances": trained.instances[:2]}
    told = route(
        root, "--shadow", "none", "--pin", "none", "--label", "stable=1", "--label", "next=3", "--canary", "3:0.25"
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == [
        "sonar: version 2 answers, the newest",
        "  version 3 answers 0.25 of the requests (canary)",
        "  label next is version 3",
        "  label stable is version 1",
    ]
    wait_for(lambda: client.post("/v1/models/sonar/labels/next:predict", json=body).status_code == 200, "the label")
    shown = json.loads(route(root, "--json").stdout)
    assert shown["labels"] == {"stable": 1, "next": 3}
    assert shown["canary"] == {"version": 3, "share": 0.25}
    assert json.loads((root / "sonar" / "routing.json").read_text())["labels"] == shown["labels"]
    assert route(root, "--label", "next=none", "--canary", "none").returncode == 0
    assert json.loads(route(root, "--json").stdout)["labels"] == {"stable": 1}
    wait_for(lambda: client.post("/v1/models/sonar/labels/next:predict", json=body).status_code == 400, "its end")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pin", "9"], "no version '9', wanted one of 1, 2, 3 or none"),
        (["--pin", "9" * 5_000], "wanted one of 1, 2, 3 or none"),
        (["--label", "stable"], "wanted LABEL=VERSION"),
        (["--label", "a b=1"], "in a label"),
        (["--canary", "3"], "wanted VERSION:SHARE"),
        (["--canary", "3:2"], "found share '2', wanted a number above 0 and at most 1"),
        (["--shadow", "3:nan"], "found share 'nan'"),
    ],
)
def test_what_cannot_be_is_refused_by_one_line_and_changes_nothing(root, options, said):
    file = root / "sonar" / "routing.json"
    before = file.read_text() if file.exists() else None
    refused = route(root, *options)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert (file.read_text() if file.exists() else None) == before


def test_a_model_that_is_not_there_is_refused(root):
    refused = route(root, "--pin", "1", name="titanic")
    assert refused.returncode == 2
    assert "no model 'titanic', wanted one of sonar" in refused.stderr


@pytest.fixture
def damaged(trained, tmp_path) -> Path:
    """Versions 1 and 2, and two that no server can load: 3 is cut off, 4 is a copy of another version."""
    for version in (1, 2, 3):
        publish_as(trained.folder, tmp_path, version)
    shutil.copytree(tmp_path / "sonar" / "1", tmp_path / "sonar" / "4")
    file = tmp_path / "sonar" / "3" / "saved_model.pb"
    file.write_bytes(file.read_bytes()[:1_000])
    return tmp_path


DAMAGE = {3: "saved_model.pb: 1000 bytes found", 4: "holds sonar 1, wanted sonar 4"}


@pytest.mark.parametrize("version", DAMAGE)
@pytest.mark.parametrize("options", [["--pin", "{}"], ["--label", "a={}"], ["--canary", "{}:0.1"], ["--shadow", "{}"]])
def test_a_damaged_version_is_given_no_place(damaged, options, version):
    options = [option.format(version) for option in options]
    refused = route(damaged, *options)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: {' '.join(options)}: version {version} cannot be served: {damaged}")
    assert DAMAGE[version] in line
    assert not (damaged / "sonar" / "routing.json").exists()


def test_what_a_server_does_without_a_damaged_version_is_said_and_so(damaged, trained, tmp_path_factory):
    """A version that is damaged after it was given its place: the running server is asked as well."""
    body = {"instances": trained.instances[:2]}
    assert route(damaged).stdout.splitlines()[0] == "sonar: version 2 answers, the newest that can be served"
    log = tmp_path_factory.mktemp("damaged") / "log"
    with (
        bentoml_serve(damaged, log, DROPSERVE_POLL_S="0.1") as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        assert current(client, body) == "2"
        assert route(damaged, "--pin", "1", "--label", "stable=1").returncode == 0
        wait_for(lambda: current(client, body) == "1", "the pin")
        file = damaged / "sonar" / "routing.json"
        wanted = {"pin": 3, "labels": {"stable": 4}, "canary": {"version": 3, "share": 0.9}, "shadow": {"version": 4}}
        file.write_text(json.dumps(wanted))
        told = route(damaged, "--label", "old=1")
        assert told.returncode == 0, told.stderr
        *said, third, fourth = told.stdout.splitlines()
        assert said == [
            "sonar: version 3 is pinned and cannot be served: the version that answers stays",
            "  version 3 cannot be served: no share of the requests is its own (canary)",
            "  version 4 cannot be served: nothing is compared (shadow)",
            "  label old is version 1",
            "  label stable is version 4, which cannot be served: the version that it named stays",
        ]
        assert DAMAGE[3] in third
        assert DAMAGE[4] in fourth
        wait_for(lambda: client.get("/v1/models/sonar/labels/old").status_code == 200, "the routing")
        for _ in range(20):
            assert current(client, body) == "1"
            labelled = client.get("/v1/models/sonar/labels/stable").json()["model_version_status"]
            assert [status["version"] for status in labelled] == ["1"]
            time.sleep(0.05)


def test_a_shadow_is_compared_and_answers_nobody_while_it_and_other_models_load(trained, other, tmp_path):
    """Its place is written before it is there; one model is loaded before it, and one after it."""
    body = {"instances": trained.instances[:5]}
    publish_as(trained.folder, tmp_path, 1)
    publish_as(trained.folder, tmp_path, 2)
    (tmp_path / "sonar" / "routing.json").write_text(json.dumps({"shadow": {"version": 3}}))
    log = tmp_path / "log"
    with (
        bentoml_serve(tmp_path, log, DROPSERVE_MODEL="sonar", DROPSERVE_POLL_S="0.1") as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        for name, folder, version in (
            ("early", other.folder, 1),
            ("whale", other.folder, 1),
            ("sonar", other.folder, 3),
        ):
            publish_as(folder, tmp_path, version, name=name)
        # Comparisons by what is being loaded, if anything is.
        seen: dict[tuple[str, ...], list[float]] = {}

        def is_over() -> bool:
            assert current(client, body) == "2"
            found = samples(client)
            states = {key: dict(labels) for key in found for name, labels in [key] if name == "dropserve_version_state"}
            loading = tuple(sorted(labels["model"] for labels in states.values() if labels["state"] == "LOADING"))
            seen.setdefault(loading, []).append(compared(found, "3"))
            loaded = {labels["model"] for labels in states.values() if labels["state"] == "AVAILABLE"}
            return not loading and loaded == {"early", "whale", "sonar"} and len(seen[loading]) > 3

        wait_for(is_over, "all models")
        assert set(seen["early",]) == set(seen["sonar",]) == {0}
        before, *_, after = seen["whale",]
        assert after > before
        wait_for(lambda: compared(samples(client), "3") > after, "more comparisons")
        assert current(client, body) == "2"
