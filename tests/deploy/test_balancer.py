"""Real replicas behind a real HAProxy: one leaves in peace, one is killed, and nobody who asks finds out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.process import ROOT, Served, bentoml_serve, free_port

pytestmark = pytest.mark.alone

CONFIG = ROOT / "deploy" / "haproxy.cfg"
CLIENTS = 6
ROW = [0.5] * 60


@pytest.fixture(scope="module")
def haproxy() -> str:
    found = shutil.which("haproxy")
    if found is None:
        pytest.skip("haproxy is not there; on Debian: apt-get install haproxy")
    return found


@contextlib.contextmanager
def balanced(haproxy: str, servers: list[Served], folder: Path) -> Iterator[str]:
    """The configuration of deploy/ as it is, but for the addresses."""
    port = free_port()
    text = CONFIG.read_text()
    assert text.count("bind *:3000") == 1
    text = text.replace("bind *:3000", f"bind 127.0.0.1:{port}")
    for name, server in zip(re.findall(r"^    server (\w+)", text, re.MULTILINE), servers, strict=True):
        text = text.replace(f"{name}:3000", server.url.removeprefix("http://"))
    (folder / "haproxy.cfg").write_text(text)
    with subprocess.Popen([haproxy, "-db", "-f", folder / "haproxy.cfg"], stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 30
            while not _is_ready(port):
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _is_ready(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200
    return False


@dataclass
class Load:
    """Clients that ask one after the other, until they are stopped."""

    url: str
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        body = {"instances": [ROW], "num_samples": 200, "seed": 3}
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/uncertainty", json=body)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code == 200:
                    self.answers.append(answer.text)
                else:
                    self.failures.append(f"{answer.status_code} {answer.text[:100]}")

    def wait(self, more: int) -> None:
        """Until so many more were answered."""
        wanted, deadline = len(self.answers) + more, time.monotonic() + 120
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, self.failures[-3:]
            time.sleep(0.05)


def _asked(server: Served) -> float:
    """Requests for draws that a server has counted."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(r'^dropserve_requests_total\{[^}]*"200"[^}]*\} (\S+)', text, re.M))


def test_the_configuration_is_one(haproxy, tmp_path):
    text = CONFIG.read_text().replace("one:3000", "127.0.0.1:3001").replace("two:3000", "127.0.0.1:3002")
    (tmp_path / "haproxy.cfg").write_text(text)
    done = subprocess.run([haproxy, "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "kill-9"])
def test_a_replica_ends_under_load(end, haproxy, trained_repository, tmp_path):
    with (
        bentoml_serve(trained_repository, tmp_path / "one.log", DROPSERVE_DRAIN_S="3") as one,
        bentoml_serve(trained_repository, tmp_path / "two.log", DROPSERVE_DRAIN_S="3") as two,
        balanced(haproxy, [one, two], tmp_path) as url,
        Load(url) as load,
    ):
        # Until both work: one of them may have been found ready later.
        for _ in range(20):
            load.wait(100)
            if min(_asked(one), _asked(two)) > 10:
                break
        assert min(_asked(one), _asked(two)) > 10
        if end == signal.SIGTERM:
            os.kill(one.process.pid, end)
        else:  # the parent first, which would start its worker again
            for process in (one.process, *one.process.children(recursive=True)):
                process.kill()
        load.wait(200)
        one.process.wait(60)
        before = _asked(two)
        load.wait(50)
        assert _asked(two) > before
    # Of one that is killed, at most what it was answering.
    assert len(load.failures) <= (0 if end == signal.SIGTERM else CLIENTS), load.failures
    # And whoever answered, the answer was the same.
    found = [json.loads(answer)["predictions"][0]["mutual_information"] for answer in load.answers]
    assert max(found) - min(found) < 2e-6
