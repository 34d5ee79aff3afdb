"""What the draws' forms of Dense layers share: which layers they are of, who reads them, and how they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

# Activations of each number by itself; softmax is none.
ELEMENTWISE = (
    *(None, keras.activations.linear, keras.activations.relu, keras.activations.leaky_relu, keras.activations.elu),
    *(keras.activations.selu, keras.activations.gelu, keras.activations.silu, keras.activations.tanh),
    *(keras.activations.sigmoid, keras.activations.softplus),
)


def readers_of(nodes: Sequence[Any]) -> dict[int, list[Any]]:
    """By the id of a symbolic tensor: the nodes that read it."""
    readers: dict[int, list[Any]] = {}
    for node in nodes:
        for symbol in node.input_tensors:
            readers.setdefault(id(symbol), []).append(node)
    return readers


def is_plain_dense(operation: Any) -> bool:
    """Whether it is Keras's own Dense in float32, neither quantized nor with LoRA."""
    return (
        type(operation) is keras.layers.Dense
        and operation.compute_dtype == operation.variable_dtype == "float32"
        and operation.quantization_mode is None
        and not getattr(operation, "lora_enabled", False)
    )


def keras_mask(tensor: Any) -> Any | None:
    """The sequence mask that Keras hands on with a tensor, symbolic or not; None where there is none."""
    return getattr(tensor, "_keras_mask", None)


def dense(layer: keras.layers.Dense, x: tf.Tensor, kernel: tf.Tensor, bias: Any | None) -> tf.Tensor:
    """The layer of rows [N, inputs] with another kernel and bias.

    One unit is a dot product, for which general matrix kernels are slow: (kernel' x')' takes a third of the time of
    x kernel on CPUs, rows in the thousands.
    """
    if kernel.shape[-1] == 1:
        outputs = tf.matmul(kernel, x, transpose_a=True, transpose_b=True)
        outputs = tf.reshape(outputs if bias is None else outputs + bias, [-1, 1])
    else:
        outputs = tf.matmul(x, kernel)
        outputs = outputs if bias is None else tf.nn.bias_add(outputs, bias)
    return outputs if layer.activation is None else layer.activation(outputs)
