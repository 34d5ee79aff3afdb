import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training import datasets
from training.datasets import DATASETS, UnknownDataset, load
from training.splits import split

# Rows, per-row shape, rows of each class: the published descriptions of the data sets.
DESCRIPTIONS = {
    "sonar": ((208, 60), {"mine": 111, "rock": 97}),
    "breast_cancer": ((569, 30), {"malignant": 212, "benign": 357}),
    "wine": ((178, 13), {"class_0": 59, "class_1": 71, "class_2": 48}),
    "digits": ((1797, 8, 8, 1), None),
    "diabetes": ((442, 10), None),
}


@pytest.mark.parametrize("name", DATASETS)
def test_data_set_is_the_published_one(name):
    data = load(name)
    shape, classes = DESCRIPTIONS[name]
    assert data.x.shape == shape
    assert data.x.dtype == np.float32
    assert np.isfinite(data.x).all()
    if classes is not None:
        assert {label: int((data.y == index).sum()) for index, label in enumerate(data.labels)} == classes
    assert data.attribution


def test_sonar_values_are_those_of_the_file():
    with (Path(datasets.__file__).parent / "data" / "sonar.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    data = load("sonar")
    for number in (0, 96, 97, 207):
        row = rows[number]
        assert [row[column] for column in data.columns] == [f"{value:.4f}" for value in data.x[number]]
        assert data.labels[data.y[number]] == row["object"]


def test_digits_are_single_channel_images_of_17_grey_levels():
    data = load("digits")
    assert set(np.unique(data.x)) == set(range(17))
    assert data.input_name == "image"
    assert data.features(np.arange(10)) is None


def test_diabetes_is_in_real_units():
    data = load("diabetes")
    age, bmi = data.x[:, 0], data.x[:, 2]
    assert (age.min(), age.max()) == (19, 79)
    assert 18 <= bmi.min() < bmi.max() <= 43
    assert (data.y.min(), data.y.max()) == (25, 346)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_columns_have_names_that_are_plain_json_keys(name):
    data = load(name)
    assert len(set(data.columns)) == data.x.shape[1]
    assert all(column.replace("_", "").isalnum() and column == column.lower() for column in data.columns)


def test_feature_ranges_come_from_the_given_rows_only():
    data = load("wine")
    rows = split(data.y, data.task)
    features = data.features(rows.train)
    assert features is not None
    outside = 0
    for number, feature in enumerate(features):
        column = data.x[:, number]
        assert np.float32(feature.minimum) == column[rows.train].min()
        assert np.float32(feature.maximum) == column[rows.train].max()
        outside += column.min() < column[rows.train].min()
    # The data do have values outside the training range: a range over all rows would have been another.
    assert outside


def test_instances_are_json_that_gives_the_same_float32_back():
    for name in ("sonar", "digits"):
        data = load(name)
        text = json.dumps(data.instances(np.array([3, 200])))
        np.testing.assert_array_equal(np.array(json.loads(text), np.float32), data.x[[3, 200]])
    assert json.dumps(load("sonar").instances(np.array([0]))).startswith("[[0.02, 0.0371, 0.0428,")


def test_digest_tells_any_change_of_data():
    data = load("sonar")
    assert data.sha256 == load("sonar").sha256
    nudged, flipped = data.x.copy(), data.y.copy()
    nudged[5, 7] = np.nextafter(nudged[5, 7], np.float32(1))
    flipped[0] = 1 - flipped[0]
    assert replace(data, x=data.x.copy()).sha256 == data.sha256
    assert replace(data, x=nudged).sha256 != data.sha256
    assert replace(data, y=flipped).sha256 != data.sha256
    assert replace(data, labels=("rock", "mine")).sha256 != data.sha256


@pytest.mark.parametrize("name", ["sonr", "", "SONAR", "../sonar"])
def test_unknown_name_says_what_is_known(name):
    with pytest.raises(UnknownDataset) as caught:
        load(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(known in message for known in DATASETS)
    assert "\n" not in message
