"""Whole numbers beyond 2^53, which float64 has not: exact to the last digit, or refused."""

from collections.abc import Iterator
from typing import Any

import httpx
import keras
import pytest

from models.artifact import publish
from tests.process import bentoml_serve

EXACT = [2**53 + 1, -(2**53) - 1, 2**62 + 3, 2**63 - 1, -(2**63)]
# Some of them are read as float64, as the digits of no integer that JSON's reader has.
BEYOND = [2**63, -(2**63) - 1, 2**64 - 1, 2**64, -(2**70), 10**30, 10**400]


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[httpx.Client]:
    """Of a network that answers with the last digit of a row's number."""
    repository = tmp_path_factory.mktemp("numbers")
    number = keras.Input((1,), dtype="int64", name="number")
    digit = keras.ops.cast(keras.ops.mod(number, 10), "float32")
    answer = keras.layers.Dense(1, kernel_initializer="ones", use_bias=False)(keras.layers.Dropout(0.5)(digit))
    publish(keras.Model(number, answer), name="digits", repository=repository)
    with (
        bentoml_serve(repository, tmp_path_factory.mktemp("numbers-server") / "log") as served,
        httpx.Client(base_url=served.url, timeout=60) as connection,
    ):
        yield connection


def by_native(client: httpx.Client, numbers: list[str]) -> tuple[httpx.Response, Any]:
    answer = send(client, "/predict", f'{{"instances": [{", ".join(f"[{number}]" for number in numbers)}]}}')
    return answer, lambda content: [row["mean"] for row in content["predictions"]]


def by_rows(client: httpx.Client, numbers: list[str]) -> tuple[httpx.Response, Any]:
    rows = ", ".join(f'{{"number": [{number}]}}' for number in numbers)
    return send(client, "/v1/models/digits:predict", f'{{"instances": [{rows}]}}'), lambda found: found["predictions"]


def by_columns(client: httpx.Client, numbers: list[str]) -> tuple[httpx.Response, Any]:
    rows = ", ".join(f"[{number}]" for number in numbers)
    return send(client, "/v1/models/digits:predict", f'{{"inputs": [{rows}]}}'), lambda found: found["outputs"]


def by_open_inference(client: httpx.Client, numbers: list[str]) -> tuple[httpx.Response, Any]:
    tensor = f'{{"name": "number", "shape": [{len(numbers)}, 1], "datatype": "INT64", "data": [{", ".join(numbers)}]}}'
    answer = send(client, "/v2/models/digits/infer", f'{{"inputs": [{tensor}]}}')
    return answer, lambda found: found["outputs"][0]["data"]


def send(client: httpx.Client, path: str, content: str) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": "application/json"})


every_protocol = pytest.mark.parametrize("ask", [by_native, by_rows, by_columns, by_open_inference])


@every_protocol
def test_whole_numbers_are_read_to_the_last_digit(client, ask):
    answer, means = ask(client, list(map(str, EXACT)))
    assert answer.status_code == 200, answer.text
    assert means(answer.json()) == [number % 10 for number in EXACT]
    # float64 would have given other digits.
    assert [number % 10 for number in EXACT[:2]] != [int(float(number)) % 10 for number in EXACT[:2]]


@every_protocol
@pytest.mark.parametrize(
    "number", [*map(str, BEYOND), f"{2**53 + 1}.0", "9.007199254740993e15"], ids=lambda text: text[:24]
)
def test_numbers_that_are_no_int64_are_refused(client, ask, number):
    answer, _ = ask(client, [str(EXACT[0]), number])
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json()["error"], str)
