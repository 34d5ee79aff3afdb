"""The sockets of the ports beside BentoML's."""

from __future__ import annotations

import socket
from typing import Literal

from serving.errors import StartError
from serving.settings import Settings

# By the setting of each.
PORTS: dict[str, Literal["REST", "gRPC"]] = {"rest_port": "REST", "grpc_port": "gRPC"}


def require_ports(settings: Settings) -> dict[str, StartError]:
    """Whether a server could listen on the ports beside BentoML's now, before anything is loaded for it.

    Returns what is wrong with those that nobody chose, which are done without; raises StartError for one that somebody
    chose.
    """
    missed: dict[str, StartError] = {}
    used: dict[int, str] = {}
    # Who chose nothing gives way.
    for name in sorted(PORTS, key=lambda name: name not in settings.model_fields_set):
        port, protocol = getattr(settings, name), PORTS[name]
        if port == 0:
            continue
        try:
            if port in used:
                raise StartError(
                    f"port {port} is {used[port]}'s already, and cannot be {protocol}'s; "
                    f"choose another DROPSERVE_{protocol.upper()}_PORT, or 0 for none"
                )
            listen(settings.host, port, protocol).close()
        except StartError as error:
            if name in settings.model_fields_set:
                raise
            missed[name] = error
        else:
            used[port] = protocol
    return missed


def listen(host: str, port: int, protocol: Literal["REST", "gRPC"], is_shared: bool = False) -> socket.socket:
    """A socket on this place; raises StartError where it is taken."""
    try:
        family, kind, number, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(place)
    except UnicodeError as error:
        raise StartError(f"DROPSERVE_HOST={host!r} is no host name ({error})") from error
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} for {protocol} ({error.strerror}); "
            f"choose another DROPSERVE_{protocol.upper()}_PORT, or 0 for none"
        ) from error
    return listener
