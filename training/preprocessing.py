"""From raw rows to the numbers that a network takes: Keras layers inside the graph, fitted on the training rows only.

- a number is standardised; a missing one stands at the training mean, with an indicator beside it
- a boolean is a number, 0 or 1
- a category is one-hot; missing is a category of its own where the training rows had it; an unseen one is the bucket
  of the unknown, all zeros: what dropping the category means in training
- a pixel is scaled to 0..1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import keras
import numpy as np
from numpy.typing import NDArray

from training.datasets import Dataset, Input, known_categories, layer_name

# Rows a call of the graph.
_BATCH = 65_536
# Standard deviations that Keras's Normalization takes as they are: it divides by no less than 1e-7, and a variance has
# to be a float32.
_PLAIN_STD = 1e-6, 1e18


@dataclass(frozen=True)
class Preprocessor:
    """What was seen in the training rows. Everything else follows from it, so that another row changes nothing."""

    # The network's inputs, in order.
    specs: tuple[Input, ...]
    # Columns of numbers: float64 [F], in the order of the inputs. None for images.
    mean: NDArray[np.float64] | None
    # Of their standard deviations: 1 for a column that is constant.
    variance: NDArray[np.float64] | None
    # Which of those columns had a missing value.
    missing: tuple[int, ...]
    # Whether any of them may have one.
    nullable: bool
    # Categories with an input of their own, by input name.
    vocabularies: dict[str, list[str]]
    # The largest value of a pixel.
    white: float

    @classmethod
    def fit(cls, data: Dataset, rows: NDArray[np.int64]) -> Self:
        """Look at `rows` of the data, the training rows, and at no other."""
        x = data.x[rows]
        if not data.columns:
            return cls(data.inputs, None, None, (), False, {}, data.white)
        texts = {item.name: item.of(x) for item in data.inputs if item.dtype == "string"}
        numbers = _numbers(data.inputs, x)
        nullable = bool(set(data.nullable) - {name for name, kind in data.kinds if kind == "categorical"})
        missing = np.flatnonzero(np.isnan(numbers).any(axis=0)) if nullable else np.zeros(0, np.int64)
        mean = numbers.mean(axis=0, dtype=np.float64)
        variance = numbers.var(axis=0, dtype=np.float64)
        for column in missing:
            seen = numbers[~np.isnan(numbers[:, column]), column]
            mean[column] = seen.mean(dtype=np.float64) if len(seen) else 0.0
            variance[column] = seen.var(dtype=np.float64) if len(seen) else 1.0
        # A constant column has nothing to scale; dividing by its variance of about 0 would turn any other value into
        # 1e7.
        variance[np.fmin.reduce(numbers, axis=0) == np.fmax.reduce(numbers, axis=0)] = 1.0
        vocabularies = {name: known_categories(values) for name, values in texts.items()}
        return cls(data.inputs, mean, variance, tuple(missing.tolist()), nullable, vocabularies, data.white)

    def inputs(self) -> list[Any]:
        """New symbolic inputs of a network."""
        return [keras.Input(shape=item.shape, dtype=item.dtype, name=item.name) for item in self.specs]

    def layers(self, inputs: list[Any]) -> Any:
        """The layers on these symbolic inputs: a tensor float32 [N, F'], or [N, H, W, C] for images.

        The statistics stand in the layers' configurations and not in weights that `adapt` fills: they survive legacy
        HDF5, which restores such weights without the constants made from them.
        """
        if self.mean is None:
            return keras.layers.Rescaling(1 / self.white, name="scaling")(inputs[0])
        parts = []
        numeric = [(item, tensor) for item, tensor in zip(self.specs, inputs, strict=True) if item.dtype != "string"]
        if numeric:
            parts += self._numeric(self._matrix(numeric))
        for item, tensor in zip(self.specs, inputs, strict=True):
            if item.dtype == "string":
                parts.append(self._one_hot(item.name, tensor))
        return parts[0] if len(parts) == 1 else keras.layers.Concatenate(name=self._name("encoded"))(parts)

    def graph(self) -> keras.Model:
        """Those layers alone, as a model."""
        inputs = self.inputs()
        return keras.Model(inputs[0] if len(inputs) == 1 else inputs, self.layers(inputs))

    def encode(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Rows of `Dataset.x` as float32 [n, F'] ([n, H, W, C] for images), by those layers."""
        graph = self.graph()
        encoded = np.empty((len(x), *graph.output.shape[1:]), np.float32)
        for start in range(0, len(x), _BATCH):
            rows = x[start : start + _BATCH]
            tensors = [item.of(rows) for item in self.specs]
            encoded[start : start + _BATCH] = graph(tensors[0] if len(tensors) == 1 else tensors, training=False)
        return encoded

    def _matrix(self, numeric: list[tuple[Input, Any]]) -> Any:
        """The inputs of numbers and booleans as one tensor float32 [N, F]."""
        if numeric[0][0].column is None:
            return numeric[0][1]
        columns = []
        for item, tensor in numeric:
            # A scale of 1 is how a Keras layer makes a number of a boolean.
            number = keras.layers.Rescaling(1.0, name=f"{item.name}.number")(tensor) if item.dtype == "bool" else tensor
            columns.append(keras.layers.Reshape((1,), name=f"{item.name}.column")(number))
        return columns[0] if len(columns) == 1 else keras.layers.Concatenate(name=self._name("numbers"))(columns)

    def _numeric(self, matrix: Any) -> list[Any]:
        assert self.mean is not None
        assert self.variance is not None
        unit = _unit(self.variance)
        values = matrix
        if (unit != 1).any():
            values = keras.layers.Rescaling(unit.tolist(), name=self._name("unit"))(matrix)
        scaled = keras.layers.Normalization(
            axis=-1, mean=self.mean * unit, variance=self.variance * unit**2, name=self._name("scaling")
        )(values)
        if not self.nullable:
            return [scaled]
        # 0 is the mean.
        parts = [_called("filled", keras.ops.nan_to_num(scaled, nan=0.0))]
        if self.missing:
            columns = _called("nullable", keras.ops.take(matrix, list(self.missing), axis=1))
            holes = _called("holes", keras.ops.isnan(columns))
            parts.append(_called("missing", keras.ops.cast(holes, "float32")))
        return parts

    def _one_hot(self, name: str, tensor: Any) -> Any:
        vocabulary = self.vocabularies[name]
        unknown = "[UNK]"
        while unknown in vocabulary:
            unknown = f"[{unknown}]"
        lookup = keras.layers.StringLookup(
            vocabulary=vocabulary, oov_token=unknown, output_mode="one_hot", name=f"{name}.category"
        )
        # The first place is the bucket of unknown categories. No training row need fall into it, and weights that were
        # never trained must not speak.
        known = keras.layers.Rescaling([0.0] + [1.0] * len(vocabulary), name=f"{name}.known")
        return known(lookup(tensor))

    def _name(self, layer: str) -> str:
        return layer_name(layer, [item.name for item in self.specs])


def _called(name: str, tensor: Any) -> Any:
    """The tensor, its operation renamed: the name that Keras gives it, as `cast_1`, may be a column's."""
    tensor._keras_history.operation.name = f"numbers.{name}"
    return tensor


def _unit(variance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Powers of 2 [F] that bring columns near to 1 whose spread is far from it, without rounding any number."""
    std = np.sqrt(variance)
    least, most = _PLAIN_STD
    return np.where((std < least) | (std > most), 2.0 ** -np.round(np.log2(std)), 1.0)


def _numbers(specs: tuple[Input, ...], x: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers and booleans of the rows: float32 [n, F]."""
    if specs[0].column is None:
        return x
    columns = [item.of(x).astype(np.float32, copy=False) for item in specs if item.dtype != "string"]
    return np.stack(columns, axis=1) if columns else np.zeros((len(x), 0), np.float32)
