"""What an artifact says of rows, by its own signatures: as a server would answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.contract import (
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


def has_places(output: ModelOutput) -> bool:
    """Whether a row has a class for each of several places."""
    return output.task == "classification" and len(output.shape) > 1


@dataclass(frozen=True)
class Answers:
    """One output's answers to rows. Of an output with places [N, P, K] stands for [N, K]."""

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

    @property
    def is_classification(self) -> bool:
        return self.output.task == "classification"


@dataclass(frozen=True)
class Alone:
    """What one member of an ensemble would answer by itself."""

    # Dropout off: probabilities [N, K] or means [N].
    deterministic: Array
    # Classification: the mean of its draws [N, K], without a temperature. Regression: its draws [T, N].
    drawn: Array


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
        places = [Places.of(output, y) for output, y in zip(self.manifest.outputs, targets, strict=True)]
        deterministic = self._run(SERVING_DEFAULT, inputs, places)
        served = self._run(MC_PREDICT, inputs, places)
        return [
            self._of_output(output, own, inputs, deterministic, served)
            for output, own in zip(self.manifest.outputs, places, strict=True)
        ]

    def served(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What `mc_predict` gives, by its own names; of several places in a row their mean entropies alone."""
        return self._run(MC_PREDICT, inputs, [None] * len(self.manifest.outputs))

    def members(self, inputs: Mapping[str, Array]) -> list[Alone]:
        """Of each member of an ensemble, with as many draws of its own as the ensemble answers with; none for a single
        network.
        """
        count = self.manifest.members
        if count == 1:
            return []
        [output] = self.manifest.outputs
        network = keras.models.load_model(self._folder / KERAS_FILE, compile=False)
        point = keras.Model(network.input, member_symbols(network, count))
        parts = [
            [keras.ops.convert_to_numpy(values) for values in self._called(point, part)]
            for part in self._parts(inputs, BATCH_ROWS)
        ]
        points = [np.concatenate(own) for own in zip(*parts, strict=True)]
        value = temperature(self.manifest, output)

        def summary(draws: Array) -> Array:
            """[rows, members, ...]: draws of a number, or the mean of draws of probabilities without a temperature."""
            own = [draws[:, member::count] for member in range(count)]
            if output.task == "classification":
                own = [without_temperature(draws, value) for draws in own]
            return np.stack(own, axis=1)

        drawn = self._draws(output, inputs, summary, self.manifest.num_samples * count)
        if output.task == "classification":
            points = [np.hstack([1 - values, values]) if values.shape[1] == 1 else values for values in points]
            return [Alone(values, drawn[:, member]) for member, values in enumerate(points)]
        return [Alone(values[:, 0], drawn[:, member].T) for member, values in enumerate(points)]

    def _called(self, network: keras.Model, part: Mapping[str, Any]) -> list[Any]:
        rows = [part[item.name] for item in network.inputs]
        return network(rows[0] if len(rows) == 1 else rows, training=False)

    def _of_output(
        self,
        output: ModelOutput,
        places: Places | None,
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
        if output.task == "regression" and not output.shape:
            draws = self._draws(output, inputs, lambda values: values).T
        else:
            value = temperature(self.manifest, output)
            if value != 1:

                def summary(values: Array) -> Array:
                    return without_temperature(values if places is None else places.chosen(values, 2), value)

                uncalibrated = self._draws(output, inputs, summary, places=places)
        return Answers(output, deterministic[output.prefix + key], own, uncalibrated, draws, places)

    def _draws(
        self,
        output: ModelOutput,
        inputs: Mapping[str, Array],
        summary: Any,
        num_samples: int = 0,
        places: Places | None = None,
    ) -> Array:
        """num_samples: 0 for the manifest's own number."""
        num_samples = num_samples or self.manifest.num_samples
        scalars = {NUM_SAMPLES: tf.constant(num_samples), SEED: tf.constant(self.manifest.seed, tf.int64)}
        shape = output.shape if places is None else [*places.shape, output.shape[-1]]
        numbers = num_samples * int(np.prod([size or 1 for size in shape], dtype=int))
        batch = max(1, min(BATCH_ROWS, BATCH_NUMBERS // numbers))
        found = [
            summary(self.signatures[MC_DRAWS](**part, **scalars)[output.prefix + "draws"].numpy())
            for part in self._parts(inputs, batch)
        ]
        return np.concatenate(found)

    def _run(self, signature: str, inputs: Mapping[str, Array], places: Sequence[Places | None]) -> dict[str, Array]:
        longest = max((size for array in inputs.values() for size in array.shape[1:]), default=1)
        numbers = sum(
            int(np.prod([longest if size is None else size for size in tensor.shape[1:]], dtype=int))
            for tensor in self.manifest.signatures[signature].outputs
        )
        batch = max(1, min(BATCH_ROWS, BATCH_NUMBERS // numbers))
        if signature == MC_PREDICT:
            batch = min(batch, drawn_rows(numbers, self.manifest.num_samples))
        parts, run = [], self._without_waste(signature, [own is not None for own in places])
        for number, part in enumerate(self._parts(inputs, batch)):
            found = {name: values.numpy() for name, values in run(**part).items()}
            for output, own in zip(self.manifest.outputs, places, strict=True):
                if has_places(output):
                    found = _kept(output, own, found, number * batch)
            parts.append(found)
        return finite({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _without_waste(self, signature: str, keeps_probabilities: Sequence[bool]) -> Any:
        """The signature without outputs of places that would be thrown away: quantiles of all places take most of the
        time.
        """
        whole, wasted = self.signatures[signature], set()
        for output, keeps in zip(self.manifest.outputs, keeps_probabilities, strict=True):
            if has_places(output):
                names = NOT_KEPT if keeps else ("probabilities", *NOT_KEPT)
                wasted |= {output.prefix + name for name in names}
        kept = [tensor.name for tensor in self.manifest.signatures[signature].outputs if tensor.name not in wasted]
        if len(kept) == len(self.manifest.signatures[signature].outputs):
            return whole
        specs = {item.name: tf.TensorSpec([None, *item.shape], item.dtype) for item in self.manifest.inputs}

        def some(**inputs: Any) -> dict[str, Any]:
            found = whole(**inputs)
            return {name: found[name] for name in kept}

        return tf.function(some, autograph=False).get_concrete_function(**specs)

    def _parts(self, inputs: Mapping[str, Array], batch: int) -> Any:
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
