"""BatchNormalization folded into the layer before it: in inference mode it only scales and shifts that layer's outputs.

y = (kernel * x + bias - mean) * scale + beta is one layer with the kernel `kernel * scale`. The draws take this form,
equal to the network's up to rounding; the deterministic answer stays the network's own operations, bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from models.dense import keras_mask

# Bytes of folded kernels in an artifact at most; those that save most for their size come first.
FOLDED_BYTES = 4 * 2**20
# What stands for a free axis where a layer's work is estimated.
_FREE_AXIS = 256


@dataclass(frozen=True)
class Fold:
    """A layer and the BatchNormalization behind it, as one layer. The nodes are those of Keras's graph."""

    node: Any
    norm_node: Any
    # Input [N, ...] and kernel to the output [N, ..., units] without a bias.
    product: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    kernel: tf.Variable
    # [units].
    bias: tf.Variable

    @property
    def is_exact(self) -> bool:
        """Whether both layers compute in float32: in 16 bits Keras normalises in 32, which folding would not."""
        return all(node.operation.compute_dtype == "float32" for node in (self.node, self.norm_node))

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        layer = self.node.operation
        folded = self.product(tf.cast(x, tf.float32), tf.convert_to_tensor(self.kernel))
        folded = tf.nn.bias_add(folded, self.bias)
        mask = keras_mask(x)
        if mask is not None and layer.supports_masking:
            folded._keras_mask = mask
        return folded


def folds_of(graphs: Sequence[Any], most_bytes: int = FOLDED_BYTES) -> list[Fold]:
    """What can be folded in these graphs of Keras nodes, with at most `most_bytes` of kernels."""
    candidates = [pair for graph in graphs for pair in _pairs(graph)]

    def saved(pair: tuple[Any, Any]) -> float:
        """Floats that need no second pass, for each float of the kernel."""
        node, _ = pair
        outputs = math.prod(size or _FREE_AXIS for size in node.outputs[0].shape[1:])
        return outputs / _kernel_of(node.operation).size

    left, folds = most_bytes, []
    for node, norm_node in sorted(candidates, key=saved, reverse=True):
        fold = _fold(node, norm_node)
        size = fold.kernel.shape.num_elements() * 4
        if size <= left and bool(np.isfinite(fold.kernel.numpy()).all() and np.isfinite(fold.bias.numpy()).all()):
            left -= size
            folds.append(fold)
    return folds


def _pairs(graph: Any) -> list[tuple[Any, Any]]:
    """(node, its BatchNormalization's node) where nothing else reads the first one's output."""
    nodes = [node for nodes in graph._nodes_by_depth.values() for node in nodes if node.operation is not None]
    readers = Counter(id(symbol) for node in nodes for symbol in node.input_tensors)
    readers.update(id(symbol) for symbol in graph.outputs)
    makers = {id(node.outputs[0]): node for node in nodes if _is_foldable(node.operation)}
    found = []
    for norm_node in nodes:
        norm = norm_node.operation
        if type(norm) is not keras.layers.BatchNormalization or len(norm_node.input_tensors) != 1:
            continue
        symbol = norm_node.input_tensors[0]
        node = makers.get(id(symbol))
        last_axis = norm.axis in (-1, len(symbol.shape) - 1)
        if node is not None and readers[id(symbol)] == 1 and last_axis:
            found.append((node, norm_node))
    return found


def _is_foldable(operation: Any) -> bool:
    """Whether it is one of Keras's own layers that multiply by a kernel and do nothing more, channels last."""
    return (
        type(operation) in (keras.layers.Dense, *_CONVOLUTIONS, *_DEPTHWISE)
        and operation.activation in (None, keras.activations.linear)
        and getattr(operation, "data_format", "channels_last") == "channels_last"
        and operation.quantization_mode is None
        and not getattr(operation, "lora_enabled", False)
    )


_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


def _kernel_of(layer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)


def _fold(node: Any, norm_node: Any) -> Fold:
    layer, norm = node.operation, norm_node.operation

    def value(weight: Any, default: float) -> Any:
        return default if weight is None else np.asarray(keras.ops.convert_to_numpy(weight), np.float64)

    scale = value(norm.gamma, 1.0) / np.sqrt(value(norm.moving_variance, 1.0) + norm.epsilon)
    bias = (value(layer.bias, 0.0) - value(norm.moving_mean, 0.0)) * scale + value(norm.beta, 0.0)
    kernel = _kernel_of(layer)
    # A depthwise kernel [..., inputs, multiplier] makes output inputs * multiplier.
    kernel = kernel * (scale.reshape(kernel.shape[-2:]) if type(layer) in _DEPTHWISE else scale)
    return Fold(
        node,
        norm_node,
        _product_of(layer),
        tf.Variable(kernel, trainable=False, dtype=tf.float32, name=f"folded_kernel_{layer.name}"),
        tf.Variable(bias, trainable=False, dtype=tf.float32, name=f"folded_bias_{layer.name}"),
    )


def _product_of(layer: Any) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    if type(layer) is keras.layers.Dense:
        return keras.ops.matmul
    convolution = keras.ops.depthwise_conv if type(layer) in _DEPTHWISE else keras.ops.conv

    def product(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        padding = layer.padding
        if padding == "causal":
            # Conv1D only: each step sees those before it.
            x = tf.pad(x, [[0, 0], [layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0], [0, 0]])
            padding = "valid"
        return convolution(
            x,
            kernel,
            strides=layer.strides,
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    return product
