"""Rows of input that nobody has seen, to try a network on: what its outputs look like, whether rows stay apart."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from models.contract import ArtifactError
from models.network import Network
from models.stochastic import walk

# What stands for a free axis, the first that the network can run with: a wide kernel wants a long signal, a network
# that halves a picture five times a large one.
FREE_SIZES = (8, 32, 128, 512)


def made_up(
    specs: Sequence[tf.TensorSpec], rows: int, spread: float, free: int, whole: bool = False
) -> list[tf.Tensor]:
    """Normal numbers of that spread, zeros and ones, empty strings.

    free: the size of free axes. whole: zeros and ones for floats, too.
    """
    random = np.random.default_rng(0)

    def values(spec: tf.TensorSpec) -> tf.Tensor:
        shape = [rows, *(free if size is None else size for size in spec.shape[1:])]
        if spec.dtype == tf.string:
            return tf.fill(shape, "")
        is_number = spec.dtype.is_floating and not whole
        numbers = random.normal(0, spread, shape) if is_number else random.integers(0, 2, shape)
        return tf.cast(numbers, spec.dtype)

    return [values(spec) for spec in specs]


def wants_whole(network: Network, specs: Sequence[tf.TensorSpec]) -> bool:
    """Whether floats stand for an Embedding's tokens, as they do where nobody said int."""
    is_looked_up = any(isinstance(layer, keras.layers.Embedding) for _, layer in walk(network.model))
    return is_looked_up and all(spec.dtype.is_floating for spec in specs)


def free_size(network: Network, specs: Sequence[tf.TensorSpec]) -> int:
    """The size of free axes at which the network is tried; raises ArtifactError where it runs with none of them."""
    if all(None not in spec.shape[1:] for spec in specs):
        return FREE_SIZES[0]
    reason = ""
    for size in FREE_SIZES:
        # Traced, not run: shapes are what is asked for, and TensorFlow would log what it cannot run.
        tried = [tf.TensorSpec([2, *(axis or size for axis in spec.shape[1:])], spec.dtype) for spec in specs]
        try:
            traced = tf.function(lambda *inputs: network.deterministic(inputs), autograph=False)
            graph = traced.get_concrete_function(*tried).graph
        except (ValueError, tf.errors.OpError) as error:
            reason = reason or f" ({' '.join(str(error).split())[:200]})"
            continue
        # An empty map: what is made of it is no number. Shapes themselves may be empty, as constants of any type.
        computed = [operation for operation in graph.get_operations() if operation.type != "Const"]
        tensors = [tensor for operation in computed for tensor in operation.outputs]
        if not any(0 in tensor.shape for tensor in tensors if tensor.dtype.is_floating and tensor.shape.rank):
            return size
    raise ArtifactError(
        f"model {network.model.name!r}: it runs with none of the sizes {', '.join(map(str, FREE_SIZES))} of its free "
        f"axes{reason}; wanted a network that does, or inputs of a fixed size"
    )
