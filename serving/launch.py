"""`dropserve serve`: `bentoml serve` with everything set up. Replaces this process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from serving.access import Gate
from serving.errors import StartError
from serving.listener import require_ports
from serving.repository import Repository
from serving.settings import read_settings
from serving.tls import Tls

KEEP_ALIVE_S = 75
SERVICE = "serving.service:Dropserve"


def launch(*, repository: Path, model: str | None, host: str, port: int) -> NoReturn:
    """Check what can be checked, then become `bentoml serve`.

    Raises StartError, with one line, where the server could not start.
    """
    environment = {**os.environ, "DROPSERVE_REPOSITORY": str(repository.absolute())}
    if model is not None:
        environment["DROPSERVE_MODEL"] = model
    # The server reports to nobody unless its operator says so.
    environment.setdefault("BENTOML_DO_NOT_TRACK", "True")
    os.environ.update(environment)
    settings = read_settings()
    Gate(settings)
    Tls.choose(settings)
    Repository.choose(settings).check(settings.model)
    with _listening(host, port) as address:
        os.environ.setdefault("DROPSERVE_HOST", address)
        # While that port is taken: one that is the same, or overlaps, is refused here.
        require_ports(read_settings())
    arguments = ["-m", "bentoml", "serve", SERVICE, "--host", address, "--port", str(port)]
    # As on the REST port: clients close idle connections, not the server.
    arguments += ["--timeout-keep-alive", str(KEEP_ALIVE_S)]
    os.execv(sys.executable, [sys.executable, *arguments])


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[str]:
    """Listen for a moment: gives the numeric address of `host`, which is what BentoML wants.

    Raises StartError where `port` is taken or not allowed.
    """
    with contextlib.ExitStack() as held:
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = held.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen()
        except OSError as error:
            raise StartError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
            ) from error
        yield str(place[0])
