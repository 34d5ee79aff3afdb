"""A SavedModel in a TensorFlow session of its own: the only module of serving that imports TensorFlow.

Why a session, and not `tf.saved_model.load`: it loads in a third of the time, nearly all of it outside of Python's
lock, so that requests go on meanwhile; and closing it gives all of its memory back, where functions loaded the other
way leave their kernels behind, 13 MB for each version that ever served. TensorFlow Serving does the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from models import contract
from serving.errors import InvalidRequest, ModelFailed, StartError

Arrays = dict[str, np.ndarray]

v1 = tf.compat.v1
# It would say at each load that sessions are of the past.
tf.get_logger().setLevel("ERROR")


@dataclass(frozen=True)
class Device:
    kind: Literal["cpu", "gpu"]
    note: str
    """One sentence for the log: what was found and what follows."""


def prepare_device(wanted: Literal["auto", "cpu", "gpu"]) -> Device:
    """Choose the device before anything is placed on it; raises StartError where a GPU is wanted and there is none."""
    gpus = tf.config.list_physical_devices("GPU")
    if wanted == "cpu":
        tf.config.set_visible_devices([], "GPU")
        return Device("cpu", "running on CPU, as asked")
    if not gpus:
        if wanted == "gpu":
            raise StartError(
                "DROPSERVE_DEVICE=gpu: TensorFlow finds no GPU; wanted a CUDA GPU with its driver and "
                "`pip install 'dropserve[gpu]'`, or DROPSERVE_DEVICE=auto"
            )
        return Device("cpu", "no GPU found: running on CPU")
    for gpu in gpus:
        # Without it TensorFlow takes all of the GPU's memory at the first call.
        tf.config.experimental.set_memory_growth(gpu, True)
    return Device("gpu", f"running on {len(gpus)} GPU(s), memory grows as needed")


class Graph:
    """The functions of one SavedModel, by name. Any thread may call them."""

    def __init__(self, folder: Path, functions: Collection[str] = contract.FUNCTIONS) -> None:
        """Load; whatever TensorFlow raises on a damaged or foreign graph goes to the caller.

        functions: those that will be called; each one takes some tenths of a second to be made ready.
        """
        graph = tf.Graph()
        self._session = v1.Session(graph=graph, config=_session_config())
        with graph.as_default():
            meta = v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(folder))
            captured = _captured_tensors(graph, meta)
            adaptive = _call(meta, captured, contract.MC_ADAPTIVE)
            forms = [(most, _call(meta, captured, name)) for (_, most), name in sorted(_forms(meta).items())]
        self.signature_defs: dict[str, Any] = dict(meta.signature_def)
        """The SavedModel's own description of its signatures, SignatureDef messages by name."""
        signatures = {name: meta.signature_def[name] for name in contract.SIGNATURES}
        tensors = {
            name: (
                {key: graph.get_tensor_by_name(info.name) for key, info in signature.inputs.items()},
                # In the manifest's order: a protocol buffer's map has another one in each process.
                {key: graph.get_tensor_by_name(info.name) for key, info in sorted(signature.outputs.items())},
            )
            for name, signature in signatures.items()
        }
        tensors[contract.MC_ADAPTIVE] = adaptive
        self._functions: dict[str, Callable[[Mapping[str, Any]], Arrays]] = {}
        self.form_rows: list[int] = []
        """A number of rows for each form of `mc_predict` that is chosen by it, ascending."""
        for name in functions:
            if name == contract.MC_PREDICT and forms:
                own = [(most, _Function(self._session, *of_form)) for most, of_form in forms]
                # With a form for many rows more of them are several calls: faster than the signature's loop over draws.
                rest = None if len(own) > 1 else _Function(self._session, *tensors[name])
                self._functions[name] = _ByRows(own, rest)
                self.form_rows = [1, own[0][0] + 1]
            else:
                self._functions[name] = _Function(self._session, *tensors[name])

    def run(self, function: str, arguments: Mapping[str, Any]) -> Arrays:
        """Call a function with arrays and scalars by name; returns every output as an array.

        Raises InvalidRequest where the graph refuses the values, ModelFailed where it cannot run.
        """
        try:
            return self._functions[function](arguments)
        except tf.errors.InvalidArgumentError as error:
            # For example an index outside of an embedding's table.
            raise InvalidRequest(f"the model refuses these values: {first_line(error)}") from error
        except tf.errors.OpError as error:
            raise ModelFailed(first_line(error)) from error

    def close(self) -> None:
        """Give back all memory. No call may be running, and none may follow."""
        self._session.close()


class _Function:
    """One function of the graph. Arguments and results go by position; their order is kept here."""

    def __init__(self, session: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        self._arguments = [(name, tensor.dtype.as_numpy_dtype) for name, tensor in inputs.items()]
        self._results = list(outputs)
        self._call = _callable(session, list(inputs.values()), list(outputs.values()))

    def __call__(self, arguments: Mapping[str, Any]) -> Arrays:
        values = self._call(*(np.asarray(arguments[name], dtype) for name, dtype in self._arguments))
        return dict(zip(self._results, values, strict=True))


class _ByRows:
    """One function in several forms, each for no more rows than its bound; beyond, `rest`, or several calls."""

    def __init__(self, forms: Sequence[tuple[int, _Function]], rest: _Function | None) -> None:
        self._forms = forms
        self._rest = rest

    def __call__(self, arguments: Mapping[str, Any]) -> Arrays:
        rows = len(next(iter(arguments.values())))
        for most, function in self._forms:
            if rows <= most:
                return function(arguments)
        if self._rest is not None:
            return self._rest(arguments)
        most, function = self._forms[-1]
        calls = -(-rows // most)
        ends = [rows * call // calls for call in range(calls + 1)]
        parts = [
            function({name: values[begin:end] for name, values in arguments.items()}) for begin, end in pairwise(ends)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _callable(session: Any, feeds: list[Any], fetches: list[Any]) -> Callable[..., list[np.ndarray]]:
    """A function from arrays to arrays: 20 us around the graph's own time, a tenth of a signature's call in Python."""
    options = v1.RunOptions()
    if not tf.config.get_visible_devices("GPU"):
        # In the calling thread: a switch between threads costs more than a small network. One operation still uses all
        # cores.
        options.inter_op_thread_pool = -1
    compiled = getattr(session, "_make_callable_from_options", None)
    if compiled is None:  # another TensorFlow: what it documents does the same, 90 us slower
        call = session.make_callable(fetches, feed_list=feeds, accept_options=True)
        return functools.partial(call, options=options)
    return compiled(
        config_pb2.CallableOptions(
            feed=[tensor.name for tensor in feeds], fetch=[tensor.name for tensor in fetches], run_options=options
        )
    )


def _session_config() -> Any:
    config = v1.ConfigProto()
    config.gpu_options.allow_growth = True
    return config


def _children(meta: Any) -> dict[str, int]:
    """What is attached to the loaded module: numbers of objects by name."""
    return {child.local_name: child.node_id for child in meta.object_graph_def.nodes[0].children}


def _forms(meta: Any) -> dict[tuple[int, int], str]:
    """The forms of `mc_predict`: names by the least and the most rows."""
    pattern = contract.MC_PREDICT_ROWS.format(least=r"(\d+)", most=r"(\d+)")
    found = [re.fullmatch(pattern, name) for name in _children(meta)]
    return {(int(match[1]), int(match[2])): match[0] for match in found if match is not None}


def _call(meta: Any, captured: Mapping[int, Any], attribute: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put a call of a function that is attached to the module into the graph: its inputs and outputs by name.

    It is no signature, so that a session finds it in the library of functions only.
    """
    objects = meta.object_graph_def
    bare = objects.nodes[_children(meta)[attribute]].bare_concrete_function
    name = bare.concrete_function_name
    function = objects.concrete_functions[name]
    definition = next(item.signature for item in meta.graph_def.library.function if item.signature.name == name)
    arguments = definition.input_arg[: len(definition.input_arg) - len(function.bound_inputs)]
    # In the library an argument called "Age" is "age".
    inputs = {
        keyword: v1.placeholder(tf.as_dtype(argument.type), name=keyword)
        for keyword, argument in zip(bare.argument_keywords, arguments, strict=True)
    }
    # TensorFlow flattens a dictionary in the order of its sorted keys.
    names = sorted(function.output_signature.dict_value.fields)
    values = tf.raw_ops.StatefulPartitionedCall(
        args=[*inputs.values(), *(captured[index] for index in function.bound_inputs)],
        Tout=[tf.as_dtype(output.type) for output in definition.output_arg],
        f=name,
    )
    return inputs, dict(zip(names, values, strict=True))


def _captured_tensors(graph: Any, meta: Any) -> dict[int, Any]:
    """Tensors in the graph for the captured objects, by the object's number in the object graph.

    Calls of the signatures show most of them: variables, tables. Variables that no signature reads are known by name.
    """
    objects = meta.object_graph_def
    found: dict[int, Any] = {}
    for name in contract.SIGNATURES:
        output = next(iter(meta.signature_def[name].outputs.values()))
        call = graph.get_tensor_by_name(output.name).op
        bound = objects.concrete_functions[call.get_attr("f").name].bound_inputs
        found.update(zip(bound, call.inputs[len(call.inputs) - len(bound) :], strict=True))
    handles = {operation.name: operation for operation in graph.get_operations() if operation.type == "VarHandleOp"}
    for number, node in enumerate(objects.nodes):
        if number not in found and node.HasField("variable") and node.variable.name in handles:
            found[number] = handles[node.variable.name].outputs[0]
    return found


def first_line(error: Exception) -> str:
    """The error's kind and its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and line != "Graph execution error:"]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
