"""Ports of 127.0.0.1 on which nobody listens."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def free_ports() -> Iterator[Callable[[], int]]:
    """Give a function that takes a port.

    Each port stays bound, without listening, until the end: the kernel gives it to nobody else, while a server that
    sets SO_REUSEADDR, as ZeroMQ does, can listen on it.
    """
    with contextlib.ExitStack() as held:

        def take() -> int:
            holder = held.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            return holder.getsockname()[1]

        yield take
