"""Free ports that stay free until the process they are meant for listens."""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType

__all__ = ["HeldPorts"]


class HeldPorts:
    """Ports of this host on which nobody listens, bound for as long as the ``with`` block lasts.

    The kernel gives a bound port to nobody who asks for any free one, while a server that sets SO_REUSEADDR, as that of
    links does, can listen on it.

    Parameters
    ----------
    host : str
        Address or name of an interface of this host.
    count : int
        How many ports, from 0 on.

    Attributes
    ----------
    ports : tuple of int
        The ports, all different; known inside the ``with`` block.

    Examples
    --------
    >>> from llm_datadist.cluster.held_ports import HeldPorts
    >>> with HeldPorts("127.0.0.1", 3) as held:
    ...     len(set(held.ports))
    3
    """

    def __init__(self, host: str, count: int) -> None:
        self._host = host
        self._count = count
        self._sockets = contextlib.ExitStack()
        self.ports: tuple[int, ...] = ()

    def __enter__(self) -> HeldPorts:
        """Take the ports.

        Raises
        ------
        OSError
            The host has no such address, or no port is free.
        """
        with contextlib.ExitStack() as sockets:
            family, kind, _, _, address = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[0]
            held = [sockets.enter_context(socket.socket(family, kind)) for _ in range(self._count)]
            for one in held:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(address)
            self.ports = tuple(one.getsockname()[1] for one in held)
            self._sockets = sockets.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sockets.close()
        self.ports = ()
