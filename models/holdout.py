"""Held-out rows of a packaged model: an .npz file with `x` (or one array per input name) and `y`; with several outputs,
or an input called `y`, one `y_<output>` for each output.

Their first rows become the artifact's examples, and the network's figures on them go into its manifest.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, mean_squared_error

from models.contract import ENDS, NO_CLASS, ArtifactError, ModelInput, ModelOutput
from models.sampling import some

Array = NDArray[Any]

X, Y = "x", "y"
# Rows a call of the network, and numbers of an answer that a call may make at most.
_BATCH = 256
_BATCH_NUMBERS = 2**24
# Numbers of answers that are measured at a time: float64, and copies of them.
_MEASURED_NUMBERS = 2**20

# How NumPy's files begin: one array's, and those of several. Of others NumPy says how to unpickle them.
_BEGINNINGS = (b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")

# What NumPy and zipfile raise on a file that is damaged, encrypted or compressed in another way.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)

# A computation of the network: its flat inputs in, tensors with rows first out.
Answer = Callable[[list[tf.Tensor]], dict[str, tf.Tensor]]


class HoldoutError(ArtifactError):
    """Held-out rows do not fit the network. One line: the file, the array, what was found, what is wanted."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"{path}: {found}")


@dataclass(frozen=True)
class Holdout:
    """The arrays of one file, as they stand there."""

    path: Path
    arrays: Mapping[str, Array]

    @classmethod
    def read(cls, path: Path) -> Holdout:
        """Read the file; nothing in it is unpickled."""
        wanted = "wanted what numpy.savez wrote: `x` (or one array per input name) and `y`"
        if not path.is_file():
            raise HoldoutError(path, f"not found; {wanted}")
        try:
            with path.open("rb") as stream:
                if not stream.peek(6).startswith(_BEGINNINGS):
                    raise ValueError("it is no .npz file")
                file = np.load(stream, allow_pickle=False)
                if isinstance(file, np.lib.npyio.NpzFile):
                    return cls(path, {name: file[name] for name in file.files})
        except DAMAGED as error:
            raise HoldoutError(path, f"cannot be read ({' '.join(str(error).split())[:200]}); {wanted}") from error
        raise HoldoutError(path, f"holds one array without a name; {wanted}")

    def matched(
        self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput], *, may_be_padded: bool = False
    ) -> Rows:
        """The rows as the network's inputs and outputs want them; raises HoldoutError where they do not fit.

        may_be_padded: where a row has a class for each of several places, some of them may have NO_CLASS.
        """
        columns = self._columns(inputs)
        # An input may be called `y`, too.
        is_plain = len(outputs) == 1 and Y not in columns.values()
        targets = {output.name: Y if is_plain else f"{Y}_{output.name}" for output in outputs}
        wanted = [*columns.values(), *targets.values()]
        both = sorted(set(columns.values()) & set(targets.values()))
        if both:
            raise HoldoutError(self.path, f"{both[0]!r} would be an input and an answer; rename the model's input")
        if set(self.arrays) != set(wanted):
            alternative = f" ({columns[inputs[0].name]!r} may be called {X!r})" if len(inputs) == 1 else ""
            raise HoldoutError(
                self.path, f"holds the arrays {_listed(self.arrays)}; {_listed(wanted)} wanted{alternative}"
            )
        sizes = {len(self.arrays[name]) if self.arrays[name].ndim else 0 for name in wanted}
        if len(sizes) > 1 or sizes == {0}:
            shapes = ", ".join(f"{name} {self.arrays[name].shape}" for name in wanted)
            raise HoldoutError(self.path, f"arrays of the shapes {shapes}; as many rows in each wanted, at least 1")
        [rows] = sizes
        return Rows(
            {item.name: self._input(item, columns[item.name]) for item in inputs},
            list(outputs),
            [self._target(output, targets[output.name], rows, may_be_padded) for output in outputs],
        )

    def inputs(self, inputs: Sequence[ModelInput]) -> dict[str, Array]:
        """Rows without their answers, as the network's inputs want them; other arrays do not matter.

        Raises HoldoutError.
        """
        columns = self._columns(inputs)
        wanted = _listed(columns.values())
        if not self.arrays.keys() >= set(columns.values()):
            raise HoldoutError(self.path, f"holds the arrays {_listed(self.arrays)}; {wanted} wanted")
        sizes = {len(self.arrays[name]) if self.arrays[name].ndim else 0 for name in columns.values()}
        if len(sizes) > 1 or sizes == {0}:
            shapes = ", ".join(f"{name} {self.arrays[name].shape}" for name in columns.values())
            raise HoldoutError(self.path, f"arrays of the shapes {shapes}; as many rows in each wanted, at least 1")
        return {item.name: self._input(item, columns[item.name]) for item in inputs}

    def _columns(self, inputs: Sequence[ModelInput]) -> dict[str, str]:
        """The array of each input: a single one may be called `x`."""
        if len(inputs) == 1 and X in self.arrays:
            return {inputs[0].name: X}
        return {item.name: item.name for item in inputs}

    def _input(self, item: ModelInput, name: str) -> Array:
        array = self.arrays[name]
        if not _fits(array, [None, *item.shape]):
            raise HoldoutError(self.path, f"{name}: shape {array.shape} found, {_shape(item.shape)} wanted")
        dtype = tf.as_dtype(item.dtype)
        accepted = "US" if dtype == tf.string else "b" if dtype.is_bool else "biu" if dtype.is_integer else "biuf"
        if array.dtype.kind not in accepted:
            raise HoldoutError(self.path, f"{name}: type {array.dtype} found, {item.dtype} wanted")
        if dtype == tf.string:
            texts = self._texts(name, array).astype(object)
            self._check_missing(name, texts == "", item)
            return texts
        if item.features is not None and array.dtype.kind == "f":
            holes = np.isnan(array)
            self._check_missing(name, holes, item)
            self._check_finite(name, np.where(holes, 0, array))
        else:
            self._check_finite(name, array)
        if dtype.is_floating:
            self._check_size(name, array, dtype)
        if dtype.is_integer and (array.min(initial=0) < dtype.min or array.max(initial=0) > dtype.max):
            raise HoldoutError(self.path, f"{name}: values beyond {item.dtype} ({dtype.min} to {dtype.max})")
        return array.astype(dtype.as_numpy_dtype)

    def _target(self, output: ModelOutput, name: str, rows: int, may_be_padded: bool) -> Array:
        array = self.arrays[name]
        wanted = output.shape[:-1] if output.task == "classification" else output.shape
        if output.task == "classification" and _fits(array, [rows, *output.shape]) and array.dtype.kind in "biuf":
            array = self._from_one_hot(name, array)
        if array.ndim == len(wanted) + 2 and array.shape[-1] == 1:
            array = array[..., 0]
        if not _fits(array, [rows, *wanted]):
            raise HoldoutError(
                self.path,
                f"{name}: shape {self.arrays[name].shape} found, {_shape(wanted, rows)} wanted for {rows} rows",
            )
        if output.task == "classification":
            return self._classes(name, array, output.labels or [], may_be_padded and bool(wanted))
        if array.dtype.kind not in "biuf":
            raise HoldoutError(self.path, f"{name}: type {array.dtype} found, numbers wanted")
        self._check_finite(name, array)
        self._check_size(name, array, tf.float32)
        return array.astype(np.float64)

    def _classes(self, name: str, array: Array, labels: list[str], may_be_padded: bool) -> Array:
        if array.dtype.kind in "US":
            texts = self._texts(name, array)
            unknown = sorted(set(np.unique(texts).tolist()) - set(labels))
            if unknown:
                raise HoldoutError(self.path, f"{name}: label {unknown[0]!r} found, one of {', '.join(labels)} wanted")
            return np.vectorize(labels.index, otypes=[np.int64])(texts)
        if array.dtype.kind not in "biuf":
            raise HoldoutError(self.path, f"{name}: type {array.dtype} found, class numbers or labels wanted")
        self._check_finite(name, array)
        is_padding = (array == NO_CLASS) & may_be_padded
        wrong = ((array < 0) | (array >= len(labels)) | (array != np.floor(array))) & ~is_padding
        padding = f", or {NO_CLASS} for a place that has none" if may_be_padded else ""
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            wanted = f"whole numbers from 0 to {len(labels) - 1} wanted{padding}"
            raise HoldoutError(self.path, f"{name}: {array[wrong].flat[0]} found in row {row}, {wanted}")
        if is_padding.all():
            raise HoldoutError(self.path, f"{name}: {NO_CLASS} found at every place, a class at one of them wanted")
        return array.astype(np.int64)

    def _from_one_hot(self, name: str, array: Array) -> Array:
        if not (np.isin(array, (0, 1)).all() and (array.sum(axis=-1) == 1).all()):
            raise HoldoutError(self.path, f"{name}: shape {array.shape} found, but its rows are not one-hot")
        return array.argmax(axis=-1)

    def _texts(self, name: str, array: Array) -> Array:
        """Texts, of bytes the UTF-8 that TensorFlow's texts are."""
        if array.dtype.kind == "U":
            return array
        try:
            return np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise HoldoutError(self.path, f"{name}: bytes found that are not UTF-8, texts wanted") from error

    def _check_missing(self, name: str, holes: Array, item: ModelInput) -> None:
        """Of a table's input [N] or [N, F] no value is missing but in columns where that is allowed."""
        if item.features is None:
            return
        wrong = holes.reshape(len(holes), -1) & ~np.array([feature.nullable for feature in item.features])
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            whose = f" of column {item.features[column].name!r}" if item.shape else ""
            raise HoldoutError(self.path, f"{name}: no value{whose} in row {row}, where one was never missing before")

    def _check_size(self, name: str, array: Array, dtype: tf.DType) -> None:
        """No finite number is beyond the type that holds it in the graph."""
        if array.dtype.kind == "b":
            return
        wrong = np.abs(array.astype(np.float64)) > float(dtype.max)
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            raise HoldoutError(self.path, f"{name}: {array[wrong].flat[0]:g} found in row {row}, beyond {dtype.name}")

    def _check_finite(self, name: str, array: Array) -> None:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise HoldoutError(self.path, f"{name}: NaN or infinity found in row {row}, finite numbers wanted")


@dataclass(frozen=True)
class KnownRows:
    """Held-out rows of whoever made the network: their arrays fit it as they are."""

    # [N, ...] by input name.
    inputs: Mapping[str, Array]
    # One array [N, ...] for each output, in the network's order: class numbers or values.
    targets: Sequence[Array]

    def matched(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> Rows:
        """The rows as the network's inputs and outputs want them."""
        dtypes = [np.int64 if output.task == "classification" else np.float64 for output in outputs]
        return Rows(
            {item.name: self.inputs[item.name] for item in inputs},
            list(outputs),
            [target.astype(dtype) for target, dtype in zip(self.targets, dtypes, strict=True)],
        )


@dataclass(frozen=True)
class Rows:
    """Held-out rows that fit a network."""

    # [N, ...] by input name, in the network's order.
    inputs: Mapping[str, Array]
    outputs: Sequence[ModelOutput]
    # One array for each output: class numbers (int64) or values (float64).
    targets: Sequence[Array]

    def examples(self, count: int) -> list[Any]:
        """The first rows in the JSON form of `instances`."""
        columns = {name: _plain(array[:count]) for name, array in self.inputs.items()}
        if len(columns) == 1:
            return list(*columns.values())
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @property
    def count(self) -> int:
        return len(next(iter(self.inputs.values())))

    def some(self, most: int) -> Rows:
        """At most that many of the rows."""
        return replace(
            self,
            inputs={name: some(array, most) for name, array in self.inputs.items()},
            targets=[some(target, most) for target in self.targets],
        )

    def run(self, answer: Answer, specs: Sequence[tf.TensorSpec], numbers: int = 1) -> dict[str, Array]:
        """What a computation says of every row, call by call. specs: of the inputs; numbers: of one row's answer."""
        answers = list(self._parts(answer, specs, min(max(_BATCH_NUMBERS // numbers, 1), _BATCH)))
        return {name: np.concatenate([part[name] for part in answers]) for name in answers[0]}

    def _parts(self, answer: Answer, specs: Sequence[tf.TensorSpec], batch: int) -> Iterator[dict[str, Array]]:
        """The same, of so many rows at a time."""
        run = tf.function(lambda *inputs: answer(list(inputs)), autograph=False).get_concrete_function(*specs)
        arrays = list(self.inputs.values())
        for start in range(0, self.count, batch):
            rows = [
                tf.constant(array[start : start + batch], spec.dtype) for array, spec in zip(arrays, specs, strict=True)
            ]
            yield finite({name: values.numpy() for name, values in run(*rows).items()}, start)

    def figures(self, answer: Answer, specs: Sequence[tf.TensorSpec]) -> dict[str, float]:
        """Figures of `answer`, the network with dropout off; with several outputs their names are prefixed.

        Classification: accuracy; nll, the mean negative log-likelihood in nats; brier, the squared error summed over
        the classes (Brier 1950). Regression: rmse and mae in the target's unit.
        """
        numbers = max(
            target[0].size * len(output.labels or "1")
            for output, target in zip(self.outputs, self.targets, strict=True)
        )
        # Of one part after another: all answers of large maps would not fit in memory. Each figure is a mean over rows.
        measured: list[dict[str, float]] = []
        counts: list[int] = []
        for answers in self._parts(answer, specs, min(max(_MEASURED_NUMBERS // numbers, 1), _BATCH)):
            first, rows = sum(counts), len(next(iter(answers.values())))
            found: dict[str, float] = {}
            for output, target in zip(self.outputs, self.targets, strict=True):
                key, measure = ("probabilities", _classification) if output.labels else ("mean", _regression)
                values = answers[output.prefix + key].astype(np.float64)
                wanted = (self.count, *values.shape[1 : target.ndim])
                if target.shape != wanted:
                    raise PlacesError(output.name, target.shape, wanted)
                own = measure(values, target[first : first + rows])
                found |= {output.prefix + name: value for name, value in own.items()}
            measured.append(found)
            counts.append(rows)
        means = {name: float(np.average([part[name] for part in measured], weights=counts)) for name in measured[0]}
        for output in self.outputs:
            if not output.labels:
                # A root of a mean, not a mean of roots.
                means[output.prefix + "rmse"] = math.sqrt(means[output.prefix + "rmse"])
        return means


class PlacesError(ArtifactError):
    """Answers of held-out rows are of other places than the network's. One line: the output, found, wanted."""

    def __init__(self, output: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        super().__init__(f"held-out answers of output {output!r}: shape {found} found, {wanted} wanted for these rows")


class NotFinite(ArtifactError):
    """A network has no answer to a row. One line: the row, what was found, what is wanted."""

    def __init__(self, row: int, name: str, value: float) -> None:
        super().__init__(
            f"row {row}: the network answers with {name} {value:g}; wanted rows of the size that it was trained on, "
            "and weights that training did not drive to infinity"
        )


def finite(answers: dict[str, Array], first: int = 0) -> dict[str, Array]:
    """The answers [N, ...] by name, to rows `first` and on; raises NotFinite where a row's are not. Only ends of
    intervals may be infinite.
    """
    # By name, as the outputs of a SavedModel's signature come in another order in each process.
    for name, values in sorted(answers.items()):
        if values.dtype.kind != "f" or name.endswith(ENDS):
            continue
        wrong = ~np.isfinite(values)
        if wrong.any():
            raise NotFinite(first + int(np.argwhere(wrong)[0][0]), name, float(values[wrong].flat[0]))
    return answers


def _plain(array: Array) -> list[Any]:
    """As plain Python, a float32 as the shortest decimal that gives it back."""
    if array.dtype.kind == "f":
        return np.array([float(str(value)) for value in array.flat]).reshape(array.shape).tolist()
    return array.tolist()


def _classification(probabilities: Array, classes: Array) -> dict[str, float]:
    count = probabilities.shape[-1]
    flat = probabilities.reshape(-1, count)
    # A float32 softmax sums to 1 within 1e-7; scikit-learn wants float64's accuracy.
    flat = flat / flat.sum(axis=1, keepdims=True)
    truth = classes.reshape(-1)
    one_hot = (truth[:, None] == np.arange(count)).astype(np.float64)
    return {
        "accuracy": float(accuracy_score(truth, flat.argmax(axis=1))),
        "nll": float(log_loss(truth, flat, labels=np.arange(count))),
        "brier": float(mean_squared_error(one_hot, flat) * count),
    }


def _regression(means: Array, values: Array) -> dict[str, float]:
    """The square of the rmse under its name: squares of several parts have a mean."""
    flat, truth = means.reshape(-1), values.reshape(-1)
    return {"rmse": float(mean_squared_error(truth, flat)), "mae": float(mean_absolute_error(truth, flat))}


def _fits(array: Array, shape: Sequence[int | None]) -> bool:
    return array.ndim == len(shape) and all(
        size is None or size == found for size, found in zip(shape, array.shape, strict=True)
    )


def _listed(names: Any) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def _shape(per_row: Sequence[int | None], rows: int | str = "rows") -> str:
    return f"({', '.join(map(str, [rows, *('any' if size is None else size for size in per_row)]))})"
