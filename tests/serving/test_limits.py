"""Every limit over HTTP: a clear refusal with the right status, and the server goes on."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import keras
import numpy as np
import orjson
import pytest

from models.artifact import publish
from tests.process import bentoml_serve, free_port
from tests.serving.samples import samples, total
from tests.serving.versions import publish_as, wait_for

pytestmark = pytest.mark.alone

LIMITS = {
    "DROPSERVE_MAX_CONCURRENCY": "3",
    "DROPSERVE_BODY_TIMEOUT_S": "3",
    "DROPSERVE_MAX_QUEUE": "1",
    "DROPSERVE_DEADLINE_MS": "1500",
    "DROPSERVE_MAX_ROWS": "200",
    "DROPSERVE_MAX_ROW_DRAWS": str(10**9),
    "DROPSERVE_MAX_QUEUE_ROW_DRAWS": str(10**9),
    "DROPSERVE_MAX_NUM_SAMPLES": "1000000",
    "DROPSERVE_MAX_BODY_BYTES": "400000",
    "DROPSERVE_MAX_DRAWN_VALUES": "1200",
    "DROPSERVE_MODEL": "sonar",
}
HALF = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"


@pytest.fixture(scope="module")
def rest_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("limits") / "log"


@pytest.fixture(scope="module")
def client(trained, tmp_path_factory, rest_port, log) -> Iterator[httpx.Client]:
    repository = tmp_path_factory.mktemp("limited")
    publish_as(trained.folder, repository, 1)
    # A class of three for each step of a sequence of any length.
    steps = keras.Input((None, 2), name="steps")
    classes = keras.layers.Dense(3, activation="softmax", name="class")(keras.layers.Dropout(0.3)(steps))
    publish(keras.Model(steps, classes), name="steps", repository=repository)
    with (
        bentoml_serve(repository, log, DROPSERVE_REST_PORT=str(rest_port), **LIMITS) as served,  # type: ignore[arg-type]
        httpx.Client(base_url=served.url, timeout=60) as connection,
    ):
        yield connection


def half_open(client: httpx.Client) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30)
    connection.sendall(HALF)
    return connection


def test_bodies_that_do_not_come_take_places_for_a_while_and_no_longer(client, trained):
    body = {"instances": trained.instances[:1]}
    slow = [half_open(client) for _ in range(3)]
    answers: list[httpx.Response] = []

    def is_refused() -> bool:
        answers.append(client.post("/predict", json=body))
        return answers[-1].status_code == 429

    wait_for(is_refused, "a refusal")
    assert answers[-1].headers["retry-after"] == "1"
    assert "too many requests" in answers[-1].json()["error"]
    # Probes are answered whoever else is there.
    assert client.get("/readyz").status_code == 200
    for connection in slow:
        with connection:
            said = b""
            while part := connection.recv(65_536):
                said += part
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"the body was not complete after 3 s" in said
    assert client.post("/predict", json=body).status_code == 200


def test_a_body_in_slow_pieces_that_is_in_time_is_answered(client, trained):
    body = orjson.dumps({"instances": trained.instances[:1]})
    head = HALF[: HALF.index(b"content-length")] + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as connection:
        connection.sendall(head)
        for start in range(0, len(body), 200):
            connection.sendall(body[start : start + 200])
            time.sleep(0.05)
        said = b""
        while part := connection.recv(65_536):
            said += part
    assert said.startswith(b"HTTP/1.1 200 ")


def whole(body: dict, headers: str = "", query: str = "") -> bytes:
    content = orjson.dumps(body)
    head = f"POST /predict{query} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def answered(connection: socket.socket, content: bytes) -> bytes:
    """The status line of the answer, which is read to its end."""
    connection.sendall(content)
    said = b""
    while b"\r\n\r\n" not in said:
        said += connection.recv(65_536)
    head, _, body = said.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)
    return head.partition(b"\r\n")[0]


# What comes before on the same connection, by who answers it.
EARLIER: dict[str, dict[str, str] | None] = {
    "nothing": None,
    "a plain request": {},
    "one of uvicorn's": {"query": "?"},
    "one that asks for HTTP/2": {
        "headers": "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AA\r\n"
    },
}


@pytest.mark.parametrize(
    ("before", "piece"),
    # Empty lines after one that asked for HTTP/2 are a mistake, which is refused at once.
    [*((before, b"a") for before in EARLIER), *((before, b"\r\n") for before in list(EARLIER)[:3])],
)
def test_a_head_that_never_ends_is_not_waited_for(client, rest_port, trained, before, piece):
    earlier = EARLIER[before]
    with socket.create_connection(("127.0.0.1", rest_port), timeout=30) as connection:
        if earlier is not None:
            content = whole({"instances": trained.instances[:1]}, **earlier)
            assert answered(connection, content) == b"HTTP/1.1 200 OK"
        connection.sendall(b"POST /predict HTTP/1.1\r\nx-long: " if piece == b"a" else piece)
        connection.settimeout(0.1)
        said, begun = b"", time.monotonic()
        while not said:
            assert time.monotonic() - begun < 30, "the connection is still open"
            connection.sendall(piece)
            with contextlib.suppress(TimeoutError):
                said = connection.recv(65_536)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"the head of the request was not complete after 3 s" in said
        connection.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(65_536) == b""


def test_a_head_that_is_not_waited_for_is_counted_and_logged(client, rest_port, log):
    def refused() -> float:
        return total(samples(client), "dropserve_requests_total", protocol="none", code="408")

    before = refused()
    with socket.create_connection(("127.0.0.1", rest_port), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nx-begun: ")
        head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
    assert "not complete after 3 s" in json.loads(body)["error"]
    fields = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:])
    assert fields["connection"] == "close"
    assert refused() == before + 1
    wait_for(lambda: fields["x-request-id"] in log.read_text(), "the line in the log")
    line = next(line for line in log.read_text().splitlines() if fields["x-request-id"] in line)
    event = json.loads(line)
    assert (event["code"], event["protocol"], event["path"]) == ("408", "none", "")
    assert event["duration_ms"] >= 3_000


def test_a_connection_on_which_nothing_comes_is_closed(client, rest_port):
    with socket.create_connection(("127.0.0.1", rest_port), timeout=30) as connection:
        assert connection.recv(65_536) == b""


@pytest.mark.parametrize("earlier", list(EARLIER.values())[1:], ids=list(EARLIER)[1:])
def test_a_connection_that_rests_after_an_answer_is_kept(client, rest_port, trained, earlier):
    content = whole({"instances": trained.instances[:1]}, **earlier)
    with socket.create_connection(("127.0.0.1", rest_port), timeout=30) as connection:
        assert answered(connection, content) == b"HTTP/1.1 200 OK"
        # Longer than a head may take, and than that is looked at.
        time.sleep(5)
        assert answered(connection, content) == b"HTTP/1.1 200 OK"


def test_work_beyond_the_deadline_is_given_up_and_work_beyond_the_queue_refused(client, trained):
    """One request takes longer than its deadline; another one, meanwhile, finds the queue full; predictions go on."""
    long = {"instances": trained.instances[:100], "num_samples": 1_000_000}
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(httpx.post(f"{client.base_url}/uncertainty", json=long, timeout=60).status_code)

    first = threading.Thread(target=ask)
    first.start()
    wait_for(lambda: "dropserve_open_requests 1.0" in client.get("/metrics").text, "the long request")
    second = client.post("/uncertainty", json=long)
    assert second.status_code == 429
    assert second.headers["retry-after"] == "1"
    assert client.post("/predict", json={"instances": trained.instances[:1]}).status_code == 200
    first.join()
    assert statuses == [504]


def wait_for_an_empty_queue(client: httpx.Client) -> None:
    """What an earlier test gave up holds the only place in the queue until its call ends."""
    wait_for(lambda: "dropserve_open_requests 0.0" in client.get("/metrics").text, "an empty queue")


@pytest.mark.parametrize(
    ("rows", "fields", "status", "said"),
    [
        (201, {}, 400, "found 201 rows, wanted at most 200"),
        (2, {"num_samples": 1_000_001}, 400, "wanted an integer from 2 to 1000000"),
        (200, {"num_samples": 1_000_000, "tolerance": None}, 504, "no answer within 1500 ms"),
    ],
)
def test_rows_and_draws(client, trained, rows, fields, status, said):
    wait_for_an_empty_queue(client)
    answer = client.post("/uncertainty", json={"instances": (trained.instances * 2)[:rows], **fields})
    assert answer.status_code == status
    assert said in answer.json()["error"]


def draws_of(client: httpx.Client, model: str, name: str, rows: list, num_samples: int) -> httpx.Response:
    inputs = {name: rows, "num_samples": num_samples, "seed": 1}
    return client.post(f"/v1/models/{model}:predict", json={"signature_name": "mc_draws", "inputs": inputs})


@pytest.mark.parametrize(
    ("model", "rows", "num_samples", "values"),
    [("sonar", 3, 200, 2), ("steps", 2, 10, 60)],
    ids=["fixed rows", "rows of any length"],
)
def test_an_answer_with_every_draw_has_so_many_values_and_no_more(client, trained, model, rows, num_samples, values):
    wait_for_an_empty_queue(client)
    name = "features" if model == "sonar" else "steps"
    given = trained.instances[:rows] if model == "sonar" else [[[0.5, 1.0]] * 20] * rows
    answer = draws_of(client, model, name, given, num_samples)
    assert answer.status_code == 200
    assert np.size(answer.json()["outputs"]) == rows * num_samples * values == 1_200
    refused = draws_of(client, model, name, given, num_samples + 1)
    assert refused.status_code == 400
    found = f"num_samples: found {rows} rows x {num_samples + 1} draws x {values} values a draw, wanted at most 1200"
    assert found in refused.json()["error"]


def test_a_body_that_is_too_long(client):
    answer = client.post("/predict", content=b" " * 400_001, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert "400000 bytes" in answer.json()["error"]


def test_a_body_that_says_to_be_too_long_is_not_waited_for(client):
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as connection:
        connection.sendall(HALF.replace(b"1000", b"400001"))
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"400000 bytes" in answer


# Requests that are refused before they are whole, with pieces that their bodies may go on in for ever.
CHUNKED = b"transfer-encoding: chunked\r\n\r\n61a81\r\n" + b"a" * 400_001 + b"\r\n"
HTTP_2 = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AA\r\n"
LONG = b"content-length: 400001\r\n\r\n"
REFUSED = {
    "by its length": (b"/predict", LONG, b"413", b"a"),
    "by its length, though it would rather speak HTTP/2": (b"/predict", HTTP_2 + LONG, b"413", b"a"),
    "by its chunks": (b"/predict", CHUNKED, b"413", b"1\r\na\r\n"),
    "by its path": (b"/nothing", LONG, b"404", b"a"),
}


def refuse(connection: socket.socket, kind: str) -> None:
    """Send as much of a request as is refused, and read the answer."""
    path, rest, status, _ = REFUSED[kind]
    assert answered(connection, b"POST %b HTTP/1.1\r\nhost: x\r\n%b" % (path, rest)).split()[1] == status


@pytest.mark.parametrize(
    ("kind", "piece"), [*((kind, REFUSED[kind][-1]) for kind in REFUSED), ("by its chunks", b"no chunk\r\n")]
)
def test_a_request_that_is_refused_before_it_is_whole_has_one_answer(client, rest_port, kind, piece):
    with socket.create_connection(("127.0.0.1", rest_port), timeout=30) as connection:
        refuse(connection, kind)
        connection.settimeout(0.1)
        begun = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                assert time.monotonic() - begun < 30, "the connection is still open"
                connection.sendall(piece)
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(65_536) == b""
                    break


@pytest.mark.parametrize("kind", REFUSED)
def test_a_connection_whose_refused_request_comes_to_its_end_is_kept(client, rest_port, trained, kind):
    rest = b"0\r\n\r\n" if kind == "by its chunks" else b"a" * 400_001
    following = whole({"instances": trained.instances[:1]})
    with socket.create_connection(("127.0.0.1", rest_port), timeout=30) as connection:
        # The second time it rests longer than a head may take.
        for pause_s in (0, 5):
            refuse(connection, kind)
            connection.sendall(rest[:1])
            time.sleep(0.2)
            connection.sendall(rest[1:])
            time.sleep(pause_s)
            assert answered(connection, following) == b"HTTP/1.1 200 OK"
