"""Several models at once against a real server: each gets its share, its own rows, and is answered by itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest import manifest, rows, subjects, tensors
from loadtest.answers import AnswerError, Memory
from loadtest.errors import LoadTestError
from loadtest.profile import ALL_PROTOCOLS, BY_NAME, NATIVE
from tests.loadtest.test_verdict import faulty_proxy, loadtest
from tests.process import ROOT, Served, bentoml_serve, free_port

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def served(trained_repository, tmp_path_factory, grpc_port) -> Iterator[Served]:
    """Sonar by default, a second net of Sonar's rows, and wine, whose rows only its manifest knows."""
    repository = tmp_path_factory.mktemp("models") / "artifacts"
    shutil.copytree(trained_repository, repository)
    for data, *options in (("sonar", "--name", "echo", "--seed", "1"), ("wine",)):
        command = [sys.executable, "-m", "dropserve", "train", data, *options, "--epochs", "5"]
        subprocess.run([*command, "--repository", str(repository)], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    log = tmp_path_factory.mktemp("log") / "log"
    with bentoml_serve(repository, log, DROPSERVE_MODEL="sonar", DROPSERVE_GRPC_PORT=str(grpc_port)) as server:
        yield server


def requests_by_model(url: str) -> dict[str, float]:
    """The server's own count of what it was asked to compute."""
    counts: dict[str, float] = {}
    text = httpx.get(f"{url}/metrics", timeout=10).text
    for model, value in re.findall(
        r'^dropserve_requests_total\{[^}]*model="([^"]+)"[^}]*\} (\S+)$', text, re.MULTILINE
    ):
        counts[model] = counts.get(model, 0) + float(value)
    return counts


def test_each_model_gets_its_share_by_every_protocol(served, grpc_port):
    before = requests_by_model(served.url)
    options = [
        "--host",
        served.url,
        "--profile",
        "mixed",
        "--users",
        "12",
        "--grpc",
        f"127.0.0.1:{grpc_port}",
        "--json",
    ]
    done = loadtest(*options, "--model", "sonar:3", "--model", "wine:1", run_time="8s")
    verdict = json.loads(done.stdout)
    assert [error for error in verdict["errors"] if not error[0].startswith("all: p")] == []
    by_name = {kind["name"]: kind["requests"] for kind in verdict["endpoints"]}
    tensor_kinds = ("/v1 predict", "/v2 infer, JSON", "/v2 infer, binary", "gRPC Predict")
    assert by_name.keys() == {
        "/predict, sonar",
        "/uncertainty, sonar",
        *(f"{kind}, {model}" for kind in tensor_kinds for model in ("sonar", "wine")),
    }
    total = verdict["total"]["requests"]
    wine = sum(count for name, count in by_name.items() if name.endswith(", wine"))
    # Binomial, five standard deviations.
    assert abs(wine - total / 4) < 5 * (total * 0.25 * 0.75) ** 0.5
    after = requests_by_model(served.url)
    # The load test looks at rows before it begins: two of Sonar's.
    assert after["wine"] - before.get("wine", 0) == wine
    assert 0 <= after["sonar"] - before.get("sonar", 0) - (total - wine) <= 2


def test_a_model_that_is_not_the_default_is_asked_by_name_over_http(served):
    done = loadtest("--host", served.url, "--model", "wine", "--json", run_time="3s")
    verdict = json.loads(done.stdout)
    assert [error for error in verdict["errors"] if not error[0].startswith("all: p")] == []
    assert {kind["name"] for kind in verdict["endpoints"]} == {
        "/v1 predict, wine",
        "/v2 infer, JSON, wine",
        "/v2 infer, binary, wine",
    }


def test_an_answer_of_another_model_fails(served):
    with faulty_proxy(served.url, "other_model", every=20) as url:
        done = loadtest("--host", url, "--model", "sonar", "--model", "echo", "--users", "8", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    errors = json.loads(done.stdout)["errors"]
    assert any("model 'sonar' answered, wanted 'echo'" in error for error, _ in errors), errors
    assert all(", echo: " in error or error.startswith("all: p") for error, _ in errors), errors


def test_own_rows_go_to_their_model_in_its_order(served, tmp_path):
    """Columns of a file come in any order; the tensor protocols want the model's."""
    header, *lines = (ROOT / "training" / "data" / "sonar.csv").read_text().splitlines()[:5]
    turned = [",".join(reversed(line.split(","))) for line in (header, *lines)]
    path = tmp_path / "turned.csv"
    path.write_text("\n".join(turned))
    mix = subjects.shares(ALL_PROTOCOLS, {"echo": 1.0, "wine": 1.0}, "sonar")
    given = subjects.sources([f"echo={path}"], ["echo=object"], ("echo", "wine"))
    found = subjects.gather(served.url, mix, given)
    assert found["echo"].vectors == [[float(cell) for cell in line.split(",")[:-1]] for line in lines]
    options = [
        "--rows",
        f"echo={path}",
        "--target",
        "echo=object",
        "--model",
        "echo",
        "--model",
        "wine",
        "--users",
        "8",
    ]
    done = loadtest("--host", served.url, *options, "--json", run_time="3s")
    assert [error for error, _ in json.loads(done.stdout)["errors"] if not error.startswith("all: p")] == []


def test_rows_of_a_manifest_are_within_what_training_saw_and_the_same_again(served):
    known = manifest.read(served.url, "wine")
    [item] = known.inputs
    found = known.rows()
    assert found == known.rows()
    assert found != known.rows(seed=1)
    assert len({json.dumps(row) for row in found}) == len(known.examples) + manifest.MADE
    for row in found[len(known.examples) :]:
        assert list(row) == known.columns
        for feature in item.features or ():
            assert feature.minimum is not None
            assert feature.maximum is not None
            assert feature.minimum - 1e-3 <= row[feature.name] <= feature.maximum + 1e-3
    sonar = manifest.read(served.url, "echo")
    names, packaged = rows.read_csv(rows.SONAR, rows.SONAR_TARGET)
    assert rows.choose_for(sonar, None, None) == [dict(zip(names, row, strict=True)) for row in packaged]


def test_columns_of_each_kind_are_made_by_what_is_known_of_them():
    features: list[dict[str, Any]] = [
        {"name": "age", "kind": "numeric", "minimum": 18, "maximum": 30},
        {"name": "town", "kind": "categorical", "categories": ["Bern", "Basel"]},
        {"name": "member", "kind": "boolean"},
    ]
    inputs = [
        {"name": feature["name"], "dtype": dtype, "shape": [], "features": [feature]}
        for feature, dtype in zip(features, ("int64", "string", "bool"), strict=True)
    ]
    content: dict[str, Any] = {"name": "guests", "inputs": inputs, "signatures": {}, "examples": [[20, "Bern", True]]}
    made = manifest.Manifest.model_validate(content).rows()[1:]
    assert {row["town"] for row in made} == {"Bern", "Basel"}
    assert {row["member"] for row in made} == {False, True}
    assert all(type(row["age"]) is int and 18 <= row["age"] <= 30 for row in made)
    del features[0]["minimum"]
    assert manifest.Manifest.model_validate(content).rows() == content["examples"]


def test_images_are_made_between_examples():
    examples = [[[[0.0], [8.0]]], [[[1.0], [16.0]]]]
    inputs = [{"name": "image", "dtype": "float32", "shape": [1, 2, 1]}]
    content = {"name": "dots", "inputs": inputs, "signatures": {}, "examples": examples}
    made = manifest.Manifest.model_validate(content).rows()
    assert len(made) == 2 + manifest.MADE
    for [[[low], [high]]] in made:
        assert 0 <= low <= 1
        assert high == pytest.approx(8 + 8 * low, abs=1e-5)


def test_every_model_has_its_share_of_all_requests():
    models = {"a": 3.0, "b": 1.0, "c": 0.5}
    for kinds in (NATIVE, ALL_PROTOCOLS):
        for default in ("a", "elsewhere", None):
            mix = subjects.shares(kinds, models, default)
            for model, weight in models.items():
                assert sum(asked.get(model, 0) for asked in mix.values()) == pytest.approx(weight)
            for kind in NATIVE:
                assert mix.get(kind, {}).keys() == ({"a"} if default == "a" else set())
    assert subjects.shares(NATIVE, models, None).keys() == BY_NAME.keys()
    assert subjects.shares(NATIVE, {}, None) == {kind: {subjects.DEFAULT: 1} for kind in NATIVE}


@pytest.mark.parametrize("given", [":1", "sonar:0", "sonar:-1", "sonar:much", "sonar:nan", "sonar:inf"])
def test_other_weights_are_refused(given):
    with pytest.raises(LoadTestError, match="wanted NAME:WEIGHT"):
        subjects.weights([given])


def test_weights_are_one_where_none_is_given():
    assert subjects.weights(["sonar", "wine:0.5"]) == {"sonar": 1.0, "wine": 0.5}
    with pytest.raises(LoadTestError, match="'sonar' is there twice"):
        subjects.weights(["sonar", "sonar:2"])


def test_an_answer_of_another_width_or_name_is_wrong():
    table = tensors.Table("wine", "features", (13,), (), {"probabilities": (3,)})
    tensors.check_outputs(table, {"probabilities": [[0.2, 0.3, 0.5]]})
    for outputs in ({"probabilities": [[0.5, 0.5]]}, {"mean": [0.5]}, {"probabilities": [0.5]}):
        with pytest.raises(AnswerError, match="probabilities is of shape"):
            tensors.check_outputs(table, outputs)
    answer = {"model": {"name": "sonar", "version": "1"}, "predictions": [{"mean": 3.0}]}
    Memory().check_predict(json.dumps(answer).encode(), [0], "sonar")
    with pytest.raises(AnswerError, match="model 'sonar' answered, wanted 'wine'"):
        Memory().check_predict(json.dumps(answer).encode(), [0], "wine")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "beer"], "is not served here, wanted one of echo, sonar, wine"),
        (["--model", "sonar:0"], "wanted NAME:WEIGHT"),
        (["--model", "sonar", "--model", "wine", "--users", "4"], "wanted at least 5"),
        (["--model", "sonar", "--model", "wine", "--rows", "rows.csv"], "wanted NAME=... with the name of one of"),
        (["--model", "wine", "--rows", str(rows.SONAR), "--target", "object"], "wanted 13 numbers"),
    ],
)
def test_bad_mixes_end_with_exit_code_2_and_one_line(served, options, said):
    done = loadtest("--host", served.url, *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_manifest_is_what_training_wrote(served, trained_repository):
    written = json.loads(Path(trained_repository / "sonar" / "1" / "manifest.json").read_text())
    assert httpx.get(f"{served.url}/models/sonar/manifest.json", timeout=10).json() == written
    refused = httpx.get(f"{served.url}/models/beer/manifest.json", timeout=10)
    assert refused.status_code == 404
    assert refused.json()["error"].startswith('model "beer" is not served here')
    assert httpx.post(f"{served.url}/models/sonar/manifest.json", timeout=10).status_code == 405
