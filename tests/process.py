"""A server as a real process, started as an operator starts it."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[1]
# Generous: a busy machine with two cores imports TensorFlow in several processes at once.
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 30
# Below those that Linux, from 32,768 on, gives to whoever wants any port: BentoML's own sockets, for one.
LOWEST_PORT, HIGHEST_PORT = 20_000, 32_000
# Processes that run tests side by side begin at places of their own.
_FIRST_PORT = LOWEST_PORT + 97 * os.getpid() % (HIGHEST_PORT - LOWEST_PORT)
_PORTS = itertools.chain(range(_FIRST_PORT, HIGHEST_PORT), range(LOWEST_PORT, _FIRST_PORT))
BENTOML_SERVE = ("-m", "bentoml", "serve")
DROPSERVE_SERVE = ("-c", "import dropserve; dropserve.main()", "serve")


@dataclass(frozen=True)
class Served:
    url: str
    process: psutil.Popen
    log: Path


def free_port() -> int:
    """Free now, and never given twice: it is bound much later, when other servers have started."""
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError(f"no port is left from {LOWEST_PORT} to {HIGHEST_PORT}")


@contextlib.contextmanager
def bentoml_serve(
    repository: Path | None,
    log: Path,
    *,
    python: Path = Path(sys.executable),
    command: Sequence[str] = BENTOML_SERVE,
    folder: Path = ROOT,
    verify: ssl.SSLContext | None = None,
    **settings: str,
) -> Iterator[Served]:
    """`bentoml serve` in `folder` on a free port of 127.0.0.1; ready when it is given, ended afterwards.

    repository: None leaves the server to find its model. command: Python's arguments, where they are others.
    verify: where the server speaks TLS, whom to trust.
    settings: environment variables; without its own, the server drains for no time: no balancer has to notice its end.
    Raises RuntimeError with the log's end where the server does not become ready.
    """
    port = free_port()
    environment = os.environ | {"DROPSERVE_DRAIN_S": "0"} | settings
    if repository is not None:
        environment.setdefault("DROPSERVE_REPOSITORY", str(repository))
    with log.open("wb") as stream:
        process = psutil.Popen(
            [str(python), *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http{'s' if verify else ''}://127.0.0.1:{port}"
        _wait_until_ready(url, process, log, verify)
        yield Served(url, process, log)
    finally:
        stop(process)


def _wait_until_ready(url: str, process: psutil.Popen, log: Path, verify: ssl.SSLContext | None) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=2, verify=verify or True).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready:\n{log.read_text(errors='replace')[-4000:]}")


def stop(process: psutil.Popen) -> None:
    """End a process and all that it started."""
    family: list[psutil.Process] = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
        process.terminate()
    _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for straggler in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()
    psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
