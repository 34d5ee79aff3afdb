"""The three tensor protocols of a server, as bytes: TensorFlow Serving's REST and gRPC, and Open Inference (V2).

For models that take one tensor of float32: a table of numbers, or images. Nothing of TensorFlow is needed: the gRPC
messages are built from what the server's own reflection says of them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from loadtest import manifest
from loadtest.answers import AnswerError, flat, shape
from loadtest.errors import LoadTestError
from loadtest.manifest import Input, Manifest

DETERMINISTIC = "serving_default"
SIGNATURE = "mc_sample"
# Values of one output for some rows: a number, or a list of numbers, for each.
Outputs = dict[str, list[Any]]

_DT_FLOAT, _DT_INT32, _DT_INT64, _DT_BOOL = 1, 3, 9, 10
_PREDICT = "/tensorflow.serving.PredictionService/Predict"


@dataclass(frozen=True)
class Table:
    """The model's input, one tensor of float32: its name, a row's shape, and its columns' names where it has them.

    outputs: of the answers that are not draws, with each one's shape for a row.
    """

    model: str
    input: str
    shape: tuple[int, ...]
    columns: tuple[str, ...]
    outputs: dict[str, tuple[int | None, ...]]

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    def vector(self, row: Any) -> list[float]:
        """The numbers of a row in the model's order; raises LoadTestError where they are not so many numbers."""
        if isinstance(row, dict):
            row = [row.get(name) for name in self.columns or (self.input,)]
        numbers = list(flat(row))
        if len(numbers) != self.width or not all(type(value) in (int, float) for value in numbers):
            raise LoadTestError(
                f"{self.model}: row {str(row)[:60]}: wanted {self.width} numbers, for the tensor protocols"
            )
        return numbers


def check(host: str, rows: list[Any]) -> Table:
    """The table of the server's default model; raises LoadTestError where the tensor protocols cannot send `rows`."""
    try:
        answer = httpx.post(f"{host}/predict", json={"instances": rows[:1]}, timeout=30).raise_for_status().json()
        name = answer["model"]["name"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise LoadTestError(f"{host}/predict: does not answer the first row ({error!r})") from error
    return describe(manifest.read(host, name))


def describe(model: Manifest) -> Table:
    """The model's table; raises LoadTestError where it does not take one tensor of numbers."""
    match model.inputs:
        case [Input(dtype="float32") as item] if item.shape and None not in item.shape:
            outputs = {tensor.name: tuple(tensor.shape[1:]) for tensor in model.signatures[DETERMINISTIC].outputs}
            shape = tuple(size for size in item.shape if size is not None)
            return Table(model.name, item.name, shape, tuple(model.columns), outputs)
    inputs = ", ".join(f"{item.name} ({item.dtype} {item.shape})" for item in model.inputs)
    raise LoadTestError(
        f"model {model.name}: its inputs are {inputs}; "
        "wanted one of float32 with a fixed shape for the tensor protocols, or --profile smoke"
    )


def check_outputs(table: Table, outputs: Outputs) -> None:
    """Raise AnswerError unless the deterministic answer's outputs are there, with as many values for each row."""
    for name, wanted in table.outputs.items():
        for value in outputs.get(name, [None]):
            found = None if value is None else shape(value)
            sizes = None if found is None or len(found) != len(wanted) else zip(wanted, found, strict=True)
            if sizes is None or any(size not in (None, own) for size, own in sizes):
                raise AnswerError(f"{name} is of shape {found} for a row, wanted {wanted} of {table.model}")


def rest_body(table: Table, rows: list[list[float]], num_samples: int, seed: int) -> bytes:
    inputs = {table.input: [_nested(row, table.shape) for row in rows], "num_samples": num_samples, "seed": seed}
    return json.dumps({"signature_name": SIGNATURE, "inputs": inputs}).encode()


def rest_outputs(content: bytes) -> Outputs:
    outputs = _json(content).get("outputs")
    if not isinstance(outputs, dict):
        raise AnswerError("no object `outputs` in the answer")
    return outputs


def v2_body(
    table: Table, rows: list[list[float]], num_samples: int, seed: int, *, binary: bool
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a V2 request."""
    tensor: dict[str, Any] = {"name": table.input, "shape": [len(rows), *table.shape], "datatype": "FP32"}
    parameters = {"signature": SIGNATURE, "num_samples": num_samples, "seed": seed}
    if not binary:
        tensor["data"] = [_nested(row, table.shape) for row in rows]
        return json.dumps({"inputs": [tensor], "parameters": parameters}).encode(), {"Content-Type": "application/json"}
    raw = _floats(rows)
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": [tensor], "parameters": parameters | {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return head + raw, headers


def v2_outputs(content: bytes, head_length: str | None, model: str) -> Outputs:
    """head_length: the answer's `Inference-Header-Content-Length`, where it is binary. model: who was asked."""
    length = len(content) if head_length is None else int(head_length)
    head = _json(content[:length])
    _check_model(head.get("model_name"), model)
    found: Outputs = {}
    place = length
    for tensor in head.get("outputs", []):
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            flat = tensor["data"]
        else:
            flat = _unpacked(content[place : place + size], is_bool=tensor["datatype"] == "BOOL")
            place += size
        found[tensor["name"]] = _shaped(flat, tensor["shape"])
    return found


class GrpcMessages:
    """PredictRequest and its answer. `pool`: a descriptor pool that asks the server's reflection."""

    def __init__(self, pool: Any) -> None:
        from google.protobuf import message_factory

        names = ("PredictRequest", "PredictResponse")
        found = [pool.FindMessageTypeByName(f"tensorflow.serving.{name}") for name in names]
        self._request, self._response = (message_factory.GetMessageClass(descriptor) for descriptor in found)

    def call(self, channel: Any) -> Any:
        """The method Predict, over bytes."""
        return channel.unary_unary(_PREDICT)

    def body(self, table: Table, rows: list[list[float]], num_samples: int, seed: int) -> bytes:
        request = self._request()
        request.model_spec.name = table.model
        request.model_spec.signature_name = SIGNATURE
        features = request.inputs[table.input]
        features.dtype = _DT_FLOAT
        for size in (len(rows), *table.shape):
            features.tensor_shape.dim.add().size = size
        features.tensor_content = _floats(rows)
        request.inputs["num_samples"].dtype = _DT_INT32
        request.inputs["num_samples"].int_val.append(num_samples)
        request.inputs["seed"].dtype = _DT_INT64
        request.inputs["seed"].int64_val.append(seed)
        return request.SerializeToString()

    def outputs(self, content: bytes, model: str) -> Outputs:
        """model: who was asked."""
        response = self._response.FromString(content)
        _check_model(response.model_spec.name, model)
        found: Outputs = {}
        for name, tensor in response.outputs.items():
            is_bool = tensor.dtype == _DT_BOOL
            flat = list(tensor.bool_val if is_bool else tensor.float_val)
            if tensor.tensor_content:
                flat = _unpacked(tensor.tensor_content, is_bool=is_bool)
            found[name] = _shaped(flat, [dim.size for dim in tensor.tensor_shape.dim])
        return found


def predictions(outputs: Outputs, rows: int) -> list[dict[str, Any]]:
    """The answers row by row in the form of the native ones; classes go by their numbers."""
    for name, values in outputs.items():
        if not isinstance(values, list) or len(values) != rows:
            raise AnswerError(f"{name} is not a list of {rows}, one for each row")
    if "probabilities" not in outputs:
        return [_value({name: values[row] for name, values in outputs.items()}) for row in range(rows)]
    answers = []
    for row in range(rows):
        probabilities = outputs["probabilities"][row]
        # What has an axis for the classes is by class; what is of a place has one axis less.
        axes = len(shape(probabilities))
        answer: dict[str, Any] = {
            name: _by_class(values[row]) if axes and len(shape(values[row])) == axes else values[row]
            for name, values in outputs.items()
        }
        if "prediction_set" in answer:
            answer["prediction_set"] = [label for label, inside in answer["prediction_set"].items() if inside]
        answers.append({"label": _best(probabilities), **answer})
    return answers


def _value(answer: dict[str, Any]) -> dict[str, Any]:
    """A regression's answer with its interval as the native one has it."""
    if "interval_lower" not in answer:
        return answer
    ends = (answer.pop(f"interval_{end}") for end in ("lower", "upper"))
    # Infinite in binary, null in JSON.
    lower, upper = map(_known, ends)
    return {**answer, "interval": {"lower": lower, "upper": upper}}


def _known(end: Any) -> Any:
    """An end of an interval, or of each of several numbers: null where it is infinite."""
    if isinstance(end, list):
        return [_known(own) for own in end]
    return None if end is None or math.isinf(end) else end


def _by_class(values: list[Any]) -> dict[str, Any]:
    """Nested lists [..., K] as an object of nested lists [...] by the classes' numbers."""
    if not values or not isinstance(values[0], list):
        return {str(index): value for index, value in enumerate(values)}
    places = [_by_class(value) for value in values]
    return {label: [place[label] for place in places] for label in places[0]}


def _best(probabilities: Any) -> Any:
    """Of [..., K] the number of the largest, as the labels of each place."""
    if isinstance(probabilities, list) and probabilities and isinstance(probabilities[0], list):
        return [_best(place) for place in probabilities]
    if not isinstance(probabilities, list) or not probabilities:
        raise AnswerError(f"probabilities are {probabilities!r}, wanted one for each class")
    return str(max(range(len(probabilities)), key=probabilities.__getitem__))


def _check_model(found: Any, asked: str) -> None:
    if found != asked:
        raise AnswerError(f"model {found!r} answered, wanted {asked!r}")


def _nested(values: list[Any], sizes: Sequence[int]) -> list[Any]:
    """A flat list in this shape."""
    if len(sizes) == 1:
        return values
    step = math.prod(sizes[1:])
    return [_nested(values[start : start + step], sizes[1:]) for start in range(0, len(values), step)]


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise AnswerError(f"the answer is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise AnswerError("the answer is not an object")
    return found


def _unpacked(raw: bytes, *, is_bool: bool) -> list[Any]:
    """Truth values of a byte each, or float32 numbers."""
    return list(struct.unpack(f"<{len(raw)}?" if is_bool else f"<{len(raw) // 4}f", raw))


def _floats(rows: list[list[float]]) -> bytes:
    flat = [value for row in rows for value in row]
    return struct.pack(f"<{len(flat)}f", *flat)


def _shaped(values: list[Any], sizes: list[int]) -> list[Any]:
    """A flat list, or one that is nested already, by rows."""
    if values and isinstance(values[0], list):
        return values
    if not values or len(values) != math.prod(sizes):
        raise AnswerError(f"{len(values)} values, wanted shape {sizes}")
    return _nested(values, sizes)
