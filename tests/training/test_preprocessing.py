"""Preprocessing against scikit-learn's, and that no row but the training rows has a say in it."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.training.passengers import passengers
from training.datasets import MAX_CATEGORIES, Dataset, input_names, known_categories, load
from training.preprocessing import Preprocessor
from training.splits import split

TRAIN = np.arange(40)


def test_every_kind_of_column_is_encoded_as_scikit_learn_does():
    data = passengers()
    encoded = Preprocessor.fit(data, TRAIN).encode(data.x)

    numbers = np.stack([data.x[name].astype(np.float64) for name in data.columns[:4]], axis=1)
    train = numbers[TRAIN]
    filled = SimpleImputer(strategy="mean").fit(train)
    # The scale is that of the values that are there, not of those filled in.
    scaled = StandardScaler().fit(train).transform(filled.transform(numbers))
    missing = MissingIndicator().fit(train).transform(numbers)
    ports = data.x["port of call"].reshape(-1, 1)
    one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(ports[TRAIN]).transform(ports)
    unknown = np.zeros((len(ports), 1))
    np.testing.assert_allclose(encoded, np.hstack([scaled, missing, unknown, one_hot]), atol=1e-5)
    assert encoded.dtype == np.float32


def test_a_category_that_training_never_saw_is_the_bucket_of_the_unknown():
    data = passengers()
    preprocessor = Preprocessor.fit(data, TRAIN)
    rows = data.x[:3].copy()
    rows["port of call"] = ["Atlantis", "El Dorado", "Southampton"]
    encoded = preprocessor.encode(rows)
    assert not encoded[:2, -5:].any()
    assert encoded[2, -5:].sum() == 1


def test_a_category_may_be_called_as_keras_calls_the_unknown_one():
    data = passengers()
    # The first of them in the order of letters.
    names = {"": "[UNK]", "Cherbourg": "a", "Queenstown": "b", "Southampton": "c"}
    data.x["port of call"] = [names[name] for name in data.x["port of call"]]
    encoded = Preprocessor.fit(data, TRAIN).encode(data.x)
    wanted = Preprocessor.fit(passengers(), TRAIN).encode(passengers().x)
    np.testing.assert_array_equal(encoded, wanted)


def test_a_table_of_numbers_may_have_missing_ones():
    x = np.array([[1, 10], [np.nan, 20], [3, 30], [5, np.nan]], np.float32)
    data = Dataset(
        "numbers", "regression", x, np.zeros(4, np.float32), "y", "made up", columns=("a", "b"), nullable=("a", "b")
    )
    # In the first three rows only `a` has a missing value: an indicator of `b` would have had nothing to learn from.
    encoded = Preprocessor.fit(data, np.arange(3)).encode(x)
    b = (x[:, 1] - 20) / np.sqrt(200 / 3)
    np.testing.assert_allclose(encoded, [[-1, b[0], 0], [0, b[1], 1], [1, b[2], 0], [3, 0, 0]], atol=1e-6)


def test_numbers_far_from_1_are_scaled_as_others_are():
    rows = np.random.default_rng(0).normal(size=(50, 1))
    x = (rows * [1e-30, 1e-9, 1.0, 1e12, 1e30] + [0, 2e-9, 3, 0, 1e30]).astype(np.float32)
    data = Dataset("numbers", "regression", x, rows[:, 0].astype(np.float32), "y", "made up", columns=tuple("abcde"))
    preprocessor = Preprocessor.fit(data, TRAIN)
    expected = StandardScaler().fit(x[TRAIN].astype(np.float64)).transform(x.astype(np.float64))
    np.testing.assert_allclose(preprocessor.encode(x), expected, atol=1e-5)


def test_rows_that_do_not_train_change_no_fitted_statistic():
    data = passengers()
    x = data.x.copy()
    outside = np.setdiff1d(np.arange(len(x)), TRAIN)
    x["age"][outside] += 1000
    x["fare"][outside] = np.nan
    x["alone"][outside] = True
    x["smoker"][outside] = np.nan
    x["port of call"][outside] = "Atlantis"
    first = Preprocessor.fit(data, TRAIN)
    second = Preprocessor.fit(replace(data, x=x, nullable=("fare", *data.nullable)), TRAIN)
    assert second.missing == first.missing
    assert second.vocabularies == first.vocabularies
    np.testing.assert_array_equal(second.mean, first.mean)
    np.testing.assert_array_equal(second.variance, first.variance)
    assert data.features(TRAIN) == replace(data, x=x).features(TRAIN)


def test_scaled_training_rows_are_standardised():
    data = load("breast_cancer")
    rows = split(data.y, data.task)
    scaled = Preprocessor.fit(data, rows.train).encode(data.x[rows.train]).astype(np.float64)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6, -3.3e-4])
def test_constant_column_does_not_blow_up(constant):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[:, 1] = constant
    data = Dataset("some", "regression", x, np.zeros(50, np.float32), "y", "made up", columns=("a", "b", "c"))
    preprocessor = Preprocessor.fit(data, np.arange(50))
    assert np.abs(preprocessor.encode(x)[:, 1]).max() < 1e-6 * max(1, abs(constant))
    # Another value at serving time moves the input by its own distance, not by ten million times that.
    other = x[:1].copy()
    other[0, 1] = constant + 1
    assert float(preprocessor.encode(other)[0, 1]) == pytest.approx(1, abs=0.1)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_layers_come_back_from_keras_files(tmp_path):
    data = passengers()
    whole = replace(data, x=data.x.copy(), nullable=("port of call",))
    for name in ("age", "smoker"):
        whole.x[name] = np.nan_to_num(whole.x[name])
    for set_of_rows, suffixes in ((data, ["keras"]), (whole, ["keras", "h5"])):
        preprocessor = Preprocessor.fit(set_of_rows, TRAIN)
        for suffix in suffixes:
            preprocessor.graph().save(tmp_path / f"encoder.{suffix}")
            again = keras.models.load_model(tmp_path / f"encoder.{suffix}", compile=False)
            encoded = keras.ops.convert_to_numpy(again(set_of_rows.network_input(np.arange(60))))
            np.testing.assert_array_equal(encoded, preprocessor.encode(set_of_rows.x))


def test_categories_are_the_frequent_ones():
    assert known_categories(np.array(["b", "a", "b", "once", ""], object)) == ["b"]
    assert known_categories(np.array(["b", "", "a", "", "a"], object)) == ["", "a"]
    assert known_categories(np.array(["only", "once"], object)) == ["once", "only"]
    many = [f"c{number:04}" for number in range(500) for _ in range(2 + (number % 7 == 0))]
    assert (
        known_categories(np.array(many, object))
        == [*(f"c{number:04}" for number in range(500) if number % 7 == 0 or number < 33)][: MAX_CATEGORIES + 5]
    )


def test_input_names_are_the_columns_own_where_a_signature_can_have_them():
    columns = ("Age", "home town", "home/town", "class", "seed", "2nd", "größe", "_x", "self")
    assert input_names(columns) == [
        "Age",
        "home_town",
        "home_town_",
        "class_",
        "seed_",
        "column_2nd",
        "gr__e",
        "x",
        "self_",
    ]
