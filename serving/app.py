"""All routes in one ASGI application: the whole server, but for who listens and where the model came from."""

from __future__ import annotations

import re
from functools import partial
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import OPEN_PATHS
from serving.core import Core
from serving.direct import Direct
from serving.entrance import Entrance
from serving.errors import ClientGone, InvalidRequest, MethodNotAllowed, NotFound, Unauthenticated, quote
from serving.native import Native
from serving.open_inference import PREFIX as OPEN_INFERENCE
from serving.open_inference import OpenInference
from serving.pages import Pages
from serving.tensorflow_serving import PREFIX as TENSORFLOW_SERVING
from serving.tensorflow_serving import TensorFlowServing
from serving.web import GONE, Handler, Request, error_response

# As metrics and the log name them.
NATIVE_OPERATIONS = {"/predict": "predict", "/uncertainty": "uncertainty"}
MANIFEST = "/models/NAME/manifest.json"
_MANIFEST = re.compile(MANIFEST.replace("NAME", "([^/]+)"))

# A path's handlers by method; HEAD follows from GET.
Routes = dict[str, dict[str, Handler]]


def routes(native: Native, pages: Pages) -> Routes:
    return {
        "/predict": {"POST": native.predict},
        "/uncertainty": {"POST": native.uncertainty},
        "/livez": {"GET": pages.live},
        "/healthz": {"GET": pages.live},
        "/readyz": {"GET": pages.ready},
        "/metrics": {"GET": pages.metrics},
        "/openapi.json": {"GET": pages.openapi},
        # BentoML's name for the same document.
        "/docs.json": {"GET": pages.openapi},
        "/docs": {"GET": pages.docs},
        "/": {"GET": pages.index},
    }


class App:
    """Answers its own routes and leaves every other path to `otherwise`; without that they are 404."""

    def __init__(self, core: Core, otherwise: ASGIApp | None = None) -> None:
        self._pages = Pages(core)
        self._native = Native(core)
        self._routes = routes(self._native, self._pages)
        self._open_inference = OpenInference(core)
        self._tensorflow_serving = TensorFlowServing(core)
        self._entrance = Entrance(core.settings)
        self._gate = core.gate
        self._is_locked = not core.gate.is_open
        self._otherwise = otherwise
        self._observer = core.observer

    def direct(self) -> Direct:
        """What may be answered without ASGI; nothing where requests must show a key first."""
        answers = {"/predict": self._native.predict_content, "/uncertainty": self._native.uncertainty_content}
        handlers = {path: (NATIVE_OPERATIONS[path], answer) for path, answer in answers.items()}
        return Direct({} if self._is_locked else handlers, self._observer, self._entrance)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, self._entrance)
        handlers, protocol, operation = self._find(request)
        # Whoever has the other routes may log a path as it is, and a line of it would be a line of the log.
        is_one_line = request.path.isprintable()
        if handlers is None and self._otherwise is not None and is_one_line and self._may_pass(request):
            others = _Others(send)
            await self._otherwise(scope, receive, others.send)
            if others.know_it:
                return
        exchange = request.exchange = self._observer.begin(
            protocol, operation, request.path, request.header(b"x-request-id"), request.header(b"traceparent")
        )
        method = "GET" if request.method == "HEAD" else request.method
        try:
            request.require_host()
            is_open = request.path in OPEN_PATHS
            if self._is_locked and not is_open:
                self._gate.check(request.header(b"authorization"), request.header(b"x-api-key"))
            if not handlers:
                raise NotFound(f"no such path: {quote(request.path)}; GET /docs lists what there is")
            handler = handlers.get(method)
            if handler is None:
                raise MethodNotAllowed(request.method, ", ".join(handlers))
            if is_open:
                response = await handler(request)
            else:
                self._entrance.enter()
                try:
                    response = await handler(request)
                finally:
                    self._entrance.leave()
        except ClientGone:
            self._observer.end(exchange, GONE, is_error=True)
            return
        except Exception as error:  # every error becomes an answer
            response = error_response(error)
        await response.send(send, exchange, with_body=request.method != "HEAD")
        self._observer.end(exchange, str(response.status), is_error=response.status >= 400)

    def _may_pass(self, request: Request) -> bool:
        """Whether a request may go on to somebody else's routes."""
        try:
            request.require_host()
            self._gate.check(request.header(b"authorization"), request.header(b"x-api-key"))
        except (InvalidRequest, Unauthenticated):
            return False
        return True

    def _find(self, request: Request) -> tuple[dict[str, Handler] | None, str, str]:
        """The handlers of a request's path by method, and what to call it: protocol and operation."""
        path = request.path
        handlers = self._routes.get(path)
        if handlers is not None:
            operation = NATIVE_OPERATIONS.get(path)
            return (handlers, "pages", path) if operation is None else (handlers, "native", operation)
        if path.startswith(OPEN_INFERENCE):
            return self._open_inference.handlers(path) or {}, "open_inference", "metadata"
        if path.lower().startswith(TENSORFLOW_SERVING):
            # Whatever the method: TensorFlow Serving's own refusal is not the usual one.
            handlers = dict.fromkeys((request.method, "GET"), self._tensorflow_serving.answer)
            return handlers, "tensorflow_serving", "metadata"
        if (found := _MANIFEST.fullmatch(path)) is not None:
            return {"GET": partial(self._pages.manifest, found[1])}, "pages", MANIFEST
        if path.endswith("/") and path[:-1] in self._routes:
            # BentoML would redirect to the route; on every port the answer is to be the same.
            return {}, "none", ""
        return None, "none", ""


class _Others:
    """Passes an answer of somebody else's routes on, unless it says in plain text that there is no such route."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.know_it = True

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == HTTPStatus.NOT_FOUND:
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self.know_it = not kind.startswith(b"text/plain")
        if self.know_it:
            await self._send(message)
