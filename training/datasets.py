"""The data sets that `dropserve train` knows by name: Sonar, embedded, and four that come with scikit-learn."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.contract import IMAGE_INPUT, TABLE_INPUT, Feature, Task
from training.errors import InputError

FILE_SUFFIXES = (".csv", ".parquet")

SKLEARN_ATTRIBUTION = "bundled with scikit-learn; UCI Machine Learning Repository, CC BY 4.0"


class UnknownDataset(InputError):
    def __init__(self, name: str) -> None:
        found = f"data set {name!r}"
        if name.lower().endswith(FILE_SUFFIXES):
            found += ": tables from files cannot be read yet"
        super().__init__(f"{found}; wanted one of {', '.join(DATASETS)}")


@dataclass(frozen=True)
class Dataset:
    """Rows with their answers, in the raw units in which a server will receive them."""

    name: str
    task: Task
    # float32 [N, F] for a table, [N, H, W, C] for images.
    x: NDArray[np.float32]
    # int64 [N], an index into `labels`, for classification; float32 [N] for regression.
    y: NDArray[Any]
    target: str
    attribution: str
    # A table's columns, in order; empty for images.
    columns: tuple[str, ...] = ()
    # Units of those columns that have one.
    units: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def input_name(self) -> str:
        return TABLE_INPUT if self.columns else IMAGE_INPUT

    @cached_property
    def sha256(self) -> str:
        """Digest of names, shapes and values: two data sets with one digest train the same network."""
        names = [self.name, self.target, self.columns, self.labels, self.x.shape]
        digest = hashlib.sha256(json.dumps(names).encode())
        digest.update(self.x.astype("<f4").tobytes())
        digest.update(self.y.astype("<f4" if self.task == "regression" else "<i8").tobytes())
        return digest.hexdigest()

    def features(self, rows: NDArray[np.int64]) -> list[Feature] | None:
        """What the manifest says of each column, with the range seen in `rows` (the training rows); None for images."""
        if not self.columns:
            return None
        units = dict(self.units)
        lowest, highest = self.x[rows].min(axis=0), self.x[rows].max(axis=0)
        return [
            Feature(name=name, kind="numeric", minimum=decimal(low), maximum=decimal(high), unit=units.get(name))
            for name, low, high in zip(self.columns, lowest, highest, strict=True)
        ]

    def instances(self, rows: NDArray[np.int64]) -> list[Any]:
        """Rows in the JSON form of `instances`: the shortest decimals that give the same float32 values."""
        return [_nested_decimals(row) for row in self.x[rows]]


def decimal(value: np.float32) -> float:
    """The float whose shortest decimal form is that of the float32 value: 0.02, not 0.019999999552965164."""
    return float(str(value))


def _nested_decimals(values: NDArray[np.float32]) -> list[Any]:
    if values.ndim == 1:
        return [decimal(value) for value in values]
    return [_nested_decimals(part) for part in values]


def check_known(name: str) -> None:
    """Raise UnknownDataset unless `load` knows the name."""
    if name not in DATASETS:
        raise UnknownDataset(name)


def load(name: str) -> Dataset:
    """Load a data set by name. Raises UnknownDataset."""
    check_known(name)
    return DATASETS[name]()


def sonar() -> Dataset:
    text = (files("training.data") / "sonar.csv").read_text(encoding="utf-8")
    header, *rows = csv.reader(text.splitlines())
    # Sorted, as scikit-learn's LabelEncoder does in the classic tutorial: its one unit is the probability of `rock`.
    labels = ("mine", "rock")
    return Dataset(
        name="sonar",
        task="classification",
        x=np.array([row[:-1] for row in rows], dtype=np.float32),
        y=np.array([labels.index(row[-1]) for row in rows], dtype=np.int64),
        target=header[-1],
        columns=tuple(header[:-1]),
        labels=labels,
        attribution="Gorman & Sejnowski 1988, UCI Machine Learning Repository, doi:10.24432/C5T01Q, CC BY 4.0",
    )


def breast_cancer() -> Dataset:
    from sklearn.datasets import load_breast_cancer

    return _sklearn_table("breast_cancer", load_breast_cancer(), target="diagnosis")


def wine() -> Dataset:
    from sklearn.datasets import load_wine

    return _sklearn_table("wine", load_wine(), target="cultivar")


def digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Dataset(
        name="digits",
        task="classification",
        x=bunch.images.astype(np.float32)[..., np.newaxis],
        y=bunch.target.astype(np.int64),
        target="digit",
        labels=tuple(str(label) for label in bunch.target_names),
        attribution=SKLEARN_ATTRIBUTION,
    )


def diabetes() -> Dataset:
    from sklearn.datasets import load_diabetes

    # Unscaled: people and their systems have years and mmHg, not multiples of this sample's standard deviation.
    bunch = load_diabetes(scaled=False)
    return Dataset(
        name="diabetes",
        task="regression",
        x=bunch.data.astype(np.float32),
        y=bunch.target.astype(np.float32),
        target="progression",
        columns=tuple(bunch.feature_names),
        units=(("age", "years"), ("bmi", "kg/m²"), ("bp", "mmHg")),
        attribution="Efron, Hastie, Johnstone & Tibshirani 2004, Least Angle Regression; bundled with scikit-learn",
    )


def _sklearn_table(name: str, bunch: Any, *, target: str) -> Dataset:
    return Dataset(
        name=name,
        task="classification",
        x=bunch.data.astype(np.float32),
        y=bunch.target.astype(np.int64),
        target=target,
        # JSON keys without spaces or slashes: "od280/od315_of_diluted_wines".
        columns=tuple(re.sub(r"[^a-z0-9]+", "_", column.lower()) for column in bunch.feature_names),
        labels=tuple(str(label) for label in bunch.target_names),
        attribution=SKLEARN_ATTRIBUTION,
    )


DATASETS: dict[str, Callable[[], Dataset]] = {
    loader.__name__: loader for loader in (sonar, breast_cancer, wine, digits, diabetes)
}
