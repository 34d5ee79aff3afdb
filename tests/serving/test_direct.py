"""Requests that the bare port answers without ASGI: the same answers as uvicorn's, whatever way their bytes come."""

import contextlib
import gzip
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tests.process import bentoml_serve, free_port
from tests.serving.samples import samples, total
from tests.serving.versions import wait_for

pytestmark = pytest.mark.alone

# Answers differ in them from request to request.
OWN = {"date", "x-request-id", "traceparent"}


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory, port):
    settings: dict[str, Any] = {
        "DROPSERVE_REST_PORT": str(port),
        "DROPSERVE_MAX_ROW_DRAWS": str(10**9),
        "DROPSERVE_MAX_QUEUE_ROW_DRAWS": str(10**10),
    }
    with bentoml_serve(trained.repository, tmp_path_factory.mktemp("direct") / "log", **settings) as server:
        yield server


class Connection:
    """A client that writes its own bytes."""

    def __init__(self, port: int, timeout: float = 60) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self._answers = self.socket.makefile("rb")

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self.socket.close()

    def send(self, content: bytes) -> None:
        self.socket.sendall(content)

    def read(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        status = int(self._answers.readline().split()[1])
        lines = iter(lambda: self._answers.readline().decode().strip(), "")
        headers = dict(line.split(": ", 1) for line in lines)
        return status, headers, self._answers.read(int(headers["content-length"]))

    def ask(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        self.send(content)
        return self.read()

    def is_closed(self) -> bool:
        return self._answers.read(1) == b""


@pytest.fixture
def connection(served, port):
    with Connection(port) as opened:
        yield opened


def request(body: Any, path: str = "/predict", *, by_uvicorn: bool = False, headers: str = "") -> bytes:
    """A request as bytes; with a query it is none of those that are answered directly."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    target = f"{path}?" if by_uvicorn else path
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


BAD_BODIES = {
    "nothing": b"",
    "half of JSON": b'{"instances": [',
    "not an object": b"[1]",
    "an unknown field": b'{"instances": [[1]], "rows": 1}',
    "no rows": b'{"instances": []}',
    "a row of one": b'{"instances": [[1]]}',
    "no UTF-8": b'{"instances": "\xff"}',
}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/predict", {}),
        ("/uncertainty", {}),
        ("/uncertainty", {"num_samples": 30, "seed": 7, "coverage": 0.8}),
        ("/uncertainty", {"tolerance": 0.01, "num_samples": 50, "max_samples": 3_000}),
        ("/uncertainty", {"num_samples": 0}),
        ("/predict", {"num_samples": 10}),
    ],
    ids=str,
)
def test_answers_are_uvicorn_s(connection, trained, path, fields):
    body = {"instances": trained.instances[:3], **fields}
    same = "X-Request-Id: abc\r\nTraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
    for headers in ("", same):
        direct = connection.ask(request(body, path, headers=headers))
        by_uvicorn = connection.ask(request(body, path, headers=headers, by_uvicorn=True))
        assert direct[0] == by_uvicorn[0]
        assert direct[2] == by_uvicorn[2]
        assert list(direct[1]) == list(by_uvicorn[1])
        assert {name: direct[1][name] for name in direct[1].keys() - OWN} == {
            name: by_uvicorn[1][name] for name in by_uvicorn[1].keys() - OWN
        }
        assert not headers or direct[1]["x-request-id"] == "abc"


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_refusals_are_uvicorn_s(connection, body):
    direct = connection.ask(request(body))
    by_uvicorn = connection.ask(request(body, by_uvicorn=True))
    assert direct[0] == by_uvicorn[0] == 400
    assert direct[2] == by_uvicorn[2]


def test_requests_of_every_kind_in_one_piece_are_answered_in_their_order(connection, trained):
    rows = [{"instances": [row]} for row in trained.instances[:4]]
    page = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    alone = [connection.ask(request(body))[2] for body in rows]
    connection.send(
        request(rows[0])
        + request(b"{")
        + request(rows[1], "/uncertainty")
        + request(rows[1])
        + page
        + request(rows[2])
        + request(rows[3])
    )
    found = [connection.read() for _ in range(7)]
    assert [status for status, _, _ in found] == [200, 400, 200, 200, 200, 200, 200]
    assert [found[place][2] for place in (0, 3, 5, 6)] == alone


@pytest.mark.parametrize("pause_s", [0.0, 0.02, 0.2], ids=["at once", "soon", "late"])
def test_a_request_may_come_in_pieces(connection, trained, pause_s):
    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    content = request({"instances": trained.instances[:1]})
    whole = connection.ask(content)
    size = 20 if pause_s == 0 else 150
    for start in range(0, len(content), size):
        connection.send(content[start : start + size])
        time.sleep(pause_s)
    assert connection.read()[2] == whole[2]


def test_a_long_body_is_answered_too(connection, trained):
    body = {"instances": trained.instances}
    content = request(body)
    assert len(content) > 2**16
    answer = json.loads(connection.ask(content)[2])
    assert len(answer["predictions"]) == len(trained.instances)
    one = json.loads(connection.ask(request({"instances": trained.instances[:1]}))[2])
    assert one["predictions"] == answer["predictions"][:1]


def test_many_bad_requests_in_one_piece_are_refused_one_by_one(connection, trained):
    """More than there may be calls inside of one another."""
    connection.send(request(b"{") * 5_000 + request({"instances": trained.instances[:1]}))
    assert [connection.read()[0] for _ in range(5_001)] == [400] * 5_000 + [200]


def test_a_client_that_asks_and_never_reads_is_held_up(served, port, trained):
    content = request({"instances": trained.instances[:20], "num_samples": 2}, "/uncertainty")
    asked = 0
    with Connection(port, timeout=2) as connection:
        with contextlib.suppress(TimeoutError):
            while asked < 10_000:
                connection.send(content)
                asked += 1
        # Long before the end: its answers and requests fill the buffers between both, and no more.
        assert 0 < asked < 10_000
        answer = httpx.post(f"http://127.0.0.1:{port}/predict", json={"instances": trained.instances[:1]}, timeout=60)
        assert answer.status_code == 200
        connection.socket.settimeout(60)
        assert connection.read()[0] == 200


@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "with a header that ends it"])
def test_a_connection_is_kept_unless_it_is_to_be_closed(connection, trained, is_plain):
    content = request({"instances": trained.instances[:1]}, headers="" if is_plain else "Connection: close\r\n")
    status, headers, _ = connection.ask(content)
    assert status == 200
    if is_plain:
        assert "connection" not in headers
        assert connection.ask(content)[0] == 200
    else:
        assert headers["connection"] == "close"
        assert connection.is_closed()


@pytest.mark.parametrize("path", ["/predict", "/v1/models/sonar:predict"])
def test_a_request_that_would_rather_speak_http_2_is_answered(connection, trained, path):
    """As Java's own client sends them, unless it is told otherwise."""
    wish = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    found = [connection.ask(request({"instances": trained.instances[:3]}, path, headers=wish)) for _ in range(2)]
    plain = connection.ask(request({"instances": trained.instances[:3]}, path))
    assert [(status, content) for status, _, content in found] == [(200, plain[2])] * 2


def test_a_request_for_a_websocket_is_one_like_any_other(connection):
    wish = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    status, headers, content = connection.ask(f"GET /predict HTTP/1.1\r\nHost: x\r\n{wish}\r\n".encode())
    assert (status, headers["allow"]) == (405, "POST")
    assert "wanted POST" in json.loads(content)["error"]


@pytest.mark.parametrize("path", ["/predict", "/uncertainty", "/v1/models/sonar:predict", "/v2/models/sonar/infer"])
def test_a_compressed_body_is_refused_as_such(connection, trained, path):
    body = gzip.compress(json.dumps({"instances": trained.instances[:3]}).encode())
    status, headers, content = connection.ask(request(body, path, headers="Content-Encoding: gzip\r\n"))
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert json.loads(content)["error"] == 'content-encoding "gzip", wanted a body that is not compressed'


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_that_says_that_it_is_not_compressed_is_answered(connection, trained, encoding):
    body = {"instances": trained.instances[:1]}
    assert connection.ask(request(body, headers=f"Content-Encoding: {encoding}\r\n"))[0] == 200


def test_a_length_said_twice_is_refused(connection):
    assert connection.ask(request(b"{}", headers="Content-Length: 5\r\n"))[0] == 400


@pytest.mark.parametrize("target", ["/predict", "/predict?", "/livez", "/nobody/knows/it"])
@pytest.mark.parametrize("hosts", ["", "Host: x\r\nHost: x\r\n", "Host: x\r\nhost: y\r\n"], ids=["none", "same", "two"])
def test_a_request_that_does_not_say_once_for_which_host_it_is_is_refused_on_both_ports(served, port, hosts, target):
    own = httpx.URL(served.url).port or 0
    for place in (port, own):
        with Connection(place) as connection:
            content = request(b"{}", target).replace(b"Host: x\r\n", hosts.encode())
            status, _, answer = connection.ask(content)
            assert status == 400
            assert json.loads(answer)["error"] == f"found {2 if hosts else 'no'} Host headers, wanted one"
            # It is known where its body ends.
            assert connection.ask(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


@pytest.mark.parametrize("path", ["/predict", "/livez"])
def test_before_http_1_1_no_request_says_for_which_host_it_is(served, port, trained, path):
    body = {"instances": trained.instances[:1]}
    content = request(body, path).replace(b"Host: x\r\n", b"").replace(b"HTTP/1.1", b"HTTP/1.0")
    if path == "/livez":
        content = b"GET /livez HTTP/1.0\r\n\r\n"
    for place in (port, httpx.URL(served.url).port or 0):
        with Connection(place) as connection:
            assert connection.ask(content)[0] == 200


def refused(server: Any, code: str) -> float:
    """How many requests were refused before anybody knew what they ask for."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        return total(samples(client), "dropserve_requests_total", protocol="none", code=code)


@pytest.mark.parametrize("path", ["/livez", "/predict"])
def test_a_head_without_end_is_refused_before_it_fills_the_memory(served, port, path):
    before = refused(served, "431")
    with Connection(port) as connection:
        connection.send(f"POST {path} HTTP/1.1\r\n".encode())
        line = b"x-line: " + b"a" * 10_000 + b"\r\n"
        # The server does not read all of it, and its answer may be lost.
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.send(line * 10_000)
    wait_for(lambda: refused(served, "431") == before + 1, "the refusal")


def test_a_head_that_is_too_long_is_told_so(connection):
    connection.send(b"POST /livez HTTP/1.1\r\n")
    time.sleep(0.2)
    for _ in range(2):
        connection.send(b"".join(b"x-line: %b\r\n" % (b"a" * 1_000) for _ in range(33)))
        time.sleep(0.2)
    status, headers, content = connection.read()
    assert (status, headers["connection"]) == (431, "close")
    assert "longer than the limit of 65536 bytes" in json.loads(content)["error"]


def test_what_is_no_http_is_refused_and_counted(connection, served):
    before = refused(served, "400")
    status, headers, content = connection.ask(b"\x16\x03\x01 no HTTP\r\n\r\n")
    assert (status, headers["connection"]) == (400, "close")
    assert "no HTTP request" in json.loads(content)["error"]
    assert refused(served, "400") == before + 1


def test_trailers_of_a_body_are_read_over(connection, trained):
    content = json.dumps({"instances": trained.instances[:1]}).encode()
    chunks = b"%x\r\n%b\r\n0\r\nX-Request-Id: later\r\nContent-Encoding: gzip\r\n\r\n" % (len(content), content)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    plain = connection.ask(request({"instances": trained.instances[:1]}))
    for _ in range(2):
        status, headers, answer = connection.ask(head + chunks)
        assert (status, answer) == (200, plain[2])
        assert headers["x-request-id"] != "later"


def test_a_length_of_thousands_of_digits_is_refused(connection):
    head = request(b"{}").replace(b"Content-Length: 2", b"Content-Length: " + b"0" * 4_400 + b"2")
    assert len(head) > 4_400
    assert connection.ask(head)[0] == 400


@pytest.mark.parametrize(
    ("path", "by_uvicorn"),
    [("/predict", False), ("/uncertainty", False), ("/predict", True), ("/uncertainty", True)],
)
@pytest.mark.parametrize("asked", [1, 3])
def test_a_client_that_has_closed_its_side_has_its_answers(connection, trained, path, by_uvicorn, asked):
    # Not the default seed: another call than the plain one, on the way where draws are made for it.
    fields = {} if path == "/predict" else {"num_samples": 300, "seed": 5}
    contents = [
        request({"instances": [row], **fields}, path, by_uvicorn=by_uvicorn) for row in trained.instances[:asked]
    ]
    connection.send(b"".join(contents))
    connection.socket.shutdown(socket.SHUT_WR)
    found = [connection.read() for _ in contents]
    assert [status for status, _, _ in found] == [200] * asked
    assert connection.is_closed()


@pytest.mark.parametrize("by_uvicorn", [False, True])
def test_a_client_that_closes_its_side_amid_a_request_is_not_waited_for(connection, trained, by_uvicorn):
    body = {"instances": trained.instances[:1]}
    connection.send(request(body) + request(body, by_uvicorn=by_uvicorn)[:-5])
    connection.socket.shutdown(socket.SHUT_WR)
    assert connection.read()[0] == 200
    assert connection.is_closed()


def test_work_is_given_up_when_its_client_goes_away(served, port, trained):
    body = {"instances": trained.instances[:30], "num_samples": 10_000, "seed": 1}
    content = request(body, "/uncertainty")
    assert len(content) < 2**16
    for _ in range(40):
        with Connection(port) as leaving:
            leaving.send(content)
            time.sleep(0.01)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        before = total(samples(client), "dropserve_row_draws_total")
        short = {"instances": trained.instances[:1], "num_samples": 2_000}
        assert client.post("/uncertainty", json=short).status_code == 200
        wait_for(lambda: total(samples(client), "dropserve_requests_total", code="499") > 0, "clients that went away")
        wait_for(lambda: total(samples(client), "dropserve_open_requests") == 0, "an empty queue")
        done = total(samples(client), "dropserve_row_draws_total") - before
    assert done < 40 * 30 * 10_000 / 2, "the forty that left were computed"


def test_many_connections_at_once_get_their_own_answers(served, port, trained):
    rows = [{"instances": [row]} for row in trained.instances[:40]]
    with Connection(port) as connection:
        alone = [connection.ask(request(body, "/uncertainty"))[2] for body in rows]
    answers: list[tuple[int, bytes]] = []

    def user(first: int) -> None:
        with Connection(port) as connection:
            for step in range(60):
                place = (first + step * 7) % len(rows)
                answers.append((place, connection.ask(request(rows[place], "/uncertainty"))[2]))

    users = [threading.Thread(target=user, args=(first,)) for first in range(12)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    assert len(answers) == 12 * 60
    for place, answer in answers:
        [row], [expected] = (json.loads(content)["predictions"] for content in (answer, alone[place]))
        assert row["label"] == expected["label"]
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
        assert row["mutual_information"] == pytest.approx(expected["mutual_information"], abs=1e-6)
