"""Answers of calibrated models over HTTP. The networks are uncalibrated; their manifests are given scores by hand."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.artifact import publish
from models.contract import Abstention, Calibration, ConformalScores, OutputCalibration, UncertaintyReference
from tests.models.networks import regression_net, tiny_net
from tests.process import bentoml_serve
from tests.serving.samples import samples, total
from tests.serving.versions import publish_as, wait_for

LABELS = ["ant", "bee", "cat"]
ROWS = np.random.default_rng(0).normal(size=(60, 4)).round(3).tolist()
SIDES = [
    {"left": left, "right": right}
    for left, right in zip(
        np.random.default_rng(1).normal(size=(40, 3)).round(3).tolist(),
        np.random.default_rng(2).normal(size=(40, 2)).round(3).tolist(),
        strict=True,
    )
]
SCORES = np.linspace(0.2, 0.8, 99).tolist()
WIDTHS = np.linspace(0.1, 3, 39).tolist()
THRESHOLD = 0.6


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("calibrated")
    for net, labels, output, known in (
        (
            tiny_net(),
            LABELS,
            "answer",
            OutputCalibration(
                conformal=ConformalScores(kind="lac", scores=[SCORES]),
                abstention=Abstention(statistic="confidence", threshold=THRESHOLD, answered_share=0.9, error=0.1),
                reference=UncertaintyReference(abstention_share=0.1),
            ),
        ),
        (
            regression_net(),
            None,
            "target",
            OutputCalibration(conformal=ConformalScores(kind="interval", scores=[WIDTHS])),
        ),
    ):
        folder = publish(net, name=net.name, repository=made, labels=labels)
        publish_as(folder, root, 1, calibration=Calibration(rows=99, outputs={output: known}))
    return root


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
    tensor = {"name": "x", "shape": [len(ROWS), 4], "datatype": "FP32", "data": ROWS}
    body = {"inputs": [tensor], "parameters": {"signature": "mc_predict"}}
    assert tiny.post("/v2/models/tiny/infer", json=body).status_code == 200
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
    refused = tiny.post("/uncertainty", json={"instances": ROWS[:1], "coverage": 0.9})
    assert refused.status_code == 400
    assert refused.json()["error"].startswith("coverage: found 0.9, wanted none: this model has no calibration rows")
