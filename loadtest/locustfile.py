"""Locust users of a dropserve server: one class for each way to ask, every answer checked.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:3000 --users 8 --run-time 20s

`dropserve loadtest` runs just this and prints a verdict. Started by hand, without --phases, users ask as fast as they
are answered.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import FastHttpUser, User, constant, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from loadtest import answers, rows, tensors
from loadtest.arrivals import Schedule
from loadtest.profile import spread
from loadtest.server_metrics import read_totals

# Most requests carry one row; some a handful, in which each row must be answered as if alone.
ROWS_PER_REQUEST = (1, 1, 1, 2, 8)
# None: not sent, the model's own default.
NUM_SAMPLES = (None, None, 50, 200)
SEEDS = (None, None, 7)
# What the tensor protocols are asked for: they all name both, so that their answers can be held beside each other.
TENSOR_DRAWS = ((50, 0), (100, 7))
TIMEOUT_S = 30

# One memory for all users of this process: whoever asks, the answer is the same.
MEMORY = answers.Memory()


@events.init_command_line_parser.add_listener
def add_options(parser: Any, **_: Any) -> None:
    options = parser.add_argument_group("dropserve options")
    options.add_argument("--rows", default="", help="CSV or JSON file of rows (default: Sonar's, or the server's own)")
    options.add_argument("--target", default="", help="the CSV file's column that is not a feature")
    options.add_argument("--traffic-seed", type=int, default=0, help="same seed, same traffic")
    options.add_argument("--report", default="", help="write the figures of the run to this JSON file")
    options.add_argument("--phases", default="", help="JSON: [[seconds, requests a second], ...]; none: back to back")
    options.add_argument("--mix", default='{"PredictUser": 1, "UncertaintyUser": 1}', help="JSON: weights of the users")
    options.add_argument("--grpc", default="", help="address of the gRPC port, as 127.0.0.1:8500")


@events.init.add_listener
def choose_users(environment: Any, **_: Any) -> None:
    mix = json.loads(environment.parsed_options.mix)
    environment.user_classes = [kind for kind in environment.user_classes if mix.get(kind.__name__)]
    users = environment.parsed_options.num_users
    for kind in environment.user_classes:
        kind.weight = mix[kind.__name__]
        if users:
            # So that every process knows how many there are in all of them.
            kind.fixed_count = spread(users, mix)[kind.__name__]
    environment.schedules = {}
    environment.may_begin = Event()
    environment.events.spawning_complete.add_listener(lambda user_count, **_: draw_up_schedules(environment))


@events.test_start.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Read the rows; watch the server."""
    options = environment.parsed_options
    path = Path(options.rows) if options.rows else None
    environment.rows = rows.choose(environment.host, path, options.target or None)
    if any(issubclass(kind, _TensorCaller) for kind in environment.user_classes):
        environment.table = tensors.check(environment.host, environment.rows)
        environment.vectors = [tensors.vector_of(row) for row in environment.rows]
    environment.timeline = []
    if not isinstance(environment.runner, WorkerRunner):
        gevent.spawn(_watch, environment)


def draw_up_schedules(environment: Any) -> None:
    """Each kind's own, once it is known how many of its users are here: as great a share of its rate is sent from here.

    Locust deals users out to processes by turns, which may leave a process without one of some kind.
    """
    runner, options = environment.runner, environment.parsed_options
    if options.phases and not isinstance(runner, MasterRunner) and not environment.may_begin.is_set():
        phases = json.loads(options.phases)
        total = sum(kind.weight for kind in environment.user_classes)
        for kind in environment.user_classes:
            here = runner.user_classes_count.get(kind.__name__, 0) / kind.fixed_count
            name = f"{options.traffic_seed} {runner.worker_index} {kind.__name__}"
            environment.schedules[kind] = Schedule(phases, kind.weight / total * here, name)
    environment.may_begin.set()


class _Caller:
    """Takes the next request that is due, and sends it; each user has its own stream of choices."""

    environment: Any
    _numbers = itertools.count()

    def on_start(self) -> None:
        self.choices = random.Random(f"{self.environment.parsed_options.traffic_seed} {next(_Caller._numbers)}")

    def some_rows(self) -> list[int]:
        return self.choices.choices(range(len(self.environment.rows)), k=self.choices.choice(ROWS_PER_REQUEST))

    def due(self) -> float:
        """Wait until the next request is due; when that was, which is past where all users were busy."""
        self.environment.may_begin.wait()
        schedule = self.environment.schedules.get(type(self))
        if schedule is None:
            return time.perf_counter()
        at = schedule.take()
        if at is None:
            raise StopUser
        gevent.sleep(max(0.0, at - time.perf_counter()))
        return at


class _HttpCaller(_Caller, FastHttpUser):
    abstract = True
    wait_time = constant(0)
    connection_timeout = TIMEOUT_S
    network_timeout = TIMEOUT_S

    def send(self, path: str, name: str, body: Any, headers: dict[str, str], due: float, check: Any) -> None:
        with self.client.post(path, data=body, headers=headers, name=name, catch_response=True) as response:
            # From when it should have been sent.
            response.request_meta["response_time"] = (time.perf_counter() - due) * 1000
            try:
                _check_status(response)
                check(response)
            except answers.AnswerError as error:
                response.failure(str(error))

    def ask(self, path: str, row_numbers: list[int], due: float, check: Any, **parameters: Any) -> None:
        body = {"instances": [self.environment.rows[number] for number in row_numbers], **parameters}
        self.send(path, path, json.dumps(body).encode(), {"Content-Type": "application/json"}, due, check)


class PredictUser(_HttpCaller):
    """`POST /predict`."""

    @task
    def predict(self) -> None:
        due = self.due()
        row_numbers = self.some_rows()
        self.ask("/predict", row_numbers, due, lambda answer: MEMORY.check_predict(answer.content, row_numbers))


class UncertaintyUser(_HttpCaller):
    """`POST /uncertainty`."""

    @task
    def uncertainty(self) -> None:
        due = self.due()
        row_numbers = self.some_rows()
        sent = {"num_samples": self.choices.choice(NUM_SAMPLES), "seed": self.choices.choice(SEEDS)}
        parameters = {name: value for name, value in sent.items() if value is not None}

        def check(answer: Any) -> None:
            MEMORY.check_uncertainty(answer.content, row_numbers, **sent)

        self.ask("/uncertainty", row_numbers, due, check, **parameters)


class _TensorCaller(_Caller):
    def question(self) -> tuple[list[int], list[list[float]], int, int]:
        """Numbers of the rows, the rows, and the draws to ask for."""
        row_numbers = self.some_rows()
        vectors = [self.environment.vectors[number] for number in row_numbers]
        return row_numbers, vectors, *self.choices.choice(TENSOR_DRAWS)

    def check(self, outputs: tensors.Outputs, row_numbers: list[int], num_samples: int, seed: int) -> None:
        found = tensors.predictions(outputs, len(row_numbers))
        MEMORY.check_draws(self.environment.table.model, found, row_numbers, num_samples, seed)


class TensorFlowServingUser(_TensorCaller, _HttpCaller):
    """`POST /v1/models/NAME:predict`, TensorFlow Serving's REST."""

    @task
    def predict(self) -> None:
        due = self.due()
        row_numbers, vectors, num_samples, seed = self.question()
        table = self.environment.table
        body = tensors.rest_body(table, vectors, num_samples, seed)

        def check(answer: Any) -> None:
            self.check(tensors.rest_outputs(answer.content), row_numbers, num_samples, seed)

        path = f"/v1/models/{table.model}:predict"
        self.send(path, "/v1 predict", body, {"Content-Type": "application/json"}, due, check)


class V2JsonUser(_TensorCaller, _HttpCaller):
    """`POST /v2/models/NAME/infer`, Open Inference in JSON."""

    binary = False
    shown = "/v2 infer, JSON"

    @task
    def infer(self) -> None:
        due = self.due()
        row_numbers, vectors, num_samples, seed = self.question()
        table = self.environment.table
        body, headers = tensors.v2_body(table, vectors, num_samples, seed, binary=self.binary)

        def check(answer: Any) -> None:
            length = answer.headers.get("Inference-Header-Content-Length")
            self.check(tensors.v2_outputs(answer.content, length), row_numbers, num_samples, seed)

        self.send(f"/v2/models/{table.model}/infer", self.shown, body, headers, due, check)


class V2BinaryUser(V2JsonUser):
    """The same with raw tensors behind the JSON."""

    binary = True
    shown = "/v2 infer, binary"


class GrpcUser(_TensorCaller, User):
    """`tensorflow.serving.PredictionService/Predict`."""

    wait_time = constant(0)

    def on_start(self) -> None:
        import grpc
        import grpc.experimental.gevent
        from google.protobuf.descriptor_pool import DescriptorPool
        from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

        super().on_start()
        # gRPC's own threads would stop all other users while one of them waits.
        grpc.experimental.gevent.init_gevent()
        channel = grpc.insecure_channel(self.environment.parsed_options.grpc)
        self._messages = tensors.GrpcMessages(DescriptorPool(ProtoReflectionDescriptorDatabase(channel)))
        self._call = self._messages.call(channel)

    @task
    def predict(self) -> None:
        import grpc

        due = self.due()
        row_numbers, vectors, num_samples, seed = self.question()
        failure: Exception | None = None
        content = b""
        try:
            body = self._messages.body(self.environment.table, vectors, num_samples, seed)
            content = self._call(body, timeout=TIMEOUT_S)
            taken = (time.perf_counter() - due) * 1000
            self.check(self._messages.outputs(content), row_numbers, num_samples, seed)
        except grpc.RpcError as error:
            taken = (time.perf_counter() - due) * 1000
            failure = answers.AnswerError(f"status {error.code().name}, wanted OK: {error.details()}")
        except answers.AnswerError as error:
            failure = error
        self.environment.events.request.fire(
            request_type="gRPC",
            name="gRPC Predict",
            response_time=taken,
            response_length=len(content),
            exception=failure,
            context={},
        )


def _check_status(response: Any) -> None:
    if response.status_code != 200:
        text = (response.text or "").strip()[:200]
        raise answers.AnswerError(f"status {response.status_code}, wanted 200: {text or response.error or 'no body'}")


def _watch(environment: Any) -> None:
    """Once a second, what Locust and the server say of the last ones."""
    begin = time.perf_counter()
    while True:
        total = environment.stats.total
        percentile = total.get_current_response_time_percentile
        environment.timeline.append(
            {
                "second": time.perf_counter() - begin,
                "requests": total.num_requests,
                "failures": total.num_failures,
                "p50_ms": percentile(0.5),
                "p95_ms": percentile(0.95),
                "p99_ms": percentile(0.99),
                "server": read_totals(environment.host),
            }
        )
        gevent.sleep(1)


@events.quitting.add_listener
def report(environment: Any, **_: Any) -> None:
    """Write the run's figures; a run in which nothing was answered has failed."""
    if isinstance(environment.runner, WorkerRunner):
        return
    stats = environment.stats
    if stats.total.num_requests == 0:
        environment.process_exit_code = 1
    if path := environment.parsed_options.report:
        entries = [*sorted(stats.entries.values(), key=lambda entry: entry.name), stats.total]
        figures = {
            "endpoints": [_figures(entry) for entry in entries],
            "errors": [{"name": e.name, "error": str(e.error), "count": e.occurrences} for e in stats.errors.values()],
            "exceptions": [{"error": e["msg"], "count": e["count"]} for e in environment.runner.exceptions.values()],
            "timeline": getattr(environment, "timeline", []),
        }
        Path(path).write_text(json.dumps(figures), encoding="utf-8")


def _figures(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "requests": entry.num_requests,
        "failures": entry.num_failures,
        "requests_per_second": entry.total_rps,
        "p50_ms": entry.get_response_time_percentile(0.5),
        "p95_ms": entry.get_response_time_percentile(0.95),
        "p99_ms": entry.get_response_time_percentile(0.99),
    }
