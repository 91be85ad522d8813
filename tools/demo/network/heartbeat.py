"""How the two ends of a connection notice that the other one is gone: ZeroMQ's heartbeats, between its own threads.

A Python that computes for seconds is not taken for dead; a process that was stopped, or whose network is, is.
"""

from __future__ import annotations

from typing import Any

import zmq

_INTERVAL_MS = 1000
_SILENCE_MS = 5000


def set_heartbeat(socket: zmq.Socket[Any]) -> None:
    """Have a socket give up a peer that is silent; before it binds or connects."""
    socket.heartbeat_ivl = _INTERVAL_MS
    socket.heartbeat_timeout = _SILENCE_MS
    socket.heartbeat_ttl = _SILENCE_MS
