"""Who may ask: API keys, where there are any.

Probes and metrics stay open: a platform's probes carry no key, and they tell names, counts and times, nothing of a
request's content. Everything else, BentoML's own routes included, wants one.
"""

from __future__ import annotations

import hashlib
import hmac
import re

from serving.errors import StartError, Unauthenticated
from serving.settings import Settings

OPEN_PATHS = frozenset(("/livez", "/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"))
_KEY = re.compile(r"[!-~]+")
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)


class Gate:
    """Keeps digests of the keys, never a key."""

    def __init__(self, settings: Settings) -> None:
        """Raises StartError, without a key in it, for keys that cannot be used."""
        self._digests = [_digest(key) for key in _keys(settings)]

    @property
    def is_open(self) -> bool:
        return not self._digests

    def check(self, authorization: str | None, api_key: str | None) -> None:
        """Raise Unauthenticated unless one of the two headers holds a key.

        authorization: `Bearer KEY`. It takes as long for a key that is nearly right as for any other.
        """
        if self.is_open:
            return
        bearer = None if authorization is None else _BEARER.fullmatch(authorization)
        key = bearer[1] if bearer is not None else api_key
        if key is None:
            raise Unauthenticated("no API key: wanted `Authorization: Bearer KEY` or `X-Api-Key: KEY`")
        found = _digest(key)
        # All of them, whichever it is.
        if not sum(hmac.compare_digest(found, digest) for digest in self._digests):
            raise Unauthenticated("unknown API key")


def _keys(settings: Settings) -> list[str]:
    """The keys of the environment and of the file."""
    keys: list[str] = []
    if settings.api_keys is not None:
        keys += _checked("DROPSERVE_API_KEYS", settings.api_keys.get_secret_value().split(","))
    path = settings.api_keys_file
    if path is not None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise StartError(f"DROPSERVE_API_KEYS_FILE={path}: not readable ({reason}), wanted a key a line") from error
        keys += _checked(f"DROPSERVE_API_KEYS_FILE={path}", [line for line in lines if not line.startswith("#")])
    return keys


def _checked(where: str, found: list[str]) -> list[str]:
    keys = [key.strip() for key in found if key.strip()]
    if not keys:
        raise StartError(f"{where}: no key there; wanted at least one, or the setting left out")
    for number, key in enumerate(keys, 1):
        if _KEY.fullmatch(key) is None:
            raise StartError(f"{where}: key {number} has other characters than visible ASCII ones; choose another key")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
