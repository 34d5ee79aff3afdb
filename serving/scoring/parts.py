"""A part of a file -> a part of the output: all of it or nothing.

Everything is written aside, brought to the disk and renamed; the part's own file comes last, and is what says that the
part is done. Whoever is cut off leaves parts that are whole and parts that are not there.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from serving.scoring.errors import RowRefused
from serving.scoring.scorer import Scorer
from serving.scoring.sources import Chunk, Kind, Part, chunks

# Values of one batch, over all columns: with several threads some of them are in memory at once.
CHUNK_VALUES = 2**19
CHUNK_ROWS = 8_192
# Of a row group in Parquet. The footer, in memory until the file's end, has an entry for each column of each group:
# with a group for each batch, which has fewer rows the more columns there are, it would grow with their square.
GROUP_BYTES = 2**25

In = TypeVar("In")
Out = TypeVar("Out")


class Outcome(BaseModel):
    """What became of a part's rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scored: int
    rejected: int


@dataclass(frozen=True)
class Shelf:
    """Where parts are put, and what was rejected of them while the work goes on."""

    # All absolute: a worker elsewhere may have started in another folder.
    parts: Path
    work: Path
    # Where relative names of files begin.
    root: Path
    kind: Kind

    def name(self, index: int) -> str:
        return f"part-{index:05d}.{self.kind}"

    def part(self, part: Part) -> Path:
        return self.parts / self.name(part.index)

    def rejects(self, part: Part) -> Path:
        return self.work / f"rejects-{part.index:05d}.{self.kind}"

    def outcome(self, part: Part) -> Path:
        return self.work / f"outcome-{part.index:05d}.json"


def score_part(
    scorer: Scorer,
    part: Part,
    shelf: Shelf,
    *,
    threads: int,
    strict: bool,
    advance: Callable[[int], Any] = lambda rows: None,
) -> Outcome:
    """Score one part and put it on the shelf. advance: called with the rows that were just done.

    Raises RowRefused for the first row that has no answer where `strict`, else they go to the rejects.
    """
    columns = scorer.form.columns
    scored = rejected = 0
    aside = shelf.work / f"{part.index:05d}-{os.getpid()}.unfinished"
    aside_rejects = aside.with_suffix(".rejects")
    fields = reject_schema(columns)

    def score(chunk: Chunk) -> tuple[pa.RecordBatch, pa.RecordBatch, int]:
        result = scorer.score(chunk.rows)
        refused: list[tuple[int, str, int | None]] = [
            (int(chunk.numbers[place]), reason, place) for place, reason in result.reasons.items()
        ]
        refused += [(number, reason, None) for number, reason in chunk.malformed]
        refused.sort(key=lambda item: item[0])
        if strict and refused:
            raise RowRefused(f"{part.source}, row {refused[0][0]}: {refused[0][1]}")
        places = pa.array([place for _, _, place in refused], pa.int64())
        described = [
            pa.array([part.source] * len(refused), pa.string()),
            pa.array([number for number, _, _ in refused], pa.int64()),
            pa.array([reason for _, reason, _ in refused], pa.string()),
        ]
        rows = [column.take(places) for column in chunk.rows.columns]
        rejects = pa.RecordBatch.from_arrays([*described, *rows], schema=fields)
        return result.accepted, rejects, chunk.rows.num_rows + len(chunk.malformed)

    per_chunk = max(1, min(CHUNK_ROWS, CHUNK_VALUES // scorer.form.width))
    try:
        with (
            open_writer(aside, scorer.form.schema, shelf.kind) as writer,
            open_writer(aside_rejects, fields, shelf.kind) as rejects_writer,
        ):
            for accepted, rejects, rows in ordered_map(score, chunks(part, shelf.root, columns, per_chunk), threads):
                if accepted.num_rows:
                    writer.write(accepted)
                if rejects.num_rows:
                    rejects_writer.write(rejects)
                scored, rejected = scored + accepted.num_rows, rejected + rejects.num_rows
                advance(rows)
        outcome = Outcome(scored=scored, rejected=rejected)
        publish(aside_rejects, shelf.rejects(part))
        write_text(shelf.outcome(part), outcome.model_dump_json(), shelf.work)
        publish(aside, shelf.part(part))
    finally:
        aside.unlink(missing_ok=True)
        aside_rejects.unlink(missing_ok=True)
    return outcome


def reject_schema(columns: pa.Schema) -> pa.Schema:
    """Which row of which file, why, and the row as it was; a line that is no row has nothing in the file's columns."""
    own = [("source", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
    named = []
    for name, kind in own:
        free = name
        while free in columns.names:
            free = f"_{free}"
        named.append(pa.field(free, kind))
    return pa.schema([*named, *columns])


class _GroupWriter:
    """Gathers rows until they are worth a row group."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._waiting: list[pa.Table] = []
        self._bytes = 0

    def write(self, rows: pa.RecordBatch | pa.Table) -> None:
        self._waiting.append(rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows]))
        self._bytes += rows.nbytes
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._bytes = [], 0

    def __enter__(self) -> _GroupWriter:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        with self._writer:
            if failed is None:
                self._flush()


def open_writer(path: Path, schema: pa.Schema, kind: Kind) -> Any:
    """A writer of record batches and tables, to be used in a `with`."""
    if kind == "parquet":
        # A dictionary of numbers that hardly ever repeat costs as much time as all the rest, and saves no room.
        leaves = [_leaf(field) for field in schema]
        repeating = [name for name, held in leaves if pa.types.is_string(held) or pa.types.is_integer(held)]
        return _GroupWriter(pq.ParquetWriter(path, schema, use_dictionary=repeating))
    return pyarrow.csv.CSVWriter(path, schema)


def _leaf(field: pa.Field) -> tuple[str, pa.DataType]:
    """A column as Parquet stores it: the name and type of what its lists hold in the end."""
    name, held = field.name, field.type
    while pa.types.is_list(held):
        name, held = f"{name}.list.element", held.value_type
    return name, held


def fits_csv(held: pa.DataType) -> bool:
    """Whether Arrow writes values of a type into a CSV file. Not those that are nested, and a few others."""
    row = pa.RecordBatch.from_arrays([pa.nulls(1, held)], names=["x"])
    try:
        pyarrow.csv.write_csv(row, pa.BufferOutputStream())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def publish(aside: Path, place: Path) -> None:
    """Rename a finished file into its place, so that it is whole there even after a power cut."""
    _sync(aside)
    aside.replace(place)
    _sync(place.parent)


def write_text(place: Path, text: str, work: Path) -> None:
    """Write aside in `work`, where what a kill leaves behind is in nobody's way, and publish."""
    aside = work / f"{place.name}.unfinished"
    aside.write_text(text, encoding="utf-8")
    publish(aside, place)


def ordered_map(function: Callable[[In], Out], items: Iterable[In], threads: int) -> Iterator[Out]:
    """Results in the order of the items, computed by some threads; only so many items are taken in advance."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Out]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
