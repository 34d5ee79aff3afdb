"""Answers of calibrated models over HTTP. The networks are uncalibrated; their manifests are given scores by hand."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.process import bentoml_serve
from tests.serving.calibrated import LABELS, ROWS, SCORES, SIDES, THRESHOLD, WIDTHS, publish_calibrated
from tests.serving.samples import samples, total
from tests.serving.versions import publish_as, wait_for


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return publish_calibrated(tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="module")
def tiny(repository, tmp_path_factory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("tiny") / "log"
    with (
        bentoml_serve(repository, log, DROPSERVE_MODEL="tiny", DROPSERVE_POLL_S="0.2") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def branches(repository, tmp_path_factory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("branches") / "log"
    with (
        bentoml_serve(repository, log, DROPSERVE_MODEL="branches") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def asked(client: httpx.Client, rows: list, **settings: object) -> dict:
    return client.post("/uncertainty", json={"instances": rows, **settings}).raise_for_status().json()


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({}, 90), ({"coverage": 0.5}, 50), ({"coverage": 0.9, "num_samples": 40}, 90), ({"coverage": 0.95}, 95)],
    ids=["by default", "half", "other draws", "0.95"],
)
def test_a_prediction_set_holds_the_labels_within_the_coverage_s_score(tiny, settings, rank):
    answer = asked(tiny, ROWS, **settings)
    assert "warnings" not in answer
    for row in answer["predictions"]:
        wanted = [label for label in LABELS if 1 - row["probabilities"][label] <= SCORES[rank - 1]]
        assert row["prediction_set"] == wanted


def test_larger_coverages_give_larger_sets(tiny):
    smaller: list[set[str]] = [set()] * len(ROWS)
    for coverage in (0.2, 0.5, 0.8, 0.95, 0.989):
        larger = [set(row["prediction_set"]) for row in asked(tiny, ROWS, coverage=coverage)["predictions"]]
        assert all(one <= other for one, other in zip(smaller, larger, strict=True))
        smaller = larger


def test_too_few_calibration_rows_give_every_label_and_a_warning(tiny):
    answer = asked(tiny, ROWS, coverage=0.995)
    assert all(row["prediction_set"] == LABELS for row in answer["predictions"])
    assert answer["warnings"] == [
        "coverage 0.995: 199 calibration rows wanted, there are 99; every set is the full one"
    ]


def test_unsure_answers_are_withheld_and_counted_with_every_protocol(tiny):
    before = samples(tiny)
    answer = asked(tiny, ROWS)
    decisions = [row["abstain"] for row in answer["predictions"]]
    assert decisions == [max(row["probabilities"].values()) < THRESHOLD for row in answer["predictions"]]
    assert 0 < sum(decisions) < len(ROWS)
    infer(tiny, signature="mc_predict")
    after = samples(tiny)
    for word, count in (("true", sum(decisions)), ("false", len(ROWS) - sum(decisions))):
        labels = {"model": "tiny", "version": "1", "output": "answer", "abstain": word}
        grown = total(after, "dropserve_decisions_total", **labels) - total(
            before, "dropserve_decisions_total", **labels
        )
        assert grown == 2 * count
    assert total(after, "dropserve_reference_abstention_share", model="tiny") == 0.1
    assert 0 < total(after, "dropserve_abstention_share", model="tiny", output="answer") < 1


@pytest.mark.parametrize(("coverage", "rank"), [(None, 36), (0.5, 20), (0.95, 38)])
def test_an_interval_is_as_many_deviations_wide_as_the_coverage_wants(branches, coverage, rank):
    settings = {} if coverage is None else {"coverage": coverage}
    for row in asked(branches, SIDES, **settings)["predictions"]:
        reach = WIDTHS[rank - 1] * row["epistemic_std"]
        ends = {"lower": row["mean"] - reach, "upper": row["mean"] + reach, "coverage": coverage or 0.9}
        assert row["interval"] == pytest.approx(ends, rel=1e-5, abs=1e-5)
        assert "abstain" not in row
        assert "prediction_set" not in row


def test_an_interval_without_ends_is_null_and_warned_of(branches):
    answer = asked(branches, SIDES, coverage=0.99)
    assert all(row["interval"] == {"lower": None, "upper": None, "coverage": 0.99} for row in answer["predictions"])
    assert answer["warnings"] == ["coverage 0.99: 99 calibration rows wanted, there are 39; intervals have no ends"]


TENSOR = {"name": "x", "shape": [len(ROWS), 4], "datatype": "FP32", "data": ROWS}


def infer(client: httpx.Client, **parameters: object) -> dict:
    body = {"inputs": [TENSOR], "parameters": parameters}
    return client.post("/v2/models/tiny/infer", json=body).raise_for_status().json()


def test_v2_takes_a_coverage_and_gives_sets_as_truth_values(tiny):
    native = asked(tiny, ROWS, coverage=0.5, seed=3)["predictions"]
    content = infer(tiny, coverage=0.5, seed=3)
    assert content["parameters"] == {"signature": "mc_sample", "num_samples": 100, "seed": 3, "coverage": 0.5}
    found = {tensor["name"]: tensor for tensor in content["outputs"]}
    members = found["prediction_set"]
    assert (members["datatype"], members["shape"]) == ("BOOL", [len(ROWS), 3])
    assert members["data"] == [label in row["prediction_set"] for row in native for label in LABELS]
    assert (found["abstain"]["datatype"], found["abstain"]["shape"]) == ("BOOL", [len(ROWS)])
    assert found["abstain"]["data"] == [row["abstain"] for row in native]
    in_binary = tiny.post(
        "/v2/models/tiny/infer",
        json={
            "inputs": [TENSOR],
            "parameters": {"coverage": 0.5, "seed": 3, "binary_data_output": True},
            "outputs": [{"name": "prediction_set"}],
        },
    )
    length = int(in_binary.headers["inference-header-content-length"])
    assert list(in_binary.content[length:]) == members["data"]
    assert "warning" in infer(tiny, coverage=0.995)["parameters"]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"coverage": 1}, "coverage: found 1, wanted a number between 0 and 1"),
        ({"coverage": "0.9"}, 'coverage: found "0.9", wanted a number'),
        ({"coverage": True}, "coverage: found true, wanted a number"),
        ({"coverage": 0.9, "signature": "serving_default"}, "signature serving_default has no prediction sets"),
        ({"coverage": 0.9, "signature": "mc_draws"}, "signature mc_draws has no prediction sets"),
    ],
)
def test_a_wrong_coverage_of_v2_is_refused(tiny, parameters, said):
    refused = tiny.post("/v2/models/tiny/infer", json={"inputs": [TENSOR], "parameters": parameters})
    assert refused.status_code == 400
    assert said in refused.json()["error"]


@pytest.mark.parametrize(
    ("parameters", "names"),
    [({"coverage": 0.99}, ("interval_lower", "interval_upper")), ({"num_samples": 10}, ("lower", "upper"))],
    ids=["too few calibration rows", "too few draws"],
)
def test_ends_that_nobody_knows_are_null_in_json_and_infinite_in_binary(branches, parameters, names):
    inputs = [
        {"name": side, "shape": [len(SIDES), len(SIDES[0][side])], "datatype": "FP32"}
        | {"data": [row[side] for row in SIDES]}
        for side in ("left", "right")
    ]
    body = {"inputs": inputs, "outputs": [{"name": name} for name in names], "parameters": parameters}
    content = branches.post("/v2/models/branches/infer", json=body).raise_for_status().json()
    assert [tensor["data"] for tensor in content["outputs"]] == [[None] * len(SIDES)] * 2
    body["parameters"] = parameters | {"binary_data_output": True}
    answer = branches.post("/v2/models/branches/infer", json=body).raise_for_status()
    length = int(answer.headers["inference-header-content-length"])
    ends = np.frombuffer(answer.content[length:], "<f4").reshape(2, -1)
    assert (ends[0] == -np.inf).all()
    assert (ends[1] == np.inf).all()


def test_ends_that_nobody_knows_are_tensorflow_serving_s_infinity_in_its_json(branches):
    inputs = {name: [row[name] for row in SIDES] for name in ("left", "right")}
    body = {"signature_name": "mc_sample", "inputs": {**inputs, "num_samples": 10, "seed": 0}}
    answer = branches.post("/v1/models/branches:predict", json=body).raise_for_status()
    assert answer.headers["content-type"] == "application/json"
    outputs = answer.json()["outputs"]
    assert outputs["lower"] == [-np.inf] * len(SIDES)
    assert outputs["upper"] == [np.inf] * len(SIDES)


@pytest.mark.parametrize("name", ["tiny", "branches"])
def test_the_document_says_what_the_answers_have(name, request):
    client = request.getfixturevalue(name)
    operation = client.get("/openapi.json").json()["paths"]["/uncertainty"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    assert body["example"]["coverage"] == body["schema"]["properties"]["coverage"]["default"] == 0.9
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    row = schema["properties"]["predictions"]["items"]
    answer = asked(client, body["example"]["instances"], coverage=0.999)
    assert set(answer) == set(schema["properties"])
    assert set(answer["predictions"][0]) == set(row["properties"])
    assert set(row["required"]) <= set(answer["predictions"][0])


def test_a_version_without_calibration_promises_nothing(tiny, repository):
    """Last, as it changes who answers."""
    publish_as(repository / "tiny" / "1", repository, 2, calibration=None)
    wait_for(lambda: asked(tiny, ROWS[:1])["model"]["version"] == "2", "version 2")
    assert not {"prediction_set", "abstain", "interval"} & asked(tiny, ROWS[:1])["predictions"][0].keys()
    unpromised = tiny.post("/uncertainty", json={"instances": ROWS[:1], "coverage": 0.9}).json()
    of_tensors = tiny.post("/v2/models/tiny/infer", json={"inputs": [TENSOR], "parameters": {"coverage": 0.9}}).json()
    assert not {"prediction_set", "abstain", "interval"} & unpromised["predictions"][0].keys()
    assert unpromised["warnings"] == ["coverage 0.9: this model has no calibration scores to promise it by"]
    assert of_tensors["parameters"]["warning"] == unpromised["warnings"][0]
