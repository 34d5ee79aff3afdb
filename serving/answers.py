"""Arrays of a model's outputs -> the JSON objects of the native endpoints, one for each row.

NumPy scalars are left as they are: orjson writes a float32 with the digits that a float32 has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import compress
from typing import Any

import numpy as np

from models.contract import ABSTAIN, INTERVAL_LOWER, INTERVAL_UPPER, NOVELTY, PREDICTION_SET, Manifest, ModelOutput
from serving.errors import InvalidRequest
from serving.outputs import Outputs
from serving.prediction_sets import Coverage

Arrays = Mapping[str, np.ndarray]
Answer = dict[str, Any]

# Statistics in the order that the answers show them. What an artifact's signatures do not carry is left out.
_OF_CLASSES = ("std", "standard_error")
_OF_ROWS = ("predictive_entropy", "expected_entropy", "mutual_information")
_OF_REGRESSION = ("mean", "epistemic_std", "aleatoric_std", "std", "standard_error")
# Of both, behind them.
_LAST = (ABSTAIN, NOVELTY)


class AnswerWriter:
    """Writes the answers of one model, as its manifest describes the outputs."""

    def __init__(self, manifest: Manifest) -> None:
        self._writers = [_OutputWriter(output) for output in manifest.outputs]

    def predictions(self, outputs: Outputs) -> list[Answer]:
        """Deterministic answers: label and probabilities, or the mean."""
        return outputs.made(
            "predictions", lambda arrays: self._grouped([writer.predictions(arrays) for writer in self._writers])
        )

    def uncertainties(
        self, outputs: Outputs, num_samples: list[int], converged: list[bool], coverage: Coverage
    ) -> list[Answer]:
        """Answers of MC dropout; `num_samples` and `converged` are of the row, whatever its outputs."""

        def write(arrays: Arrays) -> list[Answer]:
            arrays = coverage.apply(arrays)
            return self._grouped([writer.uncertainties(arrays, coverage.value) for writer in self._writers])

        rows = outputs.made(coverage.value, write)
        for row, drawn, done in zip(rows, num_samples, converged, strict=True):
            row["num_samples"] = drawn
            row["converged"] = done
        return rows

    def _grouped(self, groups: list[list[Answer]]) -> list[Answer]:
        """One object a row; grouped by output's name where there are several."""
        if len(groups) == 1:
            return groups[0]
        names = [writer.output.name for writer in self._writers]
        return [dict(zip(names, row, strict=True)) for row in zip(*groups, strict=True)]


# What is said of each row, by name, in order.
_Columns = dict[str, list[Any]]


class _OutputWriter:
    """Writes one output's part: column by column, then row by row."""

    def __init__(self, output: ModelOutput) -> None:
        self.output = output
        self._prefix = output.prefix

    def predictions(self, arrays: Arrays) -> list[Answer]:
        return _rows(self._predicted(arrays))

    def uncertainties(self, arrays: Arrays, coverage: float) -> list[Answer]:
        columns = self._sampled(arrays)
        prefix = self._prefix
        members = arrays.get(f"{prefix}{PREDICTION_SET}")
        if members is not None:
            labels = class_labels(self.output, members.shape[-1])
            columns[PREDICTION_SET] = [list(compress(labels, row)) for row in members.tolist()]
        lower = arrays.get(f"{prefix}{INTERVAL_LOWER}")
        if lower is not None:
            ends = zip(lower, arrays[f"{prefix}{INTERVAL_UPPER}"], strict=True)
            columns["interval"] = [
                {"lower": _end(lower), "upper": _end(upper), "coverage": coverage} for lower, upper in ends
            ]
        for name in _LAST:
            values = arrays.get(f"{prefix}{name}")
            if values is not None:
                columns[name] = _values(values)
        return _rows(columns)

    def _predicted(self, arrays: Arrays) -> _Columns:
        if self.output.task == "regression":
            return {"mean": _values(finite(arrays[f"{self._prefix}mean"]))}
        probabilities = finite(arrays[f"{self._prefix}probabilities"])
        labels = class_labels(self.output, probabilities.shape[-1])
        return {
            "label": [labels[index] for index in probabilities.argmax(axis=-1).tolist()],
            "probabilities": _by_label(labels, probabilities),
        }

    def _sampled(self, arrays: Arrays) -> _Columns:
        prefix = self._prefix
        if self.output.task == "regression":
            found = ((name, arrays.get(f"{prefix}{name}")) for name in _OF_REGRESSION)
            return {name: _values(finite(values)) for name, values in found if values is not None}
        columns = self._predicted(arrays)
        for name in _OF_CLASSES:
            values = arrays[f"{prefix}{name}"]
            columns[name] = _by_label(class_labels(self.output, values.shape[-1]), values)
        for name in _OF_ROWS:
            columns[name] = _values(arrays[f"{prefix}{name}"])
        return columns


def _rows(columns: _Columns) -> list[Answer]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(array: np.ndarray) -> list[Any]:
    """One value a row: a scalar, or for several a nested list, which orjson wants contiguous."""
    return list(array if array.ndim == 1 else np.ascontiguousarray(array))


def _by_label(labels: list[str], array: np.ndarray) -> list[dict[str, Any]]:
    """An object by label for each row [N, K], without an array for each."""
    scalars = iter(list(array.ravel()))
    return [dict(zip(labels, row, strict=True)) for row in zip(*[scalars] * len(labels), strict=True)]


def class_labels(output: ModelOutput, classes: int) -> list[str]:
    """The classes' names; their numbers where the model has no names."""
    return output.labels or [str(index) for index in range(classes)]


def _end(value: Any) -> Any:
    """An interval's end; None where it has none."""
    return value if math.isfinite(value) else None


def finite(values: np.ndarray, *, ends: bool = False) -> np.ndarray:
    """The values, or InvalidRequest: finite features so large that the network overflows have no answer.

    ends: they are those of intervals, which may be infinite.
    """
    good = ~np.isnan(values) if ends else np.isfinite(values)
    if np.count_nonzero(good) != good.size:
        row = int(np.argmin(good.reshape(len(values), -1).all(axis=1)))
        raise InvalidRequest(
            f"row {row}: the network overflows on these features, wanted values of the size that it was trained on"
        )
    return values
