"""The arrays of a model's outputs -> columns.

Everything that `mc_sample` gives is there: one column for a number a row; `<name>_<label>` for one a class and
`<name>_<index>` for one an element. Classification has its `label` beside, `std` and `standard_error` of that label's
probability, and the labels of its `prediction_set` in one column: a list, or in CSV, which has none, one text. Where a
row has several places the columns are the same, with the list over its places instead of a value: [H, W] a list of H
lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute

from models.contract import (
    ABSTAIN,
    INTERVAL_LOWER,
    INTERVAL_UPPER,
    MC_SAMPLE,
    NOVELTY,
    NUM_SAMPLES,
    PREDICTION_SET,
    Manifest,
    ModelOutput,
    SignatureTensor,
)
from serving.answers import class_labels
from serving.errors import choices
from serving.prediction_sets import Coverage
from serving.scoring.errors import ScoreError

Arrays = dict[str, np.ndarray]

LABEL = "label"
PROBABILITIES = "probabilities"
# In this order; what else a model gives comes after them.
FIRST = (
    PROBABILITIES,
    "mean",
    "epistemic_std",
    "aleatoric_std",
    "std",
    "standard_error",
    "lower",
    "upper",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    PREDICTION_SET,
    INTERVAL_LOWER,
    INTERVAL_UPPER,
    ABSTAIN,
    NOVELTY,
)
# Between the labels of a set in one text.
SEPARATOR = "|"
# Of these a classification has one number a class, and the answered label's own beside.
_OF_LABEL = ("std", "standard_error")
# `probability_mine`, not `probabilities_mine`.
_SINGULAR = {PROBABILITIES: "probability"}


class AnswerColumns:
    """The columns that scoring adds, and how they are made."""

    def __init__(
        self, manifest: Manifest, prefix: str, num_samples: int, coverage: Coverage, *, lists: bool = True
    ) -> None:
        """coverage: of prediction sets and intervals. lists: whether the file can hold them, else they are texts."""
        self._num_samples = num_samples
        self._coverage = coverage
        self._columns: list[tuple[pa.Field, Callable[[Arrays], pa.Array]]] = []
        given = {tensor.name: tensor for tensor in (*manifest.signatures[MC_SAMPLE].outputs, *coverage.tensors)}
        for output in manifest.outputs:
            tensors = {
                name.removeprefix(output.prefix): tensor
                for name, tensor in given.items()
                if name.startswith(output.prefix)
            }
            names = [name for name in FIRST if name in tensors]
            names += sorted(tensors.keys() - set(names))
            for name, kind, make in _of_output(output, {name: tensors[name] for name in names}, lists):
                self._columns.append((pa.field(f"{prefix}{output.prefix}{name}", kind), make))
        # What is of the row and not of one of several outputs.
        prefixes = tuple(output.prefix for output in manifest.outputs)
        for tensor in given.values():
            if not tensor.name.startswith(prefixes):
                kind = pa.from_numpy_dtype(np.dtype(tensor.dtype))
                self._columns.append((pa.field(f"{prefix}{tensor.name}", kind), _element(tensor.name, None)))
        self._columns.append((pa.field(f"{prefix}{NUM_SAMPLES}", pa.int32()), self._drawn))

    @property
    def fields(self) -> list[pa.Field]:
        return [field for field, _ in self._columns]

    def make(self, arrays: Arrays) -> list[pa.Array]:
        """One Arrow array [N] for each of `fields`."""
        arrays = dict(self._coverage.apply(arrays))
        return [make(arrays) for _, make in self._columns]

    def check_free(self, columns: pa.Schema, place: str) -> None:
        """Raise ScoreError where the file has a column of one of these names already."""
        taken = [field.name for field in self.fields if field.name in columns.names]
        if taken:
            raise ScoreError(
                f"{place}: the file has a column {taken[0]!r} of its own, as scoring adds; "
                "wanted other names: --prefix TEXT puts TEXT before those that are added"
            )
        names = [field.name for field in self.fields]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ScoreError(f"two columns {twice!r} would be added, for labels {choices(names)}; wanted other labels")

    def _drawn(self, arrays: Arrays) -> pa.Array:
        rows = len(next(iter(arrays.values())))
        return pa.array(np.full(rows, self._num_samples, np.int32))


def _of_output(
    output: ModelOutput, tensors: dict[str, SignatureTensor], lists: bool
) -> Iterator[tuple[str, pa.DataType, Callable[[Arrays], pa.Array]]]:
    """Name, type and maker of each column of one output."""
    labels: list[str] = []
    if PROBABILITIES in tensors:
        labels = class_labels(output, _classes(output))
        places = len(output.shape) - 1
        yield LABEL, _listed(pa.string(), places), _label(f"{output.prefix}{PROBABILITIES}", labels)
    for name, tensor in tensors.items():
        if labels and name == PREDICTION_SET:
            kind = pa.list_(pa.string()) if lists else pa.string()
            yield name, kind, _members(f"{output.prefix}{name}", labels, lists)
            continue
        kind = pa.string() if tensor.dtype == "string" else pa.from_numpy_dtype(np.dtype(tensor.dtype))
        key = f"{output.prefix}{name}"
        if not labels and len(tensor.shape) == 2 and tensor.shape[1] is not None:
            for index in range(tensor.shape[1]):
                yield f"{name}_{index}", kind, _element(key, index)
            continue
        if not labels or len(tensor.shape) <= len(output.shape):
            yield name, _listed(kind, len(tensor.shape) - 1), _element(key, None)
            continue
        if name in _OF_LABEL:
            yield name, _listed(kind, places), _of_label(f"{output.prefix}{PROBABILITIES}", key)
        for index, label in enumerate(labels):
            yield f"{_SINGULAR.get(name, name)}_{label}", _listed(kind, places), _element(key, index)


def _classes(output: ModelOutput) -> int:
    classes = output.shape[-1] if output.shape else None
    if classes is None and output.labels is None:
        raise ScoreError(
            f"output {output.name!r}: {PROBABILITIES} has shape {output.shape} a row; wanted a fixed count of classes"
        )
    return classes if classes is not None else len(output.labels or ())


def _listed(kind: pa.DataType, depth: int) -> pa.DataType:
    """Lists of lists of the type, so many deep."""
    return kind if depth == 0 else pa.list_(_listed(kind, depth - 1))


def nested(values: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    """The values of an array of this shape, in its order, as [N] of lists where it has more than one axis."""
    for axis in reversed(range(1, len(shape))):
        starts = np.arange(math.prod(shape[:axis]) + 1, dtype=np.int32) * shape[axis]
        values = pa.ListArray.from_arrays(pa.array(starts), values)
    return values


def _label(key: str, labels: list[str]) -> Callable[[Arrays], pa.Array]:
    names = pa.array(labels, pa.string())

    def make(arrays: Arrays) -> pa.Array:
        best = arrays[key].argmax(axis=-1)
        return nested(names.take(pa.array(best.ravel())), best.shape)

    return make


def _members(key: str, labels: list[str], lists: bool) -> Callable[[Arrays], pa.Array]:
    """The labels of each row's set, in the labels' order."""
    names = pa.array(labels, pa.string())

    def make(arrays: Arrays) -> pa.Array:
        members = arrays[key]
        starts = np.concatenate([[0], members.sum(axis=1).cumsum()])
        sets = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), names.take(pa.array(members.nonzero()[1])))
        return sets if lists else pa.compute.binary_join(sets, SEPARATOR)

    return make


def _of_label(probabilities: str, key: str) -> Callable[[Arrays], pa.Array]:
    def make(arrays: Arrays) -> pa.Array:
        best = arrays[probabilities].argmax(axis=-1)
        return _array(np.take_along_axis(arrays[key], best[..., None], axis=-1)[..., 0])

    return make


def _element(key: str, index: int | None) -> Callable[[Arrays], pa.Array]:
    """The values [N, ...], or one of them along the last axis."""
    return lambda arrays: _array(arrays[key] if index is None else arrays[key][..., index])


def _array(values: np.ndarray) -> pa.Array:
    return nested(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape)
