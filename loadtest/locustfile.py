"""Locust users of a dropserve server: one for each endpoint, every answer checked.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:3000 --users 8 --run-time 20s

`dropserve loadtest` runs just this and prints a verdict.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, events, task

from loadtest import answers, rows

# Most requests carry one row; some a handful, in which each row must be answered as if alone.
ROWS_PER_REQUEST = (1, 1, 1, 2, 8)
# None: not sent, the model's own default.
NUM_SAMPLES = (None, None, 50, 200)
SEEDS = (None, None, 7)
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


@events.test_start.add_listener
def load_rows(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    path = Path(options.rows) if options.rows else None
    environment.rows = rows.choose(environment.host, path, options.target or None)


class _Caller(FastHttpUser):
    """Sends seeded requests back to back, each user with its own stream of choices."""

    abstract = True
    wait_time = constant(0)
    connection_timeout = TIMEOUT_S
    network_timeout = TIMEOUT_S
    _numbers = itertools.count()

    def on_start(self) -> None:
        self.choices = random.Random(f"{self.environment.parsed_options.traffic_seed} {next(self._numbers)}")

    def some_rows(self) -> list[int]:
        return self.choices.choices(range(len(self.environment.rows)), k=self.choices.choice(ROWS_PER_REQUEST))

    def ask(self, path: str, row_numbers: list[int], **parameters: Any) -> Any:
        body = {"instances": [self.environment.rows[number] for number in row_numbers], **parameters}
        return self.client.post(
            path,
            data=json.dumps(body),
            headers={"Content-Type": "application/json"},
            catch_response=True,
        )


class PredictUser(_Caller):
    """`POST /predict`."""

    @task
    def predict(self) -> None:
        row_numbers = self.some_rows()
        with self.ask("/predict", row_numbers) as response:
            try:
                _check_status(response)
                MEMORY.check_predict(response.content, row_numbers)
            except answers.AnswerError as error:
                response.failure(str(error))


class UncertaintyUser(_Caller):
    """`POST /uncertainty`."""

    @task
    def uncertainty(self) -> None:
        row_numbers = self.some_rows()
        sent = {"num_samples": self.choices.choice(NUM_SAMPLES), "seed": self.choices.choice(SEEDS)}
        parameters = {name: value for name, value in sent.items() if value is not None}
        with self.ask("/uncertainty", row_numbers, **parameters) as response:
            try:
                _check_status(response)
                MEMORY.check_uncertainty(response.content, row_numbers, **sent)
            except answers.AnswerError as error:
                response.failure(str(error))


def _check_status(response: Any) -> None:
    if response.status_code != 200:
        text = (response.text or "").strip()[:200]
        raise answers.AnswerError(f"status {response.status_code}, wanted 200: {text or response.error or 'no body'}")


@events.quitting.add_listener
def report(environment: Any, **_: Any) -> None:
    """Write the run's figures; a run in which nothing was answered has failed."""
    stats = environment.stats
    if stats.total.num_requests == 0:
        environment.process_exit_code = 1
    if path := environment.parsed_options.report:
        entries = [*sorted(stats.entries.values(), key=lambda entry: entry.name), stats.total]
        figures = {
            "endpoints": [_figures(entry) for entry in entries],
            "errors": [{"name": e.name, "error": str(e.error), "count": e.occurrences} for e in stats.errors.values()],
            "exceptions": [{"error": e["msg"], "count": e["count"]} for e in environment.runner.exceptions.values()],
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
