"""Questions about Keras's graphs of nodes that the draws' forms of Dense layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

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
