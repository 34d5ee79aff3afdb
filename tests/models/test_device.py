"""Ready for a GPU without having one: every operation of a draw has a GPU kernel at its dtype, and XLA compiles them.

What stays on the host is named: strings, look-ups, and arithmetic on sizes.
"""

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import graph_pb2, kernel_def_pb2, node_def_pb2, op_def_pb2
from tensorflow.python.eager import context
from tensorflow.python.framework import kernels, op_def_registry
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from models.artifact import publish
from models.contract import MC_ADAPTIVE, MC_PREDICT, MC_SAMPLE, SERVING_DEFAULT, SIGNATURES
from tests.models import zoo
from tests.models.artifacts import Artifact

# Placed by TensorFlow's function runtime on whatever device the caller is; no kernel of their own is asked for.
CALLS = {"PartitionedCall", "StatefulPartitionedCall", "StatelessWhile", "While", "StatelessIf", "If", "NoOp"}
# Kinds of network whose hot paths differ, beside those that other tests have published.
EXHIBITS = ("alpha_dropout", "gaussian_noise", "lstm_of_four_products", "multi_head_attention", "half_precision")


@pytest.fixture(scope="module", params=["sonar", "norms", *EXHIBITS])
def shown(request, tmp_path_factory) -> Artifact:
    if request.param not in EXHIBITS:
        return request.getfixturevalue(request.param)
    repository = tmp_path_factory.mktemp("device")
    return Artifact(publish(zoo.ZOO[request.param].build(), name=request.param, repository=repository))


def functions(artifact: Artifact) -> dict[str, tf.types.experimental.ConcreteFunction]:
    signatures = {name: artifact.loaded.signatures[name] for name in SIGNATURES}
    forms = {f"{MC_PREDICT} of {least} rows": form for (least, _), form in artifact.forms.items()}
    return {**signatures, **forms, MC_ADAPTIVE: artifact.loaded.mc_adaptive}


def nodes(function) -> Iterator[node_def_pb2.NodeDef]:
    """Every node of the function and of all that it calls."""
    graph = function.graph.as_graph_def()
    yield from graph.node
    for body in graph.library.function:
        yield from body.node_def


def dtypes(node: node_def_pb2.NodeDef) -> dict[str, list[int]]:
    """The node's types by attribute; defaults where the node names none."""
    definition: op_def_pb2.OpDef = op_def_registry.get(node.op)
    found = {}
    for attribute in definition.attr:
        value = node.attr.get(attribute.name, attribute.default_value)
        if attribute.type == "type":
            found[attribute.name] = [value.type]
        elif attribute.type == "list(type)":
            found[attribute.name] = list(value.list.type)
    return found


def fits(kernel: kernel_def_pb2.KernelDef, types: dict[str, list[int]]) -> bool:
    return all(
        set(types.get(constraint.name, [])) <= set(constraint.allowed_values.list.type)
        for constraint in kernel.constraint
        if constraint.allowed_values.HasField("list") and constraint.name in types
    )


@functools.cache
def registered(operation: str) -> list[kernel_def_pb2.KernelDef]:
    """The operation's kernels on GPUs, or on any device."""
    found = kernels.get_registered_kernels_for_op(operation).kernel
    return [kernel for kernel in found if kernel.device_type in ("GPU", "DEFAULT")]


def has_gpu_kernel(node: node_def_pb2.NodeDef) -> bool:
    types = dtypes(node)
    return any(fits(kernel, types) for kernel in registered(node.op))


def handles_strings(node: node_def_pb2.NodeDef) -> bool:
    return tf.string.as_datatype_enum in [kind for kinds in dtypes(node).values() for kind in kinds]


def on_the_host(function) -> list[node_def_pb2.NodeDef]:
    """Nodes without a GPU kernel at their types, but for calls of functions."""
    return [node for node in nodes(function) if node.op not in CALLS and not has_gpu_kernel(node)]


def test_the_registry_tells_what_has_no_gpu_kernel():
    """The check can fail: a string operation, and a type that a kernel does not take, are found out."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string), tf.TensorSpec([2, 2], tf.uint8)])
    def mixed(words, numbers):
        return tf.strings.lower(words), tf.cumsum(numbers, exclusive=True)

    assert {node.op for node in on_the_host(mixed.get_concrete_function())} == {"StringLower", "Cumsum"}


def test_every_operation_of_every_signature_has_a_gpu_kernel_at_its_dtype(shown):
    for name, function in functions(shown).items():
        # The refusal of too few draws, and its words.
        host = [node for node in on_the_host(function) if node.op != "Assert" and not handles_strings(node)]
        assert [f"{node.op} {dtypes(node)} {node.name}" for node in host] == [], name


def test_no_operation_is_pinned_to_a_device(shown):
    for name, function in functions(shown).items():
        pinned = {node.device for node in nodes(function)} - {""}
        assert pinned == set(), name


def test_what_stays_on_the_host_is_strings_and_tables_and_no_part_of_a_draw(tmp_path):
    artifact = Artifact(publish(zoo.ZOO["words_and_numbers"].build(), name="words_and_numbers", repository=tmp_path))
    sample = artifact.loaded.signatures[MC_SAMPLE]
    host = {node.op for node in on_the_host(sample) if not handles_strings(node)}
    assert host == {"LookupTableFindV2", "StringToHashBucketFast"}
    suffix = [body for body in sample.graph.as_graph_def().library.function if "suffix" in body.signature.name]
    assert suffix, "the draws' function is not found by its name"
    assert [
        node.op for body in suffix for node in body.node_def if node.op not in CALLS and not has_gpu_kernel(node)
    ] == []


# XLA: signatures lowered at fixed shapes and compiled for this machine's processor. What XLA can express for one back
# end it can for a GPU's: nothing is left to a kernel of the host.

ROWS, DRAWS = 3, 40
LOOPS = {"While", "StatelessWhile"}


def take_the_single_chunk(graph: graph_pb2.GraphDef, are_kept: bool) -> int:
    """Put the branch for what fits into one chunk in the place of the choice; XLA has no loop whose shapes change.

    are_kept: the chunk's masks are kept ones; a choice of those comes before that of the others.
    """
    bodies = {body.signature.name: body.node_def for body in graph.library.function}

    def loops(name: str) -> bool:
        called = [a.func.name for node in bodies[name] for a in node.attr.values() if a.HasField("func")]
        return any(node.op in LOOPS for node in bodies[name]) or any(loops(other) for other in called)

    def chooses(name: str) -> bool:
        called = [a.func.name for node in bodies[name] for a in node.attr.values() if a.HasField("func")]
        own = any(
            node.op in ("If", "StatelessIf") and loops(node.attr["else_branch"].func.name) for node in bodies[name]
        )
        return own or any(chooses(other) for other in called)

    choices = [
        node
        for group in (graph.node, *bodies.values())
        for node in group
        if node.op in ("If", "StatelessIf") and loops(node.attr["else_branch"].func.name)
    ]
    firsts = [chooses(node.attr["else_branch"].func.name) for node in choices]
    for node, is_first in zip(choices, firsts, strict=True):
        taken = "else_branch" if is_first and not are_kept else "then_branch"
        node.op = "StatefulPartitionedCall"
        del node.input[0]
        node.attr["f"].CopyFrom(node.attr[taken])
        for name in set(node.attr) - {"f", "Tin", "Tout"}:
            del node.attr[name]
    # Under new names: TensorFlow knows the functions as they were.
    for body in graph.library.function:
        body.signature.name += "_single"
    for node in (node for group in (graph.node, *bodies.values()) for node in group):
        for attribute in node.attr.values():
            if attribute.HasField("func"):
                attribute.func.name += "_single"
    for body in graph.library.function:
        context.context().add_function_def(body)
    return len(choices)


@pytest.mark.parametrize(
    ("signature", "arguments", "choices"),
    [
        (SERVING_DEFAULT, {}, 0),
        (MC_PREDICT, {}, 1),
        (MC_SAMPLE, {"num_samples": DRAWS, "seed": 0}, 2),
        (MC_SAMPLE, {"num_samples": DRAWS, "seed": 5}, 2),
    ],
    ids=["deterministic", "default", "kept masks", "drawn masks"],
)
@pytest.mark.parametrize("name", ["sonar", "norms"])
def test_a_signature_compiled_by_xla_gives_the_same_answer(request, name, signature, arguments, choices):
    artifact = request.getfixturevalue(name)
    (item,) = artifact.manifest.inputs
    rows = np.random.default_rng(1).uniform(size=(ROWS, *item.shape)).astype(np.float32)
    scalars = {key: tf.constant(value, tf.int64 if key == "seed" else tf.int32) for key, value in arguments.items()}
    function = artifact.loaded.signatures[signature]
    fixed = tf.function(lambda x: function(**{item.name: x}, **scalars), autograph=False)
    frozen = convert_variables_to_constants_v2(
        fixed.get_concrete_function(tf.TensorSpec(rows.shape, tf.float32)), lower_control_flow=False
    )
    graph = frozen.graph.as_graph_def()
    assert take_the_single_chunk(graph, arguments.get("seed", 0) == 0) == choices
    (given,) = [node for node in graph.node if node.op == "Placeholder"]
    graph.node.remove(given)
    outputs = [tensor.name for tensor in frozen.outputs]
    compiled = tf.function(
        lambda x: tf.graph_util.import_graph_def(graph, {f"{given.name}:0": x}, outputs, name=""),
        jit_compile=True,
        autograph=False,
    )
    text = compiled.experimental_get_compiler_ir(tf.constant(rows))(stage="stablehlo")
    assert "stablehlo.dot" in text
    assert "custom_call" not in text
    expected = artifact.answer(signature, rows, **arguments)
    for output, found in zip(sorted(expected), compiled(tf.constant(rows)), strict=True):
        np.testing.assert_allclose(found.numpy(), expected[output], atol=2e-6, err_msg=output)
