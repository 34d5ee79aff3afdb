"""The OpenAPI 3.1 document of the native endpoints, with examples that work for the loaded model."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.contract import MC_SAMPLE, MIN_NUM_SAMPLES, Feature, Manifest, ModelInput, ModelOutput
from serving.answers import class_labels
from serving.native import TOLERANCE_LIMIT
from serving.settings import Settings

Schema = dict[str, Any]


def document(manifest: Manifest, settings: Settings, release: str) -> Schema:
    """The whole document. Pure data: needs no loaded graph."""
    examples = manifest.examples[:1]
    body = {"instances": examples}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"dropserve: {manifest.name} {manifest.version}",
            "version": release,
            "description": "Predictions, and how far to trust them: Monte Carlo dropout. " + manifest.description,
        },
        "paths": {
            "/predict": {
                "post": _operation(
                    "predict",
                    "Deterministic predictions",
                    _object({"instances": _instances(manifest, settings)}, ["instances"]),
                    body,
                    _object(
                        {"model": _model(manifest), "predictions": _rows(manifest, _prediction)},
                        ["model", "predictions"],
                    ),
                )
            },
            "/uncertainty": {
                "post": _operation(
                    "uncertainty",
                    "Predictions with their uncertainty, by Monte Carlo dropout. "
                    "The same row gets the same answer, whatever is asked beside it.",
                    _object({"instances": _instances(manifest, settings), **_asked(manifest, settings)}, ["instances"]),
                    {**body, "num_samples": manifest.num_samples, "seed": manifest.seed, **_example(manifest)},
                    _object(
                        {
                            "model": _model(manifest),
                            "seed": {"type": "integer", **_INT64},
                            "predictions": _rows(manifest, lambda output: _uncertainty(manifest, output)),
                            **_warnings(),
                        },
                        ["model", "seed", "predictions"],
                    ),
                )
            },
            "/livez": {"get": _probe("The process is alive.")},
            "/readyz": {"get": _probe("The model is loaded and warmed up; 503 while it is not.")},
            "/metrics": {"get": _probe("Prometheus metrics.")},
        },
        "components": {
            "schemas": {
                "Error": _object({"error": {"type": "string"}, "details": {"type": "object"}}, ["error"], closed=False)
            }
        },
    }


_NUMERIC: Schema = {"type": "number"}
# Null stands for "left out", of any setting.
_INTEGER, _NUMBER = ["integer", "null"], ["number", "null"]
_INT64: Schema = {"minimum": -(2**63), "maximum": 2**63 - 1}
_ERRORS = {
    "400": "The request is wrong: says which row and feature, what was found and what is wanted",
    "413": "The body is over the limit",
    "415": "The content type is not JSON, or the body is compressed",
    "429": "Too many requests are waiting",
    "503": "Loading or shutting down",
    "504": "Over the deadline",
}


def _operation(name: str, summary: str, body: Schema, example: Schema, answer: Schema) -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body, "example": example}}},
        "responses": {
            "200": {"description": "One answer for each instance, in order", "content": _json(answer)},
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }


def _probe(summary: str) -> Schema:
    return {"summary": summary, "responses": {"200": {"description": summary}}}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _object(properties: dict[str, Schema], required: list[str], closed: bool = True) -> Schema:
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    return {**schema, "additionalProperties": False} if closed else schema


def _model(manifest: Manifest) -> Schema:
    return _object({"name": {"type": "string"}, "version": {"type": "string"}}, ["name", "version"])


def _asked(manifest: Manifest, settings: Settings) -> dict[str, Schema]:
    draws = {"type": _INTEGER, "minimum": MIN_NUM_SAMPLES, "maximum": settings.max_num_samples}
    return {
        "num_samples": {
            **draws,
            "default": manifest.num_samples,
            "description": "Draws for each row; with a tolerance, the least.",
        },
        "seed": {"type": _INTEGER, **_INT64, "default": manifest.seed, "description": "Which stream of draws."},
        "tolerance": {
            "type": _NUMBER,
            "exclusiveMinimum": 0,
            "exclusiveMaximum": TOLERANCE_LIMIT,
            "description": "Draw until every standard error of the row is at most this, or max_samples are drawn.",
        },
        "max_samples": {**draws, "description": "The most draws for a row, with a tolerance."},
        **_coverage(manifest),
    }


def _coverage(manifest: Manifest) -> dict[str, Schema]:
    asked: Schema = {
        "type": _NUMBER,
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
        "description": "Share of rows whose prediction set or interval is to hold the truth.",
    }
    usual = _usual_coverage(manifest)
    return {"coverage": asked if usual is None else {**asked, "default": usual}}


def _usual_coverage(manifest: Manifest) -> float | None:
    """The coverage where none is asked for, of a model that can promise one."""
    return manifest.calibration.coverage if manifest.calibration is not None and _is_conformal(manifest) else None


def _example(manifest: Manifest) -> dict[str, float]:
    usual = _usual_coverage(manifest)
    return {} if usual is None else {"coverage": usual}


def _is_conformal(manifest: Manifest) -> bool:
    known = (manifest.calibrated(output) for output in manifest.outputs)
    return any(calibrated is not None and calibrated.conformal is not None for calibrated in known)


def _warnings() -> dict[str, Schema]:
    words = "Present where there are too few calibration rows for the coverage: how many are wanted, and what follows."
    return {"warnings": {"type": "array", "items": {"type": "string"}, "description": words}}


def _instances(manifest: Manifest, settings: Settings) -> Schema:
    forms = _instance_forms(manifest)
    bounds = {"type": "array", "minItems": 1, "maxItems": settings.max_rows}
    # All rows have the first one's form.
    return (
        {**bounds, "items": forms[0]} if len(forms) == 1 else {"anyOf": [{**bounds, "items": form} for form in forms]}
    )


def _instance_forms(manifest: Manifest) -> list[Schema]:
    if not manifest.is_table:
        named = _object({item.name: _tensor(item) for item in manifest.inputs}, [item.name for item in manifest.inputs])
        return [_tensor(manifest.inputs[0]), named] if len(manifest.inputs) == 1 else [named]
    columns = [(item, feature) for item in manifest.inputs for feature in item.features or ()]
    values = {feature.name: _column(item, feature) for item, feature in columns}
    row = {"type": "array", "prefixItems": list(values.values()), "minItems": len(values), "maxItems": len(values)}
    return [row, _object(values, [feature.name for _, feature in columns if not feature.nullable])]


def _column(item: ModelInput, feature: Feature) -> Schema:
    # A boolean that may be missing is a float in the graph, and still a boolean in JSON.
    schema = _value("bool" if feature.kind == "boolean" else item.dtype, feature.nullable, feature.unit)
    return schema if feature.kind != "categorical" or feature.nullable else {**schema, "minLength": 1}


def _tensor(item: ModelInput) -> Schema:
    schema = _value(item.dtype)
    for axis in reversed(item.shape):
        schema = {"type": "array", "items": schema, "minItems": axis or 1}
        if axis is not None:
            schema["maxItems"] = axis
    return schema


def _value(dtype: str, nullable: bool = False, unit: str | None = None) -> Schema:
    kind = {"bool": "boolean", "string": "string"}.get(dtype, "integer" if "int" in dtype else "number")
    schema: Schema = {"type": [kind, "null"] if nullable else kind, **_limits(dtype)}
    return {**schema, "description": f"in {unit}"} if unit else schema


def _limits(dtype: str) -> Schema:
    """The numbers that the type can hold."""
    numpy_type = np.dtype("O" if dtype == "string" else dtype)
    if numpy_type.kind in "iu":
        return {"minimum": int(np.iinfo(numpy_type).min), "maximum": int(np.iinfo(numpy_type).max)}
    if numpy_type.kind == "f":
        limits = np.finfo(numpy_type)
        if numpy_type.itemsize == 8:
            return {"minimum": float(limits.min), "maximum": float(limits.max)}
        # What rounds to the largest number is taken as well: up to half of the last digit's worth above it.
        beyond = 2.0**limits.maxexp - 2.0 ** (limits.maxexp - limits.nmant - 2)
        return {"exclusiveMinimum": -beyond, "exclusiveMaximum": beyond}
    return {}


def _rows(manifest: Manifest, answer_of: Any) -> Schema:
    if len(manifest.outputs) == 1:
        return {"type": "array", "items": answer_of(manifest.outputs[0])}
    groups = {output.name: answer_of(output) for output in manifest.outputs}
    return {"type": "array", "items": {"type": "object", "properties": groups, "required": list(groups)}}


def _prediction(output: ModelOutput) -> Schema:
    if output.task == "regression":
        return _object({"mean": _nested(_NUMERIC, output.shape)}, ["mean"])
    return _object({"label": _label(output), "probabilities": _by_class(output)}, ["label", "probabilities"])


def _uncertainty(manifest: Manifest, output: ModelOutput) -> Schema:
    guarantees = _guarantees(manifest, output)
    drawn: dict[str, Schema] = {**guarantees, "num_samples": {"type": "integer"}, "converged": {"type": "boolean"}}
    if output.task == "regression":
        names = ["mean", "epistemic_std", *(["aleatoric_std", "std"] if output.has_aleatoric else []), "standard_error"]
        values: dict[str, Schema] = {name: _nested(_NUMERIC, output.shape) for name in names}
        return _object({**values, **drawn}, [*names, *guarantees], closed=False)
    by_class = {name: _by_class(output) for name in ("probabilities", "std", "standard_error")}
    nats = _nested({"type": "number", "minimum": 0, "description": "in nats"}, output.shape[:-1])
    by_place = dict.fromkeys(("predictive_entropy", "expected_entropy", "mutual_information"), nats)
    properties = {"label": _label(output), **by_class, **by_place}
    return _object({**properties, **drawn}, [*properties, *guarantees], closed=False)


def _guarantees(manifest: Manifest, output: ModelOutput) -> dict[str, Schema]:
    """What the answer has because of calibration rows."""
    calibrated = manifest.calibrated(output)
    found: dict[str, Schema] = {}
    if calibrated is not None and calibrated.conformal is not None:
        if calibrated.conformal.kind == "interval":
            end = _nested({"type": ["number", "null"], "description": "null: no end"}, output.shape)
            coverage = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
            ends = {"lower": end, "upper": end, "coverage": coverage}
            found["interval"] = _object(ends, list(ends))
        else:
            label: Schema = {"type": "string"} if output.labels is None else {"enum": output.labels}
            found["prediction_set"] = {
                "type": "array",
                "items": label,
                "uniqueItems": True,
                "description": "In the labels' order; empty where no label fits like the calibration rows' own did.",
            }
    if calibrated is not None and calibrated.abstention is not None:
        found["abstain"] = {"type": "boolean", "description": "Too uncertain: better asked of somebody else."}
    tensors = {tensor.name for tensor in manifest.signatures[MC_SAMPLE].outputs}
    if f"{output.prefix}novelty" in tensors:
        words = "Distance from the training rows in the network's features; 1 is their median."
        found["novelty"] = {"type": "number", "minimum": 0, "description": words}
    return found


def _label(output: ModelOutput) -> Schema:
    return _nested({"type": "string"}, output.shape[:-1])


def _by_class(output: ModelOutput) -> Schema:
    classes, numbers = output.shape[-1], _nested(_NUMERIC, output.shape[:-1])
    if output.labels is None and classes is None:
        return {"type": "object", "additionalProperties": numbers}
    labels = class_labels(output, classes or 0)
    return _object(dict.fromkeys(labels, numbers), labels)


def _nested(schema: Schema, shape: list[int | None]) -> Schema:
    """Of each place of a row [*shape]: what it has, in nested lists; of a single place that itself."""
    for axis in reversed(shape):
        schema = {"type": "array", "items": schema}
        if axis is not None:
            schema |= {"minItems": axis, "maxItems": axis}
    return schema
