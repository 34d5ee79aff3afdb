"""TensorFlow Serving's gRPC services on a port of their own, on the worker's event loop; health and reflection too.

Source: tensorflow/serving `apis/*.proto`. `num_samples` and `seed` are inputs of `mc_sample` and `mc_draws`, as in the
SavedModel. The one place where errors become gRPC status codes.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import grpc
import numpy as np
import structlog
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from tensorflow.core.example.example_pb2 import Example
from tensorflow.core.framework import types_pb2
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.protobuf import error_codes_pb2
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from models import contract
from models.contract import Manifest, ModelInput, ModelOutput
from serving import errors, tensors
from serving.answers import class_labels
from serving.core import Core
from serving.errors import (
    InvalidField,
    InvalidRequest,
    ModelFailed,
    ServingError,
    Unavailable,
    Unimplemented,
    VersionLoading,
    VersionNotFound,
    quote,
)
from serving.graph import Arrays
from serving.grpc_protocol import Server
from serving.listener import listen
from serving.observer import Exchange
from serving.runtime import Model
from serving.tls import Tls
from serving.varint import varint

log = structlog.get_logger()

# Of the call that this task answers: gRPC gives each one a task of its own.
_exchange: ContextVar[Exchange] = ContextVar("exchange")

_DESCRIBED = (
    prediction_service_pb2.DESCRIPTOR.services_by_name["PredictionService"],
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
)
SERVICES = tuple(service.full_name for service in _DESCRIBED)
_METHODS = {
    f"/{service.full_name}/{method.name}".encode(): method.name for service in _DESCRIBED for method in service.methods
}
# Not among the services that are listed: grpcio has no descriptor of it, and who lists wants to describe them all.
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"
FAREWELL_S = 0.05
SIGNATURE_DEF = "signature_def"
_State = get_model_status_pb2.ModelVersionStatus.State

STATUS: dict[type[ServingError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ModelFailed: grpc.StatusCode.INTERNAL,
}

# NumPy's type and the typed list of each TensorFlow type that an input or output may have.
_TYPES = {
    types_pb2.DT_FLOAT: ("float32", "float_val"),
    types_pb2.DT_DOUBLE: ("float64", "double_val"),
    types_pb2.DT_HALF: ("float16", "half_val"),
    types_pb2.DT_INT8: ("int8", "int_val"),
    types_pb2.DT_INT16: ("int16", "int_val"),
    types_pb2.DT_INT32: ("int32", "int_val"),
    types_pb2.DT_INT64: ("int64", "int64_val"),
    types_pb2.DT_UINT8: ("uint8", "int_val"),
    types_pb2.DT_UINT16: ("uint16", "int_val"),
    types_pb2.DT_UINT32: ("uint32", "uint32_val"),
    types_pb2.DT_UINT64: ("uint64", "uint64_val"),
    types_pb2.DT_BOOL: ("bool", "bool_val"),
    types_pb2.DT_STRING: ("string", "string_val"),
}
_ENUMS = {name: (enum, values) for enum, (name, values) in _TYPES.items()}
# The lists whose bytes are a little-endian array's, with the tag of the packed field: no number goes through Python.
_FIXED_SIZE = {
    name: bytes([TensorProto.DESCRIPTOR.fields_by_name[name].number << 3 | 2]) for name in ("float_val", "double_val")
}


def _refusing(handler: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """A handler whose errors become status codes."""

    @functools.wraps(handler)
    async def answered(services: Services, request: Any, context: Any) -> Any:
        metadata = dict(context.invocation_metadata() or ())
        exchange = services.observer.begin(
            "tensorflow_serving_grpc",
            handler.__name__,
            f"/{handler.__name__}",
            _text(metadata, "x-request-id"),
            _text(metadata, "traceparent"),
        )
        _exchange.set(exchange)
        shown = [("x-request-id", exchange.request_id)]
        if exchange.traceparent is not None:
            shown.append(("traceparent", exchange.traceparent))
        context.set_trailing_metadata(shown)
        # What is left where the client goes away and the handler is cancelled.
        code = grpc.StatusCode.CANCELLED
        try:
            services.gate.check(_text(metadata, "authorization"), _text(metadata, "x-api-key"))
            services.require_ready()
            if isinstance(request, DecodeError):
                raise InvalidRequest(f"the message cannot be decoded: {request}")
            answer = await handler(services, request)
            code = grpc.StatusCode.OK
            return answer
        except ServingError as error:
            if isinstance(error, ModelFailed):
                log.error("model failed", cause=error.cause)
            code = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
            await context.abort(code, str(error))
        except Exception as error:  # a defect of ours
            log.error("unexpected error", exc_info=error)
            code = grpc.StatusCode.INTERNAL
            await context.abort(code, "unexpected error; the cause is in the server's log")
        finally:
            services.observer.end(exchange, code.name, is_error=code is not grpc.StatusCode.OK)

    return answered


def _text(metadata: dict[str, str | bytes], name: str) -> str | None:
    value = metadata.get(name)
    return value if isinstance(value, str) else None


class Services(prediction_service_pb2_grpc.PredictionServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    """PredictionService and ModelService."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.gate = core.gate
        self.observer = core.observer

    def require_ready(self) -> None:
        if not self._core.is_ready:
            raise Unavailable("the server is not ready: it is loading or shutting down")

    @_refusing
    async def Predict(self, request: Any) -> Any:
        model = self._model(request.model_spec, request)
        signature = _signature(model, request.model_spec)
        given = dict(request.inputs)
        asked: dict[str, int | None] = {}
        if signature in (contract.MC_SAMPLE, contract.MC_DRAWS):
            asked = {name: _scalar(name, given.pop(name, None)) for name in (contract.NUM_SAMPLES, contract.SEED)}
        inputs = _read_inputs(model, given, self._core.settings.max_body_bytes)
        arrays = await self._core.run(model, signature, inputs, **asked)
        shown = tensors.finite_outputs(arrays, request.output_filter)
        response = predict_pb2.PredictResponse(model_spec=_spec(model, signature))
        for name, array in shown.items():
            response.outputs[name].CopyFrom(_tensor(array))
        return response

    @_refusing
    async def Classify(self, request: Any) -> Any:
        spec, result = await self._classify(request.model_spec, request)
        return classification_pb2.ClassificationResponse(model_spec=spec, result=result)

    @_refusing
    async def Regress(self, request: Any) -> Any:
        spec, result = await self._regress(request.model_spec, request)
        return regression_pb2.RegressionResponse(model_spec=spec, result=result)

    @_refusing
    async def MultiInference(self, request: Any) -> Any:
        if not request.tasks:
            raise InvalidField("tasks", "an empty list", "at least one task")
        _check_tasks(self._model(request.tasks[0].model_spec), request.tasks)
        response = inference_pb2.MultiInferenceResponse()
        for task in request.tasks:
            if task.method_name == CLASSIFY:
                spec, result = await self._classify(task.model_spec, request)
                response.results.add(model_spec=spec, classification_result=result)
            else:
                spec, result = await self._regress(task.model_spec, request)
                response.results.add(model_spec=spec, regression_result=result)
        return response

    @_refusing
    async def GetModelMetadata(self, request: Any) -> Any:
        if not request.metadata_field:
            raise InvalidRequest("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != SIGNATURE_DEF:
                raise InvalidRequest(f"Metadata field {field} is not supported")
        model = self._model(request.model_spec)
        response = get_model_metadata_pb2.GetModelMetadataResponse(model_spec=_spec(model))
        response.metadata[SIGNATURE_DEF].Pack(_signature_defs(str(model.folder / contract.SAVED_MODEL_FILE)))
        return response

    @_refusing
    async def GetModelStatus(self, request: Any) -> Any:
        spec = request.model_spec
        statuses = self._core.registry.shelf(spec.name).statuses
        if spec.HasField("version") or spec.version_label:
            wanted = self._number(spec)
            if wanted not in statuses:
                raise VersionNotFound(spec.name, wanted, statuses)
            statuses = {wanted: statuses[wanted]}
        response = get_model_status_pb2.GetModelStatusResponse()
        for version, status in sorted(statuses.items(), reverse=True):
            shown = response.model_version_status.add(version=version, state=_State.Value(status.state))
            shown.status.error_code = error_codes_pb2.DATA_LOSS if status.error else error_codes_pb2.OK
            shown.status.error_message = status.error
        return response

    async def HandleReloadConfigRequest(self, request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "models are those of the repository: publish into it")

    def _model(self, spec: Any, request: Any = None) -> Model:
        """The model that is named; with the request, a canary has its share of those that name no version."""
        if not spec.name:
            raise InvalidField("model_spec.name", "nothing", "a model's name")
        version = spec.version.value if spec.HasField("version") else None
        raw = None if request is None else functools.partial(request.SerializeToString, deterministic=True)
        try:
            model = self._core.model(spec.name, version, spec.version_label or None, raw)
        except VersionLoading as error:
            # As TensorFlow Serving has it.
            raise VersionNotFound(error.name, error.version, self._core.registry.shelf(error.name).loaded) from error
        _exchange.get().model = model
        return model

    def _number(self, spec: Any) -> int:
        """The version that a label stands for, or that is named."""
        return self._model(spec).manifest.version if spec.version_label else spec.version.value

    async def _classify(self, spec: Any, request: Any) -> tuple[Any, Any]:
        model, signature, output, arrays = await self._examined(spec, request, "classification", "Regress")
        scores = arrays[f"{output.prefix}probabilities"]
        tensors.check_scores(scores)
        labels = class_labels(output, scores.shape[-1])
        result = classification_pb2.ClassificationResult()
        for row in scores.tolist():
            classes = result.classifications.add()
            for label, score in zip(labels, row, strict=True):
                classes.classes.add(label=label, score=score)
        return _spec(model, signature), result

    async def _regress(self, spec: Any, request: Any) -> tuple[Any, Any]:
        model, signature, output, arrays = await self._examined(spec, request, "regression", "Classify")
        values = arrays[f"{output.prefix}mean"]
        if values.size != len(values):
            raise InvalidRequest(f"the model gives {values.size // len(values)} numbers a row, wanted one: use Predict")
        result = regression_pb2.RegressionResult()
        for value in values.reshape(-1).tolist():
            result.regressions.add(value=value)
        return _spec(model, signature), result

    async def _examined(
        self, spec: Any, request: Any, task: str, otherwise: str
    ) -> tuple[Model, str, ModelOutput, Arrays]:
        """The outputs for the request's examples, of a model that has one output of this task."""
        model = self._model(spec, request)
        signature = _signature(model, spec)
        manifest = model.manifest
        if len(manifest.outputs) != 1:
            raise InvalidRequest(f"the model has {len(manifest.outputs)} outputs, wanted one: use Predict")
        if manifest.outputs[0].task != task:
            raise InvalidRequest(f"the model's task is {manifest.outputs[0].task}, wanted {task}: use {otherwise}")
        if signature == contract.MC_DRAWS:
            raise InvalidRequest(f"signature {signature} gives draws: use Predict")
        inputs = model.reader.read([_instance(manifest, features) for features in _examples(request.input)])
        return (
            model,
            signature,
            manifest.outputs[0],
            tensors.finite_outputs(await self._core.run(model, signature, inputs)),
        )


class GrpcServer:
    """Both services on one port, with health and reflection. All methods are called on the worker's event loop."""

    def __init__(self, core: Core, is_shared: bool = False) -> None:
        """is_shared: whether other workers listen there too. Raises StartError where the port is taken."""
        settings = core.settings
        self._place = f"{settings.host}:{settings.grpc_port}"
        self._socket = listen(settings.host, settings.grpc_port, "gRPC", is_shared)
        self._tls = Tls.choose(settings)
        # What is running gets as long as any request may take.
        self._grace_s = settings.deadline_ms / 1000
        self._observer = core.observer
        self._server = Server(
            settings.max_body_bytes, settings.max_concurrency, settings.body_timeout_s, self._count_refused
        )
        services = Services(core)
        for service in _DESCRIBED:
            self._server.add_registered_method_handlers(service.full_name, _handlers(services, service))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        described = reflection.aio.ReflectionServicer([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME])
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(described, self._server)
        self._server.add_registered_method_handlers(REFLECTION_V1, _reflection_handlers(described))

    def _count_refused(self, headers: Mapping[bytes, bytes], begun: float, code: grpc.StatusCode) -> None:
        """Count and log a call that came too slowly, was one too many, or is for no method that is here."""
        path = headers.get(b":path", b"")
        operation = _METHODS.get(path, "")
        exchange = self._observer.begin(
            "tensorflow_serving_grpc" if operation else "none",
            operation,
            f"/{operation}" if operation else path.decode("latin-1"),
            headers.get(b"x-request-id", b"").decode("latin-1"),
            headers.get(b"traceparent", b"").decode("latin-1"),
        )
        exchange.started = begun
        self._observer.end(exchange, code.name, is_error=True)

    async def start(self) -> None:
        for service in SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start(self._socket, None if self._tls is None else self._tls.context(["h2"]))
        log.info("gRPC", address=self._place)

    async def stop(self) -> None:
        """Say so to health checks, refuse new calls, and wait for those that are running."""
        await self._health.enter_graceful_shutdown()
        # Whoever watches is told before the streams end.
        await asyncio.sleep(FAREWELL_S)
        await self._server.stop(self._grace_s)


def _handlers(services: Services, service: Any) -> dict[str, Any]:
    """The methods of one service, as the generated code would register them, but for messages that cannot be decoded.

    The handler is given the DecodeError, and refuses.
    """

    def decoder(kind: Any) -> Callable[[bytes], Any]:
        def decode(raw: bytes) -> Any:
            try:
                return kind.FromString(raw)
            except DecodeError as error:
                return error

        return decode

    return {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(services, method.name),
            request_deserializer=decoder(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in service.methods
    }


def _reflection_handlers(servicer: Any) -> dict[str, Any]:
    """The one method of reflection, whose messages are the same bytes in versions 1 and 1alpha."""
    return {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
    }


def _signature(model: Model, spec: Any) -> str:
    name: str = spec.signature_name or contract.SERVING_DEFAULT
    if name not in contract.SIGNATURES:
        raise InvalidRequest(f'Serving signature name: "{name}" not found in signature def')
    return name


def _check_tasks(model: Model, tasks: Sequence[Any]) -> None:
    """As TensorFlow Serving has it: the tasks ask one model, and each signature once, so that none is work twice.

    All of them before any is work. Source: tensorflow/serving `servables/tensorflow/multi_inference.cc`.
    """
    seen: set[str] = set()
    for task in tasks:
        if task.model_spec.name != model.name:
            raise InvalidRequest("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        signature = _signature(model, task.model_spec)
        if signature in seen:
            raise InvalidRequest(f"Duplicate evaluation of signature: {signature}")
        seen.add(signature)
        if task.method_name not in (CLASSIFY, REGRESS):
            raise Unimplemented(f"Unsupported signature method_name: {task.method_name}")


def _spec(model: Model, signature: str = "") -> Any:
    spec = model_pb2.ModelSpec(name=model.name, signature_name=signature)
    spec.version.value = int(model.version)
    return spec


@functools.lru_cache(maxsize=16)
def _signature_defs(path: str) -> Any:
    """The signatures as the SavedModel's file has them."""
    saved = SavedModel()
    try:
        with open(path, "rb") as stream:
            saved.ParseFromString(stream.read())
    except OSError as error:
        raise ModelFailed(f"{path}: {error.strerror}") from error
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for name, signature in saved.meta_graphs[0].signature_def.items():
        signatures.signature_def[name].CopyFrom(signature)
    return signatures


# Tensors.


def _read_inputs(model: Model, given: dict[str, Any], max_bytes: int) -> Arrays:
    manifest = model.manifest
    tensors.check_names(manifest, given)
    arrays = {item.name: _array(item, given[item.name], max_bytes) for item in manifest.inputs}
    tensors.check_rows({name: len(array) for name, array in arrays.items()})
    return tensors.check_values(manifest, model.reader, arrays)


def _array(item: ModelInput, proto: Any, max_bytes: int) -> np.ndarray:
    """A tensor's values [N, ...], from its typed list or its content, as text where they are strings."""
    field = f"input {quote(item.name)}"
    name, values_name = _TYPES.get(proto.dtype, ("unknown", ""))
    if name != item.dtype:
        raise InvalidField(field, f"type {_type_name(proto.dtype)}", f"type {_type_name(_ENUMS[item.dtype][0])}")
    shape = [axis.size for axis in proto.tensor_shape.dim]
    tensors.check_shape(item, shape)
    count = math.prod(shape)
    values = getattr(proto, values_name)
    if name == "string":
        if len(values) != count:
            raise InvalidField(field, f"{len(values)} values", f"{count}, as shape {shape} says")
        return tensors.text(item.name, values).reshape(shape)
    dtype = np.dtype(name)
    # A copy each time it is asked for.
    content = proto.tensor_content
    if content:
        if len(content) != count * dtype.itemsize:
            found = f"tensor_content of {len(content)} bytes"
            raise InvalidField(field, found, f"{count * dtype.itemsize}, as shape {shape} says")
        return np.frombuffer(content, dtype).reshape(shape)
    # A list that is too short goes on with its last value; no longer than a body of such values may be.
    if not 0 < len(values) <= count or (len(values) < count and count * dtype.itemsize > max_bytes):
        raise InvalidField(field, f"{len(values)} values", f"{count}, as shape {shape} says")
    listed = np.array(values)
    # Small types come in lists of larger ones, halves as their bits.
    array = listed.astype("uint16" if name == "float16" else dtype, copy=False)
    if array.dtype.kind in "iu" and not np.array_equal(array, listed):
        raise InvalidField(field, f"values outside of {name}", f"values of {name}")
    if name == "float16":
        array = array.view(dtype)
    if len(array) < count:
        array = np.concatenate([array, np.full(count - len(array), array[-1])])
    return array.reshape(shape)


def _scalar(name: str, proto: Any) -> int:
    """The one integer of `num_samples` or `seed`, of any integer type."""
    field = f"input {quote(name)}"
    if proto is None:
        raise InvalidField(field, "nothing", "a tensor of this name")
    kind, values_name = _TYPES.get(proto.dtype, ("unknown", ""))
    if "int" not in kind:
        raise InvalidField(field, f"type {_type_name(proto.dtype)}", "an integer type")
    if proto.tensor_shape.dim:
        raise InvalidField(field, f"shape {[axis.size for axis in proto.tensor_shape.dim]}", "a scalar, shape []")
    values: Sequence[int] = getattr(proto, values_name)
    if proto.tensor_content:
        if len(proto.tensor_content) != np.dtype(kind).itemsize:
            raise InvalidField(field, f"tensor_content of {len(proto.tensor_content)} bytes", f"one {kind}")
        values = np.frombuffer(proto.tensor_content, kind).tolist()
    if len(values) != 1:
        raise InvalidField(field, f"{len(values)} values", "one")
    return values[0]


def _type_name(number: int) -> str:
    return types_pb2.DataType.Name(number) if number in types_pb2.DataType.values() else str(number)


def _tensor(array: np.ndarray) -> TensorProto:
    """In the typed list, as TensorFlow Serving does unless it is told otherwise."""
    enum, values_name = _ENUMS[array.dtype.name]
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in array.shape])
    field = _FIXED_SIZE.get(values_name)
    if field is not None:
        content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        tensor = TensorProto.FromString(field + varint(len(content)) + content)
        tensor.dtype = enum
        tensor.tensor_shape.CopyFrom(shape)
        return tensor
    flat = array.reshape(-1)
    if values_name == "half_val":
        flat = flat.view(np.uint16)
    return TensorProto(dtype=enum, tensor_shape=shape, **{values_name: flat.tolist()})


# Examples.


def _examples(given: Any) -> list[dict[str, Any]]:
    """The features of each example by name; those of the context belong to every one."""
    context: dict[str, Any] = {}
    examples: Sequence[Example] = given.example_list.examples
    if given.HasField("example_list_with_context"):
        context = dict(given.example_list_with_context.context.features.feature)
        examples = given.example_list_with_context.examples
    if not examples:
        raise InvalidField("input", "no examples", "at least one")
    return [{**context, **dict(example.features.feature)} for example in examples]


def _instance(manifest: Manifest, features: dict[str, Any]) -> dict[str, Any]:
    """An example as a JSON instance: a scalar for a column, a nested list for an input that has axes."""
    axes = {item.name: item.shape for item in manifest.inputs if item.shape}
    truths = [item for item in manifest.inputs if item.dtype == "bool"]
    booleans = {name for item in truths for name in (item.name, *(feature.name for feature in item.features or ()))}
    instance: dict[str, Any] = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        if kind is None:
            continue
        values: list[Any] = list(getattr(feature, kind).value)
        if kind == "bytes_list":
            values = tensors.text(name, values).tolist()
        elif kind == "int64_list" and name in booleans:
            # An example has no type for them.
            values = [bool(value) if value in (0, 1) else value for value in values]
        if name not in axes:
            instance[name] = values[0] if len(values) == 1 else values
            continue
        instance[name] = tensors.row(values, axes[name])
        if instance[name] is None:
            raise InvalidRequest(f"input {quote(name)} has free axes, which an example cannot give: use Predict")
    return instance
