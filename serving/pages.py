"""Probes, metrics, the OpenAPI document and its page: what people and platforms ask of the server."""

from __future__ import annotations

import base64
import hashlib
import html
import os
from importlib.metadata import PackageNotFoundError, version

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from serving.core import Core
from serving.errors import Unavailable
from serving.openapi import Schema, document
from serving.web import Request, Response, json_response


def _hash(element: str) -> str:
    """Of the page's only element of this name, as a content security policy names it."""
    content = _PAGE.format(title="", description="", operations="").partition(f"<{element}>")[2]
    digest = hashlib.sha256(content.partition(f"</{element}>")[0].encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


# Without scripts from elsewhere: the page works where the server has no way out, and tells nobody of its readers.
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
 textarea, pre {{ width: 100%; box-sizing: border-box; font: 13px/1.4 ui-monospace, monospace }}
 textarea {{ height: 9rem }} pre {{ background: #f4f4f4; padding: .7rem; overflow: auto; max-height: 24rem }}
 button {{ font: inherit; padding: .2rem 1rem }} h2 {{ margin-top: 2rem }}
</style>
<h1>{title}</h1>
<p>{description}</p>
<p><a href="openapi.json">openapi.json</a>, <a href="metrics">metrics</a>, <a href="readyz">readyz</a></p>
{operations}
<script>
for (const form of document.forms) form.addEventListener("submit", async event => {{
  event.preventDefault();
  const answer = form.querySelector("pre");
  const headers = {{"content-type": "application/json"}};
  const reply = await fetch(form.action, {{method: "POST", headers, body: form.body.value}});
  const text = await reply.text();
  let shown = text;
  try {{ shown = JSON.stringify(JSON.parse(text), null, 2) }} catch {{}}
  answer.textContent = reply.status + "\\n" + shown;
}});
</script>
</html>
"""
# The page's own script and style, requests to this server, and nothing else; no other site's frame.
_PAGE_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        f"script-src '{_hash('script')}'; style-src '{_hash('style')}'".encode(),
    ),
)
_OPERATION = """<h2>POST {path}</h2>
<p>{summary}</p>
<form action="{relative}"><textarea name="body" spellcheck="false">{example}</textarea>
<p><button>Send</button></p><pre></pre></form>
"""


class Pages:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._own = CollectorRegistry()
        self._own.register(core.metrics)

    async def live(self, request: Request) -> Response:
        return Response(b"\n", content_type="text/plain; charset=utf-8")

    async def ready(self, request: Request) -> Response:
        if not self._core.is_ready:
            raise Unavailable("shutting down" if self._core.is_draining else "loading")
        return Response(b"\n", content_type="text/plain; charset=utf-8")

    async def metrics(self, request: Request) -> Response:
        self._core.measure()
        content = generate_latest(self._own) + generate_latest(_registry())
        return Response(content, content_type=CONTENT_TYPE_LATEST)

    async def openapi(self, request: Request) -> Response:
        return json_response(self._document())

    async def manifest(self, name: str, request: Request) -> Response:
        """What the model takes and gives, and was made of: the manifest of the version that answers now."""
        return Response(self._core.model(name).manifest.model_dump_json().encode())

    async def docs(self, request: Request) -> Response:
        content = self._document()
        operations = [
            _OPERATION.format(
                path=path,
                relative=path.lstrip("/"),
                summary=html.escape(item["post"]["summary"]),
                example=html.escape(_pretty(item["post"]["requestBody"]["content"]["application/json"]["example"])),
            )
            for path, item in content["paths"].items()
            if "post" in item
        ]
        page = _PAGE.format(
            title=html.escape(content["info"]["title"]),
            description=html.escape(content["info"]["description"]),
            operations="\n".join(operations),
        )
        return Response(page.encode(), content_type="text/html; charset=utf-8", security=_PAGE_SECURITY)

    async def index(self, request: Request) -> Response:
        return Response(b"", 307, "text/plain; charset=utf-8", [(b"location", b"docs")])

    def _document(self) -> Schema:
        return document(self._core.model().manifest, self._core.settings, release())


def _registry() -> CollectorRegistry:
    """BentoML's own metrics, of all workers where it runs several; and those of the process."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return registry


def release() -> str:
    try:
        return version("dropserve")
    except PackageNotFoundError:  # inside a Bento the project is source code, not an installed distribution
        return "unreleased"


def _pretty(content: object) -> str:
    return orjson.dumps(content).decode()
