"""What can go wrong, without a word about transports: each error writes its own message.

Status codes are decided in `serving.web` (HTTP) and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from models.contract import listed

# A message quotes this much of what a caller sent: enough to recognise it, not a payload.
QUOTE_LENGTH = 48


def quote(value: Any) -> str:
    """A JSON value as a message shows it: scalars as written, containers by their kind and size."""
    match value:
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object of {len(value)}"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case int() if abs(value) >= 10**QUOTE_LENGTH:
            return "an integer that is too large"
    text = json.dumps(value)
    return text if len(text) <= QUOTE_LENGTH else f"{text[: QUOTE_LENGTH - 3]}..."


def choices(names: Iterable[str], limit: int = 8) -> str:
    """Names for "wanted one of": the first few."""
    return listed(names, limit)


class StartError(Exception):
    """The server cannot start. `str()` is the one line that the operator reads."""


class ServingError(Exception):
    """A request cannot be answered. `str()` is the message for the caller."""

    def details(self) -> dict[str, Any] | None:
        """The same facts for a program to read, where there are any."""
        return None


class InvalidRequest(ServingError):
    """The request itself is wrong; the same request will always be refused."""


class InvalidInstance(InvalidRequest):
    """One row is wrong."""

    def __init__(self, row: int, feature: str | None, found: str, wanted: str) -> None:
        self.row, self.feature, self.found, self.wanted = row, feature, found, wanted
        place = f"row {row}" if feature is None else f"row {row}, feature {json.dumps(feature)}"
        super().__init__(f"{place}: found {found}, wanted {wanted}")

    def details(self) -> dict[str, Any]:
        return {"row": self.row, "feature": self.feature, "found": self.found, "wanted": self.wanted}


class InvalidField(InvalidRequest):
    """A member of the request body, other than a row, is wrong."""

    def __init__(self, field: str, found: str, wanted: str) -> None:
        self.field, self.found, self.wanted = field, found, wanted
        super().__init__(f"{field}: found {found}, wanted {wanted}")

    def details(self) -> dict[str, Any]:
        return {"field": self.field, "found": self.found, "wanted": self.wanted}


class NotFound(ServingError):
    """No such model, version or path."""


class ModelNotFound(NotFound):
    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        super().__init__(f"model {quote(name)} is not served here, wanted one of {choices(sorted(known))}")


class NoDefaultModel(NotFound):
    def __init__(self, known: Iterable[str]) -> None:
        super().__init__(
            f"several models are served and none is the default (--model, DROPSERVE_MODEL); "
            f"wanted a path with the name of one: {choices(sorted(known))}"
        )


class VersionNotFound(NotFound):
    def __init__(self, name: str, version: int | str | None, known: Iterable[int]) -> None:
        self.name, self.version = name, version
        wanted = choices(str(other) for other in known) or "none yet"
        found = "no version is served" if version is None else f"version {version} is not served"
        super().__init__(f"model {quote(name)}: {found}, wanted one of {wanted}")


class LabelNotFound(InvalidRequest):
    """TensorFlow Serving answers 400 to an unknown label, and 404 to an unknown version."""

    def __init__(self, name: str, label: str, known: Iterable[str]) -> None:
        self.name, self.label = name, label
        super().__init__(f"model {quote(name)}: unknown label {quote(label)}, wanted one of {choices(known) or 'none'}")


class MethodNotAllowed(ServingError):
    def __init__(self, method: str, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(f"method {method} is not allowed here, wanted {allowed}")


class Unimplemented(ServingError):
    """A protocol leaves room for it, and nobody does it."""


class BodyTooLarge(ServingError):
    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is longer than the limit of {limit} bytes: send fewer rows a request")


class UnsupportedContentType(ServingError):
    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(f"content type {json.dumps(found)}, wanted {wanted}")


class UnsupportedContentEncoding(ServingError):
    def __init__(self, found: str) -> None:
        super().__init__(f"content-encoding {json.dumps(found)}, wanted a body that is not compressed")


class Unauthenticated(ServingError):
    """No key, or one that nobody knows."""


class HeadTimeout(ServingError):
    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the head of the request was not complete after {limit_s:g} s: send it faster")


class HeadTooLarge(ServingError):
    def __init__(self, limit: int) -> None:
        super().__init__(f"the head of the request is longer than the limit of {limit} bytes: send fewer headers")


class BodyTimeout(ServingError):
    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the body was not complete after {limit_s:g} s: send it faster, or fewer rows a request")


class QueueFull(ServingError):
    """Too much work is waiting."""

    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("too many requests are waiting: try again later")


class Unavailable(ServingError):
    """The server is loading or shutting down."""

    retry_after_s = 1


class VersionLoading(Unavailable):
    """Not served yet, but soon."""

    def __init__(self, name: str, version: int | None) -> None:
        self.name, self.version = name, version
        found = "its first version" if version is None else f"version {version}"
        super().__init__(f"model {quote(name)}: {found} is loading, try again later")


class DeadlineExceeded(ServingError):
    def __init__(self, deadline_ms: float) -> None:
        super().__init__(f"no answer within {deadline_ms:g} ms: ask for fewer rows or draws, or try again later")


class ClientGone(ServingError):
    """Nobody waits for the answer any more."""


class ModelFailed(ServingError):
    """The model's graph could not run; the cause is for the log."""

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__("the model failed; the cause is in the server's log")
