"""Dense layers with kernels filled up with zeros, so that matrix products end with whole vectors of the processor.

Thirty units take longer than 32 do. The added units are 0 (or what the activation makes of it) and meet zeros in the
next layer's kernel, so that the network's answers stay what they are; only the draws take this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models.dense import ELEMENTWISE, dense, is_plain_dense, keras_mask, readers_of
from models.folding import Fold
from models.stochastic import is_elementwise

# Floats of a vector, of the processors that have the longest.
_VECTOR = 16
# The work on activations grows with the width: beyond this share the products do not save as much.
_MOST_ADDED = 1.35
# Bytes of padded kernels in an artifact at most.
PADDED_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Padded:
    """A Dense layer that takes a padded input, or gives a padded output, or both."""

    layer: keras.layers.Dense
    # [inputs, units], padded, with the normalization that the layer has absorbed.
    kernel: tf.Variable
    bias: tf.Variable | None

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        # Layers before it may compute in another precision.
        return dense(self.layer, tf.cast(x, tf.float32), tf.convert_to_tensor(self.kernel), self.bias)


def padded_layers(
    graphs: Iterable[tuple[Sequence[Any], Sequence[Any]]],
    drawn: set[int],
    folds: Mapping[int, Fold],
    absorbed: Mapping[int, Fold],
) -> dict[int, Padded]:
    """By node: the layers that gain by padding, and those that read what they give.

    graphs: nodes and outputs of each. drawn: ids of the symbols that noise reaches. folds, absorbed: by node, the
    layers with the normalization behind them, and the normalizations.
    """
    left = PADDED_BYTES
    found: dict[int, Padded] = {}
    for nodes, outputs in graphs:
        readers = readers_of(nodes)
        ends = {id(symbol) for symbol in outputs}
        widths: dict[int, int] = {}
        used: list[Any] = []
        for node in nodes:
            width = _gainful_width(node, drawn)
            chain = None if width is None else _chain(node, readers, ends, absorbed)
            if width is None or chain is None:
                continue
            symbols, takers = chain
            size = 4 * width * (node.operation.kernel.shape[0] + sum(taker.operation.units for taker in takers))
            if size <= left:
                left -= size
                widths.update(dict.fromkeys(map(id, symbols), width))
                used += [node, *takers]
        for node in used:
            if id(node) not in found:
                found[id(node)] = _padded(node, widths, folds.get(id(node)))
    return found


def _gainful_width(node: Any, drawn: set[int]) -> int | None:
    """The layer's units, padded; None where nothing is gained."""
    if not is_plain_dense(node.operation) or id(node.outputs[0]) not in drawn or len(node.outputs[0].shape) != 2:
        return None
    if keras_mask(node.input_tensors[0]) is not None:
        return None
    units = node.operation.units
    width = -(-units // _VECTOR) * _VECTOR
    return width if units < width <= units * _MOST_ADDED and node.operation.activation in ELEMENTWISE else None


def _chain(
    node: Any, readers: Mapping[int, list[Any]], ends: set[int], absorbed: Mapping[int, Fold]
) -> tuple[list[Any], list[Any]] | None:
    """Symbols that are as wide as the node's output, up to the Dense layers that read them; None where others do."""
    symbols, takers, waiting = [], [], [node.outputs[0]]
    while waiting:
        symbol = waiting.pop()
        symbols.append(symbol)
        if id(symbol) in ends or not readers.get(id(symbol)):
            return None
        for reader in readers[id(symbol)]:
            if len(reader.input_tensors) != 1:
                return None
            if is_plain_dense(reader.operation):
                takers.append(reader)
            elif id(reader) in absorbed or is_elementwise(reader.operation) or _is_activation(reader.operation):
                waiting.append(reader.outputs[0])
            else:
                return None
    return symbols, takers


def _is_activation(operation: Any) -> bool:
    if type(operation) is keras.layers.Activation:
        return operation.activation in ELEMENTWISE
    return type(operation) in (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU)


def _padded(node: Any, widths: Mapping[int, int], fold: Fold | None) -> Padded:
    layer = node.operation
    kernel = layer.kernel.value if fold is None else fold.kernel
    bias = fold.bias if fold is not None else layer.bias.value if layer.use_bias else None
    inputs, units = kernel.shape
    more_inputs = widths.get(id(node.input_tensors[0]), inputs) - inputs
    more_units = widths.get(id(node.outputs[0]), units) - units

    def variable(values: np.ndarray, padding: list[tuple[int, int]], name: str) -> tf.Variable:
        return tf.Variable(np.pad(values, padding), trainable=False, name=f"padded_{name}_{layer.name}")

    return Padded(
        layer,
        variable(kernel.numpy(), [(0, more_inputs), (0, more_units)], "kernel"),
        None if bias is None else variable(bias.numpy(), [(0, more_units)], "bias"),
    )
