"""Outputs of a network and what is reported of them: classes' probabilities or a target's value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models import conformal, mixture, statistics, temperature
from models.contract import (
    ABSTAIN,
    DEFAULT_COVERAGE,
    INTERVAL_LOWER,
    INTERVAL_UPPER,
    PREDICTION_SET,
    ArtifactError,
    ModelOutput,
    Noise,
    OutputCalibration,
    TargetNoises,
    Task,
    Temperature,
    counted,
)
from models.network import Network
from models.statistics import Moments

# Made-up rows that show what an output is where the graph does not say.
_PROBE_ROWS = 32
# Losses of units that are separate yes-or-no answers.
_BINARY_LOSSES = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
# Activations of one unit that make a probability.
_SIGMOIDS = ("sigmoid", "hard_sigmoid", "sparse_sigmoid")


@dataclass(frozen=True)
class Head:
    """One output: how the network's tensor becomes the reported quantity, and its statistics' names and shapes."""

    output: ModelOutput
    # "identity", "softmax" or "sigmoid": applied to the network's tensor.
    link: str
    # One number stands for two classes: the probability of the second.
    binary: bool
    # The network's tensor has a last axis of size 1 that the answer does not have.
    squeeze: bool
    # The network's last axis is a target's mean and the standard deviation of its noise, both in the target's unit.
    has_noise: bool = False
    # What held-out rows taught of its draws, which applies it; None until then.
    calibration: OutputCalibration | None = None
    # Of the prediction sets.
    coverage: float = DEFAULT_COVERAGE

    @property
    def is_classification(self) -> bool:
        return self.output.task == "classification"

    @property
    def draw_shape(self) -> list[int | None]:
        """Per-row shape of the quantity that is averaged over draws."""
        shape = self.output.shape
        return shape[:-1] if self.binary else [2] if self.has_noise else shape

    def quantity(self, tensor: tf.Tensor) -> tf.Tensor:
        """The network's tensor [N, ...] as the quantity that is averaged over draws, float32.

        With `has_noise` a mean and a variance, [N, 2].
        """
        values = tf.cast(tensor, tf.float32)
        if self.has_noise:
            return tf.stack([values[:, 0], tf.square(values[:, 1])], axis=-1)
        if self.squeeze:
            values = tf.squeeze(values, axis=-1)
        if self.link == "softmax":
            return tf.nn.softmax(values)
        if self.link == "sigmoid":
            return tf.sigmoid(values)
        return values

    def draw(self, tensor: tf.Tensor) -> tf.Tensor:
        """`quantity` of a draw: at the temperature of the calibration."""
        values = self.quantity(tensor)
        fit = self.calibration.fit if self.calibration is not None else None
        if not isinstance(fit, Temperature) or fit.value == 1.0:
            return values
        return temperature.applied(values, fit.value, self.binary)

    def classes(self, values: tf.Tensor) -> tf.Tensor:
        """Both classes' probabilities where one number stands for two: [...] -> [..., 2]."""
        return tf.stack([1.0 - values, values], axis=-1) if self.binary else values

    def point(self, tensor: tf.Tensor) -> dict[str, tf.Tensor]:
        """The deterministic answer."""
        if self.has_noise:
            return {self.output.prefix + "mean": tf.cast(tensor[:, 0], tf.float32)}
        name = "probabilities" if self.is_classification else "mean"
        return {self.output.prefix + name: self.classes(self.quantity(tensor))}

    def drawn(self, draws: tf.Tensor) -> dict[str, tf.Tensor]:
        """Every draw's answer, from the quantity's draws [N, T, ...]."""
        if not self.has_noise:
            return {self.output.prefix + "draws": self.classes(draws)}
        stds = tf.sqrt(draws[..., 1]) * self._noise_scale
        return {self.output.prefix + "draws": draws[..., 0], self.output.prefix + "aleatoric_draws": stds}

    @property
    def _noises(self) -> list[Noise]:
        """Of each number of a row; none where they are not known."""
        fit = self.calibration.fit if self.calibration is not None else None
        if isinstance(fit, TargetNoises):
            return fit.targets
        return [fit] if isinstance(fit, Noise) else []

    @property
    def _noise_std(self) -> float | list[float]:
        """Of a noise that is the same for every row; of several numbers a row each one's."""
        stds = [noise.std or 0.0 for noise in self._noises]
        return stds if self.output.shape else stds[0]

    @property
    def _noise_scale(self) -> float:
        return self._noises[0].scale if self._noises else 1.0

    def moments(self, draws: tf.Tensor, first_draw: tf.Tensor | int | None) -> Moments:
        """Moments of one chunk of the quantity's draws [N, C, ...]; of two classes both are there."""
        last = statistics.draws_last(draws)
        if self.binary:
            last = tf.stack([1.0 - last, last], axis=-2)
        return statistics.of_draws(last, first_draw, self.is_classification)

    def standard_error(self, moments: Moments, num_draws: tf.Tensor | int) -> tf.Tensor:
        """Of the mean of the draws, [N, ...]."""
        std = statistics.standard_deviation(moments, num_draws)
        if self.has_noise:
            std = std[:, 0]
        return std / tf.sqrt(tf.cast(num_draws, tf.float32))

    def summary(self, moments: Moments, num_draws: tf.Tensor | int, enough: bool = False) -> dict[str, tf.Tensor]:
        """All that is reported of the draws, by signature output name.

        enough: there are enough draws for quantiles.
        """
        error = self.standard_error(moments, num_draws)
        if self.has_noise or self._noises:
            answers = self._noisy(moments, num_draws, error, enough)
            return {self.output.prefix + name: value for name, value in answers.items()}
        std = statistics.standard_deviation(moments, num_draws)
        if self.is_classification:
            if self.binary:
                lower, upper = statistics.shared_interval(moments.first, num_draws, enough)
            else:
                lower, upper = statistics.central_interval(moments.first, num_draws, (0.0, 1.0), enough)
            predictive = statistics.entropy(moments.mean)
            expected = moments.negentropy / -tf.cast(num_draws, tf.float32)
            answers = {
                "probabilities": moments.mean,
                "std": std,
                "standard_error": error,
                "predictive_entropy": predictive,
                "expected_entropy": expected,
                "mutual_information": tf.maximum(predictive - expected, 0.0),
                "lower": lower,
                "upper": upper,
            }
        else:
            infinity = float("inf")
            lower, upper = statistics.central_interval(
                moments.first, num_draws, (-infinity, infinity), enough, moments.mean
            )
            answers = {
                "mean": moments.mean,
                "epistemic_std": std,
                "standard_error": error,
                "lower": lower,
                "upper": upper,
            }
        return {self.output.prefix + name: value for name, value in answers.items()}

    def _noisy(
        self, moments: Moments, num_draws: tf.Tensor | int, error: tf.Tensor, enough: bool
    ) -> dict[str, tf.Tensor]:
        """The summary of a regression whose noise is known: variances add, quantiles are the mixture's."""
        mean, first = moments.mean, moments.first
        epistemic = statistics.standard_deviation(moments, num_draws)
        if self.has_noise:
            # E[sigma^2], Kendall & Gal 2017, eq. 9.
            variance = mean[:, 1] * self._noise_scale**2
            stds = tf.sqrt(first[:, 1]) * self._noise_scale
            mean, epistemic, first = mean[:, 0], epistemic[:, 0], first[:, 0]
            aleatoric = tf.sqrt(variance)
        else:
            aleatoric = tf.zeros_like(mean) + self._noise_std
            stds = aleatoric[..., None]
        std = tf.sqrt(tf.square(epistemic) + tf.square(aleatoric))
        lower, upper = self._tails(first, stds, mean, std, enough)
        return {
            "mean": mean,
            "epistemic_std": epistemic,
            "aleatoric_std": aleatoric,
            "std": std,
            "standard_error": error,
            "lower": lower,
            "upper": upper,
        }

    def _tails(
        self, first: tf.Tensor, stds: tf.Tensor, mean: tf.Tensor, std: tf.Tensor, enough: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Quantiles of the mixture, [N]; of several numbers a row [N, D], each as if it were a row."""
        shape = self.output.shape
        if shape:
            first, stds = (tf.reshape(values, [-1, tf.shape(values)[-1]]) for values in (first, stds))
            mean, std = tf.reshape(mean, [-1]), tf.reshape(std, [-1])
        ends = statistics.known_tails(
            first, lambda: mixture.quantiles(first, stds, mean, std, statistics.INTERVAL_LEVELS), enough
        )
        lower, upper = (tf.reshape(end, [-1, *shape]) for end in ends) if shape else ends
        return lower, upper

    def decisions(self, answers: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """What follows from the summary by the calibration: prediction sets [N, K] or intervals, [N] or [N, D], and
        whether to abstain [N].
        """
        known, prefix = self.calibration, self.output.prefix
        found: dict[str, tf.Tensor] = {}
        if known is not None and known.conformal is not None and self.is_classification:
            probabilities = answers[prefix + "probabilities"]
            found[PREDICTION_SET] = conformal.prediction_set(probabilities, known.conformal, self.coverage)
        elif known is not None and known.conformal is not None:
            ends = conformal.interval(answers[prefix + "mean"], answers[prefix + "std"], known.conformal, self.coverage)
            found[INTERVAL_LOWER], found[INTERVAL_UPPER] = ends
        if known is not None and known.abstention is not None and self.is_classification:
            # What is NaN is withheld, and so below.
            is_confident = answers[prefix + "probabilities"] >= known.abstention.threshold
            found[ABSTAIN] = tf.logical_not(tf.reduce_any(is_confident, axis=-1))
        elif known is not None and known.abstention is not None:
            found[ABSTAIN] = tf.logical_not(answers[prefix + "std"] <= known.abstention.threshold)
        return {prefix + name: value for name, value in found.items()}


def _activation(symbol: Any) -> str | None:
    """The activation that makes an output: "softmax", "sigmoid" (or one like it) or another; None where the graph does
    not say.
    """
    operation = symbol._keras_history.operation
    if isinstance(operation, keras.Sequential | keras.Model) and getattr(operation, "outputs", None):
        return _activation(operation.outputs[symbol._keras_history.tensor_index])
    if isinstance(operation, keras.layers.Softmax):
        return "softmax" if operation.axis in (-1, len(symbol.shape) - 1) else None
    layer = operation.layer if isinstance(operation, keras.layers.TimeDistributed) else operation
    activation = getattr(layer, "activation", None)
    name = None if activation is None else getattr(activation, "__name__", None)
    return "sigmoid" if name in _SIGMOIDS else name


def _probed(values: NDArray[Any]) -> str:
    """The activation that outputs [N, ...] look like: "softmax", "sigmoid" or "linear"."""
    if values.min() < 0 or values.max() > 1:
        return "linear"
    sums_to_one = values.ndim > 1 and values.shape[-1] > 1 and np.allclose(values.sum(axis=-1), 1, atol=1e-2)
    return "softmax" if sums_to_one else "sigmoid"


def _probe(network: Network, made_up: Callable[[int, float], list[tf.Tensor]]) -> list[NDArray[Any]]:
    """The network's outputs, dropout off, for made-up rows of large numbers: so that logits show as such."""
    outputs = network.deterministic(made_up(_PROBE_ROWS, 10.0))
    return [tf.cast(tensor, tf.float32).numpy() for tensor in outputs]


def _loss_of(network: Network, name: str, number: int) -> Any:
    """The loss that an output was trained with; None where the network does not say."""
    loss = getattr(network.model, "loss", None)
    if isinstance(loss, Mapping):
        return loss.get(name)
    if isinstance(loss, list | tuple):
        return loss[number] if number < len(loss) else None
    return loss


def heads_of(
    network: Network,
    shapes: list[tuple[int | None, ...]],
    task: Task | None,
    labels: list[str] | None,
    unit: str | None,
    made_up: Callable[[int, float], list[tf.Tensor]],
    has_noise: bool = False,
) -> list[Head]:
    """The heads of a network's outputs, `shapes` without the rows' axis.

    made_up: so many rows of inputs of such a spread, that it can be tried with. has_noise: the single output is a
    regression's mean and the standard deviation of its noise.

    Raises ArtifactError where the outputs and what is said of them do not fit together.
    """
    names = network.output_names()
    if len(names) != len(shapes):
        raise ArtifactError(
            f"model {network.model.name!r}: a subclassed model of {len(shapes)} outputs, which have no names; wanted "
            "one output, or a functional model"
        )
    several = len(names) > 1
    if has_noise:
        if several or tuple(shapes[0]) != (2,):
            raise ArtifactError(
                f"outputs {', '.join(names)}: wanted one of two columns, a mean and its noise's deviation"
            )
        output = ModelOutput(name=names[0], task="regression", shape=[], unit=unit, has_aleatoric=True)
        return [Head(output, "identity", False, False, has_noise=True)]
    known = [_activation(symbol) for symbol in network.model.outputs] if network.is_split else [None] * len(names)
    looks = ["linear"] * len(names)
    if None in known and task != "regression":
        looks = [_probed(values) for values in _probe(network, made_up)]
    heads = []
    for number, (name, activation, look, shape) in enumerate(zip(names, known, looks, shapes, strict=True)):
        chosen = task
        loss = _loss_of(network, name, number)
        if chosen is None:
            logits = bool(getattr(loss, "from_logits", False))
            probable = activation in ("softmax", "sigmoid") or (activation is None and look == "softmax") or logits
            # Labels of several outputs say nothing of what each of them is.
            chosen = "classification" if probable or (labels is not None and not several) else "regression"
        prefix = f"{name}_" if several else ""
        if chosen == "classification":
            fitting = labels if not several or labels is None or len(labels) == _class_count(shape) else None
            # Whether it has the sigmoids itself or leaves them to its loss.
            is_many = isinstance(loss, _BINARY_LOSSES) and shape[-1:] != (1,)
            heads.append(_classification(name, prefix, "sigmoid" if is_many else activation or look, shape, fitting))
        else:
            if labels is not None and not several:
                raise ArtifactError(f"output {name!r}: {len(labels)} labels were given, but a regression has none")
            squeeze = shape[-1:] == (1,)
            kept = list(shape[:-1]) if squeeze else list(shape)
            output = ModelOutput(name=name, prefix=prefix, task="regression", shape=kept, unit=unit)
            heads.append(Head(output, "identity", False, squeeze))
    if labels is not None and not any(head.output.labels == labels for head in heads):
        raise ArtifactError(
            f"labels {', '.join(labels)}: {len(labels)} given, but no output has so many classes; "
            f"the outputs are {', '.join(f'{name} {list(shape)}' for name, shape in zip(names, shapes, strict=True))}"
        )
    return heads


def _class_count(shape: tuple[int | None, ...]) -> int | None:
    units = shape[-1] if shape else 1
    return 2 if units == 1 else units


def _classification(
    name: str, prefix: str, activation: str, shape: tuple[int | None, ...], labels: list[str] | None
) -> Head:
    units = shape[-1] if shape else 1
    if units is None:
        raise ArtifactError(
            f"output {name!r}: its number of classes is not fixed (shape {shape}); wanted a fixed last axis"
        )
    binary = units == 1
    if activation == "softmax" and binary:
        raise ArtifactError(
            f"output {name!r}: softmax over one unit is always 1; wanted one sigmoid unit or two classes"
        )
    if activation == "sigmoid" and not binary:
        raise ArtifactError(
            f"output {name!r}: {units} sigmoid units are {units} separate yes-or-no answers, not one choice of {units} "
            "classes; package with --task regression to serve each score's mean and deviation"
        )
    classes = 2 if binary else units
    if labels is not None and len(labels) != classes:
        raise ArtifactError(
            f"output {name!r}: {counted(len(labels), 'label')} given ({', '.join(labels)}), {classes} wanted "
            f"({'one sigmoid unit is two classes' if binary else f'the output has {units} units'})"
        )
    if labels is not None and len(set(labels)) != len(labels):
        raise ArtifactError(f"output {name!r}: a label is given twice: {', '.join(labels)}")
    if labels is not None and not all(labels):
        raise ArtifactError(f"output {name!r}: an empty label among {labels}; wanted a name for each class")
    link = "identity" if activation in ("softmax", "sigmoid") else ("sigmoid" if binary else "softmax")
    squeeze = bool(shape) and binary
    kept = [*(shape[:-1] if squeeze or not binary else shape), classes]
    output = ModelOutput(
        name=name,
        prefix=prefix,
        task="classification",
        shape=kept,
        labels=labels or [str(number) for number in range(classes)],
    )
    return Head(output, link, binary, squeeze)
