"""From a file of one's own to answers over HTTP: raw rows by name, with missing values and unseen categories."""

import base64
import csv
import json
import subprocess
import sys

import httpx
import keras
import numpy as np
import pytest

from tests.process import ROOT, bentoml_serve

COLUMNS = ["Age", "home town", "member", "smoker", "class", "spent"]
ROWS = 80


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The rows of a CSV file, and the folder of what `dropserve train` made of it."""
    folder = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(5)
    rows = [
        {
            "Age": "" if random.random() < 0.2 else f"{random.integers(18, 80)}",
            "home town": str(random.choice(["Ulm", "Rome", ""])),
            "member": str(random.choice(["true", "false"])),
            "smoker": str(random.choice(["true", "false", ""])),
            "class": str(random.choice(["first", "second"])),
            "spent": f"{random.gamma(2, 20):.2f}",
            "name": f"guest {number}",
        }
        for number in range(ROWS)
    ]
    with (folder / "guests.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*COLUMNS, "name"])
        writer.writeheader()
        writer.writerows(rows)
    command = [sys.executable, "-m", "dropserve", "train", str(folder / "guests.csv"), "--target", "spent"]
    shown = subprocess.run(
        [*command, "--epochs", "5", "--repository", str(folder / "artifacts")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return folder / "artifacts", rows, shown


@pytest.fixture(scope="module")
def client(trained, tmp_path_factory):
    with (
        bentoml_serve(trained[0], tmp_path_factory.mktemp("own-server") / "log") as served,
        httpx.Client(base_url=served.url, timeout=60) as connection,
    ):
        yield connection


def instance(row):
    """A row of the file as JSON has it, nothing where nothing is."""
    values = {
        "Age": row["Age"] and float(row["Age"]),
        "home town": row["home town"],
        "member": row["member"] == "true",
        "smoker": row["smoker"] and row["smoker"] == "true",
        "class": row["class"],
    }
    return {name: None if value == "" else value for name, value in values.items()}


def means(client, instances, path="/predict"):
    answer = client.post(path, json={"instances": instances})
    assert answer.status_code == 200, answer.text
    return [prediction["mean"] for prediction in answer.json()["predictions"]]


def test_types_are_shown(trained):
    _, _, shown = trained
    lines = {line[:9].strip(): line for line in shown.splitlines()}
    assert "is a quantity (regression)" in lines["guests.cs"]
    assert "numeric, nullable" in lines["Age"]
    assert "categorical, nullable" in lines["home town"]
    assert "Rome, Ulm" in lines["home town"]
    assert " boolean " in lines["member"]
    assert "boolean, nullable" in lines["smoker"]
    assert "first, second" in lines["class"]
    assert "none of them twice" in lines["name"]


def test_every_raw_row_gets_the_answer_of_the_trained_network(trained, client):
    repository, rows, _ = trained
    network = keras.models.load_model(repository / "guests" / "1" / "model.keras", compile=False)
    inputs = [
        np.array([float(row["Age"] or "nan") for row in rows], np.float32),
        np.array([row["home town"] for row in rows], object),
        np.array([row["member"] == "true" for row in rows]),
        np.array([{"true": 1, "false": 0, "": np.nan}[row["smoker"]] for row in rows], np.float32),
        np.array([row["class"] for row in rows], object),
    ]
    expected = keras.ops.convert_to_numpy(network(inputs, training=False))[:, 0]
    assert expected.std() > 0
    by_name = [instance(row) for row in rows]
    np.testing.assert_allclose(means(client, by_name), expected, rtol=1e-5)
    absent = [{name: value for name, value in row.items() if value is not None} for row in by_name]
    np.testing.assert_allclose(means(client, absent), expected, rtol=1e-5)
    in_order = [list(row.values()) for row in by_name]
    np.testing.assert_allclose(means(client, in_order), expected, rtol=1e-5)


def test_all_unseen_categories_are_one_and_no_seen_one(client):
    row = {"Age": 40, "home town": "Rome", "member": True, "smoker": False, "class": "first"}
    towns = ["Atlantis", "El Dorado", "rome", "Rome", "Ulm", None]
    found = means(client, [{**row, "home town": town} for town in towns])
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 4
    drawn = client.post("/uncertainty", json={"instances": [{**row, "home town": "Atlantis"}], "num_samples": 50})
    assert drawn.json()["predictions"][0]["epistemic_std"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class": ""}, 'row 0, feature "class": found "", wanted a string that is not empty'),
        ({"class": None}, 'row 0, feature "class": found null'),
        ({"member": None}, 'row 0, feature "member": found null, wanted true or false'),
        ({"member": 1}, 'row 0, feature "member": found 1, wanted true or false'),
        ({"smoker": "yes"}, 'row 0, feature "smoker": found "yes", wanted true or false or null'),
        ({"Age": "40"}, 'row 0, feature "Age": found "40", wanted a finite float32 number or null'),
        ({"home town": 7}, 'row 0, feature "home town": found 7'),
        ({"age": 40}, 'row 0, feature "age": found an unknown feature, wanted one of Age, home town'),
    ],
)
def test_values_that_the_column_cannot_have_are_refused(client, changes, said):
    row = {"Age": 40, "home town": "Rome", "member": True, "smoker": False, "class": "first", **changes}
    answer = client.post("/predict", json={"instances": [row]})
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_other_protocols_have_one_input_a_column(client):
    row = {"Age": 40.0, "home_town": "Rome", "member": True, "smoker": 0.0, "class_": "first"}
    expected = means(client, [[40, "Rome", True, False, "first"]])
    rest = client.post("/v1/models/guests:predict", json={"instances": [row]})
    assert rest.json() == {"predictions": expected}
    types = {"Age": "FP32", "home_town": "BYTES", "member": "BOOL", "smoker": "FP32", "class_": "BYTES"}
    inputs = [{"name": name, "shape": [1], "datatype": types[name], "data": [row[name]]} for name in row]
    open_inference = client.post("/v2/models/guests/infer", json={"inputs": inputs})
    assert open_inference.json()["outputs"][0]["data"] == expected
    encoded = {**row, "home_town": {"b64": base64.b64encode(b"Rome").decode()}}
    assert client.post("/v1/models/guests:predict", json={"instances": [encoded]}).json() == rest.json()
    no_text = {**row, "home_town": {"b64": base64.b64encode(b"\xff").decode()}}
    answer = client.post("/v1/models/guests:predict", json={"instances": [no_text]})
    assert answer.status_code == 400
    assert "is not UTF-8 text" in answer.json()["error"]
    for name, wrong in (("class_", ""), ("smoker", 0.5)):
        answer = client.post("/v1/models/guests:predict", json={"instances": [{**row, name: wrong}]})
        assert answer.status_code == 400
        assert json.dumps(name.removesuffix("_")) in json.loads(answer.text)["error"]
