"""A batch of rows -> its answers and refusals. Depends on the rows, the model, num_samples and seed: nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from models.contract import MC_SAMPLE, Manifest, drawing
from serving.errors import InvalidRequest
from serving.prediction_sets import NO_SCORES, PredictionSets
from serving.scoring.columns import PROBABILITIES, AnswerColumns, Arrays
from serving.scoring.errors import ScoreError
from serving.scoring.rows import RowReader

if TYPE_CHECKING:  # it brings TensorFlow, which a form does without
    from serving.runtime import Model

# Rows x draws of one call of the graph: its intermediate values stay in the processor's caches. On a 60-60-30-1 network
# calls eight times as long took a third more processor time.
CALL_ROW_DRAWS = 65_536
# What a free axis is counted as before rows are read.
FREE_AXIS = 64


class Settings(BaseModel):
    """What, beside the model, the answers depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_samples: int
    seed: int
    prefix: str = ""
    # Of prediction sets and intervals; None: the artifact's own.
    coverage: float | None = None


@dataclass(frozen=True)
class Scored:
    """accepted: the batch's rows that have an answer, with it; reasons: why the others have none, by their place."""

    accepted: pa.RecordBatch
    reasons: dict[int, str]


class Form:
    """What goes in and what comes out, by columns: all that can be known without the model's graph."""

    def __init__(
        self,
        manifest: Manifest,
        settings: Settings,
        columns: pa.Schema,
        place: str,
        *,
        is_text: bool,
        lists: bool = True,
    ) -> None:
        """columns: of the file `place`; is_text: whether its values are. lists: whether the output can hold lists.

        Raises ScoreError where the columns, or the coverage, do not fit the model.
        """
        self.settings = settings
        # The signature that answers, and what it takes beside the inputs.
        self.signature, self.scalars = drawing(manifest, settings.num_samples, settings.seed)
        self.reader = RowReader(manifest, columns, place, is_text=is_text)
        coverage = PredictionSets(manifest).at(settings.coverage)
        if settings.coverage is not None and not coverage.outputs:
            raise ScoreError(f"--coverage: found {settings.coverage:g}, wanted none: {NO_SCORES}")
        self.warnings = coverage.warnings
        self.answers = AnswerColumns(manifest, settings.prefix, settings.num_samples, coverage, lists=lists)
        self.answers.check_free(columns, place)
        self.columns = columns
        # Values of a row, of the model or of the file; where answers are of several places, those.
        taken = sum(math.prod(axis or FREE_AXIS for axis in item.shape) for item in manifest.inputs)
        shapes = [tensor.shape[1:] for tensor in manifest.signatures[MC_SAMPLE].outputs]
        given = sum(math.prod(FREE_AXIS if axis is None else axis for axis in shape) for shape in shapes)
        has_places = any(len(output.shape) > 1 for output in manifest.outputs)
        self.width = max(len(columns), taken, given if has_places else 0)
        self.schema = pa.schema([*columns, *self.answers.fields])
        # An answer must be finite; a quantile, say, may be absent where there are few draws.
        self.centres = [
            f"{output.prefix}{'mean' if output.task == 'regression' else PROBABILITIES}" for output in manifest.outputs
        ]


class Scorer:
    """Scores batches of files of one form. Any thread may call it."""

    def __init__(self, model: Model, form: Form) -> None:
        self._model = model
        self.form = form

    def score(self, batch: pa.RecordBatch) -> Scored:
        readable, reasons = self.form.reader.read(batch)
        places: list[np.ndarray] = [np.empty(0, np.int64)]
        answers: list[Arrays] = []
        for group in readable:
            num_samples = self.form.settings.num_samples
            call_rows = min(max(1, CALL_ROW_DRAWS // num_samples), self._model.call_rows(group.inputs, num_samples))
            for start in range(0, len(group.places), call_rows):
                part = slice(start, start + call_rows)
                inputs = {name: array[part] for name, array in group.inputs.items()}
                self._answer(group.places[part], inputs, places, answers, reasons)
        found = np.concatenate(places)
        order = np.argsort(found, kind="stable")
        rows = batch if len(found) == batch.num_rows else batch.take(pa.array(found[order]))
        if not answers:
            return Scored(pa.RecordBatch.from_pylist([], schema=self.form.schema), reasons)
        columns = [*rows.columns, *self._columns(answers, order)]
        return Scored(pa.RecordBatch.from_arrays(columns, schema=self.form.schema), reasons)

    def _columns(self, answers: list[Arrays], order: np.ndarray) -> list[pa.Array]:
        """The answers of all calls as columns, in this order; rows of free axes may have other counts of places."""
        if len({tuple(array.shape[1:] for array in part.values()) for part in answers}) == 1:
            joined = {name: np.concatenate([part[name] for part in answers])[order] for name in answers[0]}
            return self.form.answers.make(joined)
        made = [self.form.answers.make(part) for part in answers]
        return [pa.concat_arrays(parts).take(pa.array(order)) for parts in zip(*made, strict=True)]

    def _answer(
        self, rows: np.ndarray, inputs: Arrays, places: list[np.ndarray], answers: list[Arrays], reasons: dict[int, str]
    ) -> None:
        """Call the graph; where it refuses the values (an index outside of a table, say), find the rows it means."""
        try:
            arrays = self._model.run(self.form.signature, {**inputs, **self.form.scalars})
        except InvalidRequest as error:
            if len(rows) == 1:
                reasons[int(rows[0])] = str(error)
                return
            middle = len(rows) // 2
            for half in (slice(0, middle), slice(middle, None)):
                cut = {name: array[half] for name, array in inputs.items()}
                self._answer(rows[half], cut, places, answers, reasons)
            return
        finite = np.ones(len(rows), bool)
        for name in self.form.centres:
            finite &= np.isfinite(arrays[name]).reshape(len(rows), -1).all(axis=1)
        for row in rows[~finite].tolist():
            reasons[row] = "the network overflows on these features, wanted values of the size that it was trained on"
        places.append(rows[finite])
        answers.append({name: array[finite] for name, array in arrays.items()})
