"""Who has asked a service for which request, and what becomes of the requests of a driver that is gone."""

from __future__ import annotations

import logging
import time
from typing import Any, Callable

from llm_datadist.tools.demo.messages import Decoded, PoolLevel, ServiceLevel, StillHere
from llm_datadist.tools.demo.network.service_socket import Caller, ServiceSocket

_log = logging.getLogger("llm_datadist.demo")

_LOOK_S = 2.0  # between two looks for drivers that are gone


class Callers:
    """The requests at a service.

    Parameters
    ----------
    socket : ServiceSocket
        Where drivers are answered.
    drop : callable
        Called by `look` with every request whose driver is gone.
    """

    def __init__(self, socket: ServiceSocket, drop: Callable[[int], None]) -> None:
        self._socket = socket
        self._drop = drop
        self._callers: dict[int, Caller] = {}
        self._gone: set[Caller] = set()
        self._looked_s = time.monotonic()

    def __contains__(self, request: int) -> bool:
        return request in self._callers

    def take(self, request: int, caller: Caller) -> None:
        """Take note of a new request."""
        self._callers[request] = caller

    def done(self, request: int) -> None:
        """Forget a request that has left the service."""
        self._callers.pop(request, None)

    def tell(self, message: Any) -> None:
        """Send what happened to a request to the driver that asked for it."""
        if isinstance(message, Decoded):
            self._tell_pieces(message)
        elif message.request in self._callers:
            self._send(self._callers[message.request], message)

    def answer_level(self, caller: Caller, level: PoolLevel, idle_bytes: int) -> None:
        """Tell a driver how full the pool is."""
        yours = sum(owner == caller for owner in self._callers.values())
        used = max(0, level.used - idle_bytes)
        self._send(caller, ServiceLevel(level.capacity, level.peak, used, yours, len(self._callers) - yours))

    def look(self) -> None:
        """Drop the requests of drivers that are gone; call it again and again. Now and then it asks who is."""
        now = time.monotonic()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            for caller in set(self._callers.values()):
                self._send(caller, StillHere())
        while self._gone:
            self._drop_requests(self._gone.pop())

    def _tell_pieces(self, decoded: Decoded) -> None:
        pieces: dict[Caller, list[tuple[int, str]]] = {}
        for request, piece in decoded.pieces:
            if request in self._callers:
                pieces.setdefault(self._callers[request], []).append((request, piece))
        for caller, its_pieces in pieces.items():
            self._send(caller, Decoded(its_pieces))

    def _send(self, caller: Caller, message: Any) -> None:
        # Requests are not dropped here: whoever tells may be in the middle of them.
        if not self._socket.send(caller, message):
            self._gone.add(caller)

    def _drop_requests(self, caller: Caller) -> None:
        requests = [request for request, owner in self._callers.items() if owner == caller]
        if requests:
            _log.info("a driver is gone, and its %d requests with it", len(requests))
        for request in requests:
            del self._callers[request]
            self._drop(request)
