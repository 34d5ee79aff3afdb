"""The same routes on BentoML's port and on plain uvicorn; how the ports open and how they close."""

import os
import signal
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from tests.process import bentoml_serve, free_port
from tests.serving.samples import samples, total
from tests.serving.versions import wait_for


@pytest.fixture(scope="module")
def rest_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory, rest_port):
    log = tmp_path_factory.mktemp("ports") / "log"
    with bentoml_serve(trained.repository, log, DROPSERVE_REST_PORT=str(rest_port)) as server:
        yield server


PATHS = {
    "/predict": {},
    "/uncertainty": {"num_samples": 50, "seed": 3},
    "/v1/models/sonar:predict": {"signature_name": "mc_predict"},
}


@pytest.mark.parametrize(("path", "fields"), PATHS.items(), ids=PATHS)
def test_both_ports_give_the_same_answers(served, rest_port, trained, path, fields):
    body = {"instances": trained.instances[:5], **fields}
    answers = [
        httpx.post(f"{url}{path}", json=body, timeout=60).raise_for_status().json()
        for url in (served.url, f"http://127.0.0.1:{rest_port}")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/metrics", "/docs", "/v2", "/v2/health/ready", "/v1/models/sonar"]
)
def test_pages_are_on_both_ports(served, rest_port, path):
    for url in (served.url, f"http://127.0.0.1:{rest_port}"):
        assert httpx.get(f"{url}{path}", timeout=60).status_code == 200


@pytest.mark.parametrize("path", ["/nothing", "/predict/", "/uncertainty/", "/livez/"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_path_that_is_not_there_is_refused_on_both_ports(served, rest_port, method, path):
    for url in (served.url, f"http://127.0.0.1:{rest_port}"):
        answer = httpx.request(method, f"{url}{path}", timeout=60)
        assert answer.status_code == 404
        assert path in answer.json()["error"]
        assert answer.headers["x-request-id"]


def test_a_port_that_nobody_chose_and_that_is_taken_is_done_without(trained, tmp_path, monkeypatch):
    """Two servers on one machine, neither of them told where to listen for REST."""
    monkeypatch.delenv("DROPSERVE_REST_PORT")
    with (
        bentoml_serve(trained.repository, tmp_path / "first") as first,
        bentoml_serve(trained.repository, tmp_path / "second") as second,
    ):
        for server in (first, second):
            body = {"instances": trained.instances[:1]}
            assert httpx.post(f"{server.url}/predict", json=body, timeout=60).status_code == 200


def test_a_port_that_somebody_chose_and_that_is_taken_ends_the_start(trained, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with (
            pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1:{port} for REST"),
            bentoml_serve(trained.repository, tmp_path / "log", DROPSERVE_REST_PORT=port),
        ):
            pass


@pytest.mark.alone
def test_sigterm_under_load_answers_everything_that_was_accepted(trained, tmp_path):
    """Readiness falls first; what runs is answered; what is new gets 503; then nobody listens, and the process ends."""
    port = free_port()
    body = {"instances": trained.instances[:3]}
    # Seconds of work, so that it is still under way when it has been seen to be.
    long_body: dict[str, Any] = {"instances": trained.instances * 4, "num_samples": 9_000}
    # Of each user, in order: status and retry-after.
    seen: list[list[tuple[int, str]]] = [[] for _ in range(4)]
    broken: list[str] = []
    long_answers: list[int] = []
    settings: dict[str, Any] = {
        "DROPSERVE_REST_PORT": str(port),
        "DROPSERVE_DRAIN_S": "4",
        "DROPSERVE_MAX_ROW_DRAWS": str(10**7),
    }
    with (
        bentoml_serve(trained.repository, tmp_path / "log", **settings) as server,
        httpx.Client(base_url=server.url, timeout=60) as watcher,
    ):
        terminated = threading.Event()

        def user(url: str, answers: list[tuple[int, str]]) -> None:
            with httpx.Client(base_url=url, timeout=60) as client:
                while True:
                    try:
                        answer = client.post("/predict", json=body)
                    except httpx.ConnectError:
                        return
                    except httpx.HTTPError as error:
                        # A connection that the server closed while it was idle; a request on it was never taken.
                        if not terminated.is_set():
                            broken.append(repr(error))
                        return
                    answers.append((answer.status_code, answer.headers.get("retry-after", "")))
                    time.sleep(0.005)

        def patient_user() -> None:
            long_answers.append(httpx.post(f"{server.url}/uncertainty", json=long_body, timeout=60).status_code)

        urls = (server.url, f"http://127.0.0.1:{port}") * 2
        users = [threading.Thread(target=user, args=given) for given in zip(urls, seen, strict=True)]
        for thread in users:
            thread.start()
        wait_for(lambda: min(map(len, seen)) > 10, "some answers")
        patient = threading.Thread(target=patient_user)
        patient.start()
        work = len(long_body["instances"]) * long_body["num_samples"]
        wait_for(lambda: total(samples(watcher), "dropserve_open_row_draws") >= work, "the long request")
        terminated.set()
        os.kill(server.process.pid, signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/readyz", timeout=10).status_code == 503, "readiness to fall")
        assert httpx.get(f"{server.url}/livez", timeout=10).status_code == 200
        for thread in [*users, patient]:
            thread.join()
        wait_for(lambda: server.process.poll() is not None, "the process to end")
    assert broken == []
    assert long_answers == [200]
    for answers in seen:
        statuses = [status for status, _ in answers]
        assert set(statuses) <= {200, 503}
        assert statuses == sorted(statuses), "an answer after a refusal"
    together = [answer for answers in seen for answer in answers]
    assert {status for status, _ in together} == {200, 503}
    assert {retry for status, retry in together if status == 503} == {"1"}


@pytest.mark.alone
def test_a_client_that_never_finishes_its_request_does_not_keep_the_server(trained, tmp_path):
    with bentoml_serve(trained.repository, tmp_path / "log", DROPSERVE_DRAIN_S="0", DROPSERVE_GRACE_S="2") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half_open:
            half_open.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
            # Others are not blocked by it.
            body = {"instances": trained.instances[:1]}
            assert httpx.post(f"{server.url}/predict", json=body, timeout=60).status_code == 200
            os.kill(server.process.pid, signal.SIGTERM)
            wait_for(lambda: server.process.poll() is not None, "the process to end")


def test_a_killed_worker_is_replaced(trained, tmp_path):
    with bentoml_serve(trained.repository, tmp_path / "log") as server:
        body = {"instances": trained.instances[:1]}
        before = httpx.post(f"{server.url}/predict", json=body, timeout=60).json()
        worker = max(server.process.children(recursive=True), key=lambda child: child.memory_info().rss)
        worker.kill()
        wait_for(lambda: not worker.is_running(), "the worker's end")

        def answers() -> bool:
            try:
                return httpx.post(f"{server.url}/predict", json=body, timeout=60).json() == before
            except httpx.HTTPError:
                return False

        wait_for(answers, "the same answer from another worker")


@pytest.mark.alone
def test_work_is_given_up_when_its_client_goes_away(trained, tmp_path):
    """Minutes of draws, whose client leaves: the next one's draws need not wait for them."""
    settings: dict[str, Any] = {"DROPSERVE_MAX_ROW_DRAWS": str(10**9), "DROPSERVE_MAX_QUEUE_ROW_DRAWS": str(10**10)}
    with bentoml_serve(trained.repository, tmp_path / "log", **settings) as server:
        body = {"instances": trained.instances * 40, "num_samples": 10_000}
        for _ in range(3):
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{server.url}/uncertainty", json=body, timeout=1.0)
        short = {"instances": trained.instances[:1], "num_samples": 2000}
        assert httpx.post(f"{server.url}/uncertainty", json=short, timeout=20).status_code == 200
        wait_for(
            lambda: "dropserve_open_requests 0" in httpx.get(f"{server.url}/metrics", timeout=60).text, "an empty queue"
        )
