"""What every protocol calls: models by name, predictions, uncertainty. Knows nothing of HTTP, gRPC or JSON bodies."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import structlog

from models import contract
from serving.access import Gate
from serving.batcher import Batcher, Call
from serving.errors import InvalidField, StartError, Unavailable, VersionNotFound, choices, quote
from serving.graph import Arrays, prepare_device
from serving.memory import Memory
from serving.metrics import Labels, Metrics
from serving.observer import Observer
from serving.outputs import Outputs
from serving.registry import Registry
from serving.reload import Reloader
from serving.repository import Repository
from serving.runtime import Model
from serving.settings import Settings
from serving.shadow import Shadow

log = structlog.get_logger()

# Where `tolerance` is asked for without `max_samples`.
DEFAULT_MAX_SAMPLES = 2_000
# How often the workers of a server tell each other what they have counted, and unused memory is given back, in seconds.
KEEP_HOUSE_S = 1.0
# How many objects more than before make Python's collector look for circles among the new ones. At its own 700 it
# looked at every few requests' objects over and over, a twentieth of a request's time.
YOUNG_OBJECTS = 20_000


class Asked(NamedTuple):
    """How uncertainty was asked for; what was not asked for is the artifact's default."""

    num_samples: int | None = None
    seed: int | None = None
    # Draw until every standard error of the row is at most this, or `max_samples` are drawn.
    tolerance: float | None = None
    max_samples: int | None = None
    # Of prediction sets and intervals.
    coverage: float | None = None


class Drawn(NamedTuple):
    """Outputs of MC dropout for the rows of one request, and how they were drawn."""

    outputs: Outputs
    seed: int
    num_samples: list[int]
    """Draws of each row."""
    converged: list[bool]
    """Whether the row's standard errors are within the tolerance; True where none was asked for."""


Answer = TypeVar("Answer")
Made = TypeVar("Made")


class Pending(Generic[Answer]):
    """An answer that is being computed: await it, or let its future call back."""

    __slots__ = ("future", "make")

    def __init__(self, future: asyncio.Future[Any], make: Callable[[Any], Answer]) -> None:
        """make: the answer, from the future's result."""
        self.future = future
        self.make = make

    def then(self, make: Callable[[Answer], Made]) -> Pending[Made]:
        """What is made of the answer, when it is there."""
        first = self.make
        return Pending(self.future, lambda result: make(first(result)))

    def __await__(self) -> Generator[Any, None, Answer]:
        result = yield from self.future
        return self.make(result)


class Core:
    """The loaded models and the queue in front of them. `answer` and `draw` are called on one event loop."""

    def __init__(self, settings: Settings, repository: Repository, workers_folder: Path | None = None) -> None:
        """Load what the repository holds; raises StartError with one line where nothing can be served.

        workers_folder: shared by the workers of one server, where there may be several.
        """
        self.gate = Gate(settings)
        device = prepare_device(settings.device)
        log.info("device", device=device.kind, note=device.note)
        self.settings = settings
        self.registry = Registry(settings.model)
        self.metrics = Metrics(settings.drift_window_rows, workers_folder)
        self.observer = Observer(settings, self.metrics)
        self.batcher = Batcher(settings, self.metrics)
        self._shadow = Shadow(self.registry, self.batcher, self.metrics)
        self.is_ready = False
        self.is_draining = False
        self._reloader = Reloader(repository, self.registry, self.metrics, settings.keep_versions, settings.poll_s)
        self._memory = Memory()
        self._following: list[asyncio.Task[None]] = []
        # What is imported stays: the garbage collector need not walk TensorFlow's objects again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
        self._reloader.load_all()
        self._require_a_model()
        self._memory.give_back_libraries()
        if self.registry.default is None and len(self.registry.shelves) == 1:
            # It stays the default, whatever is published later.
            self.registry.default = next(iter(self.registry.shelves))

    async def open(self) -> None:
        """From now on requests are answered, and the repository is followed."""
        self._following = [asyncio.create_task(self._reloader.run()), asyncio.create_task(self._keep_house())]
        self.is_ready = True

    def drain(self) -> None:
        """Take no new request any more; those that are waiting are answered."""
        self.is_ready = False
        self.is_draining = True

    def close(self) -> None:
        self.drain()
        for task in self._following:
            task.cancel()
        self._reloader.close()
        self._shadow.close()
        self.batcher.close()
        self.observer.close()
        self.metrics.write()

    async def _keep_house(self) -> None:
        while True:
            try:
                self.measure()
                self.metrics.write()
                await asyncio.to_thread(self._memory.give_back)
            except Exception:  # the next time may go through
                log.exception("the house could not be kept")
            await asyncio.sleep(KEEP_HOUSE_S)

    def measure(self) -> None:
        """Bring the metrics that are states, not counts, up to date."""
        self.metrics.gauge("dropserve_open_requests", {(): self.batcher.open_requests})
        self.metrics.gauge("dropserve_open_row_draws", {(): self.batcher.open_row_draws})
        states: dict[Labels, float] = {}
        broken: dict[Labels, float] = {}
        for name, shelf in self.registry.shelves.items():
            broken[(name,)] = sum(bool(status.error) for status in shelf.statuses.values())
            for version, status in shelf.statuses.items():
                states[name, str(version), status.state.value] = 1
        self.metrics.gauge("dropserve_version_state", states)
        self.metrics.gauge("dropserve_broken_versions", broken)

    def model(
        self,
        name: str | None = None,
        version: int | str | None = None,
        label: str | None = None,
        request: bytes | Callable[[], bytes] | None = None,
    ) -> Model:
        """The model that answers: the default one without a name, the current version without a version or a label.

        request: the body, or what makes it, by which a canary's share of the requests is chosen.
        Raises NotFound, VersionLoading, or LabelNotFound, which is the caller's mistake.
        """
        if isinstance(version, str):
            number = contract.version_number(version)
            if number is None:
                shelf = self.registry.shelf(name or "")
                raise VersionNotFound(shelf.name, version, sorted(shelf.loaded))
            version = number
        return self.registry.find(name, version, label, request)

    def versions(self, name: str) -> list[str]:
        """The versions of a model that are loaded, oldest first; raises ModelNotFound."""
        return [str(version) for version in sorted(self.registry.shelf(name).loaded)]

    def predict(self, model: Model, inputs: Arrays) -> asyncio.Future[Outputs]:
        """Queue deterministic predictions; the future gives the outputs of `serving_default`."""
        self._require_open()
        self._check_rows(inputs, draws=1)
        return self._submit(Call(model, contract.SERVING_DEFAULT), inputs)

    def draw(self, model: Model, inputs: Arrays, asked: Asked) -> Pending[Drawn]:
        """Queue outputs of `mc_sample`, with as many draws as were asked for or as the tolerance needs.

        With a tolerance, `num_samples` is the least number of draws and `max_samples` the most.
        """
        self._require_open()
        seed = model.manifest.seed if asked.seed is None else asked.seed
        if asked.tolerance is not None:
            drawing = self._draw_until(model, inputs, asked, asked.tolerance, seed)
            return Pending(asyncio.ensure_future(drawing), lambda drawn: drawn)
        rows = len(next(iter(inputs.values())))
        draws = asked.num_samples or model.manifest.num_samples
        outputs = self._sample(model, inputs, draws, seed)
        return Pending(outputs, lambda outputs: Drawn(outputs, seed, [draws] * rows, [True] * rows))

    async def _draw_until(self, model: Model, inputs: Arrays, asked: Asked, tolerance: float, seed: int) -> Drawn:
        """Draws of each row until its standard errors are within the tolerance."""
        least = asked.num_samples or 0
        most = asked.max_samples or min(self.settings.max_num_samples, max(DEFAULT_MAX_SAMPLES, least))
        arrays, num_samples, converged = await self._adapt(model, inputs, seed, tolerance, most)
        short = num_samples < least
        if short.any():
            few = {name: values[short] for name, values in inputs.items()}
            refined = await self._sample(model, few, least, seed)
            arrays = {name: _replaced(values, short, refined[name]) for name, values in arrays.items()}
            num_samples = _replaced(num_samples, short, np.full(int(short.sum()), least))
        return Drawn(Outputs.whole(arrays), seed, num_samples.tolist(), converged.tolist())

    def run(
        self, model: Model, signature: str, inputs: Arrays, num_samples: int | None = None, seed: int | None = None
    ) -> asyncio.Future[Outputs]:
        """Queue a call of a signature by its name; the future gives the signature's outputs.

        What is not asked for is the artifact's default. Raises InvalidField for a setting that is out of range or that
        the signature does not take.
        """
        self._require_open()
        asked = {contract.NUM_SAMPLES: num_samples, contract.SEED: seed}
        if signature in (contract.SERVING_DEFAULT, contract.MC_PREDICT):
            for name, value in asked.items():
                if value is not None:
                    raise InvalidField(name, str(value), f"nothing, as signature {signature} does not take it")
        for name, allowed in (
            (contract.NUM_SAMPLES, range(contract.MIN_NUM_SAMPLES, self.settings.max_num_samples + 1)),
            (contract.SEED, range(-(2**63), 2**63)),
        ):
            value = asked[name]
            if value is not None and value not in allowed:
                raise InvalidField(name, quote(value), f"an integer from {allowed.start} to {allowed.stop - 1}")
        num_samples = model.manifest.num_samples if num_samples is None else num_samples
        seed = model.manifest.seed if seed is None else seed
        match signature:
            case contract.SERVING_DEFAULT:
                return self.predict(model, inputs)
            case contract.MC_PREDICT | contract.MC_SAMPLE:
                return self._sample(model, inputs, num_samples, seed)
            case contract.MC_DRAWS:
                self._check_rows(inputs, num_samples)
                self._check_answer(model, inputs, num_samples)
                scalars = ((contract.NUM_SAMPLES, num_samples), (contract.SEED, seed))
                return self._submit(Call(model, contract.MC_DRAWS, scalars, num_samples), inputs)
        raise InvalidField("signature", quote(signature), f"one of {choices(contract.SIGNATURES)}")

    def _submit(self, call: Call, inputs: Arrays) -> asyncio.Future[Outputs]:
        answer = self.batcher.submit(call, inputs)
        self._shadow.follow(call, inputs, answer)
        return answer

    def _require_open(self) -> None:
        if self.is_draining:
            raise Unavailable("the server is shutting down")

    def _require_a_model(self) -> None:
        shelves = self.registry.shelves
        wanted = [shelves[self.settings.model]] if self.settings.model in shelves else list(shelves.values())
        if not any(shelf.loaded for shelf in wanted):
            reasons = [status.error for shelf in wanted for status in shelf.statuses.values()]
            raise StartError(reasons[0] if reasons else "there is no model to serve")

    def _sample(self, model: Model, inputs: Arrays, num_samples: int, seed: int) -> asyncio.Future[Outputs]:
        self._check_rows(inputs, num_samples)
        function, scalars = contract.drawing(model.manifest, num_samples, seed)
        return self._submit(Call(model, function, tuple(scalars.items()), num_samples), inputs)

    async def _adapt(
        self, model: Model, inputs: Arrays, seed: int, tolerance: float, max_samples: int
    ) -> tuple[Arrays, np.ndarray, np.ndarray]:
        """Outputs of `mc_adaptive`: statistics, draws of each row [N], whether each row converged [N]."""
        self._check_rows(inputs, max_samples)
        scalars = (
            (contract.SEED, seed),
            (contract.TOLERANCE, tolerance),
            (contract.MAX_SAMPLES, max_samples),
        )
        arrays = dict(await self._submit(Call(model, contract.MC_ADAPTIVE, scalars, max_samples), inputs))
        return arrays, arrays.pop(contract.NUM_SAMPLES), arrays.pop(contract.CONVERGED)

    def _check_rows(self, inputs: Arrays, draws: int) -> None:
        rows = len(next(iter(inputs.values())))
        if rows > self.settings.max_rows:
            raise InvalidField("instances", f"{rows} rows", f"at most {self.settings.max_rows} in one request")
        if rows * draws > self.settings.max_row_draws:
            raise InvalidField(
                "num_samples",
                f"{rows} rows x {draws} draws",
                f"rows x draws of at most {self.settings.max_row_draws} in one request",
            )

    def _check_answer(self, model: Model, inputs: Arrays, draws: int) -> None:
        """Raise InvalidField where every draw of every row, as `mc_draws` gives them, would be too long an answer."""
        rows = len(next(iter(inputs.values())))
        # An answer with free axes has them from its rows.
        values = math.ceil(model.draw_values * model.row_length(inputs))
        if rows * draws * values > self.settings.max_drawn_values:
            raise InvalidField(
                "num_samples",
                f"{rows} rows x {draws} draws x {values} values a draw",
                f"at most {self.settings.max_drawn_values} values in one answer: fewer rows or draws, or signature "
                f"{contract.MC_SAMPLE}, whose answers do not grow with the draws",
            )


def _replaced(values: np.ndarray, where: np.ndarray, by: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[where] = by
    return values
