"""The limit: uvicorn and Starlette, answering a constant of the same length without reading the request."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

ANSWER = (
    b'{"model":{"name":"sonar","version":"1"},"predictions":[{"class":"mine","probabilities":{"mine":0.5,"rock":0.5}}]}'
)


async def constant(request: Request) -> Response:
    return Response(ANSWER, media_type="application/json")


async def ready(request: Request) -> Response:
    return Response(b"")


app = Starlette(routes=[Route("/predict", constant, methods=["POST"]), Route("/readyz", ready)])
