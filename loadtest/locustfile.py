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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import FastHttpUser, User, constant, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from loadtest import answers, subjects, tensors
from loadtest.arrivals import Schedule
from loadtest.latencies import Latencies, percentile_ms
from loadtest.pace import Pace
from loadtest.profile import NATIVE, request_name, spread
from loadtest.server_metrics import read_totals

# Most requests carry one row; some a handful, in which each row must be answered as if alone.
ROWS_PER_REQUEST = (1, 1, 1, 2, 8)
# None: not sent, the model's own default.
NUM_SAMPLES = (None, None, 50, 200)
SEEDS = (None, None, 7)
# What the tensor protocols are asked for: they all name both, so that their answers can be held beside each other.
TENSOR_DRAWS = ((50, 0), (100, 7))
TIMEOUT_S = 30
SHARES = (0.5, 0.95, 0.99)

# One memory for all users of this process: whoever asks, the answer is the same.
MEMORY = answers.Memory()


@events.init_command_line_parser.add_listener
def add_options(parser: Any, **_: Any) -> None:
    options = parser.add_argument_group("dropserve options")
    options.add_argument(
        "--rows",
        action="append",
        default=[],
        help="CSV or JSON file of rows, or MODEL=FILE (default: the server's own)",
    )
    options.add_argument("--target", action="append", default=[], help="the CSV file's column that is no feature")
    options.add_argument("--traffic-seed", type=int, default=0, help="same seed, same traffic")
    options.add_argument("--report", default="", help="write the figures of the run to this JSON file")
    options.add_argument("--phases", default="", help="JSON: [[seconds, requests a second], ...]; none: back to back")
    options.add_argument(
        "--mix", default=json.dumps(NATIVE), help="JSON: weights of the users, or of the models of each"
    )
    options.add_argument("--grpc", default="", help="address of the gRPC port, as 127.0.0.1:8500")


@events.init.add_listener
def choose_users(environment: Any, **_: Any) -> None:
    given = json.loads(environment.parsed_options.mix)
    environment.mix = {
        kind: models if isinstance(models, dict) else {subjects.DEFAULT: models} for kind, models in given.items()
    }
    mix = {kind: sum(models.values()) for kind, models in environment.mix.items()}
    environment.user_classes = [kind for kind in environment.user_classes if mix.get(kind.__name__)]
    users = environment.parsed_options.num_users
    for kind in environment.user_classes:
        kind.weight = mix[kind.__name__]
        if users:
            # So that every process knows how many there are in all of them.
            kind.fixed_count = spread(users, mix)[kind.__name__]
    environment.schedules = {}
    environment.may_begin = Event()
    environment.pace, environment.latencies = Pace(), Latencies()
    environment.events.test_stopping.add_listener(lambda **_: close_schedules(environment))
    environment.events.report_to_master.add_listener(lambda data, **_: data.update(told(environment)))
    environment.events.worker_report.add_listener(lambda data, **_: hear(environment, data))
    environment.events.request.add_listener(
        lambda name, response_time, **_: note_answer(environment, name, response_time)
    )
    environment.events.spawning_complete.add_listener(lambda user_count, **_: draw_up_schedules(environment))


@events.test_start.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Read the rows; watch the server."""
    options = environment.parsed_options
    models = {model: None for weights in environment.mix.values() for model in weights}
    given = subjects.sources(options.rows, options.target, models)
    environment.subjects = subjects.gather(environment.host, environment.mix, given)
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


def close_schedules(environment: Any) -> None:
    environment.pace.unsent += sum(schedule.close() for schedule in environment.schedules.values())


def note_answer(environment: Any, name: str, response_time_ms: float) -> None:
    environment.pace.unanswered -= 1
    environment.latencies.note(name, response_time_ms)


def told(environment: Any) -> dict[str, Any]:
    """What a process of several tells Locust's master, beside what Locust tells."""
    return {"pace": environment.pace.taken(), "latencies": environment.latencies.taken()}


def hear(environment: Any, data: dict[str, Any]) -> None:
    environment.pace.add(data["pace"])
    environment.latencies.add(data["latencies"])


class _Caller:
    """Takes the next request that is due, and sends it; each user has its own stream of choices."""

    environment: Any
    _numbers = itertools.count()

    def on_start(self) -> None:
        self.choices = random.Random(f"{self.environment.parsed_options.traffic_seed} {next(_Caller._numbers)}")

    def some_rows(self) -> tuple[str, subjects.Subject, list[int]]:
        """A model, what is known of it, and the numbers of some of its rows."""
        weights = self.environment.mix[type(self).__name__]
        model = next(iter(weights)) if len(weights) == 1 else self.choices.choices([*weights], [*weights.values()])[0]
        subject = self.environment.subjects[model]
        return model, subject, self.choices.choices(range(len(subject.rows)), k=self.choices.choice(ROWS_PER_REQUEST))

    def due(self) -> float:
        """Wait until the next request is due; when that was, which is past where all users were busy."""
        self.environment.may_begin.wait()
        pace = self.environment.pace
        schedule = self.environment.schedules.get(type(self))
        if schedule is None:
            pace.unanswered += 1
            return time.perf_counter()
        at = schedule.take()
        if at is None:
            raise StopUser
        is_free = at > time.perf_counter()
        gevent.sleep(max(0.0, at - time.perf_counter()))
        if is_free:
            pace.sent(time.perf_counter() - at)
        pace.unanswered += 1
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

    def ask(self, path: str, name: str, instances: list[Any], due: float, check: Any, **parameters: Any) -> None:
        body = {"instances": instances, **parameters}
        self.send(path, name, json.dumps(body).encode(), {"Content-Type": "application/json"}, due, check)


class PredictUser(_HttpCaller):
    """`POST /predict`."""

    @task
    def predict(self) -> None:
        due = self.due()
        model, subject, row_numbers = self.some_rows()
        instances = [subject.rows[number] for number in row_numbers]

        def check(answer: Any) -> None:
            MEMORY.check_predict(answer.content, row_numbers, model)

        self.ask("/predict", request_name("PredictUser", model), instances, due, check)


class UncertaintyUser(_HttpCaller):
    """`POST /uncertainty`."""

    @task
    def uncertainty(self) -> None:
        due = self.due()
        model, subject, row_numbers = self.some_rows()
        instances = [subject.rows[number] for number in row_numbers]
        sent = {"num_samples": self.choices.choice(NUM_SAMPLES), "seed": self.choices.choice(SEEDS)}
        parameters = {name: value for name, value in sent.items() if value is not None}

        def check(answer: Any) -> None:
            MEMORY.check_uncertainty(answer.content, row_numbers, **sent, model=model)

        self.ask("/uncertainty", request_name("UncertaintyUser", model), instances, due, check, **parameters)


@dataclass(frozen=True)
class _Question:
    """name: how the request is called; vectors: the rows with these numbers."""

    name: str
    table: tensors.Table
    row_numbers: list[int]
    vectors: list[list[float]]
    num_samples: int
    seed: int

    @property
    def asked(self) -> tuple[tensors.Table, list[list[float]], int, int]:
        return self.table, self.vectors, self.num_samples, self.seed

    def check(self, outputs: tensors.Outputs) -> None:
        tensors.check_outputs(self.table, outputs)
        found = tensors.predictions(outputs, len(self.row_numbers))
        MEMORY.check_draws(self.table.model, found, self.row_numbers, self.num_samples, self.seed)


class _TensorCaller(_Caller):
    def question(self) -> _Question:
        model, subject, row_numbers = self.some_rows()
        assert subject.table is not None
        vectors = [subject.vectors[number] for number in row_numbers]
        name = request_name(type(self).__name__, model)
        return _Question(name, subject.table, row_numbers, vectors, *self.choices.choice(TENSOR_DRAWS))


class TensorFlowServingUser(_TensorCaller, _HttpCaller):
    """`POST /v1/models/NAME:predict`, TensorFlow Serving's REST."""

    @task
    def predict(self) -> None:
        due = self.due()
        question = self.question()

        def check(answer: Any) -> None:
            question.check(tensors.rest_outputs(answer.content))

        path = f"/v1/models/{question.table.model}:predict"
        headers = {"Content-Type": "application/json"}
        self.send(path, question.name, tensors.rest_body(*question.asked), headers, due, check)


class V2JsonUser(_TensorCaller, _HttpCaller):
    """`POST /v2/models/NAME/infer`, Open Inference in JSON."""

    binary = False

    @task
    def infer(self) -> None:
        due = self.due()
        question = self.question()
        model = question.table.model
        body, headers = tensors.v2_body(*question.asked, binary=self.binary)

        def check(answer: Any) -> None:
            length = answer.headers.get("Inference-Header-Content-Length")
            question.check(tensors.v2_outputs(answer.content, length, model))

        self.send(f"/v2/models/{model}/infer", question.name, body, headers, due, check)


class V2BinaryUser(V2JsonUser):
    """The same with raw tensors behind the JSON."""

    binary = True


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
        question = self.question()
        failure: Exception | None = None
        content = b""
        try:
            body = self._messages.body(*question.asked)
            content = self._call(body, timeout=TIMEOUT_S)
            taken = (time.perf_counter() - due) * 1000
            question.check(self._messages.outputs(content, question.table.model))
        except grpc.RpcError as error:
            taken = (time.perf_counter() - due) * 1000
            failure = answers.AnswerError(f"status {error.code().name}, wanted OK: {error.details()}")
        except answers.AnswerError as error:
            failure = error
        self.environment.events.request.fire(
            request_type="gRPC",
            name=question.name,
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
    """Once a second, what Locust and the server say of the last ones; the end, once every request was sent."""
    environment.may_begin.wait()
    begin = time.perf_counter()
    total, before = environment.stats.total, Counter[int]()
    while True:
        now = environment.latencies.all()
        environment.timeline.append(
            {
                "second": time.perf_counter() - begin,
                "requests": total.num_requests,
                "failures": total.num_failures,
                **_percentiles(now - before),
                "server": read_totals(environment.host),
            }
        )
        before = now
        gevent.sleep(1)
        if total.num_requests and environment.runner.user_count == 0:
            environment.runner.quit()
            return


@events.quitting.add_listener
def report(environment: Any, **_: Any) -> None:
    """Write the run's figures; a run in which nothing was answered has failed."""
    if isinstance(environment.runner, WorkerRunner):
        return
    stats = environment.stats
    if stats.total.num_requests == 0:
        environment.process_exit_code = 1
    if path := environment.parsed_options.report:
        entries = sorted(stats.entries.values(), key=lambda entry: entry.name)
        latencies = environment.latencies
        figures = {
            "endpoints": [
                *(_figures(entry, latencies.of(entry.name)) for entry in entries),
                _figures(stats.total, latencies.all()),
            ],
            "errors": [{"name": e.name, "error": str(e.error), "count": e.occurrences} for e in stats.errors.values()],
            "exceptions": [{"error": e["msg"], "count": e["count"]} for e in environment.runner.exceptions.values()],
            "timeline": getattr(environment, "timeline", []),
            "late_ms": environment.pace.late_ms,
            "unsent": environment.pace.unsent,
            "unanswered": environment.pace.unanswered,
        }
        Path(path).write_text(json.dumps(figures), encoding="utf-8")


def _figures(entry: Any, times: Counter[int]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "requests": entry.num_requests,
        "failures": entry.num_failures,
        "requests_per_second": entry.total_rps,
        **_percentiles(times),
    }


def _percentiles(times: Counter[int]) -> dict[str, float | None]:
    return {f"p{round(100 * share)}_ms": percentile_ms(times, share) for share in SHARES}
