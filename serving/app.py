"""All routes in one ASGI application: the whole server, but for who listens and where the model came from."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.core import Core
from serving.errors import ClientGone, MethodNotAllowed, NotFound, quote
from serving.native import Native
from serving.open_inference import PREFIX as OPEN_INFERENCE
from serving.open_inference import OpenInference
from serving.pages import Pages
from serving.tensorflow_serving import PREFIX as TENSORFLOW_SERVING
from serving.tensorflow_serving import TensorFlowServing
from serving.web import Handler, Request, error_response

# A path's handlers by method; HEAD follows from GET.
Routes = dict[str, dict[str, Handler]]


def routes(core: Core) -> Routes:
    native, pages = Native(core), Pages(core)
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
        self._routes = routes(core)
        self._open_inference = OpenInference(core)
        self._tensorflow_serving = TensorFlowServing(core)
        self._max_body_bytes = core.settings.max_body_bytes
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, self._max_body_bytes)
        handlers = self._routes.get(request.path)
        if handlers is None and request.path.startswith(OPEN_INFERENCE):
            handlers = self._open_inference.handlers(request.path) or {}
        if handlers is None and request.path.lower().startswith(TENSORFLOW_SERVING):
            # Whatever the method: TensorFlow Serving's own refusal is not the usual one.
            handlers = dict.fromkeys((request.method, "GET"), self._tensorflow_serving.answer)
        if handlers is None and self._otherwise is not None:
            await self._otherwise(scope, receive, send)
            return
        method = "GET" if request.method == "HEAD" else request.method
        try:
            if not handlers:
                raise NotFound(f"no such path: {quote(request.path)}; GET /docs lists what there is")
            handler = handlers.get(method)
            if handler is None:
                raise MethodNotAllowed(request.method, ", ".join(handlers))
            response = await handler(request)
        except ClientGone:
            return
        except Exception as error:  # every error becomes an answer
            response = error_response(error)
        await response.send(send, with_body=request.method != "HEAD")
