"""Arrays of a model's outputs -> the JSON objects of the native endpoints, one for each row.

NumPy scalars are left as they are: orjson writes a float32 with the digits that a float32 has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np

from models.contract import ABSTAIN, INTERVAL_LOWER, INTERVAL_UPPER, NOVELTY, PREDICTION_SET, Manifest, ModelOutput
from serving.errors import InvalidRequest
from serving.prediction_sets import Coverage

Arrays = dict[str, np.ndarray]
Answer = dict[str, Any]

# Statistics in the order that the answers show them. What an artifact's signatures do not carry is left out.
_OF_CLASSES = ("std", "standard_error")
_OF_ROWS = ("predictive_entropy", "expected_entropy", "mutual_information")
_OF_REGRESSION = ("mean", "epistemic_std", "aleatoric_std", "std", "standard_error")
# Of both, behind them.
_LAST = (ABSTAIN, NOVELTY)


def predictions(manifest: Manifest, arrays: Arrays) -> list[Answer]:
    """Deterministic answers: label and probabilities, or the mean."""
    return _by_output(manifest, arrays, _prediction_rows)


def uncertainties(
    manifest: Manifest, arrays: Arrays, num_samples: np.ndarray, converged: np.ndarray, coverage: Coverage
) -> list[Answer]:
    """Answers of MC dropout; `num_samples` [N] and `converged` [N] are of the row, whatever its outputs."""
    rows = _by_output(
        manifest, coverage.apply(arrays), lambda output, arrays: _uncertainty_rows(output, arrays, coverage.value)
    )
    for row, drawn, done in zip(rows, num_samples.tolist(), converged.tolist(), strict=True):
        row["num_samples"] = drawn
        row["converged"] = done
    return rows


def _by_output(
    manifest: Manifest, arrays: Arrays, rows_of: Callable[[ModelOutput, Arrays], list[Answer]]
) -> list[Answer]:
    """One object a row; grouped by output's name where there are several."""
    if len(manifest.outputs) == 1:
        return rows_of(manifest.outputs[0], arrays)
    names = [output.name for output in manifest.outputs]
    groups = [rows_of(output, arrays) for output in manifest.outputs]
    return [dict(zip(names, row, strict=True)) for row in zip(*groups, strict=True)]


def _prediction_rows(output: ModelOutput, arrays: Arrays) -> list[Answer]:
    if output.task == "regression":
        return [{"mean": _number(value)} for value in finite(arrays[f"{output.prefix}mean"])]
    return _class_rows(output, finite(arrays[f"{output.prefix}probabilities"]))


def _uncertainty_rows(output: ModelOutput, arrays: Arrays, coverage: float) -> list[Answer]:
    rows = _value_rows(output, arrays) if output.task == "regression" else _sampled_class_rows(output, arrays)
    prefix = output.prefix
    if f"{prefix}{PREDICTION_SET}" in arrays:
        labels = class_labels(output, arrays[f"{prefix}{PREDICTION_SET}"].shape[-1])
        for row, members in zip(rows, arrays[f"{prefix}{PREDICTION_SET}"].tolist(), strict=True):
            row[PREDICTION_SET] = list(compress(labels, members))
    if f"{prefix}{INTERVAL_LOWER}" in arrays:
        ends = (arrays[f"{prefix}{name}"] for name in (INTERVAL_LOWER, INTERVAL_UPPER))
        for row, lower, upper in zip(rows, *ends, strict=True):
            row["interval"] = {"lower": _end(lower), "upper": _end(upper), "coverage": coverage}
    for name in _LAST:
        values = arrays.get(f"{prefix}{name}")
        if values is not None:
            for row, value in zip(rows, values, strict=True):
                row[name] = _number(value)
    return rows


def _value_rows(output: ModelOutput, arrays: Arrays) -> list[Answer]:
    found = [name for name in _OF_REGRESSION if f"{output.prefix}{name}" in arrays]
    columns = [finite(arrays[f"{output.prefix}{name}"]) for name in found]
    return [
        {name: _number(value) for name, value in zip(found, row, strict=True)} for row in zip(*columns, strict=True)
    ]


def _sampled_class_rows(output: ModelOutput, arrays: Arrays) -> list[Answer]:
    rows = _class_rows(output, finite(arrays[f"{output.prefix}probabilities"]))
    labels = class_labels(output, arrays[f"{output.prefix}probabilities"].shape[-1])
    for name in _OF_CLASSES:
        for row, values in zip(rows, arrays[f"{output.prefix}{name}"], strict=True):
            row[name] = dict(zip(labels, values, strict=True))
    for name in _OF_ROWS:
        for row, value in zip(rows, arrays[f"{output.prefix}{name}"], strict=True):
            row[name] = _number(value)
    return rows


def _class_rows(output: ModelOutput, probabilities: np.ndarray) -> list[Answer]:
    labels = class_labels(output, probabilities.shape[-1])
    best = probabilities.argmax(axis=-1).tolist()
    return [
        {"label": labels[index], "probabilities": dict(zip(labels, row, strict=True))}
        for index, row in zip(best, probabilities, strict=True)
    ]


def class_labels(output: ModelOutput, classes: int) -> list[str]:
    """The classes' names; their numbers where the model has no names."""
    return output.labels or [str(index) for index in range(classes)]


def _number(value: Any) -> Any:
    """A scalar, or for several a nested list: orjson wants contiguous arrays."""
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) and value.ndim else value


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
