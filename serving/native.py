"""`POST /predict` and `POST /uncertainty`: dropserve's own endpoints."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from models.contract import MIN_NUM_SAMPLES
from serving.core import Asked, Core, Drawn, Pending
from serving.errors import InvalidField, InvalidRequest, choices, quote
from serving.observer import Exchange
from serving.outputs import Outputs
from serving.prediction_sets import Coverage
from serving.runtime import Model
from serving.web import Request, Response, json_response, read_object

Content = dict[str, Any]

INSTANCES = "instances"
PREDICT_FIELDS = (INSTANCES,)
UNCERTAINTY_FIELDS = (INSTANCES, "num_samples", "seed", "tolerance", "max_samples", "coverage")

_INT64 = range(-(2**63), 2**63)
# A tolerance is a float32 in the graph.
TOLERANCE_LIMIT = 3.4e38
_NOTHING = Asked()


class Native:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def predict(self, request: Request) -> Response:
        request.require_json()
        body = await request.body()
        return json_response(await self.predict_content(read_object(body), body, request.exchange))

    async def uncertainty(self, request: Request) -> Response:
        request.require_json()
        body = await request.body()
        # Draws may take long: they are given up when the client goes away.
        work = self.uncertainty_content(read_object(body), body, request.exchange)
        return json_response(await request.outcome(work))

    def predict_content(
        self, content: dict[str, Any], body: bytes | None = None, exchange: Exchange | None = None
    ) -> Pending[Content]:
        """The answer to one `/predict` body: its content, and its bytes where it came as such."""
        _check_fields(content, PREDICT_FIELDS)
        model = self._model(body, exchange)
        arrays = self._core.predict(model, model.reader.read(content[INSTANCES]))
        return Pending(arrays, partial(_prediction, model))

    def uncertainty_content(
        self, content: dict[str, Any], body: bytes | None = None, exchange: Exchange | None = None
    ) -> Pending[Content]:
        """The answer to one `/uncertainty` body, likewise."""
        _check_fields(content, UNCERTAINTY_FIELDS)
        asked = read_asked(content, self._core.settings.max_num_samples)
        model = self._model(body, exchange)
        coverage = model.sets.at(asked.coverage)
        drawn = self._core.draw(model, model.reader.read(content[INSTANCES]), asked)
        return drawn.then(partial(_uncertainty, model, coverage))

    def _model(self, body: bytes | None, exchange: Exchange | None) -> Model:
        model = self._core.model(request=body)
        if exchange is not None:
            exchange.model = model
        return model


def read_asked(content: dict[str, Any], max_num_samples: int) -> Asked:
    """How uncertainty is asked for; raises InvalidField for a value of the wrong type or out of range."""
    if len(content) == 1:
        # The rows, as most requests have it.
        return _NOTHING
    draws = range(MIN_NUM_SAMPLES, max_num_samples + 1)
    asked = Asked(
        num_samples=_integer(content, "num_samples", draws),
        seed=_integer(content, "seed", _INT64),
        tolerance=_number(content, "tolerance", above=0.0, below=TOLERANCE_LIMIT),
        max_samples=_integer(content, "max_samples", draws),
        coverage=_number(content, "coverage", above=0.0, below=1.0),
    )
    if asked.max_samples is not None and asked.max_samples < (asked.num_samples or 0):
        raise InvalidField("max_samples", str(asked.max_samples), f"at least num_samples, {asked.num_samples}")
    return asked


def _check_fields(content: dict[str, Any], allowed: Iterable[str]) -> None:
    for name in content:
        if name not in allowed:
            raise InvalidRequest(f"unknown field {quote(name)}, wanted {choices(allowed)}")
    if INSTANCES not in content:
        raise InvalidField(INSTANCES, "nothing", "a list of rows")


def _integer(content: dict[str, Any], name: str, allowed: range) -> int | None:
    value = content.get(name)
    if value is None:
        return None
    if type(value) is not int or value not in allowed:
        raise InvalidField(name, quote(value), f"an integer from {allowed.start} to {allowed.stop - 1}")
    return value


def _number(content: dict[str, Any], name: str, above: float, below: float) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not above < value < below:
        bounds = f"a number between {above:g} and {below:g}" if below < TOLERANCE_LIMIT else f"a number above {above:g}"
        raise InvalidField(name, quote(value), bounds)
    return float(value)


def _prediction(model: Model, outputs: Outputs) -> Content:
    return {"model": _identity(model), "predictions": model.writer.predictions(outputs)}


def _uncertainty(model: Model, coverage: Coverage, drawn: Drawn) -> Content:
    rows = model.writer.uncertainties(drawn.outputs, drawn.num_samples, drawn.converged, coverage)
    answer = {"model": _identity(model), "seed": drawn.seed, "predictions": rows}
    return {**answer, "warnings": coverage.warnings} if coverage.warnings else answer


def _identity(model: Model) -> dict[str, str]:
    return {"name": model.name, "version": model.version}
