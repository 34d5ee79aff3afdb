"""A proxy before a real server that spoils some of its answers.

python faulty_proxy.py UPSTREAM FAULT EVERY     prints its own address on the first line, then serves

The answers number 100, 100 + EVERY, 100 + 2 EVERY, ... of the two endpoints are spoiled: the first one comes soon, so
that a slow machine meets it too. The fault `silence` never answers those; `delay_50_ms` is of every answer;
`other_model` sends every EVERYth request for the model `echo` to `sonar`.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FIRST = 100
PASSED = ("content-type", "inference-header-content-length")


def wrong_probability(answer: dict[str, Any]) -> None:
    """One probability a little off; the sum, the label and the entropy still hold together."""
    prediction = answer["predictions"][0]
    p = prediction["probabilities"]
    likeliest, other, *_ = sorted(p, key=lambda label: -p[label])
    step = 0.001 if p[likeliest] < 0.99 else -0.001
    p[likeliest] += step
    p[other] -= step


def wrong_sum(answer: dict[str, Any]) -> None:
    p = answer["predictions"][0]["probabilities"]
    p[min(p, key=lambda label: p[label])] += 0.01


def negative_entropy(answer: dict[str, Any]) -> None:
    if "predictive_entropy" in answer["predictions"][0]:
        answer["predictions"][0]["predictive_entropy"] = -0.1


def wrong_standard_error(answer: dict[str, Any]) -> None:
    errors = answer["predictions"][0].get("standard_error", {})
    for label in errors:
        errors[label] = 2 * errors[label] + 0.01


def lost_row(answer: dict[str, Any]) -> None:
    answer["predictions"].pop()


def text_for_number(answer: dict[str, Any]) -> None:
    p = answer["predictions"][0]["probabilities"]
    for label in p:
        p[label] = str(p[label])


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    function.__name__: function
    for function in (wrong_probability, wrong_sum, negative_entropy, wrong_standard_error, lost_row, text_for_number)
}


def build(
    upstream: str,
    spoil: Callable[[dict[str, Any]], None] | None,
    every: int,
    delay_s: float = 0,
    renamed: tuple[str, str] | None = None,
    is_silent: bool = False,
) -> Starlette:
    client = httpx.AsyncClient(base_url=upstream, timeout=30)
    answered = asked = 0

    async def forward(request: Request) -> Response:
        nonlocal answered, asked
        headers = {name: request.headers[name] for name in PASSED if name in request.headers}
        path = request.url.path
        if renamed is not None and request.method == "POST" and renamed[0] in path:
            asked += 1
            path = path if asked % every else path.replace(*renamed)
        got = await client.request(request.method, path, content=await request.body(), headers=headers)
        content, status = got.content, got.status_code
        if delay_s and request.method == "POST":
            await asyncio.sleep(delay_s)
        if request.method == "POST" and status == 200:
            answered += 1
            if answered % every == FIRST % every and answered >= FIRST:
                if spoil is None and is_silent:
                    await asyncio.sleep(3600)
                elif spoil is None:
                    status, content = 500, b'{"error": "spoiled"}'
                else:
                    answer = orjson.loads(content)
                    spoil(answer)
                    content = orjson.dumps(answer)
        headers = {name: got.headers[name] for name in PASSED if name in got.headers}
        return Response(content, status, headers)

    return Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])


if __name__ == "__main__":
    _, upstream, fault, every = sys.argv
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    if fault == "delay_50_ms":
        app = build(upstream, lambda answer: None, sys.maxsize, delay_s=0.05)
    elif fault == "other_model":
        app = build(upstream, lambda answer: None, int(every), renamed=("/models/echo", "/models/sonar"))
    else:
        app = build(
            upstream,
            None if fault in ("status_500", "silence") else FAULTS[fault],
            int(every),
            is_silent=fault == "silence",
        )
    uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)).run(sockets=[listener])
