"""TLS: the same certificate on all ports."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import StartError
from serving.settings import Settings


@dataclass(frozen=True)
class Tls:
    certificate: Path
    """PEM, the server's own first, then those that lead to a known authority."""
    key: Path
    client_authority: Path | None
    """PEM; where it is given, clients need a certificate that it signed."""

    @classmethod
    def choose(cls, settings: Settings) -> Tls | None:
        """What the settings say, or None for plain text; raises StartError for files that cannot be used."""
        if settings.tls_certfile is None or settings.tls_keyfile is None:
            given = {
                "DROPSERVE_TLS_CERTFILE": settings.tls_certfile,
                "DROPSERVE_TLS_KEYFILE": settings.tls_keyfile,
                "DROPSERVE_TLS_CLIENT_CA": settings.tls_client_ca,
            }
            names = [name for name, path in given.items() if path is not None]
            if names:
                raise StartError(
                    f"{' and '.join(names)} alone: TLS wants DROPSERVE_TLS_CERTFILE and DROPSERVE_TLS_KEYFILE"
                )
            return None
        tls = cls(settings.tls_certfile, settings.tls_keyfile, settings.tls_client_ca)
        try:
            tls.context([])
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = ", ".join(str(path) for path in (tls.certificate, tls.key, tls.client_authority) if path)
            raise StartError(
                f"TLS: {files} cannot be used ({error}); wanted a certificate and its key, PEM without a password"
            ) from error
        return tls

    def context(self, protocols: list[str]) -> ssl.SSLContext:
        """What asyncio wants. protocols: that clients may choose from (ALPN)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A password would be asked for on a terminal that a server does not have.
        context.load_cert_chain(self.certificate, self.key, password="")
        if self.client_authority is not None:
            context.load_verify_locations(self.client_authority)
            context.verify_mode = ssl.CERT_REQUIRED
        if protocols:
            context.set_alpn_protocols(protocols)
        return context

    def bentoml(self) -> dict[str, Any]:
        """BentoML's `ssl` options."""
        options: dict[str, Any] = {"enabled": True, "certfile": str(self.certificate), "keyfile": str(self.key)}
        if self.client_authority is not None:
            options |= {"ca_certs": str(self.client_authority), "cert_reqs": int(ssl.CERT_REQUIRED)}
        return options

    def uvicorn(self) -> dict[str, Any]:
        """uvicorn's options, for the REST port."""
        options = self.bentoml()
        return {f"ssl_{name}": value for name, value in options.items() if name != "enabled"}
