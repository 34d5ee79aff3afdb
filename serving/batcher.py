"""Rows of concurrent requests put into one call of the model: bounded, cancellable, never blocking the event loop long.

Mixing requests is safe because a row's answer does not depend on its batch mates. Requests are mixed when they call the
same function of the same model with the same settings (`num_samples`, `seed`, ...) for rows of the same shape.

Two lanes, so that MC work never starves predictions; in each one
- a call waits while every turn of the event loop brings more requests, which many clients keep busy anyway: a larger
  batch costs each of them less. Where requests are few there is nothing to wait for, and no timer;
- a call that is expected to be short runs on the event loop itself, a longer one on the lane's own thread, meanwhile
  the next batch gathers; the thread of the draws has a lower priority, which counts where a core is short only;
- a request with more rows than a call may have is cut into several calls, between which others have their turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from models import contract
from serving.errors import DeadlineExceeded, QueueFull, Unavailable
from serving.graph import Arrays
from serving.metrics import Metrics
from serving.outputs import Outputs
from serving.runtime import Model
from serving.settings import Settings

# How often waiting requests are looked at for a deadline that has passed, in seconds.
SWEEP_S = 0.05
# How long requests are gathered for one call, in seconds, at most: those of 64 busy clients are read in 2 to 6 ms, and
# a call that began without half of them would leave the other half to a call of its own, turn after turn.
GATHER_S = 0.01
# Of the thread of long draws, as `nice` counts: the lowest. They have all that predictions leave over; where those want
# a whole core, 1.4 % of it, as Linux hands out ticks of some milliseconds, and more of them than one in a hundred would
# be in the predictions' 99th percentile.
DRAWS_NICENESS = 19


class Call:
    """What to run: requests with the same call may share a batch."""

    __slots__ = ("draws", "function", "is_answered", "key", "model", "scalars")

    def __init__(
        self,
        model: Model,
        function: str,
        scalars: tuple[tuple[str, Any], ...] = (),
        draws: int = 1,
        is_answered: bool = True,
    ) -> None:
        """scalars: the call's own arguments by name. draws: for each row, 1 for a prediction: what the call costs.
        is_answered: whether somebody gets what it gives, which is not so of a shadow.
        """
        self.model = model
        self.function = function
        self.scalars = scalars
        self.draws = draws
        self.is_answered = is_answered
        self.key: Hashable = (id(model), function, scalars, is_answered)


class Ticket:
    """One request's place in a lane. A request with many rows is answered in several calls, a part of the rows each."""

    __slots__ = ("arrived", "call", "deadline", "future", "inputs", "parts", "row_draws", "rows", "taken")

    def __init__(
        self, call: Call, inputs: Arrays, rows: int, future: asyncio.Future[Outputs], deadline_s: float
    ) -> None:
        self.arrived = time.monotonic()
        self.call = call
        self.inputs = inputs
        self.rows = rows
        self.row_draws = rows * call.draws
        self.future = future
        self.deadline = self.arrived + deadline_s
        # Rows that are in a call or have been, and the outputs of those that have.
        self.taken = 0
        self.parts: list[Outputs] = []


# Functions whose outputs are statistics of draws.
WATCHED = (contract.MC_PREDICT, contract.MC_SAMPLE, contract.MC_ADAPTIVE)

# A ticket's rows from .. to in one call.
Share = tuple[Ticket, int, int]
# What a call gave to each request, and all of it together; None where it failed.
Ran = tuple[list[Outputs | Exception], Arrays | None]


class _Lane:
    """Waiting requests of one kind, and the thread for calls that are too long for the event loop."""

    def __init__(
        self, name: str, batch_row_draws: int, inline_s: float, metrics: Metrics, niceness: int | None = None
    ) -> None:
        # By batch key; the first key is the next to be served and goes to the end when it has been: no key starves,
        # and a long request makes a short one wait for one call, not for all of its own.
        self._waiting: OrderedDict[Hashable, deque[Ticket]] = OrderedDict()
        self._batch_row_draws = batch_row_draws
        self._inline_s = inline_s
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, f"dropserve-{name}", _lower_priority, (niceness,))
        self._running: list[Share] = []
        self._started = 0.0
        self._turn_planned = False
        # Since when the next call gathers its requests, and how many there were at the last turn of the event loop.
        self._gathers_since = 0.0
        self._gathered = 0
        # What has not been answered, in requests and in rows x draws.
        self.requests = 0
        self.row_draws = 0

    def put(self, key: Hashable, ticket: Ticket) -> None:
        queue = self._waiting.get(key)
        if queue is None:
            queue = self._waiting[key] = deque()
        queue.append(ticket)
        self.requests += 1
        self.row_draws += ticket.row_draws
        if not self._turn_planned:
            self._plan_turn()

    def tickets(self) -> list[Ticket]:
        return [*chain.from_iterable(self._waiting.values()), *(ticket for ticket, _, _ in self._running)]

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _plan_turn(self) -> None:
        if self._waiting and not self._running and not self._turn_planned:
            self._turn_planned = True
            self._gathers_since = time.monotonic()
            self._gathered = 0
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """One call: here if it is short, else on the thread; or another look, while more requests come."""
        if self._gathers():
            asyncio.get_running_loop().call_soon(self._turn)
            return
        self._turn_planned = False
        batch = self._take_batch()
        if batch:
            self._started = time.monotonic()
            call = batch[0][0].call
            row_draws: float = call.draws * sum(stop - start for _, start, stop in batch)
            if call.model.free_inputs:
                row_draws *= call.model.row_length(batch[0][0].inputs)
            if call.model.costs[call.function].seconds(row_draws) > self._inline_s:
                self._running = batch
                done = asyncio.get_running_loop().run_in_executor(self._thread, _run, batch)
                done.add_done_callback(self._thread_done)
                return
            self._deliver(batch, _run(batch))
        self._plan_turn()

    def _gathers(self) -> bool:
        """Whether to wait for another turn of the event loop.

        The last one brought requests, they do not fill a call yet, and there is time left.
        """
        before, self._gathered = self._gathered, self.requests
        is_full = self.row_draws >= self._batch_row_draws
        return self.requests > before and not is_full and time.monotonic() - self._gathers_since < GATHER_S

    def _thread_done(self, done: asyncio.Future[Ran]) -> None:
        batch, self._running = self._running, []
        if not done.cancelled():
            self._deliver(batch, done.result())
        self._plan_turn()

    def _take_batch(self) -> list[Share]:
        """Rows of the next key's requests, as many as one call may have.

        Requests that nobody waits for any more are dropped on the way.
        """
        batch: list[Share] = []
        while self._waiting and not batch:
            key, queue = self._waiting.popitem(last=False)
            call = queue[0].call
            most = max(1, self._batch_row_draws // call.draws)
            if call.function in WATCHED:
                most = min(most, call.model.call_rows(queue[0].inputs, call.draws))
            room = most
            while queue and room:
                ticket = queue[0]
                if ticket.future.done():
                    self._release(queue.popleft())
                    continue
                start = ticket.taken
                if batch and room < ticket.rows - start <= most:
                    # Whole in the next call: to cut it and to put it together costs more than the room is worth.
                    break
                ticket.taken = min(ticket.rows, start + room)
                room -= ticket.taken - start
                batch.append((ticket, start, ticket.taken))
                if ticket.taken == ticket.rows:
                    queue.popleft()
            if queue:
                self._waiting[key] = queue
        return batch

    def _deliver(self, batch: list[Share], ran: Ran) -> None:
        """Give each request its rows, and its answer when it has them all."""
        answers, outputs = ran
        self._record(batch, outputs)
        for (ticket, _, stop), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                # Rows of it that still wait are dropped when their turn comes.
                if not ticket.future.done():
                    ticket.future.set_exception(answer)
            elif stop == ticket.rows:
                if not ticket.future.done():
                    ticket.future.set_result(_put_together([*ticket.parts, answer]))
            else:
                ticket.parts.append(answer)
            if stop == ticket.rows:
                self._release(ticket)

    def _record(self, batch: list[Share], outputs: Arrays | None) -> None:
        started = self._started
        call = batch[0][0].call
        model, manifest = call.model, call.model.manifest
        waits = [started - ticket.arrived for ticket, start, _ in batch if start == 0]
        rows = sum(stop - start for _, start, stop in batch)
        self._metrics.call(model, call.function, waits, rows, rows * call.draws, time.monotonic() - started)
        if outputs is not None and call.function in WATCHED and call.is_answered:
            usual = call.draws == manifest.num_samples and call.function != contract.MC_ADAPTIVE
            self._metrics.drawn(model, outputs, rows, usual)

    def _release(self, ticket: Ticket) -> None:
        self.requests -= 1
        self.row_draws -= ticket.row_draws


class Batcher:
    """Takes work from every protocol. All methods are called on one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        inline_s = settings.inline_ms / 1000
        self._settings = settings
        self._deadline_s = settings.deadline_ms / 1000
        self._predictions = _Lane("predict", settings.batch_rows, inline_s, metrics)
        self._draws = _Lane("draws", settings.batch_row_draws, inline_s, metrics, DRAWS_NICENESS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def open_requests(self) -> int:
        """Requests that wait for an answer."""
        return self._predictions.requests + self._draws.requests

    @property
    def open_row_draws(self) -> int:
        """Their rows x draws."""
        return self._predictions.row_draws + self._draws.row_draws

    def submit(self, call: Call, inputs: Arrays) -> asyncio.Future[Outputs]:
        """Queue the rows of one request; the future gives its own rows of every output, or a ServingError.

        Cancelling the future gives the request up: if its call has not begun, it never will.
        Raises QueueFull where too much is waiting, Unavailable after `close`.
        """
        if self._closed:
            raise Unavailable("the server is shutting down")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        rows = len(next(iter(inputs.values())))
        row_draws = rows * call.draws
        lane = self._predictions if call.function == contract.SERVING_DEFAULT else self._draws
        if lane.requests >= self._settings.max_queue or (
            lane.requests and lane.row_draws + row_draws > self._settings.max_queue_row_draws
        ):
            raise QueueFull
        future: asyncio.Future[Outputs] = self._loop.create_future()
        lane.put(_batch_key(call, inputs), Ticket(call, inputs, rows, future, self._deadline_s))
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return future

    def close(self) -> None:
        """Refuse new work and wait for the threads."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for lane in (self._predictions, self._draws):
            for ticket in lane.tickets():
                if not ticket.future.done():
                    ticket.future.set_exception(Unavailable("the server is shutting down"))
            lane.close()

    def _sweep(self) -> None:
        """Give up what is past its deadline; look again while anything waits.

        One timer for all requests: a timer for each would keep every request's memory for the whole deadline.
        """
        self._sweeper = None
        now = time.monotonic()
        for lane in (self._predictions, self._draws):
            for ticket in lane.tickets():
                if now > ticket.deadline and not ticket.future.done():
                    ticket.future.set_exception(DeadlineExceeded(self._settings.deadline_ms))
        if self.open_requests and not self._closed:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)


def _lower_priority(niceness: int | None) -> None:
    """Of the calling thread, below the process's, where threads have one of their own."""
    if niceness is not None and sys.platform == "linux":
        thread = threading.get_native_id()
        # A sandbox may forbid it: the draws are as urgent as predictions then.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def _batch_key(call: Call, inputs: Arrays) -> Hashable:
    """Equal for requests that fit into one call: the same function and settings, the same shape of a row.

    Only inputs with a free axis can differ in shape.
    """
    free = call.model.free_inputs
    return call.key if not free else (call.key, tuple(inputs[name].shape[1:] for name in free))


def _run(batch: list[Share]) -> Ran:
    """Call the model once for all; give each request its own rows, in the order of the batch.

    Where the call fails each request is run alone: one that the model cannot answer must not fail its batch mates.
    """
    call = batch[0][0].call
    inputs = _joined([{name: x[start:stop] for name, x in ticket.inputs.items()} for ticket, start, stop in batch])
    try:
        outputs = call.model.run(call.function, {**inputs, **dict(call.scalars)})
    except Exception as error:  # whatever TensorFlow raises
        alone: list[Outputs | Exception] = [error]
        return (alone if len(batch) == 1 else [_run([share])[0][0] for share in batch]), None
    answers: list[Outputs | Exception] = []
    made: dict[Hashable, list[Any]] = {}
    first = 0
    for _, start, stop in batch:
        last = first + stop - start
        answers.append(Outputs(outputs, first, last, made))
        first = last
    return answers, outputs


def _put_together(parts: list[Outputs]) -> Outputs:
    """The answer to a request that took several calls."""
    return parts[0] if len(parts) == 1 else Outputs.whole(_joined(parts))


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """The rows of all parts, in order."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
