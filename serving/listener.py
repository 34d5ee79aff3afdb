"""The sockets of the ports beside BentoML's."""

from __future__ import annotations

import socket
from typing import Literal

from serving.errors import StartError


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
