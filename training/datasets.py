"""Rows with their answers, and the data sets that are known by name: Sonar, embedded, and four of scikit-learn's."""

from __future__ import annotations

import csv
import hashlib
import json
import keyword
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.contract import IMAGE_INPUT, RESERVED_INPUT_NAMES, TABLE_INPUT, Feature, Task
from training.errors import InputError

Kind = Literal["numeric", "boolean", "categorical"]

# Categories of one column that get an input of their own; those beyond are one with the unseen.
MAX_CATEGORIES = 100
# What stands for a missing category.
MISSING = ""

SKLEARN_ATTRIBUTION = "bundled with scikit-learn; UCI Machine Learning Repository, CC BY 4.0"


class UnknownDataset(InputError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"data set {name!r}; wanted one of {', '.join(DATASETS)}, a .csv or .parquet file, or a folder of images"
        )


class ConstantTarget(InputError):
    def __init__(self, data: Dataset, rows: NDArray[np.int64]) -> None:
        value = data.y[rows[0]]
        super().__init__(
            f"{data.name}: target {data.target!r} is {value:g} in {np.count_nonzero(data.y == value):,} of "
            f"{len(data.y):,} rows, and in all {len(rows):,} that would train a network; wanted more of other values"
        )


@dataclass(frozen=True)
class Input:
    """One input tensor of the networks of a data set."""

    name: str
    # TensorFlow's name.
    dtype: str
    # Of one row.
    shape: tuple[int, ...]
    # The field of the rows that it holds; None where the rows are the tensor.
    column: str | None = None

    def of(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The tensor [n, ...] for rows of `Dataset.x`."""
        return rows if self.column is None else np.ascontiguousarray(rows[self.column])


@dataclass(frozen=True)
class Dataset:
    """Rows with their answers, in the raw units in which a server will receive them."""

    name: str
    task: Task
    # float32 [N, F] for a table of numbers, [N, H, W, C] for images. For a table with other types a structured array
    # [N] with one field a column: float32 (numeric, and boolean where values are missing), bool, str.
    # A missing value is NaN or "".
    x: NDArray[Any]
    # int64 [N], an index into `labels`, for classification; float32 [N] for regression.
    y: NDArray[Any]
    target: str
    attribution: str
    # A table's columns, in order; empty for images.
    columns: tuple[str, ...] = ()
    # Units of those columns that have one.
    units: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()
    # Kinds of those columns that are not numeric.
    kinds: tuple[tuple[str, Kind], ...] = ()
    # Columns in which values may be missing.
    nullable: tuple[str, ...] = ()
    # Columns of a file that are no input, and why.
    ignored: tuple[tuple[str, str], ...] = ()
    # The largest value of a pixel.
    white: float = 1.0

    @property
    def input_name(self) -> str:
        """The name of the only input: a table of numbers or images have one."""
        [item] = self.inputs
        return item.name

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        if self.x.dtype.names is None:
            name = TABLE_INPUT if self.columns else IMAGE_INPUT
            return (Input(name, "float32", tuple(self.x.shape[1:])),)
        dtypes = {column: self.x.dtype[column] for column in self.columns}
        return tuple(
            Input(name, "string" if dtypes[column].kind == "O" else str(dtypes[column]), (), column)
            for name, column in zip(input_names(self.columns), self.columns, strict=True)
        )

    @cached_property
    def sha256(self) -> str:
        """Digest of names, shapes and values: two data sets with one digest train the same network."""
        names: list[Any] = [self.name, self.target, self.columns, self.labels, self.x.shape]
        if self.kinds or self.nullable:
            names += [self.kinds, self.nullable]
        digest = hashlib.sha256(json.dumps(names).encode())
        for item in self.inputs:
            values = item.of(self.x)
            if item.dtype == "string":
                digest.update("\0".join(values.tolist()).encode())
            else:
                digest.update(values.astype("?" if item.dtype == "bool" else "<f4", copy=False).data)
        digest.update(self.y.astype("<f4" if self.task == "regression" else "<i8").tobytes())
        return digest.hexdigest()

    def target_scale(self, rows: NDArray[np.int64]) -> tuple[float, float]:
        """Mean and standard deviation of a regression's target in `rows`, the training rows; 0 and 1 of classes.

        Raises ConstantTarget.
        """
        if self.task == "classification":
            return 0.0, 1.0
        y = self.y[rows]
        if y.min() == y.max():
            raise ConstantTarget(self, rows)
        return float(y.mean(dtype=np.float64)), float(y.std(dtype=np.float64))

    def tensors(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The inputs [n, ...] of a network or an artifact for the given rows, by name."""
        chosen = self.x[rows]
        return {item.name: item.of(chosen) for item in self.inputs}

    def network_input(self, rows: NDArray[np.int64]) -> Any:
        """The same as a Keras network takes it: one array, or a list of them in order."""
        tensors = list(self.tensors(rows).values())
        return tensors[0] if len(tensors) == 1 else tensors

    def features(self, rows: NDArray[np.int64]) -> list[Feature] | None:
        """What the manifest says of each column, with the range or the categories seen in `rows` (the training rows);
        None for images.
        """
        if not self.columns:
            return None
        units, kinds, x = dict(self.units), dict(self.kinds), self.x[rows]
        found = []
        for number, name in enumerate(self.columns):
            kind = kinds.get(name, "numeric")
            values = x[name] if self.kinds else x[:, number]
            common: dict[str, Any] = {
                "name": name,
                "kind": kind,
                "nullable": name in self.nullable,
                "unit": units.get(name),
            }
            if kind == "categorical":
                common["categories"] = [category for category in known_categories(values) if category != MISSING]
            elif kind == "numeric":
                seen = values[~np.isnan(values)] if name in self.nullable else values
                if len(seen):
                    common |= {"minimum": decimal(seen.min()), "maximum": decimal(seen.max())}
            found.append(Feature(**common))
        return found

    def instances(self, rows: NDArray[np.int64]) -> list[Any]:
        """Rows in the JSON form of `instances`: the shortest decimals that give the same float32 values, null for a
        missing value; objects by column name for a table with several types.
        """
        if self.kinds:
            return [self._object(row) for row in self.x[rows]]
        return [_nested_decimals(row) for row in self.x[rows]]

    def _object(self, row: Any) -> dict[str, Any]:
        kinds = dict(self.kinds)

        def plain(name: str) -> Any:
            value = row[name]
            match kinds.get(name):
                case "categorical":
                    return None if value == MISSING else value
                case "boolean":
                    return None if np.isnan(value) else bool(value)
            return decimal(value)

        return {name: plain(name) for name in self.columns}


def known_categories(values: NDArray[Any]) -> list[str]:
    """The categories of a column [n] of text that get an input of their own, sorted; the missing one may be among them.

    Those seen more than once, the most frequent where there are too many; all of them where none is seen twice.
    """
    counts = Counter(values.tolist())
    repeated = {category: count for category, count in counts.items() if count > 1} or counts
    frequent = sorted(repeated, key=lambda category: (-counts[category], category))
    return sorted(frequent[:MAX_CATEGORIES])


def input_names(columns: tuple[str, ...]) -> list[str]:
    """Names of tensors for columns, each of which is an input: the column's own where TensorFlow allows it.

    It allows letters, digits and underscores, and a signature's arguments are Python's.
    """
    names: list[str] = []
    for column in columns:
        name = re.sub(r"[^A-Za-z0-9_]", "_", column).lstrip("_")
        if not name or name[0].isdigit():
            name = f"column_{name}"
        while keyword.iskeyword(name) or name == "self" or name in RESERVED_INPUT_NAMES or name in names:
            name += "_"
        names.append(name)
    return names


def layer_name(name: str, inputs: Collection[str]) -> str:
    """The name of a layer beside inputs of these names, with which it shares a namespace: no input's has a dot."""
    return f"{name}.layer" if name in inputs else name


def decimal(value: np.float32) -> float | None:
    """The float whose shortest decimal form is that of the float32 value: 0.02, not 0.019999999552965164.

    None for NaN, which stands for a missing value.
    """
    return None if np.isnan(value) else float(str(value))


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
        white=16.0,
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
