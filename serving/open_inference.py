"""The Open Inference Protocol, version 2, over HTTP: what Triton, KServe and MLServer speak.

Sources: open-inference-protocol `specification/protocol/inference_rest.md`; Triton `extension_binary_data.md`.
Uncertainty is asked for by the request's parameters `signature`, `num_samples`, `seed` and `coverage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from models import contract
from models.contract import ModelInput, SignatureTensor
from serving import tensors
from serving.core import Core
from serving.errors import InvalidField, InvalidRequest, Unavailable, choices, quote
from serving.graph import Arrays
from serving.pages import release
from serving.prediction_sets import Coverage
from serving.runtime import Model
from serving.web import Handler, Header, Request, Response, json_response, read_object

PREFIX = "/v2"
PLATFORM = "tensorflow_savedmodel"
HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY_TYPE = "application/octet-stream"

# The protocol's names of TensorFlow's types.
_DATATYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "string": "BYTES",
}
_LENGTH_BYTES = 4

COVERAGE = "coverage"
# Of /uncertainty alone: no signature draws until a standard error is reached.
ADAPTIVE = (contract.TOLERANCE, contract.MAX_SAMPLES)


class OpenInference:
    """Handlers of `/v2`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def handlers(self, path: str) -> dict[str, Handler] | None:
        """The handlers of one path by method; None where there is no such path."""
        match path.strip("/").split("/"):
            case ["v2"]:
                return {"GET": self.server}
            case ["v2", "health", "live"]:
                return {"GET": self.live}
            case ["v2", "health", "ready"]:
                return {"GET": self.ready}
            case ["v2", "models", name, *rest]:
                version = None
                if rest[:1] == ["versions"] and len(rest) > 1:
                    version, rest = rest[1], rest[2:]
                match rest:
                    case []:
                        return {"GET": partial(self.model, name, version)}
                    case ["ready"]:
                        return {"GET": partial(self.model_ready, name, version)}
                    case ["infer"]:
                        return {"POST": partial(self.infer, name, version)}
        return None

    async def server(self, request: Request) -> Response:
        return json_response({"name": "dropserve", "version": release(), "extensions": ["binary_tensor_data"]})

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        return _readiness({"ready": self._core.is_ready})

    async def model(self, name: str, version: str | None, request: Request) -> Response:
        model = self._core.model(name, version)
        signature = model.manifest.signatures[contract.SERVING_DEFAULT]
        return json_response(
            {
                "name": model.name,
                "versions": self._core.versions(name),
                "platform": PLATFORM,
                "inputs": [_metadata(tensor) for tensor in signature.inputs],
                "outputs": [_metadata(tensor) for tensor in signature.outputs],
            }
        )

    async def model_ready(self, name: str, version: str | None, request: Request) -> Response:
        model = self._core.model(name, version)
        return _readiness({"name": model.name, "ready": self._core.is_ready})

    async def infer(self, name: str, version: str | None, request: Request) -> Response:
        request.exchange.operation = "infer"
        body, json_bytes = await _read_body(request)
        model = request.exchange.model = self._core.model(name, version, request=body)
        content = read_object(body[:json_bytes])
        binary = memoryview(body)[json_bytes:]
        parameters = _parameters(content, "parameters")
        request_id = content.get("id")
        if request_id is not None and type(request_id) is not str:
            raise InvalidField("id", quote(request_id), "a text")
        inputs = _read_inputs(model, content, binary)
        signature, num_samples, seed = _asked(parameters)
        coverage = _coverage(model, signature, parameters)
        outputs = _requested_outputs(content, parameters)
        work = self._core.run(model, signature, inputs, num_samples, seed)
        # Draws may take long: they are given up when the client goes away.
        arrays: Mapping[str, np.ndarray] = await (
            work if signature == contract.SERVING_DEFAULT else request.outcome(work)
        )
        if coverage is not None:
            arrays = coverage.apply(arrays)
        shown = tensors.finite_outputs(arrays, list(outputs))
        head: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
        if request_id is not None:
            head["id"] = request_id
        if signature != contract.SERVING_DEFAULT:
            head["parameters"] = {
                "signature": signature,
                "num_samples": model.manifest.num_samples if num_samples is None else num_samples,
                "seed": model.manifest.seed if seed is None else seed,
            }
        if coverage is not None:
            head["parameters"]["coverage"] = coverage.value
            if coverage.warnings:
                head["parameters"]["warning"] = ". ".join(coverage.warnings)
        in_binary = _flag(parameters, "binary_data_output")
        return _response(head, shown, {output: outputs.get(output, in_binary) for output in shown})


def _readiness(content: dict[str, Any]) -> Response:
    if content["ready"]:
        return json_response(content)
    return json_response(content, 503, [(b"retry-after", b"%d" % Unavailable.retry_after_s)])


def _metadata(tensor: SignatureTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "datatype": _DATATYPES[tensor.dtype],
        "shape": [-1 if axis is None else axis for axis in tensor.shape],
    }


# Reading a request.


async def _read_body(request: Request) -> tuple[bytes, int]:
    """The body, and how many of its bytes are JSON; binary tensors follow."""
    length = request.header(HEADER_LENGTH.lower().encode())
    if length is None:
        request.require_json()
        body = await request.body()
        return body, len(body)
    body = await request.body()
    if not (length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= len(body)):
        raise InvalidField(HEADER_LENGTH, quote(length), f"the bytes of the JSON part, at most {len(body)}")
    return body, int(length)


def _read_inputs(model: Model, content: dict[str, Any], binary: memoryview) -> Arrays:
    """The arrays of the model's inputs, each given in JSON or in the binary part."""
    given = content.get("inputs")
    if type(given) is not list or not all(type(tensor) is dict for tensor in given):
        raise InvalidField("inputs", quote(given) if "inputs" in content else "nothing", "a list of tensors")
    by_name: dict[str, dict[str, Any]] = {}
    for tensor in given:
        name = tensor.get("name")
        if type(name) is not str:
            raise InvalidField("an input's name", quote(name), "a string")
        if name in by_name:
            raise InvalidField(f"input {quote(name)}", "two tensors", "one")
        by_name[name] = tensor
    manifest = model.manifest
    tensors.check_names(manifest, by_name)
    items = {item.name: item for item in manifest.inputs}
    shapes = {name: _shape(items[name], tensor) for name, tensor in by_name.items()}
    tensors.check_rows({name: shape[0] for name, shape in shapes.items()})
    arrays: Arrays = {}
    lists: dict[str, list[Any]] = {}
    # The binary parts stand in the order of the request's list.
    for name, tensor in by_name.items():
        size = _parameters(tensor, f"input {quote(name)}: parameters").get("binary_data_size")
        if size is None:
            lists[name] = _nested(name, tensor.get("data"), shapes[name])
        elif tensor.get("data") is not None:
            raise InvalidField(f"input {quote(name)}", "both data and binary_data_size", "one of them")
        else:
            part, binary = _taken(name, size, binary)
            arrays[name] = _from_bytes(items[name], part, shapes[name])
    if len(binary):
        raise InvalidRequest(f"{len(binary)} bytes follow the last binary tensor, wanted none")
    if not lists:
        return tensors.check_values(manifest, model.reader, arrays)
    values = {**lists, **{name: tensors.nested(items[name], array) for name, array in arrays.items()}}
    read = model.reader.read(tensors.instances(manifest, values))
    for name, array in read.items():
        if list(array.shape) != shapes[name]:
            raise InvalidField(f"input {quote(name)}", f"data of shape {list(array.shape)}", f"shape {shapes[name]}")
    return read


def _shape(item: ModelInput, tensor: dict[str, Any]) -> list[int]:
    """The shape that a tensor says it has; InvalidField where it or the datatype is not the input's."""
    field = f"input {quote(item.name)}"
    datatype = tensor.get("datatype")
    if datatype != _DATATYPES[item.dtype]:
        raise InvalidField(field, f"datatype {quote(datatype)}", f"datatype {_DATATYPES[item.dtype]}")
    shape = tensor.get("shape")
    if type(shape) is not list or not all(type(size) is int for size in shape):
        raise InvalidField(field, f"shape {quote(shape)}", "shape as a list of integers")
    tensors.check_shape(item, shape)
    return shape


def _nested(name: str, data: Any, shape: list[int]) -> list[Any]:
    """The data [N, ...] nested as the shape says; given so, or flat in row-major order."""
    if type(data) is not list:
        raise InvalidField(f"input {quote(name)}", f"data {quote(data)}", "a list of values, or binary_data_size")
    if list in set(map(type, data)):
        if len(data) != shape[0]:
            raise InvalidField(f"input {quote(name)}", f"data of {len(data)} rows", f"{shape[0]}, as shape says")
        return data
    if len(data) != math.prod(shape):
        raise InvalidField(
            f"input {quote(name)}", f"data of {len(data)} values", f"{math.prod(shape)}, as shape {shape} says"
        )
    return tensors.folded(data, shape)


def _taken(name: str, size: Any, binary: memoryview) -> tuple[memoryview, memoryview]:
    """The next tensor's bytes, and what follows them."""
    if type(size) is not int or not 0 <= size <= len(binary):
        wanted = f"the tensor's bytes, of which {len(binary)} are left in the body"
        raise InvalidField(f"input {quote(name)}: binary_data_size", quote(size), wanted)
    return binary[:size], binary[size:]


def _from_bytes(item: ModelInput, part: memoryview, shape: list[int]) -> np.ndarray:
    """An array from little-endian values, or from texts that each have their length in front."""
    count = math.prod(shape)
    if item.dtype == "string":
        return tensors.text(item.name, _byte_strings(item.name, part, count)).reshape(shape)
    # A truth value is any byte but 0.
    dtype = np.dtype("u1" if item.dtype == "bool" else item.dtype).newbyteorder("<")
    if len(part) != count * dtype.itemsize:
        wanted = f"{count * dtype.itemsize} for shape {shape} of {_DATATYPES[item.dtype]}"
        raise InvalidField(f"input {quote(item.name)}: binary_data_size", str(len(part)), wanted)
    array = np.frombuffer(part, dtype).reshape(shape)
    return array != 0 if item.dtype == "bool" else array


def _byte_strings(name: str, part: memoryview, count: int) -> list[bytes]:
    values: list[bytes] = []
    place = 0
    while place < len(part):
        start = place + _LENGTH_BYTES
        place = start + int.from_bytes(part[place:start], "little")
        if start > len(part) or place > len(part):
            raise InvalidField(f"input {quote(name)}", "a string that is cut short", "its length in 4 bytes, then it")
        values.append(bytes(part[start:place]))
    if len(values) != count:
        raise InvalidField(f"input {quote(name)}", f"{len(values)} strings", f"{count}, as shape says")
    return values


def _parameters(content: dict[str, Any], field: str) -> dict[str, Any]:
    """The member `parameters`: an object, empty where there is none. Unknown ones are other servers' and do no harm."""
    parameters = _optional(content, "parameters", {})
    if type(parameters) is not dict:
        raise InvalidField(field, quote(parameters), "an object")
    return parameters


def _optional(members: dict[str, Any], name: str, default: Any) -> Any:
    """A member that may be absent, or null, which is the same."""
    value = members.get(name)
    return default if value is None else value


def _asked(parameters: dict[str, Any]) -> tuple[str, int | None, int | None]:
    """Signature, number of draws and seed. Who names draws, a seed or a coverage and no signature wants uncertainty."""
    num_samples, seed = (_integer(parameters, name) for name in (contract.NUM_SAMPLES, contract.SEED))
    for name in ADAPTIVE:
        # Unknown parameters do no harm; one that is known elsewhere would be believed to hold.
        if parameters.get(name) is not None:
            wanted = "nothing, as only /uncertainty draws until a tolerance is reached"
            raise InvalidField(name, quote(parameters[name]), wanted)
    is_asked = num_samples is not None or seed is not None or parameters.get(COVERAGE) is not None
    signature = _optional(parameters, "signature", contract.MC_SAMPLE if is_asked else contract.SERVING_DEFAULT)
    if signature not in contract.SIGNATURES:
        raise InvalidField("signature", quote(signature), f"one of {choices(contract.SIGNATURES)}")
    return signature, num_samples, seed


def _coverage(model: Model, signature: str, parameters: dict[str, Any]) -> Coverage | None:
    """The coverage that prediction sets and intervals are asked for at; None where the request names none."""
    coverage = parameters.get(COVERAGE)
    if coverage is None:
        return None
    if signature not in (contract.MC_PREDICT, contract.MC_SAMPLE):
        raise InvalidField(COVERAGE, quote(coverage), f"nothing, as signature {signature} has no prediction sets")
    if type(coverage) not in (int, float) or not 0 < coverage < 1:
        raise InvalidField(COVERAGE, quote(coverage), "a number between 0 and 1")
    return model.sets.at(float(coverage))


def _integer(parameters: dict[str, Any], name: str) -> int | None:
    value = parameters.get(name)
    if value is not None and type(value) is not int:
        raise InvalidField(name, quote(value), "an integer")
    return value


def _flag(parameters: dict[str, Any], name: str, default: bool = False) -> bool:
    value = _optional(parameters, name, default)
    if type(value) is not bool:
        raise InvalidField(name, quote(value), "true or false")
    return value


def _requested_outputs(content: dict[str, Any], parameters: dict[str, Any]) -> dict[str, bool]:
    """Names of the outputs to return, and whether in binary; none for all."""
    requested = _optional(content, "outputs", [])
    if type(requested) is not list or not all(type(output) is dict for output in requested):
        raise InvalidField("outputs", quote(requested), "a list of objects")
    default = _flag(parameters, "binary_data_output")
    found: dict[str, bool] = {}
    for output in requested:
        name = output.get("name")
        if type(name) is not str:
            raise InvalidField("an output's name", quote(name), "a string")
        found[name] = _flag(_parameters(output, f"output {quote(name)}: parameters"), "binary_data", default)
    return found


# Writing an answer.


def _response(head: dict[str, Any], arrays: Arrays, binary: dict[str, bool]) -> Response:
    """The outputs in JSON, and after it those that are wanted in binary."""
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, array in arrays.items():
        output: dict[str, Any] = {
            "name": name,
            "datatype": _DATATYPES[array.dtype.name],
            "shape": list(array.shape),
        }
        if binary[name]:
            parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = np.ascontiguousarray(array).reshape(-1)
        described.append(output)
    response = json_response({**head, "outputs": described})
    if not parts:
        return response
    length: Header = (HEADER_LENGTH.encode(), b"%d" % len(response.body))
    return Response(b"".join([response.body, *parts]), 200, BINARY_TYPE, [length])
