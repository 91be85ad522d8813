"""Ports for members of communicators that meet over TCP: as many in a row as tests have devices, and nobody else's."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from llm_datadist.engine.meeting_places import BASE_PORT

HOST = "127.0.0.1"
COUNT = 32
_FIRST, _LAST = 20000, 32000  # below the ports that the kernel gives to connections


@contextlib.contextmanager
def reserved_ports() -> Iterator[int]:
    """Let members of this process, and of those that it starts, count their ports from the one that is given."""
    with contextlib.ExitStack() as held:
        base = next(base for base in range(_FIRST, _LAST, COUNT) if _hold(held, base))
        before = os.environ.get(BASE_PORT)
        os.environ[BASE_PORT] = str(base)
        try:
            yield base
        finally:
            if before is None:
                del os.environ[BASE_PORT]
            else:
                os.environ[BASE_PORT] = before


def _hold(held: contextlib.ExitStack, base: int) -> bool:
    """Bind ports without listening: only listeners that set SO_REUSEADDR can have them. False if one is taken."""
    with contextlib.ExitStack() as holders:
        for port in range(base, base + COUNT):
            holder = holders.enter_context(socket.socket())
            try:
                holder.bind((HOST, port))
            except OSError:
                return False
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: nobody else is to hold it too
        held.enter_context(holders.pop_all())
    return True
