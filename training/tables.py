"""Your own table: a CSV or Parquet file becomes a data set; what cannot be honoured is refused in one line.

Columns stay Arrow's until they are float32: no Python object is made for a number, one for each different text.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from models.contract import NotUtf8, Task, counted, csv_delimiter, listed, not_utf8, one_line, visible
from training.datasets import MISSING, Dataset, Kind
from training.errors import InputError

CSV, PARQUET = ".csv", ".parquet"
SUFFIXES = (CSV, PARQUET)
KINDS: tuple[Kind, ...] = get_args(Kind)
IGNORED = "ignored"
NULLABLE = "nullable"

# Whole numbers with at most so many different values are classes, where nobody says otherwise.
MAX_INFERRED_CLASSES = 20
# Of each class: one for each fifth of the split.
MIN_CLASS_ROWS = 5
MIN_ROWS = 10

_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
# With a decimal comma or marks between thousands: 1,5 and 1.234,5 and 1,234.5, but no list of numbers, as 1,2,3.
_COMMA_NUMBER = r"^\s*[+-]?((\d{1,3}(\.\d{3})+|\d*),\d+|\d{1,3}(,\d{3})+(\.\d*)?)([eE][+-]?\d+)?\s*$"
# Of Arrow's message where a column that must be text is in another encoding.
_INVALID_TEXT = "invalid UTF8"
# And where a row has more values than the header, or fewer.
_RAGGED = " columns, got "
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# TensorFlow takes smaller numbers than float32's least normal one for 0.
_LEAST_SPREAD = 100 * float(np.finfo(np.float32).tiny)
# A regression answers with variances on the way.
_LEAST_SQUARED = 1e-15


class TableError(InputError):
    """A table cannot train a network. One line: the file, the column, what was found, what is wanted."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"{path}: {one_line(found)}")


@dataclass(frozen=True)
class ColumnType:
    """What `--type` says of a column; None leaves it to inference."""

    kind: Kind | None = None
    ignored: bool = False
    nullable: bool = False

    @classmethod
    def parse(cls, text: str) -> tuple[str, ColumnType]:
        """`COLUMN=numeric|boolean|categorical|ignored`, `COLUMN=nullable` or both, as in `COLUMN=numeric,nullable`."""
        column, equals, described = text.rpartition("=")
        words = described.split(",")
        kinds = [kind for kind in KINDS if kind in words]
        known = set(words) <= {*KINDS, IGNORED, NULLABLE}
        if not (equals and column and known and len(kinds) <= 1 and len(set(words)) == len(words)):
            raise InputError(
                f"--type {text!r}; wanted COLUMN=KIND, where KIND is {', '.join(KINDS)} or {IGNORED}, "
                f"with ',{NULLABLE}' where values may be missing"
            )
        return column, cls(kinds[0] if kinds else None, IGNORED in words, NULLABLE in words)


def is_table(data: str) -> bool:
    """Whether DATA of the command line is the name of a file that this module reads."""
    return data.lower().endswith(SUFFIXES)


def read(
    path: Path,
    *,
    target: str | None,
    types: Mapping[str, ColumnType] | None = None,
    task: Task | None = None,
) -> Dataset:
    """The file as a data set, types and task inferred where nobody gives them.

    Raises TableError.
    """
    types = types or {}
    left_out = {column for column, given in types.items() if given.ignored}
    table = file_columns(path, left_out, {column for column, given in types.items() if given.kind == "categorical"})
    indices = index_columns(table)
    wanted = f"wanted one of {listed(name for name in table.column_names if name not in indices)}"
    if target is None:
        raise TableError(path, f"no target; wanted --target COLUMN, {wanted.removeprefix('wanted ')}")
    if target not in table.column_names:
        raise TableError(path, f"target {target!r} is not among its columns; {wanted}")
    if target in types:
        raise TableError(path, f"column {target!r} is the target; wanted --task for it, not --type")
    for column in types:
        if column not in table.column_names and column not in left_out:
            raise TableError(path, f"--type {visible(column)}: not among its columns; {wanted}")
    if table.num_rows < MIN_ROWS:
        raise TableError(
            path, f"{counted(table.num_rows, 'row') if table.num_rows else 'no rows'}; wanted at least {MIN_ROWS}"
        )
    answers = _Target.read(path, target, table.column(target), task)
    columns, ignored = [], dict.fromkeys(sorted(left_out), "as asked")
    for column in table.column_names:
        if column in indices and column != target and column not in types:
            ignored[column] = "index of a pandas table"
        elif column != target:
            read_column = _Column.read(path, column, table.column(column), types.get(column, ColumnType()))
            if isinstance(read_column, str):
                ignored[column] = read_column
            else:
                columns.append(read_column)
    if not columns:
        reason = next(iter(ignored.items()), None)
        why = f" ({reason[0]!r} is ignored: {reason[1]})" if reason else ""
        raise TableError(path, f"no column beside the target {target!r}{why}; wanted at least one to predict it from")
    return Dataset(
        name=path.name,
        task=answers.task,
        x=_rows(columns, table.num_rows),
        y=answers.y,
        target=target,
        attribution=f"file {path.name}",
        columns=tuple(column.name for column in columns),
        labels=answers.labels,
        kinds=tuple((column.name, column.kind) for column in columns if column.kind != "numeric"),
        nullable=tuple(column.name for column in columns if column.nullable),
        ignored=tuple(ignored.items()),
    )


def file_columns(path: Path, left_out: set[str], texts: Collection[str] = ()) -> pa.Table:
    """The file's columns but those left out. texts: columns whose values are as a CSV file spells them, as 01234."""
    if path.is_dir():
        raise TableError(path, "is a folder; wanted a CSV or Parquet file")
    if not path.is_file():
        raise TableError(path, "not found; wanted a CSV or Parquet file")
    try:
        table = _csv(path, texts) if path.suffix.lower() == CSV else _parquet(path)
    except NotUtf8 as error:
        raise TableError(path, str(error)) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "CSV" if path.suffix.lower() == CSV else "Parquet"
        raise TableError(
            path, f"cannot be read as {kind} ({_first_line(error)}); wanted a table with a header"
        ) from error
    names = table.column_names
    if not names:
        raise TableError(path, "no columns; wanted a table with a header")
    for place, column in enumerate(names, start=1):
        if not column.strip():
            raise TableError(path, f"column {place} has no name; wanted a name for each column")
        if names.count(column) > 1:
            raise TableError(path, f"column {column!r} is there {names.count(column)} times; wanted a name of its own")
    if all(re.match(_NUMBER, column) for column in names):
        raise TableError(path, f"its header is {listed(names, 3)}, which are values; wanted the columns' names")
    return table.drop_columns([column for column in names if column in left_out])


def _csv(path: Path, texts: Collection[str]) -> pa.Table:
    options = pyarrow.csv.ParseOptions(delimiter=csv_delimiter(path), newlines_in_values=True)
    try:
        table = pyarrow.csv.read_csv(
            path,
            parse_options=options,
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )
    except pa.ArrowInvalid as error:
        if _INVALID_TEXT in str(error):
            raise not_utf8(path) from error
        if _RAGGED in str(error):
            raise _Ragged.read(path, options) from error
        raise
    # Where nobody asked for a type, text that is none has become bytes.
    if any(pa.types.is_binary(field.type) for field in table.schema):
        raise not_utf8(path)
    return table


class _Ragged(TableError):
    @classmethod
    def read(cls, path: Path, options: pyarrow.csv.ParseOptions) -> _Ragged:
        """What is wrong with a file that Arrow found to be ragged: its first such row."""
        found = "rows of more values than columns, or of fewer"

        def note(row: pyarrow.csv.InvalidRow) -> str:
            nonlocal found
            # The header is Arrow's first row.
            number = f"{row.number - 1:,}"
            found = f"row {number}: {row.actual_columns:,} values found, {row.expected_columns:,} wanted"
            return "error"

        options.invalid_row_handler = note
        with contextlib.suppress(pa.ArrowInvalid):
            # Rows are numbered only where one thread reads them.
            pyarrow.csv.read_csv(path, read_options=pyarrow.csv.ReadOptions(use_threads=False), parse_options=options)
        return cls(path, f"{found}, one for each column")


def _parquet(path: Path) -> pa.Table:
    # As a file: a path may be taken for a data set of many files, with columns of its own in the path.
    return pyarrow.parquet.ParquetFile(path).read()


def index_columns(table: pa.Table) -> set[str]:
    """Columns that number or name the rows of the pandas table that a Parquet file was made of, as the file says."""
    try:
        found = table.schema.pandas_metadata
    except ValueError:
        return set()
    names = found.get("index_columns") if isinstance(found, dict) else None
    # A range's is no column, and described by an object.
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


@dataclass(frozen=True)
class _Column:
    """A column as numbers, booleans or texts."""

    name: str
    kind: Kind
    nullable: bool
    # float32 (NaN is missing), bool or texts ("" is missing): [N].
    values: NDArray[Any]

    @classmethod
    def read(cls, path: Path, name: str, column: pa.ChunkedArray, given: ColumnType) -> _Column | str:
        """The column, or why it is ignored."""
        where = f"column {name!r}"
        column = plain(path, where, column, given.kind, f", or {_as_option(name, IGNORED)}")
        present = _present(column)
        if len(present) == 0:
            raise TableError(path, f"{where}: no values; leave it out with {_as_option(name, IGNORED)}")
        holes = len(present) < len(column)
        distinct = pc.count_distinct(present).as_py()
        if distinct == 1 and not holes:
            raise TableError(
                path,
                f"{where}: {present[0].as_py()!r} in every row, which tells nothing; "
                f"leave it out with {_as_option(name, IGNORED)}",
            )
        kind = given.kind or _kind(path, where, column, present, _as_option(name, "categorical"))
        if kind == "categorical":
            if given.kind is None and distinct == len(present) > 1:
                return f"{distinct:,} texts, none of them twice"
            values = as_texts(column)
        else:
            numbers = as_numbers(path, where, column, kind)
            is_boolean = kind == "boolean" and not holes and not given.nullable
            values = numbers.astype(bool) if is_boolean else numbers
            _check_spread(path, name, numbers)
        return cls(name, kind, holes or given.nullable, values)


@dataclass(frozen=True)
class _Target:
    task: Task
    # As in Dataset.
    y: NDArray[Any]
    labels: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, name: str, column: pa.ChunkedArray, task: Task | None) -> _Target:
        where = f"target {name!r}"
        column = plain(path, where, column, "categorical" if task == "classification" else None)
        holes = find_holes(column)
        if holes.any():
            raise TableError(
                path,
                f"{where}: no value in {counted(int(holes.sum()), 'row')}, first in row {_row(holes):,}; "
                "wanted a value in every row",
            )
        kind: Kind = "categorical"
        if task != "classification":
            kind = _kind(path, where, column, column, "--task classification")
        if kind != "numeric" and task == "regression":
            raise TableError(path, f"{where}: {column[0].as_py()!r} found in row 1, numbers wanted for a regression")
        if kind != "numeric" or (task is None and _looks_like_classes(column)):
            return cls._classes(path, where, column)
        values = as_numbers(path, where, column, "numeric")
        if values.min() == values.max():
            raise TableError(path, f"{where}: {values[0]:g} in every row; wanted values that differ")
        spread = float(values.max()) - float(values.min())
        if np.abs(values).max() > 1 / _LEAST_SQUARED or spread < _LEAST_SQUARED:
            raise TableError(
                path,
                f"{where}: {values.min():g} to {values.max():g}, of which float32 holds no squares; "
                "wanted it in another unit",
            )
        return cls("regression", values, ())

    @classmethod
    def _classes(cls, path: Path, where: str, column: pa.ChunkedArray) -> _Target:
        if pa.types.is_floating(column.type):
            # Refuses infinity.
            as_numbers(path, where, column, "numeric")
        # Numbers by size, texts by letter.
        values = pc.unique(column)
        labels = tuple(as_texts(values.take(pc.sort_indices(values))))
        counts = pc.value_counts(pa.chunked_array([pa.array(as_texts(column))]))
        rows = {entry["values"].as_py(): entry["counts"].as_py() for entry in counts}
        if len(labels) == 1:
            raise TableError(path, f"{where}: {labels[0]!r} in every row; wanted at least two classes")
        _check_spelling(path, where, labels)
        rarest = min(labels, key=lambda label: rows[label])
        if rows[rarest] < MIN_CLASS_ROWS:
            number = " (--task regression takes it as a quantity)" if _is_number(column.type) else ""
            raise TableError(
                path,
                f"{where}: {counted(rows[rarest], 'row')} of class {rarest!r}; wanted at least {MIN_CLASS_ROWS} of "
                f"each of the {len(labels):,} classes, to train, to calibrate and to test{number}",
            )
        codes = pc.index_in(pa.array(as_texts(column)), value_set=pa.array(labels))
        return cls("classification", codes.to_numpy().astype(np.int64), labels)


def _check_spelling(path: Path, where: str, labels: tuple[str, ...]) -> None:
    """TableError for classes that nobody can tell apart by looking at them."""
    seen: dict[str, str] = {}
    for label in labels:
        # Within the text as well: no-break spaces, and two for one.
        other = seen.setdefault(" ".join(label.split()), label)
        if other != label:
            raise TableError(
                path,
                f"{where}: the classes {other!r} and {label!r} differ only in blanks; wanted one spelling of each",
            )


def plain(path: Path, where: str, column: pa.ChunkedArray, kind: Kind | None, remedy: str = "") -> pa.ChunkedArray:
    """The column without Arrow's encodings; TableError for a type that is no number, boolean or text.

    remedy: what else the error is to offer.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    found = column.type
    if pa.types.is_decimal(found):
        return column.cast(pa.float64())
    if _is_text(found):
        return column.cast(pa.string())
    if pa.types.is_floating(found):
        # Arrow computes little with halves, and tells -0.0 from 0.0.
        column = column.cast(pa.float32()) if pa.types.is_float16(found) else column
        return pc.add(column, pa.scalar(0.0, column.type))
    if not (_is_number(found) or pa.types.is_boolean(found) or pa.types.is_null(found)):
        if kind == "categorical" and (pa.types.is_temporal(found) or pa.types.is_binary(found)):
            try:
                return column.cast(pa.string())
            except pa.ArrowInvalid as error:
                raise TableError(path, f"{where}: bytes that are no text in UTF-8; wanted texts") from error
        raise TableError(path, f"{where}: its type is {found}; wanted numbers, booleans or texts{remedy}")
    return column


def _kind(path: Path, where: str, column: pa.ChunkedArray, present: pa.ChunkedArray, as_text: str) -> Kind:
    """What the column's values are. as_text: the option that takes them as texts, for the error that may need it."""
    if _is_number(column.type):
        return "numeric"
    if pa.types.is_boolean(column.type):
        return "boolean"
    is_number = pc.match_substring_regex(present, _NUMBER)
    numbers = pc.sum(is_number).as_py() or 0
    commas = pc.sum(pc.match_substring_regex(present, _COMMA_NUMBER)).as_py() or 0
    if commas and numbers + commas > len(present) / 2:
        row = pc.index(pc.match_substring_regex(column, _COMMA_NUMBER), True).as_py()
        raise TableError(
            path,
            f"{where}: {column[row].as_py()!r} in row {row + 1:,}, a number with a comma; wanted a decimal point, as "
            f"in 1.5, and no mark between thousands, or {as_text}",
        )
    if len(present) > numbers > len(present) / 2:
        text = pc.fill_null(
            pc.and_(pc.invert(pc.match_substring_regex(column, _NUMBER)), pc.not_equal(column, "")), False
        )
        row = pc.index(text, True).as_py()
        raise TableError(
            path,
            f"{where}: text where numbers were, {column[row].as_py()!r} in row {row + 1:,}; wanted a number there, "
            f"nothing where it is missing, or {as_text}",
        )
    return "categorical"


def _looks_like_classes(column: pa.ChunkedArray) -> bool:
    """Whether a column of numbers without holes reads as classes: few values, all of them whole numbers."""
    values = pc.unique(column)
    if len(values) > MAX_INFERRED_CLASSES:
        return False
    return bool(pc.all(pc.equal(values, pc.floor(values))).as_py())


def as_numbers(path: Path, where: str, column: pa.ChunkedArray, kind: Kind) -> NDArray[np.float32]:
    """float32 [N], NaN for what is missing; TableError for what is no number, or none that float32 has."""
    wanted = "a number" if kind == "numeric" else "true, false, 0 or 1"
    if _is_text(column.type):
        column = pc.if_else(pc.equal(column, MISSING), None, pc.utf8_trim_whitespace(column))
        if kind == "boolean":
            lower = pc.utf8_lower(column)
            column = pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", lower))
        wrong = pc.invert(pc.match_substring_regex(column, _NUMBER))
        row = pc.index(pc.fill_null(wrong, False), True).as_py()
        if row >= 0:
            found = column[row].as_py()
            if kind == "numeric" and re.match(_COMMA_NUMBER, found):
                wanted += " with a decimal point"
            raise TableError(path, f"{where}: {found!r} in row {row + 1:,}; wanted {wanted}")
    exact = column.cast(pa.float64(), safe=False).to_numpy()
    wrong_numbers = np.abs(exact) > _FLOAT32_MAX
    if kind == "boolean":
        wrong_numbers |= ~np.isnan(exact) & (exact != 0) & (exact != 1)
    if wrong_numbers.any():
        row = int(np.argmax(wrong_numbers))
        limit = " within float32" if kind == "numeric" else ""
        raise TableError(path, f"{where}: {exact[row]:g} in row {row + 1:,}; wanted {wanted}{limit}")
    return exact.astype(np.float32)


def _check_spread(path: Path, name: str, numbers: NDArray[np.float32]) -> None:
    """TableError for numbers [N] whose differences float32 does not hold. NaN is missing."""
    least, most = np.nanmin(numbers), np.nanmax(numbers)
    if least == most and np.isnan(numbers).any():
        # Whether it is there is what tells.
        return
    if least == most or float(most) - float(least) < _LEAST_SPREAD:
        raise TableError(
            path,
            f"column {name!r}: {least:g} to {most:g}, the same number in float32; wanted it in another unit or from "
            f"another origin, {_as_option(name, 'categorical')}, or {_as_option(name, IGNORED)}",
        )


def as_texts(column: Any) -> NDArray[Any]:
    """Texts [N] as Python's, one object for each different one; "" for what is missing."""
    if pa.types.is_float16(column.type):
        # For which Arrow has no functions.
        column = column.cast(pa.float32())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        is_whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**63))
        # 10000000000 and not 1e+10: whole numbers are floats where one is missing. Each value by itself, as `score` has
        # no other.
        whole = pc.if_else(is_whole, column, None).cast(pa.int64())
        column = pc.coalesce(whole.cast(pa.string()), column.cast(pa.string()))
    encoded = pc.fill_null(column.cast(pa.string()), MISSING).dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    categories = np.array([*encoded.dictionary.to_pylist(), None], object)[:-1]
    return categories[encoded.indices.to_numpy()]


def _present(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values that are not missing."""
    return column.filter(pa.array(~find_holes(column))) if len(column) else column


def find_holes(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where nothing stands: null, NaN, or an empty text."""
    holes = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
    if _is_text(column.type):
        holes = pc.or_(holes, pc.fill_null(pc.equal(column, MISSING), True))
    return holes.to_numpy().astype(bool)


def _rows(columns: list[_Column], rows: int) -> NDArray[Any]:
    """The columns as `Dataset.x`."""
    if all(column.kind == "numeric" for column in columns):
        matrix = np.empty((rows, len(columns)), np.float32)
        for place, column in enumerate(columns):
            matrix[:, place] = column.values
        return matrix
    x = np.empty(rows, [(column.name, column.values.dtype) for column in columns])
    for column in columns:
        x[column.name] = column.values
    return x


def _is_number(found: pa.DataType) -> bool:
    return pa.types.is_integer(found) or pa.types.is_floating(found)


def _is_text(found: pa.DataType) -> bool:
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)


def _as_option(column: str, kind: str) -> str:
    """The option that gives the column this type, as a shell takes it."""
    given = f"{column}={kind}"
    return f"--type {shlex.quote(given) if given.isprintable() else repr(given)}"


def _row(where: NDArray[np.bool_]) -> int:
    """The first row, counted from 1 without the header."""
    return int(np.argmax(where)) + 1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
