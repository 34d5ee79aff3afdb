"""Which files there are to score, and how they are cut into parts.

A part is a range of rows of one file, and depends on nothing but the file's bytes and `part_rows`: the same files give
the same parts, however often the work is taken up and whoever does it. A CSV file is read once to be cut: its rows end
where the text ends a line outside of quotes, and each part remembers its bytes.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from models.contract import NotUtf8, csv_delimiter, not_utf8
from serving.errors import choices
from serving.scoring.errors import ScoreError

Kind = Literal["csv", "parquet"]
KINDS: dict[str, Kind] = {".csv": "csv", ".parquet": "parquet"}

# What a scoring leaves beside its parts.
STATE = "_score.json"
OWN = ("_rejects.", "_work")

BLOCK_BYTES = 2**22
# A CSV part is read at once: its bytes are bounded as well.
PART_BYTES = 2**26
_QUOTE, _NEWLINE, _RETURN = b'"', b"\n", b"\r"


class Part(BaseModel):
    """A range of one file's rows; the header of a CSV file is no row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    source: str
    kind: Kind
    first_row: int
    # Of a CSV file with blank lines, these count.
    rows: int
    # CSV only: where its text lies in the file.
    start: int = 0
    stop: int = 0
    delimiter: str = ","


class Source(BaseModel):
    """One file of the input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """Some rows of a part. `numbers` [N]: each row's own in its file, from 0; `malformed`: lines that are no row."""

    rows: pa.RecordBatch
    numbers: np.ndarray
    malformed: list[tuple[int, str]]


def find(wanted: str) -> list[Path]:
    """The files that a path means: a file, a folder's files, or what a pattern matches; in the order of their names.

    In a folder hidden files are not data, nor is what an earlier scoring left there beside its parts. Other names with
    an underscore are what tools give to files that are not whole: whether they are data must be said, by a pattern.
    """
    path = Path(wanted)
    if path.is_file():
        candidates = [path]
    elif path.is_dir():
        candidates = _in_folder(path)
    elif glob.has_magic(wanted):
        candidates = [Path(found) for found in glob.glob(wanted, recursive=True) if Path(found).is_file()]
    else:
        raise ScoreError(f"{wanted}: not there; wanted a Parquet or CSV file, a folder of them, or a pattern")
    files = sorted(file for file in candidates if file.suffix.lower() in KINDS)
    if not files:
        raise ScoreError(f"{wanted}: no file whose name ends with {choices(KINDS)}")
    if len({kind(file) for file in files}) > 1:
        raise ScoreError(f"{wanted}: Parquet and CSV files; wanted files of one kind (a pattern chooses)")
    for file in files:
        check_name(file)
    return files


def check_name(path: Path) -> None:
    """Raise ScoreError for a name that neither Arrow nor JSON can hold; that of the current folder is part of it."""
    name = os.fsencode(path.absolute())
    try:
        name.decode()
    except UnicodeDecodeError as error:
        shown = name.decode(errors="backslashreplace")
        raise ScoreError(f"{shown}: a name that is not UTF-8; wanted another one") from error


def _in_folder(folder: Path) -> list[Path]:
    found = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or file.suffix.lower() not in KINDS or any(part.startswith(".") for part in parts):
            continue
        place = next((place for place, part in enumerate(parts) if part.startswith("_")), None)
        if place is None:
            found.append(file)
        elif not (parts[place].startswith(OWN) and folder.joinpath(*parts[:place], STATE).exists()):
            raise ScoreError(
                f"{file}: a name with an underscore in front, as of files that are not whole; "
                f"wanted another name, or a pattern that says which files are meant, as '{folder}/*{file.suffix}'"
            )
    return found


def kind(path: Path) -> Kind:
    return KINDS[path.suffix.lower()]


def schema(path: Path) -> pa.Schema:
    """A file's columns. Those of a CSV file are text: what is a number, the model knows."""
    try:
        found = pq.read_schema(path) if kind(path) == "parquet" else _csv_schema(path)
    except NotUtf8 as error:
        raise ScoreError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScoreError(f"{path}: cannot be read ({_first_line(error)}); wanted a {kind(path)} file") from error
    if not found.names:
        raise ScoreError(f"{path}: no columns; wanted a first line with their names")
    twice = next((name for name in found.names if found.names.count(name) > 1), None)
    if twice is not None:
        raise ScoreError(f"{path}: column {twice!r} is there twice; wanted names of one column each")
    columns = pa.schema([field.with_type(_plain(field.type)) for field in found])
    for field in columns:
        if not _can_be_taken(field.type):
            raise ScoreError(
                f"{path}: column {field.name!r} is of type {field.type}; wanted one that rows are taken from"
            )
    return columns


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type as which a column is read: Arrow 26 takes no rows from views, which are another layout of the same."""
    if kind in (pa.string_view(), pa.binary_view()):
        return pa.large_string() if kind == pa.string_view() else pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _can_be_taken(kind: pa.DataType) -> bool:
    try:
        pa.nulls(1, kind).take(pa.array([0]))
    except pa.ArrowNotImplementedError:
        return False
    return True


def survey(path: Path, part_rows: int, first_index: int) -> tuple[Source, list[Part]]:
    """A file's digest, and its parts, numbered from `first_index`; at least one, be it empty. Raises ScoreError."""
    try:
        if kind(path) == "csv":
            return _survey_csv(path, part_rows, first_index)
        rows = pq.read_metadata(path).num_rows
        digest = hashlib.sha256()
        for block in _blocks(path):
            digest.update(block)
    except NotUtf8 as error:
        raise ScoreError(f"{path}: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise ScoreError(f"{path}: cannot be read ({_first_line(error)})") from error
    parts = [
        Part(
            index=first_index + number,
            source=str(path),
            kind="parquet",
            first_row=start,
            rows=min(part_rows, rows - start),
        )
        for number, start in enumerate(range(0, max(rows, 1), part_rows))
    ]
    return Source(path=str(path), bytes=path.stat().st_size, sha256=digest.hexdigest()), parts


def chunks(part: Part, root: Path, columns: pa.Schema, chunk_rows: int) -> Iterator[Chunk]:
    """The rows of a part, a few at a time. root: where a relative name begins.

    Raises ScoreError where the file is not what it was said to be.
    """
    path = root / part.source
    try:
        if part.kind == "csv":
            yield from _csv_chunks(path, part, columns, chunk_rows)
        else:
            yield from _parquet_chunks(path, part, columns, chunk_rows)
    except (pa.ArrowException, OSError) as error:
        raise ScoreError(f"{part.source}: damaged after row {part.first_row}: {_first_line(error)}") from error


def _parquet_chunks(path: Path, part: Part, columns: pa.Schema, chunk_rows: int) -> Iterator[Chunk]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        # Only the groups that the part touches are read.
        ends = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
        last_row = part.first_row + part.rows
        groups = [
            group for group in range(file.num_row_groups) if ends[group] < last_row and ends[group + 1] > part.first_row
        ]
        position = int(ends[groups[0]]) if groups else 0
        for batch in file.iter_batches(chunk_rows, row_groups=groups):
            start, stop = max(part.first_row, position), min(last_row, position + batch.num_rows)
            if start < stop:
                rows = batch.slice(start - position, stop - start).cast(columns)
                # Text may be of bytes that are none.
                rows.validate(full=True)
                yield Chunk(rows, np.arange(start, stop), [])
            position += batch.num_rows
            if position >= last_row:
                return


def _csv_chunks(path: Path, part: Part, columns: pa.Schema, chunk_rows: int) -> Iterator[Chunk]:
    with path.open("rb") as file:
        file.seek(part.start)
        text = file.read(part.stop - part.start)
    malformed: list[tuple[int, str]] = []

    def refuse(line: pyarrow.csv.InvalidRow) -> str:
        reason = f"found {line.actual_columns} values, wanted {line.expected_columns}, one for each column"
        malformed.append((part.first_row + (line.number or 1) - 1, reason))
        return "skip"

    if not text.strip():
        return
    table = pyarrow.csv.read_csv(
        io.BytesIO(text),
        # Rows are numbered only where one thread reads them.
        read_options=pyarrow.csv.ReadOptions(use_threads=False, column_names=columns.names, block_size=len(text) + 1),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=part.delimiter, newlines_in_values=True, invalid_row_handler=refuse
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=columns, strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=False
        ),
    )
    numbers = np.setdiff1d(
        np.arange(part.first_row, part.first_row + table.num_rows + len(malformed)), [row for row, _ in malformed]
    )
    for start in range(0, max(table.num_rows, 1), chunk_rows):
        rows = table.slice(start, chunk_rows).combine_chunks()
        batch = rows.to_batches()[0] if rows.num_rows else pa.RecordBatch.from_pylist([], schema=columns)
        yield Chunk(batch, numbers[start : start + chunk_rows], malformed if start == 0 else [])


def _csv_schema(path: Path) -> pa.Schema:
    delimiter = csv_delimiter(path)
    try:
        # One record, as a name may have a line's end in it.
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=delimiter), [])
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    return pa.schema([(name, pa.string()) for name in names])


def _survey_csv(path: Path, part_rows: int, first_index: int) -> tuple[Source, list[Part]]:
    digest = hashlib.sha256()
    delimiter = csv_delimiter(path)
    scan = _Lines(delimiter)
    # `here`: where the last line ended.
    size = lines = here = 0
    # Where the open part starts, and which row it starts with; -1 is the header.
    start, first_row = 0, -1
    cuts: list[tuple[int, int, int, int]] = []

    def cut(stop: int) -> None:
        nonlocal start, first_row
        if first_row >= 0:
            cuts.append((first_row, lines - 1 - first_row, start, stop))
        start, first_row = stop, lines - 1

    for block in _text_blocks(path):
        digest.update(block)
        # A value that starts after the byte order mark starts the file.
        marked = size == 0 and block.startswith(codecs.BOM_UTF8)
        for end in scan.ends(block.replace(codecs.BOM_UTF8, 3 * delimiter.encode(), 1) if marked else block):
            lines += 1
            here = size + int(end) + 1
            if first_row < 0 or lines - 1 - first_row >= part_rows or here - start >= PART_BYTES:
                cut(here)
        size += len(block)
    if size > start:
        lines += here != size
        cut(size)
    if not cuts:
        cuts.append((0, 0, size, size))
    parts = [
        Part(
            index=first_index + number,
            source=str(path),
            kind="csv",
            first_row=row,
            rows=rows,
            start=begin,
            stop=stop,
            delimiter=delimiter,
        )
        for number, (row, rows, begin, stop) in enumerate(cuts)
    ]
    return Source(path=str(path), bytes=size, sha256=digest.hexdigest()), parts


class _Lines:
    """Where the lines of a CSV file end, block by block, as Arrow's reader has it.

    A quote opens at the start of a value only, and is text elsewhere (`5" pipe`); one within quotes is written twice. A
    \\r without a \\n ends a line as well.
    """

    def __init__(self, delimiter: str) -> None:
        self._quoted = False
        # The byte before the block; a quote only if it may be the first of two.
        self._before = _NEWLINE[0]
        self._opens = np.zeros(256, bool)
        self._opens[list(delimiter.encode() + _NEWLINE + _RETURN)] = True

    def ends(self, block: bytes) -> np.ndarray:
        """Places of the line ends outside of quotes. A block does not end between \\r and \\n."""
        text = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(text == _NEWLINE[0])
        if _RETURN in block:
            returns = np.flatnonzero(text == _RETURN[0])
            following = text[np.minimum(returns + 1, len(text) - 1)]
            ends = np.union1d(ends, returns[following != _NEWLINE[0]])
        quoted = self._quoted
        turns = self._turns(text) if _QUOTE in block else np.empty(0, np.int64)
        last_is_text = block.endswith(_QUOTE) and not (len(turns) and turns[-1] == len(text) - 1)
        self._before = 0 if last_is_text else block[-1]
        if not quoted and not len(turns):
            return ends
        return ends[(np.searchsorted(turns, ends) + quoted) % 2 == 0]

    def _turns(self, text: np.ndarray) -> np.ndarray:
        """Places of the quotes that open or close; of two within quotes the first closes, the second opens again."""
        quotes = np.flatnonzero(text == _QUOTE[0])
        before = np.where(quotes > 0, text[quotes - 1], self._before)
        opens = self._opens[before]
        # Mostly every second quote opens, and none is text.
        if not (opens | (before == _QUOTE[0]))[int(self._quoted) :: 2].all():
            turns = []
            closed = -1 if self._before == _QUOTE[0] else None
            for place, may_open in zip(quotes.tolist(), opens.tolist(), strict=True):
                if self._quoted or may_open or closed == place - 1:
                    closed = place if self._quoted else None
                    self._quoted = not self._quoted
                    turns.append(place)
            return np.array(turns, np.int64)
        self._quoted ^= len(quotes) % 2 == 1
        return quotes


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            # The two bytes of a line end stay together.
            while block.endswith(_RETURN) and (more := file.read(BLOCK_BYTES)):
                block += more
            yield block


def _text_blocks(path: Path) -> Iterator[bytes]:
    """The same of a text: another encoding is found before any of it is scored. Raises NotUtf8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in _blocks(path):
            decoder.decode(block)
            yield block
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
