"""JSON instances -> the arrays of a model's inputs, refusing whatever a model would silently turn into a number.

An instance is one row, in any of these forms:

- a table: a list of values in the manifest's column order, or an object by column name
- one other input (an image, say): its nested list
- any model: an object by input name

The good case is read by NumPy in bulk. Only when something is wrong with it is the request read value by value,
to say which row and which feature, what was found and what is wanted. Neither needs TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from models.contract import Feature, Manifest, ModelInput
from serving.errors import InvalidField, InvalidInstance, choices, quote

Arrays = dict[str, np.ndarray]

# JSON's number types in Python. bool is a subclass of int, and is not among them.
_NUMBERS = frozenset({int, float})
# The smallest magnitude that each type rounds to infinity, as exact integers: any JSON number compares with them.
OVERFLOW = {"float16": 65_520, "float32": 2**128 - 2**103, "float64": 2**1024 - 2**970}
_LIMITS = {np.dtype(name): float(limit) if name != "float64" else np.inf for name, limit in OVERFLOW.items()}


# Stands for a name that an object does not have.
_ABSENT = object()


class NotPlain(Exception):
    """The bulk reading does not fit: read value by value."""


@dataclass(frozen=True)
class _Column:
    """A scalar of a row: where it comes from in JSON, and what may stand there."""

    name: str
    dtype: np.dtype
    nullable: bool = False
    # A boolean in a float, so that NaN can say that it is missing.
    is_boolean_number: bool = False
    # A category: the empty string says that it is missing.
    is_category: bool = False

    @classmethod
    def of(cls, feature: Feature, item: ModelInput) -> _Column:
        dtype = _numpy_dtype(item.dtype)
        is_boolean_number = feature.kind == "boolean" and dtype.kind == "f"
        return cls(feature.name, dtype, feature.nullable, is_boolean_number, feature.kind == "categorical")

    @property
    def wanted(self) -> str:
        what = {"f": "a finite number", "i": "an integer", "u": "an integer", "b": "true or false"}.get(
            self.dtype.kind, "a string"
        )
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            what = f"an integer from {limits.min} to {limits.max}"
        elif self.is_boolean_number:
            what = "true or false"
        elif self.dtype == np.float32:
            what = "a finite float32 number"
        elif self.is_category and not self.nullable:
            what = "a string that is not empty"
        return f"{what} or null" if self.nullable else what

    def read(self, row: int, value: Any) -> Any:
        """The value for the graph, or InvalidInstance."""
        if value is None and self.nullable:
            return np.nan if self.dtype.kind == "f" else ""
        if not self.fits(value):
            raise InvalidInstance(row, self.name, quote(value), self.wanted)
        return value

    def fits(self, value: Any) -> bool:
        if self.is_boolean_number:
            return type(value) is bool or (type(value) in _NUMBERS and value in (0, 1))
        if self.is_category and not self.nullable and value == "":
            return False
        match self.dtype.kind:
            case "f":
                limit = OVERFLOW[self.dtype.name]
                return type(value) in _NUMBERS and -limit < value < limit
            case "i" | "u":
                limits = np.iinfo(self.dtype)
                return type(value) is int and limits.min <= value <= limits.max
            case "b":
                return type(value) is bool
            case _:
                # A lone surrogate has no UTF-8 form: no such text can reach the graph.
                return type(value) is str and _is_encodable(value)

    def plain(self, values: list[Any]) -> np.ndarray:
        """A whole column [N]; NotPlain unless every value fits, which `read` then says more about."""
        kinds = set(map(type, values))
        if kinds & {type(None), type(_ABSENT)}:
            if not self.nullable or self.dtype.kind not in "fO":
                raise NotPlain
            missing = np.nan if self.dtype.kind == "f" else ""
            absent = np.fromiter((value is None or value is _ABSENT for value in values), bool, len(values))
            array = np.full(len(values), missing, self.dtype)
            present = [value for value in values if value is not None and value is not _ABSENT]
            array[~absent] = self.plain(present) if present else array[:0]
            return array
        if self.is_boolean_number:
            if not kinds <= {bool, int, float}:
                raise NotPlain
            # As exact numbers: an integer may be too large for a float.
            if not set(values) <= {0, 1}:
                raise NotPlain
            return np.array(values, self.dtype)
        array = _plain_array(values, self.dtype)
        if self.is_category and not self.nullable and "" in values:
            raise NotPlain
        return array


class InstanceReader:
    """Reads `instances` for one model, as its manifest describes the inputs."""

    def __init__(self, manifest: Manifest) -> None:
        self._inputs = manifest.inputs
        self._by_name = {item.name: item for item in manifest.inputs}
        self._columns = _columns(manifest)
        self._names = {column.name for column in self._columns}
        self._read: Callable[[list[Any]], Arrays]
        # A table of numbers in one tensor [N, F], rather than one tensor [N] for each column.
        self._is_matrix = manifest.is_table and len(manifest.inputs) == 1 and len(manifest.inputs[0].shape) == 1
        if self._is_matrix:
            self._read = self._read_matrix
        elif manifest.is_table:
            self._read = self._read_columns
        else:
            self._read = self._read_tensors

    def read(self, instances: Any) -> Arrays:
        """Arrays [N, ...] by input name.

        Raises InvalidField where `instances` is not a non-empty list, InvalidInstance for the first row that is wrong.
        """
        if type(instances) is not list:
            raise InvalidField("instances", quote(instances), "a list of rows")
        if not instances:
            raise InvalidField("instances", "an empty list", "at least one row")
        return self._read(instances)

    def blank(self, rows: int) -> Arrays:
        """Rows of zeros (empty strings), for a model without examples; free axes have length one."""
        return {
            item.name: np.zeros([rows, *(axis or 1 for axis in item.shape)], _numpy_dtype(item.dtype))
            for item in self._inputs
        }

    # A table of numbers in one tensor.

    def _read_matrix(self, instances: list[Any]) -> Arrays:
        item = self._inputs[0]
        for read in (self._plain_matrix, self._plain_matrix_with_gaps):
            try:
                return {item.name: read(instances)}
            except NotPlain:
                continue
        rows = [self._row_values(row, instance) for row, instance in enumerate(_same_form(instances))]
        return {item.name: np.array(rows, self._columns[0].dtype)}

    def _plain_matrix_with_gaps(self, instances: list[Any]) -> np.ndarray:
        """The same where values may be missing: column by column."""
        if not any(column.nullable for column in self._columns):
            raise NotPlain
        return np.stack(self._plain_columns(instances), axis=1)

    def _plain_matrix(self, instances: list[Any]) -> np.ndarray:
        """The whole table in bulk; NotPlain unless every row is as it should be."""
        columns = self._columns
        width = len(columns)
        kinds = set(map(type, instances))
        if kinds == {dict}:
            try:
                pick = itemgetter(*(column.name for column in columns))
                if set(map(len, instances)) != {width}:
                    raise NotPlain
                flat = [*chain.from_iterable(map(pick, instances))] if width > 1 else [*map(pick, instances)]
            except KeyError:
                raise NotPlain from None
        elif kinds == {list}:
            if set(map(len, instances)) != {width}:
                raise NotPlain
            flat = instances[0] if len(instances) == 1 else [*chain.from_iterable(instances)]
        else:
            raise NotPlain
        return _plain_array(flat, columns[0].dtype).reshape(len(instances), width)

    # A table with other types: one tensor for each column.

    def _read_columns(self, instances: list[Any]) -> Arrays:
        try:
            found = self._plain_columns(instances)
            return {item.name: array for item, array in zip(self._inputs, found, strict=True)}
        except NotPlain:
            pass
        rows = [self._row_values(row, instance) for row, instance in enumerate(_same_form(instances))]
        return {
            item.name: np.array([row[place] for row in rows], column.dtype)
            for place, (item, column) in enumerate(zip(self._inputs, self._columns, strict=True))
        }

    def _plain_columns(self, instances: list[Any]) -> list[np.ndarray]:
        """One array [N] for each column, in bulk; NotPlain unless every row is as it should be."""
        columns = self._columns
        kinds = set(map(type, instances))
        if kinds == {list}:
            if set(map(len, instances)) != {len(columns)}:
                raise NotPlain
            return [
                column.plain(list(found)) for column, found in zip(columns, zip(*instances, strict=True), strict=True)
            ]
        if kinds != {dict} or not self._names.issuperset(chain.from_iterable(instances)):
            raise NotPlain
        return [column.plain([instance.get(column.name, _ABSENT) for instance in instances]) for column in columns]

    def _row_values(self, row: int, instance: Any) -> list[Any]:
        """One row of a table, value by value, in column order."""
        columns = self._columns
        if type(instance) is list:
            if len(instance) != len(columns):
                place = columns[len(instance)].name if len(instance) < len(columns) else None
                missing = "" if place is None else f" ({quote(place)} is the first that is missing)"
                raise InvalidInstance(
                    row, place, f"a list of {len(instance)} values{missing}", f"{len(columns)} values, in column order"
                )
            return [column.read(row, value) for column, value in zip(columns, instance, strict=True)]
        if type(instance) is not dict:
            wanted = f"a list of {len(columns)} values or an object by feature name"
            raise InvalidInstance(row, None, quote(instance), wanted)
        names = {column.name for column in columns}
        if instance.keys() >= self._by_name.keys() and not self._by_name.keys() <= names:
            return self._row_of_inputs(row, instance)
        for name in instance:
            if name not in names:
                raise InvalidInstance(
                    row, name, "an unknown feature", f"one of {choices(column.name for column in columns)}"
                )
        for column in columns:
            if column.name not in instance and not column.nullable:
                raise InvalidInstance(row, column.name, "no value", column.wanted)
        return [column.read(row, instance.get(column.name)) for column in columns]

    def _row_of_inputs(self, row: int, instance: dict[str, Any]) -> list[Any]:
        """A table's row given as an object of the model's named inputs."""
        for name in instance:
            if name not in self._by_name:
                raise InvalidInstance(row, name, "an unknown input", f"one of {choices(self._by_name)}")
        if self._is_matrix:
            values = instance[self._inputs[0].name]
            if type(values) is dict and values.keys() == self._by_name.keys():
                raise InvalidInstance(row, None, "an object of the model's inputs within another", "one of them")
            return self._row_values(row, values)
        return self._row_values(row, [instance[item.name] for item in self._inputs])

    # Any other model: one tensor for each input.

    def _read_tensors(self, instances: list[Any]) -> Arrays:
        inputs = self._inputs
        named = [
            type(instance) is dict and (len(inputs) > 1 or instance.keys() == self._by_name.keys())
            for instance in _same_form(instances)
        ]
        if len(inputs) == 1 and not any(named):
            return {inputs[0].name: self._read_tensor(inputs[0], instances)}
        for row, instance in enumerate(instances):
            if type(instance) is not dict:
                wanted = f"an object with the inputs {choices(self._by_name)}"
                raise InvalidInstance(row, None, quote(instance), wanted)
            for name in instance:
                if name not in self._by_name:
                    raise InvalidInstance(row, name, "an unknown input", f"one of {choices(self._by_name)}")
            for name in self._by_name:
                if name not in instance:
                    raise InvalidInstance(row, name, "no value", _wanted_tensor(self._by_name[name]))
        return {item.name: self._read_tensor(item, [instance[item.name] for instance in instances]) for item in inputs}

    def _read_tensor(self, item: ModelInput, values: list[Any]) -> np.ndarray:
        """[N, *shape] of one input; `values` holds its nested lists, one a row."""
        dtype = _numpy_dtype(item.dtype)
        try:
            shape, flat = _flatten(values, len(item.shape))
            if all(axis is None or axis == found for axis, found in zip(item.shape, shape[1:], strict=True)):
                return _plain_array(flat, dtype).reshape(shape)
        except NotPlain:
            pass
        column = _Column(item.name, dtype)
        first_shape: list[int] | None = None
        for row, value in enumerate(values):
            shape = _checked_shape(row, item, column, value, item.shape, ())
            if first_shape is not None and shape != first_shape:
                raise InvalidInstance(row, item.name, f"shape {shape}", f"the first row's shape {first_shape}")
            first_shape = shape
        return np.array(values, dtype).reshape([len(values), *(first_shape or [])])


def _columns(manifest: Manifest) -> list[_Column]:
    """The columns of a table's row, in order; none where the inputs are not a table's."""
    return [_Column.of(feature, item) for item in manifest.inputs for feature in item.features or ()]


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(object) if name == "string" else np.dtype(name)


def _same_form(instances: list[Any]) -> list[Any]:
    """The instances, if all are lists or all are objects; else InvalidInstance for the first that differs."""
    form = type(instances[0])
    for row, instance in enumerate(instances):
        if type(instance) is not form:
            raise InvalidInstance(row, None, quote(instance), f"the form of row 0: {quote(instances[0])}")
    return instances


def plain_tensor(values: list[Any], rank: int, dtype: np.dtype) -> np.ndarray:
    """Equally nested lists, one for each row with `rank` axes, in bulk; NotPlain unless every value fits."""
    shape, flat = _flatten(values, rank)
    return _plain_array(flat, dtype).reshape(shape)


def _plain_array(flat: list[Any], dtype: np.dtype) -> np.ndarray:
    """A flat list of JSON scalars as an array; NotPlain unless each is of the right type, finite and in range."""
    kinds = set(map(type, flat))
    try:
        if dtype.kind == "f":
            if not kinds <= _NUMBERS:
                raise NotPlain
            # In doubles first: a conversion that overflows would warn, and NaN compares false with everything.
            exact = np.array(flat, np.float64)
            if np.count_nonzero(np.abs(exact) < _LIMITS[dtype]) != len(flat):
                raise NotPlain
            return exact.astype(dtype)
        allowed = {"i": int, "u": int, "b": bool}.get(dtype.kind, str)
        if kinds - {allowed}:
            raise NotPlain
        array = np.array(flat, dtype)
    except OverflowError:
        raise NotPlain from None
    if dtype.kind == "O" and not all(map(_is_encodable, flat)):
        raise NotPlain
    return array


def _flatten(values: list[Any], depth: int) -> tuple[list[int], list[Any]]:
    """The shape [len(values), ...] and all scalars of equally nested lists; NotPlain where they are not equal."""
    shape = [len(values)]
    for _ in range(depth):
        if set(map(type, values)) - {list}:
            raise NotPlain
        lengths = set(map(len, values))
        if len(lengths) != 1:
            raise NotPlain
        shape.append(lengths.pop())
        values = [*chain.from_iterable(values)]
    return shape, values


def _checked_shape(
    row: int, item: ModelInput, column: _Column, value: Any, shape: list[int | None], place: tuple[int, ...]
) -> list[int]:
    """The shape of one row's nested list; InvalidInstance at the first place that does not fit."""
    name = item.name + "".join(f"[{index}]" for index in place)
    if not shape:
        if not column.fits(value):
            raise InvalidInstance(row, name, quote(value), column.wanted)
        return []
    if type(value) is not list:
        raise InvalidInstance(row, name, quote(value), _wanted_tensor(item))
    if shape[0] is not None and len(value) != shape[0]:
        raise InvalidInstance(row, name, quote(value), f"a list of {shape[0]}: {_wanted_tensor(item)}")
    if not value:
        raise InvalidInstance(row, name, "an empty list", _wanted_tensor(item))
    inner = [_checked_shape(row, item, column, entry, shape[1:], (*place, index)) for index, entry in enumerate(value)]
    for index, found in enumerate(inner):
        if found != inner[0]:
            raise InvalidInstance(row, f"{name}[{index}]", f"shape {found}", f"its neighbours' shape {inner[0]}")
    return [len(value), *inner[0]]


def _wanted_tensor(item: ModelInput) -> str:
    shape = ", ".join("any" if axis is None else str(axis) for axis in item.shape)
    return f"{item.dtype} values of shape [{shape}]" if item.shape else f"one {item.dtype} value"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
