"""TensorFlow Serving's REST API, version 1: predict, classify, regress, status, metadata.

Source: tensorflow/serving, `g3doc/api_rest.md`, `model_servers/http_rest_api_util.cc`, `util/json_tensor.cc`; paths,
formats, statuses and the wording of errors are theirs. Two things are not: numbers that are not finite are refused
(400) but for NaN in a column that may be empty, and classify and regress work on every signature.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from typing import Any, NoReturn
from urllib.parse import unquote

import numpy as np
from google.protobuf.json_format import MessageToDict

from models import contract
from models.contract import Manifest, SignatureTensor
from serving import tensors
from serving.answers import class_labels
from serving.core import Core
from serving.errors import (
    InvalidRequest,
    LabelNotFound,
    ModelNotFound,
    NotFound,
    VersionLoading,
    VersionNotFound,
)
from serving.graph import Arrays
from serving.instances import OVERFLOW, NotPlain, plain_tensor
from serving.registry import Status
from serving.runtime import Model
from serving.web import Request, Response, json_response, read_json

PREFIX = "/v1/"

_PREDICTION = re.compile(
    r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)", re.IGNORECASE
)
_STATUS = re.compile(r"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(?:/(metadata))?", re.IGNORECASE)

# Scalars of the draws' signatures: no tensors with a row for each instance.
_SCALARS = (contract.NUM_SAMPLES, contract.SEED)
# TensorFlow's own limit is 254.
_MAX_RANK = 64


class TensorFlowServing:
    """Answers everything below `/v1/`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def answer(self, request: Request) -> Response:
        path: str = request.scope["raw_path"].decode("latin-1")
        if request.method == "POST" and (found := _PREDICTION.fullmatch(path)):
            name, version, label, method = found.groups()
            request.exchange.operation = method.lower()
            body = await request.body()
            model = request.exchange.model = self._model(unquote(name), version, label and unquote(label), body)
            content = _read(body)
            signature = _signature_name(content)
            if method.lower() == "predict":
                return await self._predict(request, model, signature, content)
            return await self._examples(request, model, signature, content, method.lower())
        if request.method == "GET" and (found := _STATUS.fullmatch(path)):
            name, version, label, metadata = found.groups()
            if name is None:
                raise InvalidRequest("Missing model name in request.")
            if metadata:
                return self._metadata(unquote(name), version, label and unquote(label))
            return self._status(unquote(name), version, label and unquote(label))
        raise InvalidRequest(f"Malformed request: {request.method} {path}")

    def _model(self, name: str, version: str | None, label: str | None, body: bytes | None = None) -> Model:
        """The model asked for; its absence is told in TensorFlow Serving's words."""
        try:
            return self._core.model(name, _version(version), label, body)
        except LabelNotFound as error:
            raise InvalidRequest(f"Unrecognized servable version label: {error.label}") from error
        except (ModelNotFound, VersionLoading, VersionNotFound) as error:
            wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise NotFound(f"Servable not found for request: {wanted}") from error

    # Predict.

    async def _predict(self, request: Request, model: Model, signature: str, content: dict[str, Any]) -> Response:
        items = _items(model, signature)
        if "instances" in content:
            if "inputs" in content:
                problem = "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
                _format_error(content, problem)
            columns = _columns_of_rows(content, items)
            scalars = {name: _shared(name, columns.pop(name)) for name in _SCALARS if name in columns}
        elif "inputs" in content:
            columns = _columns(content["inputs"], items)
            scalars = {name: _scalar(items[name], columns.pop(name)) for name in _SCALARS if name in columns}
        else:
            raise InvalidRequest("Missing 'inputs' or 'instances' key")
        arrays = {name: _tensor(items[name], values, rows="instances" in content) for name, values in columns.items()}
        for item in model.manifest.inputs:
            tensors.check_shape(item, arrays[item.name].shape)
        tensors.check_rows({name: len(array) for name, array in arrays.items()})
        inputs = tensors.check_values(model.manifest, model.reader, arrays)
        outputs = await self._run(request, model, signature, inputs, **scalars)
        respond = _response_with_infinity if tensors.has_unknown_ends(outputs) else json_response
        if "instances" in content:
            return respond({"predictions": _rows(outputs)})
        shown: Any = outputs if len(outputs) > 1 else next(iter(outputs.values()))
        return respond({"outputs": shown})

    async def _run(
        self,
        request: Request,
        model: Model,
        signature: str,
        inputs: Arrays,
        num_samples: int | None = None,
        seed: int | None = None,
    ) -> Arrays:
        work = self._core.run(model, signature, inputs, num_samples, seed)
        # Draws may take long: they are given up when the client goes away.
        outputs = await (work if signature == contract.SERVING_DEFAULT else request.outcome(work))
        return {name: np.ascontiguousarray(values) for name, values in tensors.finite_outputs(outputs).items()}

    # Classify and regress.

    async def _examples(
        self, request: Request, model: Model, signature: str, content: dict[str, Any], method: str
    ) -> Response:
        task = "classification" if method == "classify" else "regression"
        _items(model, signature)
        if len(model.manifest.outputs) != 1 or model.manifest.outputs[0].task != task:
            raise InvalidRequest(
                f"Expected {task} signature method_name to be tensorflow/serving/{method}. "
                "Was: tensorflow/serving/predict"
            )
        if signature == contract.MC_DRAWS:
            raise InvalidRequest(f"Signature {signature} has no {task} output")
        inputs = model.reader.read(_instances(model.manifest, content, method))
        outputs = await self._run(request, model, signature, inputs)
        if task == "regression":
            values = outputs["mean"]
            if values.ndim != 1:
                raise InvalidRequest(
                    "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] "
                    f"but got [{','.join(str(size) for size in values.shape)}]"
                )
            return json_response({"results": values})
        scores = outputs["probabilities"]
        tensors.check_scores(scores)
        labels = class_labels(model.manifest.outputs[0], scores.shape[-1])
        return json_response({"results": [list(zip(labels, row, strict=True)) for row in scores]})

    # Status and metadata.

    def _status(self, name: str, version: str | None, label: str | None) -> Response:
        shelf = self._core.registry.shelves.get(name)
        statuses = {} if shelf is None else shelf.statuses
        if label is not None:
            if shelf is None or label not in shelf.labels:
                raise InvalidRequest(f"Unrecognized servable version label: {label}")
            version = str(shelf.labels[label])
        number = _version(version)
        if number is not None:
            if number not in statuses:
                raise NotFound(f"Could not find version {number} of model {name}")
            statuses = {number: statuses[number]}
        if not statuses:
            raise NotFound(f"Could not find any versions of model {name}")
        newest_first = sorted(statuses.items(), reverse=True)
        return json_response({"model_version_status": [_version_status(*item) for item in newest_first]})

    def _metadata(self, name: str, version: str | None, label: str | None) -> Response:
        model = self._model(name, version, label)
        signatures = {
            key: MessageToDict(signature, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            for key, signature in model.signature_defs.items()
        }
        return json_response(
            {
                "model_spec": {"name": model.name, "signature_name": "", "version": model.version},
                "metadata": {"signature_def": {"signature_def": signatures}},
            }
        )


# Reading a request.


def _read(body: bytes) -> dict[str, Any]:
    if not body:
        raise InvalidRequest("JSON Parse error: The document is empty")
    try:
        content = read_json(body)
    except InvalidRequest as error:
        raise InvalidRequest(f"JSON Parse error: {error}") from error
    if type(content) is not dict:
        raise InvalidRequest(f"JSON Value: {_shown(content)} Is not object")
    return content


def _signature_name(content: dict[str, Any]) -> str:
    name = content.get("signature_name", "")
    if type(name) is not str:
        _format_error(content, "not formatted correctly. 'signature_name' key must be a string value.")
    return name or contract.SERVING_DEFAULT


def _response_with_infinity(content: Any) -> Response:
    """Infinity as TensorFlow Serving writes it, a word that JSON does not have."""
    return Response(json.dumps(content, default=lambda values: values.tolist(), separators=(",", ":")).encode())


def _version(text: str | None) -> int | None:
    if text is None:
        return None
    number = int(text) if len(text) < 20 else 2**63
    if number >= 2**63:
        raise InvalidRequest(f"Failed to convert version: {text} to numeric.")
    return number


def _items(model: Model, signature: str) -> dict[str, SignatureTensor]:
    """The inputs of a signature by name."""
    found = model.manifest.signatures.get(signature)
    if found is None:
        raise InvalidRequest(f'Serving signature name: "{signature}" not found in signature def')
    return {item.name: item for item in found.inputs}


def _columns_of_rows(content: dict[str, Any], items: dict[str, SignatureTensor]) -> dict[str, list[Any]]:
    """The row format: the values of each input, one for each row."""
    rows = content["instances"]
    if type(rows) is not list:
        _format_error(content, "Excepting 'instances' to be an list/array")
    if not rows:
        _format_error(content, "No values in 'instances' array")
    names = sorted(items)
    if not _is_object(rows[0]):
        if len(items) > 1:
            raise InvalidRequest(
                "instances is a plain list, but expecting list of objects as multiple "
                "input tensors required as per tensorinfo_map"
            )
        for index, row in enumerate(rows):
            if _is_object(row):
                raise InvalidRequest(f"Expecting value/list but got object at item {index} of input list")
        return {names[0]: rows}
    for index, row in enumerate(rows):
        if not _is_object(row):
            raise InvalidRequest(f"Expecting object but got list at item {index} of input list")
        for name in row:
            if name not in items:
                raise InvalidRequest(
                    f"Failed to process element: {index} key: {name} of 'instances' list. "
                    f"Error: INVALID_ARGUMENT: JSON object: does not have named input: {name}"
                )
        if row.keys() != items.keys():
            raise InvalidRequest(
                f"Failed to process element: {index} of 'instances' list. JSON object: {_shown(row)} "
                f"keys must be equal to: {','.join(names)}"
            )
    return {name: [row[name] for row in rows] for name in names}


def _columns(inputs: Any, items: dict[str, SignatureTensor]) -> dict[str, Any]:
    """The columnar format: each input's tensor."""
    if not _is_object(inputs):
        if len(items) > 1:
            raise InvalidRequest(
                "inputs is a plain value/list, but expecting an object as multiple "
                "input tensors required as per tensorinfo_map"
            )
        return {next(iter(items)): inputs}
    for name in sorted(items):
        if name not in inputs:
            raise InvalidRequest(f"Missing named input: {name} in 'inputs' object.")
    return {name: inputs[name] for name in items}


def _tensor(item: SignatureTensor, values: Any, rows: bool) -> np.ndarray:
    """A nested list as a tensor, of the shape that the list has.

    rows: whether the list is the row format's, of one tensor for each row.
    Raises InvalidRequest where the list is uneven or a value of another type.
    """
    dtype = np.dtype(object) if item.dtype == "string" else np.dtype(item.dtype)
    if type(values) is list:
        try:
            return plain_tensor(values, len(item.shape) - 1, dtype)
        except NotPlain:
            pass
    shape = _shape_of(values)
    if rows and values:
        # Each row is a tensor of its own; all must have the first one's shape.
        for index, value in enumerate(values):
            try:
                _check(item, value, shape[1:], 0)
            except InvalidRequest as error:
                prefix = f"Failed to process element: {index} of 'instances' list. Error: INVALID_ARGUMENT: "
                raise InvalidRequest(f"{prefix}{error}") from error
    else:
        _check(item, values, shape, 0)
    flat = [_converted(value) for value in _leaves(values, len(shape))]
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.astype(dtype).reshape(shape)


def _shape_of(value: Any) -> list[int]:
    shape: list[int] = []
    while type(value) is list:
        shape.append(len(value))
        if len(shape) > _MAX_RANK:
            raise InvalidRequest(f"a list nested more than {_MAX_RANK} deep, which no tensor is")
        if not value:
            break
        value = value[0]
    return shape


def _check(item: SignatureTensor, value: Any, shape: list[int], level: int) -> None:
    """Raise InvalidRequest for the first place that does not fit the shape or the type."""
    if type(value) is not list:
        if level != len(shape):
            raise InvalidRequest(
                f"JSON Value: {_shown(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        _check_type(item, value)
        return
    if level >= len(shape):
        raise InvalidRequest(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise InvalidRequest(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    for entry in value:
        _check(item, entry, shape, level + 1)


def _check_type(item: SignatureTensor, value: Any) -> None:
    dtype = item.dtype
    kinds: dict[str, tuple[type, ...]] = {"string": (str,), "bool": (bool,)}
    allowed = kinds.get(dtype, (int,) if "int" in dtype else (int, float))
    if dtype == "string" and type(value) is dict:
        _converted(value)
        return
    if type(value) not in allowed:
        raise InvalidRequest(
            f"JSON Value: {_shown(value)} Type: {_json_type(value)} "
            f"is not of expected type: {_TYPE_NAMES.get(dtype, dtype)}"
        )
    if "int" in dtype:
        limits = np.iinfo(dtype)
        if not limits.min <= value <= limits.max:
            raise InvalidRequest(f"JSON Value: {_shown(value)} Type: Number is not of expected type: {dtype}")
    elif dtype in OVERFLOW and (type(value) is int or math.isfinite(value)) and not abs(value) < OVERFLOW[dtype]:
        kind = {"float64": "double", "float16": "half"}.get(dtype, "float")
        raise InvalidRequest(f"Cannot convert JSON value: {_shown(value)} to {kind} without loss of precision.")


def _leaves(value: Any, depth: int) -> list[Any]:
    """All scalars of equally nested lists."""
    flat = [value]
    for _ in range(depth):
        flat = [entry for part in flat for entry in part]
    return flat


def _converted(value: Any) -> Any:
    """A leaf: text given as `{"b64": ...}` is decoded."""
    if type(value) is not dict:
        return value
    if not _is_base64(value):
        raise InvalidRequest(f"JSON Value: {_shown(value)} not formatted correctly for base64 data")
    try:
        return base64.b64decode(value["b64"], validate=True).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"JSON Value: {_shown(value)} is not UTF-8 text, base64 encoded") from error
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("Unable to base64 decode") from error


def _shared(name: str, values: list[Any]) -> int:
    """A scalar of the call, given in each row of the row format: the same in all."""
    for index, value in enumerate(values):
        if type(value) is not int:
            raise InvalidRequest(
                f"Failed to process element: {index} key: {name} of 'instances' list. Error: INVALID_ARGUMENT: "
                f"JSON Value: {_shown(value)} Type: {_json_type(value)} is not of expected type: int64"
            )
        if value != values[0]:
            raise InvalidRequest(f"{name} holds for all instances of a request: found {values[0]} and {value}")
    first: int = values[0]
    return first


def _scalar(item: SignatureTensor, value: Any) -> int:
    # An integer of any size: who checks its range knows what is wanted.
    if type(value) is not int:
        _check(item, value, [], 0)
    number: int = value
    return number


def _instances(manifest: Manifest, content: dict[str, Any], method: str) -> list[Any]:
    """The `examples` of classify and regress as instances; `context` has the features that all of them share."""
    examples = content.get("examples")
    if examples is None:
        _format_error(content, f"When method is {method}, key 'examples' is expected and was not found")
    if type(examples) is not list:
        _format_error(content, "Expecting 'examples' value to be an list/array")
    if not examples:
        _format_error(content, "'examples' value is an empty array")
    shared = content.get("context", {})
    for example in (shared, *examples):
        if type(example) is not dict:
            raise InvalidRequest(f"Example must be JSON object but got JSON {_json_type(example)}")
    shapes = {item.name: item.shape for item in manifest.inputs}
    return [
        {name: _feature(value, shapes.get(name, [])) for name, value in {**shared, **example}.items()}
        for example in examples
    ]


def _feature(value: Any, shape: list[int | None]) -> Any:
    """A feature's value. A list with one value is the value; of an input that has axes, [*shape], it may be flat."""
    if type(value) is not list:
        return _converted(value) if _is_base64(value) else value
    if list in set(map(type, value)):
        return value
    values = [_converted(entry) if _is_base64(entry) else entry for entry in value]
    if not shape:
        return values[0] if len(values) == 1 else values
    nested = tensors.row(values, shape)
    return values if nested is None else nested


# Writing an answer.


def _rows(outputs: Arrays) -> Any:
    """The row format: one value a row, or an object where there are several outputs."""
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    return [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]


def _version_status(version: int, status: Status) -> dict[str, Any]:
    code = "DATA_LOSS" if status.error else "OK"
    return {
        "version": str(version),
        "state": status.state.value,
        "status": {"error_code": code, "error_message": status.error},
    }


# Wording.

_TYPE_NAMES = {"float32": "float", "float64": "double"}
_SHOWN_LENGTH = 200


def _format_error(content: dict[str, Any], problem: str) -> NoReturn:
    raise InvalidRequest(f"JSON Value: {_shown(content)} {problem}")


def _shown(value: Any) -> str:
    """A JSON value as an error shows it: its beginning, where it is long."""
    text = ""
    for part in json.JSONEncoder().iterencode(value):
        text += part
        if len(text) > _SHOWN_LENGTH:
            return f"{text[:_SHOWN_LENGTH]}..."
    return text


def _json_type(value: Any) -> str:
    if value is True:
        return "True"
    if value is False:
        return "False"
    return {type(None): "Null", dict: "Object", list: "Array", str: "String"}.get(type(value), "Number")


def _is_base64(value: Any) -> bool:
    return type(value) is dict and value.keys() == {"b64"} and type(value["b64"]) is str


def _is_object(value: Any) -> bool:
    return type(value) is dict and not _is_base64(value)
