"""What an artifact says of rows, by its own signatures: as a server would answer them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.contract import (
    INTERVAL_LOWER,
    INTERVAL_UPPER,
    KERAS_FILE,
    MC_DRAWS,
    MC_PREDICT,
    NO_CLASS,
    NUM_SAMPLES,
    SEED,
    SERVING_DEFAULT,
    Manifest,
    ModelOutput,
    Temperature,
    drawn_rows,
)
from models.holdout import PlacesError, finite
from models.members import member_symbols
from models.sampling import some
from training.numbers import STATISTICS, Numbers, has_numbers

Array = NDArray[Any]

# Rows of a call, and numbers that it may return, at most.
BATCH_ROWS = 4096
BATCH_NUMBERS = 2**24
# Places of all rows that are judged at most, and their probabilities: of larger maps some places, at random, show it,
# and a thousandth of an accuracy is less than rows differ by.
JUDGED_PLACES = 2**17
JUDGED_NUMBERS = 2**22
# Of several places in a row what is kept, beside the probabilities: the mean over the places.
OF_PLACES = ("predictive_entropy", "expected_entropy", "mutual_information")
NOT_KEPT = ("std", "standard_error", "lower", "upper")
# Of several numbers in a row.
NOT_KEPT_OF_NUMBERS = ("standard_error", "lower", "upper", INTERVAL_LOWER, INTERVAL_UPPER)


@dataclass(frozen=True)
class Places:
    """The places of a row, of an output that has a class for each."""

    rows: int
    # As the answers have them: (S,) or (H, W).
    shape: tuple[int, ...]
    # [P] numbers of those that are judged, in order; the same ones of every row.
    judged: NDArray[np.int64]
    # [N, ...] whether a place has a class; where it has none, the row was padded.
    has_class: NDArray[np.bool_]

    @classmethod
    def of(cls, output: ModelOutput, target: Array) -> Places | None:
        """None where the output has one class a row, or is no classification.

        target: the true classes [N, ...], NO_CLASS where a row was padded.
        """
        if not has_places(output):
            return None
        shape, has_class = target.shape[1:], target != NO_CLASS
        most = max(min(JUDGED_PLACES, JUDGED_NUMBERS // len(output.labels or "1")) // len(target), 1)
        numbers = np.arange(int(np.prod(shape, dtype=int)))
        if len(numbers) > most:
            # Of those that have a class in some row.
            numbers = some(np.flatnonzero(has_class.reshape(len(target), -1).any(axis=0)), most)
        return cls(len(target), shape, numbers, has_class)

    @property
    def are_all(self) -> bool:
        return len(self.judged) == np.prod(self.shape, dtype=int)

    @property
    def left_out(self) -> int:
        """Places of all rows, of those that would be judged, which have no class."""
        return int((~self.chosen(self.has_class)).sum())

    @property
    def rows_with_class(self) -> NDArray[np.bool_]:
        """[N] whether one of the row's places has a class."""
        return np.asarray(self.has_class.reshape(self.rows, -1).any(axis=1))

    def mean(self, values: Array, first: int) -> Array:
        """[n] mean over the places that have a class, of the values [n, ...] of rows `first` and on; 0 without any."""
        has_class = self.has_class[first : first + len(values)].reshape(len(values), -1)
        total = np.where(has_class, values.reshape(len(values), -1), 0).sum(axis=1)
        return total / np.maximum(has_class.sum(axis=1), 1)

    def chosen(self, values: Array, before: int = 1) -> Array:
        """[N, ..., P, ...] of values with the places' axes behind the first `before`."""
        flat = values.reshape(*values.shape[:before], -1, *values.shape[before + len(self.shape) :])
        return flat if self.are_all else flat.take(self.judged, axis=before)


def parts_of(output: ModelOutput, target: Array) -> Places | Numbers | None:
    """What a row has several of; None where it has one class or one number. target: the true answers [N, ...]."""
    return Places.of(output, target) or Numbers.of(output, target)


def has_places(output: ModelOutput) -> bool:
    """Whether a row has a class for each of several places."""
    return output.task == "classification" and len(output.shape) > 1


@dataclass(frozen=True)
class Answers:
    """One output's answers to rows. Of an output with places [N, P, K] stands for [N, K]; of one with several numbers a
    row [N, J] stands for [N], and [T, N, J] for [T, N].
    """

    output: ModelOutput
    # Dropout off: probabilities [N, K] or means [N].
    deterministic: Array
    # What `mc_predict` gives, by the names of `mc_sample`'s outputs; of several places their mean entropies [N].
    served: Mapping[str, Array]
    # Classification at a temperature: the mean of the draws without it [N, K]. None where there is no temperature.
    uncalibrated: Array | None
    # Regression: the draws [T, N].
    draws: Array | None
    places: Places | None = None
    numbers: Numbers | None = None

    @property
    def is_classification(self) -> bool:
        return self.output.task == "classification"

    def by_number(self) -> Iterator[Answers]:
        """Those of each number that is judged, as of an output of its own."""
        assert self.numbers is not None
        assert self.draws is not None
        for number in range(self.numbers.judged):
            yield replace(
                self,
                output=self.numbers.output(self.output, number),
                deterministic=self.deterministic[:, number],
                served=self.numbers.served(self.served, number),
                draws=self.draws[..., number],
                numbers=None,
            )


@dataclass(frozen=True)
class Alone:
    """What one member of an ensemble would answer by itself."""

    # Dropout off: probabilities [N, K] or means [N].
    deterministic: Array
    # Classification: the mean of its draws [N, K], without a temperature. Regression: its draws [T, N].
    drawn: Array

    def number(self, number: int) -> Alone:
        """Of several numbers a row, [N, J] and [T, N, J], what it would answer of one."""
        return Alone(self.deterministic[:, number], self.drawn[..., number])


class Artifact:
    """The signatures of one published version, with its own number of draws and seed."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder
        # Kept: its functions hold its variables weakly.
        self._loaded = tf.saved_model.load(str(folder))
        self.signatures: Mapping[str, Any] = self._loaded.signatures

    def answers(self, inputs: Mapping[str, Array], targets: Sequence[Array]) -> list[Answers]:
        """Of each output, in the manifest's order. targets: their true answers [N, ...].

        Raises PlacesError where these are of other places than the network's answers.
        """
        parts = [parts_of(output, y) for output, y in zip(self.manifest.outputs, targets, strict=True)]
        deterministic = self._run(SERVING_DEFAULT, inputs, parts)
        served = self._run(MC_PREDICT, inputs, parts)
        return [
            self._of_output(output, own, inputs, deterministic, served)
            for output, own in zip(self.manifest.outputs, parts, strict=True)
        ]

    def served(self, inputs: Mapping[str, Array], numbers: Sequence[Numbers | None] | None = None) -> dict[str, Array]:
        """What `mc_predict` gives, by its own names; of several places in a row their mean entropies alone.

        numbers: of each output those that are judged, of which the deviations of the draws are wanted alone, [N, J];
        where a row has other ones, none.
        """
        return self._run(MC_PREDICT, inputs, numbers or [None] * len(self.manifest.outputs), are_judged=False)

    def members(self, inputs: Mapping[str, Array], targets: Sequence[Array]) -> list[Alone]:
        """Of each member of an ensemble, with as many draws of its own as the ensemble answers with; none for a single
        network. targets: as of `answers`.
        """
        count = self.manifest.members
        if count == 1:
            return []
        [output], [target] = self.manifest.outputs, targets
        numbers = Numbers.of(output, target)
        network = keras.models.load_model(self._folder / KERAS_FILE, compile=False)
        point = keras.Model(network.input, member_symbols(network, count))
        parts = [
            [keras.ops.convert_to_numpy(values) for values in self._called(point, part)]
            for part in self._batches(inputs, BATCH_ROWS)
        ]
        points = [np.concatenate(own) for own in zip(*parts, strict=True)]
        value = temperature(self.manifest, output)

        def summary(draws: Array) -> Array:
            """[rows, members, ...]: draws of a number, or the mean of draws of probabilities without a temperature."""
            own = [draws[:, member::count] for member in range(count)]
            if output.task == "classification":
                own = [without_temperature(draws, value) for draws in own]
            if numbers is not None:
                own = [numbers.chosen(draws, 2) for draws in own]
            return np.stack(own, axis=1)

        drawn = self._draws(output, inputs, summary, self.manifest.num_samples * count)
        if output.task == "classification":
            points = [np.hstack([1 - values, values]) if values.shape[1] == 1 else values for values in points]
            return [Alone(values, drawn[:, member]) for member, values in enumerate(points)]
        if numbers is not None:
            points = [numbers.chosen(values) for values in points]
        else:
            points = [values[:, 0] for values in points]
        return [Alone(values, drawn[:, member].swapaxes(0, 1)) for member, values in enumerate(points)]

    def _called(self, network: keras.Model, part: Mapping[str, Any]) -> list[Any]:
        rows = [part[item.name] for item in network.inputs]
        return network(rows[0] if len(rows) == 1 else rows, training=False)

    def _of_output(
        self,
        output: ModelOutput,
        parts: Places | Numbers | None,
        inputs: Mapping[str, Array],
        deterministic: Mapping[str, Array],
        served: Mapping[str, Array],
    ) -> Answers:
        key = "probabilities" if output.task == "classification" else "mean"
        own = {
            name.removeprefix(output.prefix): values
            for name, values in served.items()
            if name.startswith(output.prefix)
        }
        uncalibrated = draws = None
        places = parts if isinstance(parts, Places) else None
        numbers = parts if isinstance(parts, Numbers) else None
        if output.task == "regression":
            draws = self._draws(
                output, inputs, lambda values: values if numbers is None else numbers.chosen(values, 2), parts=numbers
            ).swapaxes(0, 1)
        else:
            value = temperature(self.manifest, output)
            if value != 1:

                def summary(values: Array) -> Array:
                    return without_temperature(values if places is None else places.chosen(values, 2), value)

                uncalibrated = self._draws(output, inputs, summary, parts=places)
        return Answers(output, deterministic[output.prefix + key], own, uncalibrated, draws, places, numbers)

    def _draws(
        self,
        output: ModelOutput,
        inputs: Mapping[str, Array],
        summary: Any,
        num_samples: int = 0,
        parts: Places | Numbers | None = None,
    ) -> Array:
        """num_samples: 0 for the manifest's own number."""
        num_samples = num_samples or self.manifest.num_samples
        scalars = {NUM_SAMPLES: tf.constant(num_samples), SEED: tf.constant(self.manifest.seed, tf.int64)}
        shape: Sequence[int | None] = output.shape
        if parts is not None:
            shape = [*parts.shape, *output.shape[len(parts.shape) :]]
        numbers = num_samples * int(np.prod([size or 1 for size in shape], dtype=int))
        batch = max(1, min(BATCH_ROWS, BATCH_NUMBERS // numbers))
        found = [
            summary(self.signatures[MC_DRAWS](**part, **scalars)[output.prefix + "draws"].numpy())
            for part in self._batches(inputs, batch)
        ]
        return np.concatenate(found)

    def _run(
        self,
        signature: str,
        inputs: Mapping[str, Array],
        parts: Sequence[Places | Numbers | None],
        are_judged: bool = True,
    ) -> dict[str, Array]:
        longest = max((size for array in inputs.values() for size in array.shape[1:]), default=1)
        numbers = sum(
            int(np.prod([longest if size is None else size for size in tensor.shape[1:]], dtype=int))
            for tensor in self.manifest.signatures[signature].outputs
        )
        batch = max(1, min(BATCH_ROWS, BATCH_NUMBERS // numbers))
        if signature == MC_PREDICT:
            batch = min(batch, drawn_rows(numbers, self.manifest.num_samples))
        answers, run = [], self._without_waste(signature, are_judged)
        for number, part in enumerate(self._batches(inputs, batch)):
            found = {name: values.numpy() for name, values in run(**part).items()}
            for output, own in zip(self.manifest.outputs, parts, strict=True):
                if has_places(output):
                    found = _kept(output, own if isinstance(own, Places) else None, found, number * batch)
                elif isinstance(own, Numbers):
                    found = _kept_numbers(output, own, found, are_judged)
            answers.append(found)
        return finite({name: np.concatenate([part[name] for part in answers]) for name in answers[0]})

    def _without_waste(self, signature: str, are_judged: bool) -> Any:
        """The signature without outputs of places or numbers that would be thrown away: quantiles of all of them take
        most of the time.
        """
        whole, wasted = self.signatures[signature], set()
        for output in self.manifest.outputs:
            names: tuple[str, ...] = ()
            if has_places(output):
                names = NOT_KEPT if are_judged else ("probabilities", *NOT_KEPT)
            elif has_numbers(output):
                names = NOT_KEPT_OF_NUMBERS if are_judged else ("mean", "aleatoric_std", "std", *NOT_KEPT_OF_NUMBERS)
            wasted |= {output.prefix + name for name in names}
        kept = [tensor.name for tensor in self.manifest.signatures[signature].outputs if tensor.name not in wasted]
        if len(kept) == len(self.manifest.signatures[signature].outputs):
            return whole
        specs = {item.name: tf.TensorSpec([None, *item.shape], item.dtype) for item in self.manifest.inputs}

        def some(**inputs: Any) -> dict[str, Any]:
            found = whole(**inputs)
            return {name: found[name] for name in kept}

        return tf.function(some, autograph=False).get_concrete_function(**specs)

    def _batches(self, inputs: Mapping[str, Array], batch: int) -> Any:
        rows = len(next(iter(inputs.values())))
        for start in range(0, rows, batch):
            yield {
                item.name: tf.constant(inputs[item.name][start : start + batch], item.dtype)
                for item in self.manifest.inputs
            }


def _kept(output: ModelOutput, places: Places | None, found: Mapping[str, Array], first: int) -> dict[str, Array]:
    """The answers [n, ...] to rows `first` and on, with what is judged of this output's places: all of it would not fit
    in memory.

    Raises PlacesError.
    """
    kept = {}
    for name, values in found.items():
        own = name.removeprefix(output.prefix) if name.startswith(output.prefix) else ""
        if own == "probabilities" and places is not None:
            if values.shape[1:-1] != places.shape:
                raise PlacesError(output.name, (places.rows, *places.shape), (places.rows, *values.shape[1:-1]))
            kept[name] = places.chosen(values)
        elif own in OF_PLACES:
            flat = values.reshape(len(values), -1)
            kept[name] = flat.mean(axis=1) if places is None else places.mean(flat, first)
        elif own not in ("probabilities", *NOT_KEPT):
            kept[name] = values
    return kept


def _kept_numbers(
    output: ModelOutput, numbers: Numbers, found: Mapping[str, Array], are_judged: bool
) -> dict[str, Array]:
    """The answers [n, ...] to some rows, with the numbers of this output that are judged.

    Raises PlacesError where the rows are judged, and have other numbers.
    """
    kept = {}
    for name, values in found.items():
        own = name.removeprefix(output.prefix) if name.startswith(output.prefix) else ""
        if own not in STATISTICS:
            kept[name] = values
        elif values.shape[1:] == numbers.shape:
            kept[name] = numbers.chosen(values)
        elif are_judged:
            raise PlacesError(output.name, (numbers.rows, *numbers.shape), (numbers.rows, *values.shape[1:]))
    return kept


def temperature(manifest: Manifest, output: ModelOutput) -> float:
    """1 where there is none, or where it stayed off."""
    known = manifest.calibrated(output)
    fit = known.fit if known is not None else None
    return fit.value if isinstance(fit, Temperature) else 1.0


def without_temperature(draws: Array, value: float) -> Array:
    """The mean [N, K] of draws [N, T, K] as they would be without the temperature: each was p^(1/value), normalised."""
    logs = np.log(np.maximum(draws.astype(np.float64), np.finfo(np.float32).tiny)) * value
    powers = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=1)
