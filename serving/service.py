"""The BentoML service: `bentoml serve` from the project root, or from a built Bento.

Requests on BentoML's port are answered by `serving.app` before they reach BentoML's own request path, whose middleware
keeps every request for a whole timeout and costs ten times what a prediction costs. `@bentoml.api` declares the same
endpoints, so that BentoML's clients, its schema and calls in process know them.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, cast

import bentoml
from starlette.types import ASGIApp, Receive, Scope, Send

from models import contract
from serving import devices, lean
from serving.access import Gate
from serving.errors import StartError
from serving.listener import require_ports
from serving.repository import Repository
from serving.settings import ENV_PREFIX, Settings, read_settings
from serving.tls import Tls

# Exit code of a start that cannot succeed.
CANNOT_START = 2
# In the workers' environment: a folder of theirs, where they count together, and a file there by which one of them
# tells the parent that it cannot start.
WORKERS_FOLDER_VARIABLE = "DROPSERVE_WORKERS_FOLDER"
FAILURE_FILE = "cannot-start"
# Likewise: whether several workers listen on the ports beside BentoML's.
SHARED_PORTS_VARIABLE = "DROPSERVE_SHARED_PORTS"


class Port(Protocol):
    """A port beside BentoML's own."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class FrontedService(bentoml.Service):
    """A BentoML service whose own ASGI application comes second."""

    def inject_config(self) -> None:
        """Give BentoML what the settings say: when it serves, not when this module is imported."""
        # Settings that cannot be used are refused, with one line, by `check`.
        with contextlib.suppress(StartError):
            settings = read_settings()
            tls = Tls.choose(settings)
            self.config["ssl"] = {"enabled": False} if tls is None else cast(Any, tls.bentoml())
            self.config.update(cast(Any, devices.planned(settings.device, settings.workers).bentoml()))
        super().inject_config()

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        return Front(super().to_asgi(is_main))


class Front:
    """Passes the lifespan to BentoML, which loads the service; then answers what the service's own routes are."""

    def __init__(self, bento_app: ASGIApp) -> None:
        self._bento_app = bento_app
        self._app: ASGIApp = bento_app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._bento_app(scope, receive, send)
            return
        if self._app is self._bento_app:
            from serving.app import App

            self._app = App(bentoml.get_current_service().core, otherwise=self._bento_app)
        await self._app(scope, receive, send)


@bentoml.service(name="dropserve", service_class=FrontedService, workers=1)
class Dropserve:
    """Keras models that say when they are guessing: predictions with Monte Carlo dropout uncertainty."""

    def __init__(self) -> None:
        with _ending_at_once():
            self._load()

    def _load(self) -> None:
        if bentoml.server_context.worker_index is not None and not _shares_ports():
            try:
                # Before anything is loaded; by now BentoML's own port is taken too.
                require_ports(read_settings())
            except StartError as error:
                _give_up(error)
        # Imported here, in the worker, and nowhere else: the parent process stays small.
        devices.pin(os.environ, bentoml.server_context.worker_index)
        lean.import_tensorflow()
        from serving import logs
        from serving.core import Core
        from serving.native import Native

        logs.configure()
        folder = os.environ.get(WORKERS_FOLDER_VARIABLE)
        try:
            settings = read_settings()
            self.core = Core(settings, repository(settings), None if folder is None else Path(folder))
        except Exception as error:  # BentoML would start the worker again, for ever
            _give_up(error)
        self._native = Native(self.core)
        self._ports: list[Port] = []
        # uvicorn would format a line for each request that no handler of BentoML's prints.
        logging.getLogger("uvicorn.access").propagate = False

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Before any worker starts: whatever would make it fail is said once, and the server exits."""
        try:
            settings = read_settings()
            Gate(settings)
            Tls.choose(settings)
            repository(settings).check(settings.model)
            workers = devices.planned(settings.device, settings.workers).workers
            # Several workers will listen on each port together, so that none of them notices another server that does.
            for name, error in require_ports(settings).items():
                logging.getLogger("bentoml.serve").warning("%s: not opened: %s", name, error)
                os.environ[f"{ENV_PREFIX}{name.upper()}"] = "0"
        except (StartError, contract.ArtifactError) as error:
            _say(error)
            raise SystemExit(CANNOT_START) from None
        os.environ[SHARED_PORTS_VARIABLE] = str(int(workers > 1))
        _share_a_folder()

    @bentoml.on_startup
    async def open(self) -> None:
        try:
            await self._open()
        except Exception as error:  # likewise
            _give_up(error)

    async def _open(self) -> None:
        await self.core.open()
        self._drain_at_sigterm()
        settings = self.core.settings
        shared = _shares_ports()
        if settings.rest_port:
            from serving.app import App
            from serving.rest_port import RestPort

            tls = Tls.choose(settings)

            await self._open_port(
                "rest_port", lambda: RestPort(App(self.core), settings.host, settings.rest_port, tls, shared)
            )
        if settings.grpc_port:
            # Imported only where it is wanted: protocol buffers and gRPC take memory.
            from serving.grpc_server import GrpcServer

            await self._open_port("grpc_port", lambda: GrpcServer(self.core, shared))

    async def _open_port(self, setting: str, make: Callable[[], Port]) -> None:
        """Open one of the ports beside BentoML's. Where it is taken: give up if somebody chose it, else do without."""
        try:
            port = make()
            await port.start()
        except StartError as error:
            if setting in self.core.settings.model_fields_set:
                _give_up(error)
            logging.getLogger("bentoml.serve").warning("%s: not opened: %s", setting, error)
        else:
            self._ports.append(port)

    def _drain_at_sigterm(self) -> None:
        """At SIGTERM first let everybody know and see off what is running; only then let BentoML's server end."""
        loop = asyncio.get_running_loop()
        settings = self.core.settings
        end = signal.getsignal(signal.SIGTERM)

        def drain(number: int, frame: FrameType | None) -> None:
            if self.core.is_draining:
                return
            self.core.drain()
            if callable(end):
                loop.call_soon_threadsafe(loop.call_later, settings.drain_s, end, number, frame)
            # A client that never finishes its request must not keep the process.
            loop.call_soon_threadsafe(loop.call_later, settings.grace_s, os._exit, 0)

        signal.signal(signal.SIGTERM, drain)

    @bentoml.on_shutdown
    async def close(self) -> None:
        self.core.drain()
        await asyncio.gather(*(port.stop() for port in self._ports))
        self.core.close()

    @bentoml.api(route="/predict")
    async def predict(self, instances: list[Any]) -> dict[str, Any]:
        return await self._native.predict_content({"instances": instances})

    @bentoml.api(route="/uncertainty")
    async def uncertainty(
        self,
        instances: list[Any],
        num_samples: int | None = None,
        seed: int | None = None,
        tolerance: float | None = None,
        max_samples: int | None = None,
        coverage: float | None = None,
    ) -> dict[str, Any]:
        asked = {
            "num_samples": num_samples,
            "seed": seed,
            "tolerance": tolerance,
            "max_samples": max_samples,
            "coverage": coverage,
        }
        return await self._native.uncertainty_content({"instances": instances, **asked})


def repository(settings: Settings) -> Repository:
    """What to serve: the repository's models, or those of the Bento that this service was built into."""
    bento = cast(FrontedService, Dropserve).bento
    bundled = [] if bento is None else [Path(bentoml.models.get(model.tag).path) for model in bento.info.all_models]
    return Repository.choose(settings, bundled)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """SIGTERM and Ctrl-C within end a worker: uvicorn would only note them, and load what nobody will ask for."""
    if bentoml.server_context.worker_index is None:
        # Not a process of the service's own.
        yield
        return
    noted = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in noted.items():
            signal.signal(number, handler)


def _shares_ports() -> bool:
    return os.environ.get(SHARED_PORTS_VARIABLE) == "1"


def _say(error: Exception) -> None:
    print(f"dropserve cannot start: {_line(error)}", file=sys.stderr, flush=True)


def _line(error: Exception) -> str:
    if isinstance(error, StartError | contract.ArtifactError):
        return str(error)
    # A defect, here or in what it stands on: its place helps whoever reports it.
    *_, place = traceback.extract_tb(error.__traceback__)
    reason = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {reason} ({place.filename}, line {place.lineno})"


def _give_up(error: Exception) -> NoReturn:
    """Leave a worker that will never be ready.

    BentoML would start it again, for ever: the parent, which does that, is told to stop.
    """
    if bentoml.server_context.worker_index is None:
        raise error
    _say(error)
    folder = os.environ.get(WORKERS_FOLDER_VARIABLE)
    if folder is not None:
        (Path(folder) / FAILURE_FILE).touch()
    os.kill(os.getppid(), signal.SIGTERM)
    os._exit(CANNOT_START)


def _share_a_folder() -> None:
    """Give the workers a folder; make this process, their parent, exit with CANNOT_START if one of them gave up.

    BentoML would exit with 0.
    """
    folder = Path(tempfile.mkdtemp(prefix="dropserve-"))
    os.environ[WORKERS_FOLDER_VARIABLE] = str(folder)

    def finish() -> None:
        failed = (folder / FAILURE_FILE).exists()
        shutil.rmtree(folder, ignore_errors=True)
        if failed:
            sys.stdout.flush()
            os._exit(CANNOT_START)

    atexit.register(finish)
