"""What an artifact says of rows, by its own signatures: as a server would answer them."""

from __future__ import annotations

from collections.abc import Mapping
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
    NUM_SAMPLES,
    SEED,
    SERVING_DEFAULT,
    Manifest,
    ModelOutput,
    Temperature,
)
from models.holdout import finite
from models.members import member_symbols

Array = NDArray[Any]

# Rows of a call, and numbers that it may return, at most.
BATCH_ROWS = 4096
BATCH_NUMBERS = 2**24


@dataclass(frozen=True)
class Answers:
    """One output's answers to rows."""

    output: ModelOutput
    # Dropout off: probabilities [N, K] or means [N].
    deterministic: Array
    # What `mc_predict` gives, by the names of `mc_sample`'s outputs.
    served: Mapping[str, Array]
    # Classification at a temperature: the mean of the draws without it [N, K]. None where there is no temperature.
    uncalibrated: Array | None
    # Regression: the draws [T, N].
    draws: Array | None

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

    def answers(self, inputs: Mapping[str, Array]) -> list[Answers]:
        """Of each output, in the manifest's order."""
        deterministic = self._run(SERVING_DEFAULT, inputs)
        served = self._run(MC_PREDICT, inputs)
        return [self._of_output(output, inputs, deterministic, served) for output in self.manifest.outputs]

    def served(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What `mc_predict` gives, by its own names."""
        return self._run(MC_PREDICT, inputs)

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
                uncalibrated = self._draws(output, inputs, lambda values: without_temperature(values, value))
        return Answers(output, deterministic[output.prefix + key], own, uncalibrated, draws)

    def _draws(self, output: ModelOutput, inputs: Mapping[str, Array], summary: Any, num_samples: int = 0) -> Array:
        """num_samples: 0 for the manifest's own number."""
        num_samples = num_samples or self.manifest.num_samples
        scalars = {NUM_SAMPLES: tf.constant(num_samples), SEED: tf.constant(self.manifest.seed, tf.int64)}
        numbers = num_samples * int(np.prod([size or 1 for size in output.shape], dtype=int))
        batch = max(1, min(BATCH_ROWS, BATCH_NUMBERS // numbers))
        found = [
            summary(self.signatures[MC_DRAWS](**part, **scalars)[output.prefix + "draws"].numpy())
            for part in self._parts(inputs, batch)
        ]
        return np.concatenate(found)

    def _run(self, signature: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        parts = [self.signatures[signature](**part) for part in self._parts(inputs, BATCH_ROWS)]
        return finite({name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]})

    def _parts(self, inputs: Mapping[str, Array], batch: int) -> Any:
        rows = len(next(iter(inputs.values())))
        for start in range(0, rows, batch):
            yield {
                item.name: tf.constant(inputs[item.name][start : start + batch], item.dtype)
                for item in self.manifest.inputs
            }


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
