"""A Keras network in a graph, rounded as Keras rounds it.

Eagerly, TensorFlow runs one operation after another. Of a graph, its optimiser makes something faster that differs in
the last bit: a Dense layer becomes one fused kernel with another sigmoid, x / sqrt(y) becomes x * rsqrt(y). It only
recognises neighbours: with a check of the shape between them, which copies nothing, every operation stays itself.
A division by a constant would become a product with its reciprocal; it cannot where the constant might be fed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Flat = Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]

# They compute nothing.
_PASSIVE = frozenset({"Placeholder", "Const", "ReadVariableOp", "Identity", "Reshape", "Squeeze", "ExpandDims"})


def operation_by_operation(network: Flat, specs: Sequence[tf.TensorSpec]) -> Flat:
    """The same function of flat tensors, to be called while a graph is traced: bit-equal to an eager `network`."""
    traced = tf.function(lambda *inputs: network(inputs), autograph=False).get_concrete_function(*specs)
    definition = _with_checks(traced.graph)
    names = [tensor.name for tensor in traced.inputs]
    outputs = [tensor.name for tensor in traced.outputs]

    def run(inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        captured = [tf.identity(tensor) for tensor in traced.captured_inputs]
        given = dict(zip(names, [*inputs, *captured], strict=True))
        return tf.graph_util.import_graph_def(definition, given, outputs, name="network")

    return run


def _with_checks(graph: tf.Graph) -> Any:
    """The graph's definition, a check of its shape after every operation that computes one floating-point tensor."""
    checked = {operation.name: operation.outputs[0] for operation in graph.get_operations() if _computes(operation)}
    constants = {operation.name: operation for operation in graph.get_operations() if operation.type == "Const"}
    original = graph.as_graph_def()
    definition = tf.compat.v1.GraphDef(versions=original.versions, library=original.library)
    for node in original.node:
        copy = definition.node.add()
        copy.CopyFrom(node)
        # A gradient of one's own (Keras's silu has one) refers to the traced graph.
        copy.attr.pop("_gradient_op_type", None)
        copy.input[:] = [f"{name}/check" if name in checked else name for name in node.input]
        if node.op == "RealDiv" and node.input[1] in constants:
            constant = constants[node.input[1]].outputs[0]
            copy.input[1] = f"{node.name}/divisor"
            divisor = definition.node.add(name=copy.input[1], op="PlaceholderWithDefault", input=[node.input[1]])
            divisor.attr["dtype"].type = constant.dtype.as_datatype_enum
            divisor.attr["shape"].shape.CopyFrom(constant.shape.as_proto())
        if node.name in checked:
            tensor = checked[node.name]
            check = definition.node.add(name=f"{node.name}/check", op="EnsureShape", input=[node.name])
            check.attr["T"].type = tensor.dtype.as_datatype_enum
            check.attr["shape"].shape.CopyFrom(tensor.shape.as_proto())
    return definition


def _computes(operation: tf.Operation) -> bool:
    outputs = operation.outputs
    return (
        len(outputs) == 1
        and operation.type not in _PASSIVE
        and outputs[0].dtype.is_floating
        and outputs[0].shape.rank is not None
    )
