"""`/predict` and `/uncertainty` of a real server, over real sockets."""

import asyncio
import json
import math
import random
import subprocess
import sys

import httpx
import numpy as np
import pytest

from tests.process import bentoml_serve

LABELS = ("mine", "rock")


def probabilities(answer: dict) -> np.ndarray:
    return np.array([[row["probabilities"][label] for label in LABELS] for row in answer["predictions"]])


def test_predict_equals_the_trained_network_on_all_rows(client, trained):
    answer = client.post("/predict", json={"instances": trained.instances}).raise_for_status().json()
    assert answer["model"] == {"name": "sonar", "version": "1"}
    rock = trained.model.predict(trained.rows, verbose=0)[:, 0]
    np.testing.assert_allclose(probabilities(answer)[:, 1], rock, atol=1e-6)
    np.testing.assert_allclose(probabilities(answer).sum(axis=1), 1, atol=1e-6)
    assert [row["label"] for row in answer["predictions"]] == [LABELS[int(p > 0.5)] for p in rock]


def test_rows_may_be_objects_by_feature_name_in_any_order(client, trained):
    names = [feature.name for feature in trained.manifest.inputs[0].features]
    rows = [dict(zip(names, row, strict=True)) for row in trained.instances[:5]]
    shuffled = [dict(random.Random(0).sample(list(row.items()), len(row))) for row in rows]
    as_lists = client.post("/predict", json={"instances": trained.instances[:5]}).json()
    assert client.post("/predict", json={"instances": shuffled}).json() == as_lists
    named_input = [{"features": row} for row in trained.instances[:5]]
    assert client.post("/predict", json={"instances": named_input}).json() == as_lists


def test_uncertainty_has_every_field_and_its_identities(client, trained):
    body = {"instances": trained.instances[:20], "num_samples": 500, "seed": 7}
    answer = client.post("/uncertainty", json=body).raise_for_status().json()
    assert answer["seed"] == 7
    for row in answer["predictions"]:
        assert set(row) == {
            "label",
            "probabilities",
            "std",
            "standard_error",
            "predictive_entropy",
            "expected_entropy",
            "mutual_information",
            "prediction_set",
            "abstain",
            "novelty",
            "num_samples",
            "converged",
        }
        mean = np.array([row["probabilities"][label] for label in LABELS])
        assert row["predictive_entropy"] == pytest.approx(-(mean * np.log(mean)).sum(), abs=1e-5)
        information = row["predictive_entropy"] - row["expected_entropy"]
        assert row["mutual_information"] == pytest.approx(max(0, information), abs=1e-5)
        for label in LABELS:
            assert row["standard_error"][label] == pytest.approx(row["std"][label] / math.sqrt(500), rel=1e-5)
        assert row["num_samples"] == 500
        assert row["converged"] is True


def test_the_artifact_s_defaults_are_what_naming_them_gives(client, trained):
    rows = trained.instances[:20]
    default = client.post("/uncertainty", json={"instances": rows}).json()
    named = client.post("/uncertainty", json={"instances": rows, "num_samples": 100, "seed": 0}).json()
    assert default == named
    other_seed = client.post("/uncertainty", json={"instances": rows, "seed": 1}).json()
    assert np.abs(probabilities(other_seed) - probabilities(default)).max() > 1e-4


def test_with_a_tolerance_each_row_is_drawn_until_it_is_reached(client, trained):
    rows = trained.instances[:40]
    body = {"instances": rows, "tolerance": 0.01, "max_samples": 3000, "num_samples": 200}
    answer = client.post("/uncertainty", json=body).raise_for_status().json()
    drawn = [row["num_samples"] for row in answer["predictions"]]
    assert min(drawn) >= 200
    assert len(set(drawn)) > 1
    for instance, row in zip(rows, answer["predictions"], strict=True):
        worst = max(row["standard_error"].values())
        assert row["converged"] == (worst <= 0.01)
        fixed = client.post("/uncertainty", json={"instances": [instance], "num_samples": row["num_samples"]}).json()
        assert row["probabilities"] == pytest.approx(fixed["predictions"][0]["probabilities"], abs=1e-6)


def test_a_restarted_server_gives_the_same_answers(client, trained, tmp_path):
    body = {"instances": trained.instances[:10], "num_samples": 64, "seed": 5}
    before = client.post("/uncertainty", json=body).json()
    with bentoml_serve(trained.repository, tmp_path / "log") as again:
        after = httpx.post(f"{again.url}/uncertainty", json=body, timeout=60).json()
    for old, new in zip(before["predictions"], after["predictions"], strict=True):
        for field in ("probabilities", "std", "standard_error"):
            assert new[field] == pytest.approx(old[field], abs=1e-6)
        assert new["mutual_information"] == pytest.approx(old["mutual_information"], abs=1e-6)


def test_mixed_concurrent_requests_get_the_answers_that_each_gets_alone(server, trained):
    chosen = random.Random(1)
    bodies: list[tuple[str, dict]] = []
    for _ in range(120):
        rows = chosen.sample(trained.instances, chosen.randint(1, 4))
        if chosen.random() < 0.5:
            bodies.append(("/predict", {"instances": rows}))
        else:
            asked = {"num_samples": chosen.choice([2, 50, 100, 1000]), "seed": chosen.choice([0, 1])}
            bodies.append(("/uncertainty", {"instances": rows, **asked}))

    async def together() -> list[dict]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as connection:
            return [
                answer.raise_for_status().json()
                for answer in await asyncio.gather(*(connection.post(path, json=body) for path, body in bodies))
            ]

    together_answers = asyncio.run(together())
    with httpx.Client(base_url=server.url, timeout=60) as connection:
        for (path, body), together_answer in zip(bodies, together_answers, strict=True):
            alone = connection.post(path, json=body).json()
            assert alone["model"] == together_answer["model"]
            for expected, found in zip(alone["predictions"], together_answer["predictions"], strict=True):
                for field in ("probabilities", "std") if path == "/uncertainty" else ("probabilities",):
                    assert found[field] == pytest.approx(expected[field], abs=1e-6)


# In a process of its own: BentoML's client leaves temporary folders to the garbage collector, which warns of it.
BENTOML_CLIENT = """
import json, sys, bentoml
url, rows = sys.argv[1], json.load(sys.stdin)
with bentoml.SyncHTTPClient(url) as client:
    answers = [client.predict(instances=rows), client.uncertainty(instances=rows, num_samples=50, seed=3)]
print(json.dumps(answers))
"""


def test_bentoml_s_own_client_gets_the_same_answers(server, client, trained):
    rows = trained.instances[:3]
    ran = subprocess.run(
        [sys.executable, "-c", BENTOML_CLIENT, server.url],
        input=json.dumps(rows),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    predicted, drawn = json.loads(ran.stdout)
    assert predicted == client.post("/predict", json={"instances": rows}).json()
    assert drawn == client.post("/uncertainty", json={"instances": rows, "num_samples": 50, "seed": 3}).json()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/schema.json"])
def test_probes_and_pages_answer(client, path):
    assert client.get(path).status_code == 200
    assert client.get(path).content


# Bad requests: the request as it goes over the wire, the status, and what the error must name.

ROW = [0.1] * 60
JSON = {"content-type": "application/json"}


def instances(*rows: object, **fields: object) -> str:
    return json.dumps({"instances": list(rows), **fields})


def with_value(token: str, row: int = 0, feature: int = 6) -> str:
    """A body of three rows with one value replaced by a JSON token."""
    rows = [[repr(value) for value in ROW] for _ in range(3)]
    rows[row][feature] = token
    return '{"instances": [' + ", ".join(f"[{', '.join(values)}]" for values in rows) + "]}"


NAMED = {f"band_{number:02}": 0.1 for number in range(1, 61)}

BAD_ROWS = {
    "too short": (instances(ROW, ROW[:59]), ["row 1", "band_60", "59", "60"]),
    "too long": (instances([*ROW, 0.1]), ["row 0", "61", "60"]),
    "empty row": (instances([]), ["row 0", "band_01"]),
    "string": (with_value('"0.5"', row=2), ["row 2", "band_07", "0.5", "finite"]),
    "null": (with_value("null"), ["row 0", "band_07", "null", "finite"]),
    "boolean": (with_value("true", row=1), ["row 1", "band_07", "true", "finite"]),
    "nested list": (with_value("[0.5]"), ["row 0", "band_07", "a list of 1", "finite"]),
    "NaN": (with_value("NaN", feature=0), ["row 0", "band_01", "NaN", "finite"]),
    "Infinity": (with_value("Infinity"), ["row 0", "band_07", "Infinity", "finite"]),
    "-Infinity": (with_value("-Infinity"), ["row 0", "band_07", "-Infinity", "finite"]),
    "too large for a double": (with_value("1e999", feature=59), ["row 0", "band_60", "Infinity", "finite"]),
    "too large for a float": (with_value("1e39"), ["row 0", "band_07", "1e+39", "finite"]),
    "enormous integer": (with_value("1" + "0" * 400), ["row 0", "band_07", "finite"]),
    "unknown feature": (instances(NAMED, {**NAMED, "band_61": 0.1}), ["row 1", "band_61", "unknown"]),
    "missing feature": (
        instances({name: value for name, value in NAMED.items() if name != "band_33"}),
        ["row 0", "band_33", "no value"],
    ),
    "null by name": (instances({**NAMED, "band_12": None}), ["row 0", "band_12", "null"]),
    "boolean by name": (instances(NAMED, {**NAMED, "band_12": False}), ["row 1", "band_12", "false"]),
    "mixed rows": (instances(ROW, NAMED), ["row 1", "an object of 60", "a list of 60"]),
    "row is a number": (instances(0.5), ["row 0", "0.5"]),
    "row is null": (instances(ROW, None), ["row 1", "null"]),
    "row is a string": (instances("row"), ["row 0", '"row"']),
}

BAD_BODIES = {
    "empty body": ("", ["empty"]),
    "broken JSON": ('{"instances": [[0.1', ["not JSON"]),
    "not UTF-8": (b'{"instances": "\xff"}', ["not JSON"]),
    "UTF-16": ('{"instances": []}'.encode("utf-16"), ["not JSON"]),
    "a list": ("[[0.1]]", ["the body", "a list of 1", "object"]),
    "a number": ("3", ["the body", "3", "object"]),
    "null": ("null", ["the body", "null", "object"]),
    "half a surrogate pair": ('{"instances": [{"band_01\\ud800": 0.1}]}', ["not JSON"]),
    "too deep": ("[" * 100_000, ["not JSON"]),
    "wrong key": (json.dumps({"inputs": [ROW]}), ["inputs", "instances"]),
    "misspelt key": (instances(ROW, num_sample=3), ["num_sample"]),
    "no instances": ("{}", ["instances", "nothing"]),
    "empty instances": (instances(), ["instances", "empty list"]),
    "instances is null": ('{"instances": null}', ["instances", "null"]),
    "instances is an object": ('{"instances": {"0": 1}}', ["instances", "an object of 1"]),
    "instances is a string": ('{"instances": "abc"}', ["instances", "abc"]),
}

BAD_SETTINGS = {
    "num_samples 0": ({"num_samples": 0}, ["num_samples", "0", "from 2 to"]),
    "num_samples 1": ({"num_samples": 1}, ["num_samples", "1", "from 2 to"]),
    "num_samples -5": ({"num_samples": -5}, ["num_samples", "-5", "from 2 to"]),
    "num_samples 10^9": ({"num_samples": 10**9}, ["num_samples", "1000000000", "10000"]),
    "num_samples a string": ({"num_samples": "x"}, ["num_samples", '"x"', "integer"]),
    "num_samples a float": ({"num_samples": 10.0}, ["num_samples", "10.0", "integer"]),
    "num_samples a boolean": ({"num_samples": True}, ["num_samples", "true", "integer"]),
    "seed above int64": ({"seed": 2**63}, ["seed", "9223372036854775808", "9223372036854775807"]),
    "seed below int64": ({"seed": -(2**63) - 1}, ["seed", "-9223372036854775808"]),
    "seed of 30 digits": ({"seed": 10**30}, ["seed", "integer"]),
    "seed a string": ({"seed": "0"}, ["seed", '"0"']),
    "tolerance 0": ({"tolerance": 0}, ["tolerance", "0", "above 0"]),
    "tolerance a string": ({"tolerance": "small"}, ["tolerance", "small"]),
    "enormous tolerance": ({"tolerance": 10**400}, ["tolerance"]),
    "coverage 0": ({"coverage": 0}, ["coverage", "0", "between 0 and 1"]),
    "coverage 1": ({"coverage": 1}, ["coverage", "1", "between 0 and 1"]),
    "coverage 90": ({"coverage": 90}, ["coverage", "90", "between 0 and 1"]),
    "max_samples 1": ({"max_samples": 1, "tolerance": 0.1}, ["max_samples", "1"]),
    "max_samples below num_samples": (
        {"max_samples": 50, "num_samples": 60, "tolerance": 0.1},
        ["max_samples", "50", "num_samples, 60"],
    ),
    "rows x draws": ({"num_samples": 10_000, "instances": [ROW] * 300}, ["300 rows x 10000 draws"]),
}


def assert_refused(client, answer: httpx.Response, status: int, named: list[str]) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert isinstance(error, str)
    assert "\n" not in error
    for name in named:
        assert name in error
    good = client.post("/predict", json={"instances": [ROW]})
    assert good.status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/uncertainty"])
@pytest.mark.parametrize(("body", "named"), [*BAD_ROWS.values(), *BAD_BODIES.values()], ids=[*BAD_ROWS, *BAD_BODIES])
def test_bad_bodies_are_refused(client, path, body, named):
    assert_refused(client, client.post(path, content=body, headers=JSON), 400, named)


@pytest.mark.parametrize(("fields", "named"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(client, fields, named):
    assert_refused(client, client.post("/uncertainty", json={"instances": [ROW], **fields}), 400, named)


@pytest.mark.parametrize("path", ["/predict", "/uncertainty"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_a_wrong_method_is_refused(client, path, method):
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    if method != "HEAD":
        assert_refused(client, answer, 405, [method, "POST"])


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream"])
def test_a_wrong_content_type_is_refused(client, kind):
    body = instances(ROW)
    assert_refused(client, client.post("/predict", content=body, headers={"content-type": kind}), 415, [kind])


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_json_content_types_are_accepted(client, kind):
    assert client.post("/predict", content=instances(ROW), headers={"content-type": kind}).status_code == 200


def test_a_body_over_the_limit_is_refused(client):
    body = instances(*[ROW] * 5000)
    assert len(body) > 2**20
    assert_refused(client, client.post("/predict", content=body, headers=JSON), 413, ["1048576 bytes"])


def test_a_streamed_body_over_the_limit_is_refused(client):
    def chunks():
        for _ in range(64):
            yield b" " * 2**15

    assert_refused(client, client.post("/predict", content=chunks(), headers=JSON), 413, ["1048576 bytes"])


def test_an_unknown_path_is_refused(client):
    assert client.post("/predictions", json={"instances": [ROW]}).status_code == 404
