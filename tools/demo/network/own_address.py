"""With which address this host shows itself to others."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def address_towards(registry: str) -> str:
    """Give the address from which this host reaches a registry, ``tcp://host:port``.

    Raises
    ------
    OSError
        The host is unknown, or there is no way to it.
    """
    address = urlsplit(registry if "://" in registry else f"tcp://{registry}")
    family, kind, _, _, target = socket.getaddrinfo(address.hostname, address.port or 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])
