"""Kept masks multiplied into the kernel that they meet: one matrix product makes a layer of all draws.

Where dropout falls on what the prefix gives, a Dense layer follows and, behind it, dropout again, draw t of row x is
relu((x * m_t) W + b) * n_t = relu(x (m_t W n_t) + b n_t), as no mask is negative. With the masks kept, the brackets are
kept too: [inputs, draws * units], so that nothing is copied and nothing masked, and all draws of a row are one row of
one product. It pays from some rows on, which share the reading of so large a kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models.dense import ELEMENTWISE, dense, is_plain_dense, keras_mask, readers_of
from models.stochastic import Noise, falls_on_units

# Bytes of merged kernels in an artifact at most: what a core's cache holds beside the rows.
MERGED_BYTES = 2 * 2**20
# Rows that it takes: one row alone reads the whole kernel to itself.
MERGED_ROWS = 8

# f(a x) = a f(x) for a >= 0.
_HOMOGENEOUS = (None, keras.activations.linear, keras.activations.relu, keras.activations.leaky_relu)


@dataclass(frozen=True)
class Site:
    """Where masks can be merged: nodes of Keras's graph."""

    # The dropout before the layer, and the one behind it.
    before: Any
    dense: Any
    behind: Any | None

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers whose masks they are."""
        return [node.operation.draw_index for node in (self.before, self.behind) if node is not None]


@dataclass(frozen=True)
class Merged:
    """The kept masks of the first draws in a kernel."""

    site: Site
    units: int
    # [inputs, draws * units] and [draws * units].
    kernel: tf.Variable
    bias: tf.Variable

    @property
    def variables(self) -> list[tf.Variable]:
        return [self.kernel, self.bias]

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """The layer's outputs for every draw, folded: [rows, inputs] -> [rows * draws, units]."""
        # The dropout that it makes up for would have cast them.
        x = tf.cast(x, tf.float32)
        outputs = dense(self.site.dense.operation, x, tf.convert_to_tensor(self.kernel), self.bias)
        return tf.reshape(outputs, [-1, self.units])


def sites_of(nodes: Sequence[Any], outputs: Sequence[Any], passed: Mapping[int, Any]) -> list[Site]:
    """Every site among a graph's nodes. passed: the normalizations that a layer before them has absorbed, by node."""
    readers = readers_of(nodes)
    calls = Counter(id(node.operation) for node in nodes)
    ends = {id(symbol) for symbol in outputs}

    def reader(node: Any) -> Any | None:
        """The only one that reads the node's output."""
        found = readers.get(id(node.outputs[0]), [])
        return found[0] if len(found) == 1 and id(node.outputs[0]) not in ends else None

    def is_dropout(node: Any | None) -> bool:
        if (
            node is None
            or keras_mask(node.input_tensors[0]) is not None
            or not falls_on_units(node.operation)
            or node.operation.compute_dtype != "float32"
        ):
            return False
        return calls[id(node.operation)] == 1

    found = []
    for node in nodes:
        layer = reader(node) if is_dropout(node) and _is_flat(node.input_tensors[0]) else None
        # Of all draws at once the activation falls on units of each of them.
        if layer is None or not is_plain_dense(layer.operation) or layer.operation.activation not in ELEMENTWISE:
            continue
        behind = reader(layer) if layer.operation.activation in _HOMOGENEOUS else None
        while behind is not None and (id(behind) in passed or _is_homogeneous(behind.operation)):
            behind = reader(behind)
        found.append(Site(node, layer, behind if is_dropout(behind) else None))
    return found


def merge_masks(
    site: Site,
    kernel: tf.Variable,
    bias: tf.Variable | None,
    noises: Sequence[Noise],
    kept: Sequence[tf.Variable],
    num_draws: int,
) -> Merged:
    """The masks of the first draws in the layer's kernel [inputs, units] and bias [units]."""
    masks = {noise.layer: variable.numpy()[:num_draws] for noise, variable in zip(noises, kept, strict=True)}
    inputs, units = kernel.shape
    before = masks[site.before.operation.draw_index]
    behind = np.ones([1, units], np.float32) if site.behind is None else masks[site.behind.operation.draw_index]
    kernels = before.T[:, :, None] * kernel.numpy()[:, None, :] * behind
    biases = np.zeros([num_draws, units], np.float32) + (0 if bias is None else bias.numpy() * behind)
    return Merged(
        site,
        units,
        tf.Variable(kernels.reshape(inputs, -1), trainable=False, name="merged_kernel"),
        tf.Variable(biases.reshape(-1), trainable=False, name="merged_bias"),
    )


def _is_flat(symbol: Any) -> bool:
    return len(symbol.shape) == 2 and symbol.shape[0] is None and symbol.shape[1] is not None


def _is_homogeneous(operation: Any) -> bool:
    if getattr(operation, "compute_dtype", None) != "float32":
        return False
    if type(operation) is keras.layers.Activation:
        return operation.activation in _HOMOGENEOUS
    return type(operation) is keras.layers.LeakyReLU or (
        type(operation) is keras.layers.ReLU and operation.max_value is None and not operation.threshold
    )
