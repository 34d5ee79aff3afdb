"""Tensors as other servers' protocols carry them -> the arrays of a model's inputs, and outputs on their way back.

The rules are those of JSON instances: where a value is wrong, `instances` is shown the row and words the refusal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from models.contract import ENDS, Manifest, ModelInput
from serving.answers import finite
from serving.errors import InvalidField, InvalidInstance, InvalidRequest, choices, quote
from serving.graph import Arrays
from serving.instances import InstanceReader


def check_names(manifest: Manifest, names: Iterable[str]) -> None:
    """Raise InvalidField unless the names are the model's inputs, each of them."""
    found = set(names)
    wanted = [item.name for item in manifest.inputs]
    for name in sorted(found - set(wanted)):
        raise InvalidField(f"input {quote(name)}", "an unknown input", f"one of {choices(wanted)}")
    for name in wanted:
        if name not in found:
            raise InvalidField(f"input {quote(name)}", "nothing", "a tensor of this name")


def check_shape(item: ModelInput, shape: Sequence[int]) -> None:
    """Raise InvalidField unless a tensor [N, ...] of this shape holds at least one row of the input."""
    wanted = [None, *item.shape]
    fits = len(shape) == len(wanted) and all(
        size > 0 and axis in (None, size) for axis, size in zip(wanted, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if axis is None else str(axis) for axis in wanted)
        raise InvalidField(f"input {quote(item.name)}", f"shape {list(shape)}", f"shape [{sizes}], at least one row")


def check_rows(lengths: Mapping[str, int]) -> None:
    """Raise InvalidField unless all inputs have the same number of rows."""
    first, *others = lengths
    for name in others:
        if lengths[name] != lengths[first]:
            wanted = f"{lengths[first]} rows, as input {quote(first)} has"
            raise InvalidField(f"input {quote(name)}", f"{lengths[name]} rows", wanted)


def check_values(manifest: Manifest, reader: InstanceReader, arrays: Arrays) -> Arrays:
    """The arrays [N, ...] by input name, of the right shapes and types, if a model may see their values.

    Raises InvalidInstance for the first row that holds a number that is not finite, or nothing in a column that must
    have a value.
    """
    for item in manifest.inputs:
        array = arrays[item.name]
        bad = _not_finite(item, array) if array.dtype.kind == "f" else _empty(item, array)
        if bad is not None:
            row = int(np.argmax(bad.reshape(len(array), -1).any(axis=1)))
            _refuse(manifest, reader, {name: values[row : row + 1] for name, values in arrays.items()}, row)
    return arrays


def text(name: str, values: Sequence[bytes]) -> np.ndarray:
    """The values of an input as text, flat; InvalidInstance for bytes that are no UTF-8, as no text in JSON is."""
    texts = np.empty(len(values), object)
    for place, value in enumerate(values):
        try:
            texts[place] = value.decode()
        except UnicodeDecodeError:
            raise InvalidInstance(place, name, "bytes that are not UTF-8", "a string") from None
    return texts


def nested(item: ModelInput, array: np.ndarray) -> list[Any]:
    """An array [N, ...] of an input as JSON has it: null where a column that may be empty is."""
    values = array.tolist()
    if item.features and array.dtype.kind == "f" and any(feature.nullable for feature in item.features):
        values = _with_nulls(values)
    return values


def folded(values: list[Any], shape: Sequence[int]) -> list[Any]:
    """Values, flat in row-major order, nested as the shape [M, ...] says."""
    for size in reversed(shape[1:]):
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return values


def row(values: list[Any], shape: Sequence[int | None]) -> list[Any] | None:
    """One row of an input [*shape], from its values as one flat list; None where only nesting could give free axes.

    The first axis is as long as the values are, so that who reads the row can say what is wrong with it.
    """
    sizes = [size for size in shape[1:] if size is not None]
    return folded(values, [len(values), *sizes]) if len(sizes) == len(shape) - 1 else None


def instances(manifest: Manifest, values: Mapping[str, list[Any]]) -> list[Any]:
    """Rows as `InstanceReader` reads them, from one nested list [N, ...] by input name."""
    columns = [values[item.name] for item in manifest.inputs]
    if not manifest.is_table or (len(columns) == 1 and manifest.inputs[0].shape):
        if len(columns) == 1:
            return columns[0]
        names = [item.name for item in manifest.inputs]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def finite_outputs(arrays: Mapping[str, np.ndarray], names: Sequence[str] = ()) -> Arrays:
    """The outputs asked for by name, without names all; InvalidField for an unknown one, InvalidRequest as `finite`.

    The ends of an interval may be infinite: where there are too few draws, or calibration rows, to know them.
    """
    for name in names:
        if name not in arrays:
            known = choices(sorted(arrays), limit=16)
            raise InvalidField(f"output {quote(name)}", "an unknown output", f"one of {known}")
    return {name: finite(arrays[name], ends=name.endswith(ENDS)) for name in names or arrays}


def check_scores(scores: np.ndarray) -> None:
    """Raise InvalidRequest, in TensorFlow Serving's words, unless the scores are [N, K]: a row has one class."""
    if scores.ndim != 2:
        shape = ",".join(map(str, scores.shape))
        raise InvalidRequest(f"Expected Tensor shape: [batch_size num_classes] but got [{shape}]")


def has_unknown_ends(arrays: Arrays) -> bool:
    """Whether an interval has an end that nobody can know, which is infinite."""
    return any(name.endswith(ENDS) and not np.isfinite(values).all() for name, values in arrays.items())


def _not_finite(item: ModelInput, array: np.ndarray) -> np.ndarray | None:
    """Where a number stands that may not; None where all may. NaN is how a column that may be empty says that it is."""
    good = np.isfinite(array)
    if item.features and item.features[0].kind == "boolean":
        good &= (array == 0) | (array == 1)
    if np.count_nonzero(good) == good.size:
        return None
    nullable = np.array([feature.nullable for feature in item.features or ()] or [False])
    bad = ~good & ~(np.isnan(array) & nullable)
    return bad if bad.any() else None


def _empty(item: ModelInput, array: np.ndarray) -> np.ndarray | None:
    """Where a category is empty that may not be: the empty string is how a column that may be says that it is."""
    feature = item.features[0] if item.features else None
    if feature is None or feature.kind != "categorical" or feature.nullable:
        return None
    bad = array == ""
    return bad if bad.any() else None


def _refuse(manifest: Manifest, reader: InstanceReader, one: Arrays, row: int) -> None:
    """Raise the refusal that the one row would get as a JSON instance."""
    try:
        reader.read(instances(manifest, {item.name: nested(item, one[item.name]) for item in manifest.inputs}))
    except InvalidInstance as error:
        raise InvalidInstance(row, error.feature, error.found, error.wanted) from None


def _with_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nulls(entry) for entry in value]
    return None if math.isnan(value) else value
