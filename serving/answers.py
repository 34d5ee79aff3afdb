"""Arrays of a model's outputs -> the JSON objects of the native endpoints, one for each row, as text.

orjson writes the numbers of all rows at once, each with the digits that a float32 has; a row's object is its numbers
put into the form that all rows share. Objects made row by row, to be written then, took twice as long.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import numpy as np
import orjson

from models.contract import ABSTAIN, INTERVAL_LOWER, INTERVAL_UPPER, NOVELTY, PREDICTION_SET, Manifest, ModelOutput
from serving.errors import InvalidRequest
from serving.outputs import Outputs
from serving.prediction_sets import Coverage

Arrays = Mapping[str, np.ndarray]

# Statistics in the order that the answers show them. What an artifact's signatures do not carry is left out.
_OF_CLASSES = ("std", "standard_error")
_OF_ROWS = ("predictive_entropy", "expected_entropy", "mutual_information")
_OF_REGRESSION = ("mean", "epistemic_std", "aleatoric_std", "std", "standard_error")
# Of both, behind them.
_LAST = (ABSTAIN, NOVELTY)

_BOOLEANS = {False: b"false", True: b"true"}


class AnswerWriter:
    """Writes the answers of one model, as its manifest describes the outputs."""

    def __init__(self, manifest: Manifest) -> None:
        self._writers = [_OutputWriter(output) for output in manifest.outputs]

    def predictions(self, outputs: Outputs) -> list[orjson.Fragment]:
        """Deterministic answers: label and probabilities, or the mean."""

        def write(arrays: Arrays) -> list[bytes]:
            return self._rows([writer.predictions(arrays) for writer in self._writers])

        return [orjson.Fragment(row + b"}") for row in outputs.made("predictions", write)]

    def uncertainties(
        self, outputs: Outputs, num_samples: list[int], converged: list[bool], coverage: Coverage
    ) -> list[orjson.Fragment]:
        """Answers of MC dropout; `num_samples` and `converged` are of the row, whatever its outputs."""

        def write(arrays: Arrays) -> list[bytes]:
            arrays = coverage.apply(arrays)
            return self._rows([writer.uncertainties(arrays, coverage.value) for writer in self._writers])

        rows = outputs.made(coverage.value, write)
        return [
            orjson.Fragment(b'%b,"num_samples":%d,"converged":%b}' % (row, drawn, _BOOLEANS[done]))
            for row, drawn, done in zip(rows, num_samples, converged, strict=True)
        ]

    def _rows(self, forms: list[_Form]) -> list[bytes]:
        """One object a row, its brace not closed; grouped by output's name where there are several."""
        if len(forms) == 1:
            return forms[0].rows()
        whole = _Form()
        for writer, form in zip(self._writers, forms, strict=True):
            whole.add(writer.output.name, [row + b"}" for row in form.rows()])
        return whole.rows()


class _Form:
    """What all rows' objects have in common, and what each has of its own: column by column, as JSON."""

    def __init__(self) -> None:
        self._members: list[bytes] = []
        self._columns: list[Sequence[bytes]] = []

    def add(self, name: str, texts: Sequence[bytes]) -> None:
        """A member of every object; `texts` are its values, one a row."""
        self._members.append(b"%b:%%b" % _quoted(name))
        self._columns.append(texts)

    def add_object(self, name: str, keys: tuple[str, ...], values: Iterable[Sequence[bytes]]) -> None:
        """A member that is itself an object; `values` are those of its keys, one sequence a row."""
        form = _object(keys)
        self.add(name, [form % tuple(row) for row in values])

    def rows(self) -> list[bytes]:
        """Every row's object, its brace not closed."""
        form = b"{" + b",".join(self._members)
        return [form % row for row in zip(*self._columns, strict=True)]


class _OutputWriter:
    """Writes one output's part."""

    def __init__(self, output: ModelOutput) -> None:
        self.output = output
        self._prefix = output.prefix

    def predictions(self, arrays: Arrays) -> _Form:
        form = _Form()
        if self.output.task == "regression":
            form.add("mean", _texts(finite(arrays[f"{self._prefix}mean"])))
        else:
            self._predict(form, arrays)
        return form

    def uncertainties(self, arrays: Arrays, coverage: float) -> _Form:
        form, prefix = _Form(), self._prefix
        if self.output.task == "regression":
            for name in _OF_REGRESSION:
                values = arrays.get(f"{prefix}{name}")
                if values is not None:
                    form.add(name, _texts(finite(values)))
        else:
            self._predict(form, arrays)
            for name in _OF_CLASSES:
                self._add_by_label(form, name, arrays[f"{prefix}{name}"])
            for name in _OF_ROWS:
                form.add(name, _texts(arrays[f"{prefix}{name}"]))
        members = arrays.get(f"{prefix}{PREDICTION_SET}")
        if members is not None:
            labels = self._labels_of(members)
            form.add(PREDICTION_SET, [b"[%b]" % b",".join(compress(labels, row)) for row in members.tolist()])
        lower = arrays.get(f"{prefix}{INTERVAL_LOWER}")
        if lower is not None:
            # Of an end that is infinite orjson makes null.
            ends = _texts(lower), _texts(arrays[f"{prefix}{INTERVAL_UPPER}"])
            whole = zip(*ends, [orjson.dumps(coverage)] * len(lower), strict=True)
            form.add_object("interval", ("lower", "upper", "coverage"), whole)
        for name in _LAST:
            values = arrays.get(f"{prefix}{name}")
            if values is not None:
                form.add(name, _texts(values))
        return form

    def _predict(self, form: _Form, arrays: Arrays) -> None:
        """The best label and the probabilities [N, ..., K]: of several places in a row, nested lists of them."""
        probabilities = finite(arrays[f"{self._prefix}probabilities"])
        best = probabilities.argmax(axis=-1)
        if best.ndim == 1:
            labels = self._labels_of(probabilities)
            form.add("label", [labels[index] for index in best.tolist()])
        else:
            names = np.array(class_labels(self.output, probabilities.shape[-1]), object)
            form.add("label", [orjson.dumps(names[row].tolist()) for row in best])
        self._add_by_label(form, "probabilities", probabilities)

    def _add_by_label(self, form: _Form, name: str, array: np.ndarray) -> None:
        """An object by label for each row of [N, ..., K]."""
        labels = tuple(class_labels(self.output, array.shape[-1]))
        size = len(labels)
        if array.ndim == 2:
            texts = _texts(array.ravel())
            form.add_object(name, labels, [texts[start : start + size] for start in range(0, len(texts), size)])
        else:
            columns = [_texts(array[..., place]) for place in range(size)]
            form.add_object(name, labels, zip(*columns, strict=True))

    def _labels_of(self, array: np.ndarray) -> list[bytes]:
        return _label_texts(tuple(class_labels(self.output, array.shape[-1])))


@functools.lru_cache(256)
def _object(keys: tuple[str, ...]) -> bytes:
    """An object with these keys, whose values `%` fills in."""
    return b"{%b}" % b",".join([b"%b:%%b" % _quoted(key) for key in keys])


@functools.lru_cache(256)
def _quoted(name: str) -> bytes:
    """A member's name as JSON, in a form that `%` fills in."""
    return orjson.dumps(name).replace(b"%", b"%%")


@functools.lru_cache(256)
def _label_texts(labels: tuple[str, ...]) -> list[bytes]:
    return [orjson.dumps(label) for label in labels]


def _texts(array: np.ndarray) -> list[bytes]:
    """One JSON value a row: a scalar, or for several a nested list."""
    if array.ndim == 1:
        return _dumped(array)[1:-1].split(b",")
    return [_dumped(row) for row in array]


def _dumped(array: np.ndarray) -> bytes:
    # orjson wants arrays contiguous.
    return orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)


def class_labels(output: ModelOutput, classes: int) -> list[str]:
    """The classes' names; their numbers where the model has no names."""
    return output.labels or [str(index) for index in range(classes)]


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
