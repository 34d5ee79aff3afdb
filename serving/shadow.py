"""Shadow traffic: a candidate version answers what the current one answers; nobody gets its answers, they are compared.

The candidate's calls go through the same queue, after those that are waiting. A request is skipped where the queue is
not nearly empty: a comparison is never worth a late answer. What a candidate computes counts as work of its version
(rows, calls, queue); what it says, in the comparison alone: entropies, decisions and drift are of answers that somebody
got.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
import structlog

from models import contract
from serving.batcher import Batcher, Call
from serving.errors import ServingError
from serving.graph import Arrays
from serving.metrics import Metrics
from serving.outputs import Outputs
from serving.registry import Registry
from serving.runtime import Model

log = structlog.get_logger()

# Requests in the queue beyond which none is shadowed.
MAX_OPEN_REQUESTS = 32

# What is compared: the signatures' tensors, one number or one vector a row.
_COMPARED = ("probabilities", "mean", "predictive_entropy", "mutual_information", "epistemic_std")


class Shadow:
    """All methods are called on one event loop."""

    def __init__(self, registry: Registry, batcher: Batcher, metrics: Metrics) -> None:
        self._registry = registry
        self._batcher = batcher
        self._metrics = metrics
        # Of each model, the part of a request that its share leaves for the next one.
        self._owed: dict[str, float] = {}
        self._open: set[asyncio.Task[None]] = set()

    def follow(self, call: Call, inputs: Arrays, answer: asyncio.Future[Outputs]) -> None:
        """A request was queued: let the candidate answer it too, if there is one and it is this one's turn."""
        shelf = self._registry.shelves.get(call.model.name)
        if shelf is None or shelf.routing.shadow is None or call.model is not shelf.current:
            return
        candidate = shelf.loaded.get(shelf.routing.shadow.version)
        if candidate is None or candidate is call.model:
            return
        owed = self._owed.get(shelf.name, 0.0) + shelf.routing.shadow.share
        self._owed[shelf.name] = owed - (owed >= 1)
        if owed < 1:
            return
        if self._batcher.open_requests > MAX_OPEN_REQUESTS:
            self._count(call.model, candidate, "skipped")
            return
        draws = candidate.manifest.num_samples if call.function == contract.MC_PREDICT else call.draws
        try:
            if not _is_like(candidate, call.model):
                raise ServingError("its inputs or outputs are not those of the current version")
            other = self._batcher.submit(Call(candidate, call.function, call.scalars, draws, is_answered=False), inputs)
        except ServingError as error:
            self._fail(call.model, candidate, error)
            return
        task = asyncio.ensure_future(self._compare(call.model, candidate, answer, other))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    def close(self) -> None:
        for task in self._open:
            task.cancel()

    async def _compare(
        self, current: Model, candidate: Model, answer: asyncio.Future[Outputs], other: asyncio.Future[Outputs]
    ) -> None:
        await asyncio.wait({answer, other})
        if answer.cancelled() or other.cancelled() or answer.exception() is not None:
            # Nothing was answered that the candidate's answer could be compared with.
            if not other.cancelled():
                other.exception()
            self._count(current, candidate, "skipped")
            return
        failure = other.exception()
        if failure is not None:
            self._fail(current, candidate, failure)
            return
        ours, theirs = answer.result(), other.result()
        unlike = [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
        if unlike:
            # Free axes: as many places as each network makes of the input.
            shapes = f"{list(theirs[unlike[0]].shape)}, wanted {list(ours[unlike[0]].shape)}"
            self._fail(current, candidate, ServingError(f"its {unlike[0]} has the shape {shapes}"))
            return
        self._count(current, candidate, "compared")
        for output in current.manifest.outputs:
            labels = (*current.identity, candidate.version, output.name)
            probabilities = f"{output.prefix}probabilities"
            if probabilities in ours:
                same = ours[probabilities].argmax(-1) == theirs[probabilities].argmax(-1)
                # A row of several places: with the same label in all of them.
                same = same.reshape(len(same), -1).all(axis=1)
                self._metrics.count("dropserve_shadow_rows", (*labels, "true"), int(same.sum()))
                self._metrics.count("dropserve_shadow_rows", (*labels, "false"), int((~same).sum()))
            for statistic in _COMPARED:
                tensor = f"{output.prefix}{statistic}"
                if tensor in ours and tensor in theirs:
                    difference = _largest(ours[tensor], theirs[tensor])
                    self._metrics.observe_all("dropserve_shadow_difference", (*labels, statistic), difference)

    def _count(self, current: Model, candidate: Model, result: Literal["compared", "skipped", "failed"]) -> None:
        self._metrics.count("dropserve_shadow_requests", (*current.identity, candidate.version, result), 1)

    def _fail(self, current: Model, candidate: Model, error: BaseException) -> None:
        self._count(current, candidate, "failed")
        log.warning("shadow failed", model=current.name, version=candidate.version, reason=str(error))


def _is_like(candidate: Model, current: Model) -> bool:
    """Whether both take the same tensors and give the same outputs."""

    def form(model: Model) -> Any:
        manifest = model.manifest
        inputs = [(item.name, item.dtype, item.shape) for item in manifest.inputs]
        return inputs, [(output.name, output.task, output.shape, output.labels) for output in manifest.outputs]

    return form(candidate) == form(current)


def _largest(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[N] the largest difference in each row; rows that have none, as they are not finite, are left out."""
    difference = np.abs(ours.astype(float) - theirs).reshape(len(ours), -1).max(axis=1)
    return difference[np.isfinite(difference)]
