import hashlib

import numpy as np
import pytest

from training.datasets import DATASETS, load
from training.splits import TARGET_BINS, split, target_bins

# SHA-256 over the row numbers of train, calibration and test: a release that moved a row between them would make old
# and new figures incomparable, and would test new models on rows that calibrated old ones.
RECORDED = {
    "sonar": "9f60da8b144be86a8ba9c880e985a135a721a09ae19a099ef3416572cf834c34",
    "breast_cancer": "73f8d84a303fac176ee97d0794221621030a62743544bf49483ae67302a8b5a4",
    "wine": "b06acfba9da480eb0387811730130966fb9cce689a160b6d8a85be0fbd32eebc",
    "digits": "f590407a9774fa77f1fe0117d852866ac982afcf4b0e16c8024086051cc3df44",
    "diabetes": "6e15ed8181f7085337bc8bde75a02c974d0f0e67277e859f3f3ecc60bb553b48",
}

each_dataset = pytest.mark.parametrize("name", DATASETS)


@each_dataset
def test_rows_are_the_same_in_every_release(name):
    data = load(name)
    rows = split(data.y, data.task)
    digest = hashlib.sha256()
    for part in (rows.train, rows.calibration, rows.test):
        digest.update(part.astype("<i8").tobytes() + b"|")
    assert digest.hexdigest() == RECORDED[name]


@each_dataset
def test_every_row_is_in_exactly_one_part(name):
    data = load(name)
    rows = split(data.y, data.task)
    together = np.concatenate([rows.train, rows.calibration, rows.test])
    np.testing.assert_array_equal(np.sort(together), np.arange(len(data.y)))
    assert len(rows.test) == len(rows.calibration) == round(0.2 * len(data.y))


@each_dataset
def test_every_part_has_every_class_or_target_decile_in_proportion(name):
    data = load(name)
    rows = split(data.y, data.task)
    groups = data.y if data.task == "classification" else target_bins(data.y)
    for part in (rows.train, rows.calibration, rows.test):
        expected = np.bincount(groups) * len(part) / len(groups)
        # Whole rows: each stratum is within one row of its share, after two splits within two.
        assert np.abs(np.bincount(groups[part], minlength=len(expected)) - expected).max() < 2


def test_split_looks_at_targets_only_and_not_at_process_state():
    data = load("wine")
    first = split(data.y, data.task)
    np.random.seed(1)
    second = split(data.y.copy(), data.task)
    np.testing.assert_array_equal(first.test, second.test)
    np.testing.assert_array_equal(first.train, second.train)


def test_target_bins_are_deciles():
    y = np.random.default_rng(0).permutation(np.arange(1000, dtype=np.float32))
    bins = target_bins(y)
    np.testing.assert_array_equal(bins, y.astype(int) // 100)
    assert bins.max() == TARGET_BINS - 1
