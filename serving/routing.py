"""Which version of a model answers: `routing.json` in the model's folder, written by hand or by `dropserve route`.

{"labels": {"stable": 3, "canary": 4}, "pin": 3, "canary": {"version": 4, "share": 0.1}, "shadow": {"version": 5}}

Without the file the newest version answers everything.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROUTING_FILE = "routing.json"

Version = Annotated[int, Field(ge=1)]


class RoutingError(Exception):
    """The file cannot be used. `str()` is one line."""


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Canary(_Typed):
    """A version that answers a share of the requests that name no version."""

    version: Version
    # Of the requests, chosen by a hash of the body: a retry gets the same version.
    share: Annotated[float, Field(gt=0, le=1)]


class Shadow(_Typed):
    """A version that answers nobody: its predictions are compared with those that were sent."""

    version: Version
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class Routing(_Typed):
    labels: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")], Version] = {}
    # Answers the requests that name no version, in place of the newest.
    pin: Version | None = None
    canary: Canary | None = None
    shadow: Shadow | None = None

    def versions(self) -> set[int]:
        """All versions that must stay loaded for it."""
        others = (self.pin, self.canary and self.canary.version, self.shadow and self.shadow.version)
        return {*self.labels.values(), *(version for version in others if isinstance(version, int))}


def read_routing(folder: Path) -> Routing:
    """The routing of the model in `folder`; raises RoutingError for a file that is not as it should be."""
    path = folder / ROUTING_FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return Routing()
    except OSError as error:
        raise RoutingError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return Routing.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RoutingError(f"{path}, at {where}: {first['msg']}") from error


def write_routing(folder: Path, routing: Routing) -> None:
    """Replace the file in one step: a server never reads half of it."""
    content = routing.model_dump_json(indent=2, exclude_defaults=True) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".routing-", delete=False) as stream:
        stream.write(content)
    Path(stream.name).chmod(0o644)
    os.replace(stream.name, folder / ROUTING_FILE)
