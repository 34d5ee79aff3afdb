"""Columns of a file -> the arrays of a model's inputs, and for each row that cannot be taken, why.

Columns are read in bulk; a row that does not fit is given to the reader of the HTTP endpoints, which says what is wrong
with it in the same words.
"""

from __future__ import annotations

import contextlib
import decimal
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from models.contract import Feature, Manifest, ModelInput
from serving.errors import InvalidInstance, choices
from serving.instances import InstanceReader
from serving.scoring.errors import ScoreError

Arrays = dict[str, np.ndarray]

# What text may be read as a value of a type: JSON's forms, and what libraries write for a truth or a missing number.
_FORMS = {
    pa.float64(): r"^\s*[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|(?i:nan))\s*$",
    pa.int64(): r"^\s*-?\d{1,18}\s*$",
    pa.bool_(): r"^\s*(true|false|True|False|TRUE|FALSE|0|1)\s*$",
}
# And for what is missing: all that is missing to training, which reads CSV files by Arrow's own list.
_MISSING = pa.array(pyarrow.csv.ConvertOptions().null_values, pa.string())
# Types of which a value is made of, or is one of, values of one other type.
_HOLDERS = (
    pa.ListType,
    pa.LargeListType,
    pa.FixedSizeListType,
    pa.ListViewType,
    pa.LargeListViewType,
    pa.DictionaryType,
)


@dataclass(frozen=True)
class Readable:
    """Rows that a model can take together: `places` [M] in the batch, `inputs` [M, ...] by name."""

    places: np.ndarray
    inputs: Arrays


@dataclass(frozen=True)
class _Column:
    """A column of the file that is a scalar of the model's row."""

    name: str
    input: str
    dtype: np.dtype
    nullable: bool
    # As in `serving.instances`: a boolean in a float, so that NaN can say that it is missing; a category, of which the
    # empty string says it.
    is_boolean_number: bool = False
    is_category: bool = False

    @property
    def wanted(self) -> str:
        """The type that a typed column should have."""
        return "bool" if self.is_boolean_number else "string" if self.dtype.kind == "O" else str(self.dtype)


class RowReader:
    """Reads batches of files with the same columns for one model. Raises ScoreError where the columns do not fit it."""

    def __init__(self, manifest: Manifest, columns: pa.Schema, place: str, *, is_text: bool) -> None:
        """columns: of the file `place`; is_text: all of them are text that stands for values, as in CSV."""
        self._reader = InstanceReader(manifest)
        self._inputs = manifest.inputs
        self._is_text = is_text
        self._is_matrix = False
        self._columns = self._scalars(manifest, columns)
        wanted = [column.name for column in self._columns] or [item.name for item in manifest.inputs]
        missing = [name for name in wanted if name not in columns.names]
        if missing:
            raise ScoreError(
                f"{place}: no column {missing[0]!r}{_and_others(missing)}, found {choices(columns.names)}; "
                f"wanted the columns of the model: {choices(wanted)}"
            )
        for column in self._columns if not is_text else ():
            kind = columns.field(column.name).type
            if not _fits(kind, column):
                raise ScoreError(f"{place}: column {column.name!r} is of type {kind}, wanted {column.wanted}")
        for item in manifest.inputs if not (is_text or self._columns) else ():
            kind = columns.field(item.name).type
            if not _fits_json(kind):
                raise ScoreError(f"{place}: column {item.name!r} is of type {kind}, wanted lists of {item.dtype}")

    def read(self, batch: pa.RecordBatch) -> tuple[list[Readable], dict[int, str]]:
        """Rows that the model can take, in groups of one shape, and reasons by place for the others."""
        return self._read_table(batch) if self._columns else self._read_tensors(batch)

    def _scalars(self, manifest: Manifest, columns: pa.Schema) -> list[_Column]:
        """The columns of a table, or of a vector that stands in the file as one column for each element."""
        if manifest.is_table:
            self._is_matrix = len(manifest.inputs) == 1 and len(manifest.inputs[0].shape) == 1
            return [_column(feature, item) for item in manifest.inputs for feature in item.features or ()]
        item = manifest.inputs[0]
        if len(manifest.inputs) == 1 and item.name not in columns.names and item.shape == [len(columns.names)]:
            self._is_matrix = True
            return [_Column(name, item.name, _dtype(item), nullable=False) for name in columns.names]
        return []

    def _read_table(self, batch: pa.RecordBatch) -> tuple[list[Readable], dict[int, str]]:
        bad = np.zeros([len(self._columns), batch.num_rows], bool)
        read: list[np.ndarray] = []
        arrays: Arrays = {}
        if self._is_matrix:
            first = self._columns[0]
            arrays[first.input] = np.empty([batch.num_rows, len(self._columns)], first.dtype)
        for place, column in enumerate(self._columns):
            values, bad[place] = _read_column(batch.column(column.name), column)
            read.append(values)
            if self._is_matrix:
                arrays[column.input][:, place] = values
            else:
                arrays[column.input] = values
        is_bad = bad.any(axis=0)
        reasons = {int(row): self._reason(batch, read, bad, int(row)) for row in np.flatnonzero(is_bad)}
        places = np.flatnonzero(~is_bad)
        if reasons:
            arrays = {name: array[places] for name, array in arrays.items()}
        return ([Readable(places, arrays)] if len(places) else []), reasons

    def _reason(self, batch: pa.RecordBatch, read: list[np.ndarray], bad: np.ndarray, row: int) -> str:
        """read: the columns' values [N]; bad [columns, N]: which of them could not be taken."""
        values = [
            # As it was read, where it was: JSON has not all forms of a number or of what is missing that files have.
            self._value(batch, column, row) if unfit else _taken(taken[row], column)
            for column, taken, unfit in zip(self._columns, read, bad[:, row], strict=True)
        ]
        instance = {self._columns[0].input: values} if self._is_matrix else values
        try:
            self._reader.read([instance])
        except InvalidInstance as error:
            return self._words(error)
        return f"a value out of range, wanted the types of {choices(column.name for column in self._columns)}"

    def _value(self, batch: pa.RecordBatch, column: _Column, row: int) -> Any:
        is_text = self._is_text and column.dtype.kind != "O"
        return _json_value(batch.column(column.name)[row].as_py(), is_text=is_text)

    def _words(self, error: InvalidInstance) -> str:
        feature = "" if error.feature is None else f"feature {json.dumps(self._shown(error.feature))}: "
        return f"{feature}found {error.found}, wanted {error.wanted}"

    def _shown(self, feature: str) -> str:
        """A vector's element by its column's name."""
        named = {f"{column.input}[{place}]": column.name for place, column in enumerate(self._columns)}
        return named.get(feature, feature)

    def _read_tensors(self, batch: pa.RecordBatch) -> tuple[list[Readable], dict[int, str]]:
        """One column for each input, with nested lists in it; in CSV as JSON. Rows of free shapes may differ."""
        columns = [batch.column(item.name).to_pylist() for item in self._inputs]
        names = [item.name for item in self._inputs]
        texts = {item.name for item in self._inputs if item.dtype == "string"}
        groups: dict[tuple, tuple[list[int], list[Arrays]]] = {}
        reasons: dict[int, str] = {}
        for row, values in enumerate(zip(*columns, strict=True)):
            instance = {
                name: _json_value(value, is_text=self._is_text and name not in texts)
                for name, value in zip(names, values, strict=True)
            }
            try:
                arrays = self._reader.read([instance])
            except InvalidInstance as error:
                reasons[row] = self._words(error)
                continue
            rows, members = groups.setdefault(tuple(array.shape for array in arrays.values()), ([], []))
            rows.append(row)
            members.append(arrays)
        readable = [
            Readable(np.array(rows), {name: np.concatenate([arrays[name] for arrays in members]) for name in names})
            for rows, members in groups.values()
        ]
        return readable, reasons


def _read_column(values: pa.Array, column: _Column) -> tuple[np.ndarray, np.ndarray]:
    """A column's values [N] as the model takes them, and which rows [N] have none that it could take."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if column.nullable and column.dtype.kind != "O" and pa.types.is_string(values.type):
        values = pc.if_else(pc.is_in(values, _MISSING), None, values)
    absent = pc.is_null(values).to_numpy(zero_copy_only=False)
    if column.dtype.kind == "O":
        texts = np.array(_as_text(values).fill_null("").to_pylist(), object)
        if column.nullable:
            return texts, np.zeros(len(texts), bool)
        return texts, texts == "" if column.is_category else absent
    if column.is_boolean_number and (pa.types.is_boolean(values.type) or _is_text(values.type)):
        values = pc.cast(_parsed(values, pa.bool_()), pa.int8())
        # Text that is no truth is none that is missing.
        unreadable = _nulls(values) & ~absent
        return values.cast(pa.float32()).fill_null(np.nan).to_numpy(zero_copy_only=False).astype(column.dtype), (
            unreadable | (absent & (not column.nullable))
        )
    if column.dtype.kind == "f":
        exact = _parsed(values, pa.float64())
        unreadable = pc.is_null(exact).to_numpy(zero_copy_only=False) & ~absent
        numbers = exact.fill_null(np.nan).to_numpy(zero_copy_only=False)
        # What the type of the model's input would round to infinity is refused, as over HTTP.
        with np.errstate(over="ignore"):
            narrow = numbers.astype(column.dtype)
        missing = np.isnan(numbers) & ~unreadable & column.nullable
        fit = np.isin(numbers, (0, 1)) if column.is_boolean_number else np.isfinite(narrow)
        return narrow, ~(fit | missing)
    if column.dtype.kind == "b":
        if not (pa.types.is_boolean(values.type) or _is_text(values.type)):
            numbers = pc.cast(values, pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
            return numbers == 1, ~np.isin(numbers, (0, 1))
        truths = _parsed(values, pa.bool_())
        return truths.fill_null(False).to_numpy(zero_copy_only=False), _nulls(truths)
    integers = _parsed(values, pa.int64())
    found = integers.fill_null(0).to_numpy(zero_copy_only=False)
    limits = np.iinfo(column.dtype)
    return found.astype(column.dtype), _nulls(integers) | (found < limits.min) | (found > limits.max)


def _as_text(values: pa.Array) -> pa.Array:
    """The values as the categories that training makes of them: whole floats as integers, not a number as missing."""
    if not pa.types.is_floating(values.type):
        return values.cast(pa.string())
    if pa.types.is_float16(values.type):
        # For which Arrow has no functions.
        values = values.cast(pa.float32())
    values = pc.if_else(pc.is_nan(values), None, values)
    is_whole = pc.and_(pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), 2.0**63))
    whole = pc.if_else(is_whole, values, None).cast(pa.int64())
    return pc.coalesce(whole.cast(pa.string()), values.cast(pa.string()))


def _parsed(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values as numbers; nothing in the place of text that is none."""
    if _is_text(values.type):
        if pa.types.is_floating(kind):
            # A column without any such text, as most are, needs no second look.
            with contextlib.suppress(pa.ArrowInvalid):
                return pc.cast(values, kind)
        matches = pc.match_substring_regex(values, _FORMS[kind])
        values = pc.if_else(matches, pc.utf8_trim_whitespace(values), None)
    return pc.cast(values, kind, safe=not pa.types.is_floating(kind))


def _nulls(values: pa.Array) -> np.ndarray:
    return pc.is_null(values).to_numpy(zero_copy_only=False)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _column(feature: Feature, item: ModelInput) -> _Column:
    dtype = _dtype(item)
    is_boolean_number = feature.kind == "boolean" and dtype.kind == "f"
    is_category = feature.kind == "categorical"
    return _Column(feature.name, item.name, dtype, feature.nullable, is_boolean_number, is_category)


def _fits(found: pa.DataType, column: _Column) -> bool:
    """Whether a typed column holds what the model's takes."""
    wanted = column.dtype
    if column.is_boolean_number and pa.types.is_boolean(found):
        return True
    if pa.types.is_dictionary(found):
        found = found.value_type
    integer = bool(pa.types.is_integer(found)) and found != pa.uint64()
    match wanted.kind:
        case "f":
            return integer or found == pa.uint64() or bool(pa.types.is_floating(found) or pa.types.is_decimal(found))
        case "i" | "u":
            return integer
        case "b":
            # As text may be, and numbers that stand for a truth in a float.
            number = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
            return bool(pa.types.is_boolean(found) or number)
    if _is_text(found) or not column.is_category:
        return _is_text(found)
    # Training makes categories of these, too.
    number = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
    moment = pa.types.is_date(found) or pa.types.is_time(found) or pa.types.is_timestamp(found)
    return bool(pa.types.is_boolean(found) or number or moment)


def _fits_json(found: pa.DataType) -> bool:
    """Whether values of a type are, as Python has them, what JSON has: no dates, say, and no bytes."""
    if isinstance(found, pa.BaseExtensionType):
        return _fits_json(found.storage_type)
    if isinstance(found, _HOLDERS):
        return _fits_json(found.value_type)
    return bool(
        _is_text(found)
        or pa.types.is_integer(found)
        or pa.types.is_floating(found)
        or pa.types.is_boolean(found)
        or pa.types.is_null(found)
    )


def _taken(value: Any, column: _Column) -> Any:
    """A value that `_read_column` took, as JSON has it, whose truths are no 0 and 1."""
    if column.is_category:
        return value or None
    if column.dtype.kind == "f" and np.isnan(value):
        return None
    return bool(value) if column.is_boolean_number else value if column.dtype.kind == "O" else value.item()


def _json_value(value: Any, *, is_text: bool) -> Any:
    """A value of the file as JSON has it. is_text: text stands for a number, a list, ..."""
    if is_text and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return float(value) if isinstance(value, decimal.Decimal) else value


def _dtype(item: ModelInput) -> np.dtype:
    return np.dtype(object) if item.dtype == "string" else np.dtype(item.dtype)


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""
