"""The socket of a service: requests of any number of drivers come in, answers go back to the one that asked."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

import zmq

from llm_datadist.tools.demo.network.heartbeat import set_heartbeat
from llm_datadist.tools.demo.network.wire import MAX_MESSAGE_BYTES, WireError, decode, encode

_log = logging.getLogger("llm_datadist.demo")

_MOST_AT_ONCE = 100  # messages that are read before the service goes on with its work

Caller = bytes  # ZeroMQ's name of a connection


class ServiceSocket:
    """A listening socket; a context manager.

    Parameters
    ----------
    host : str
        Where to listen: a name, an address, or ``0.0.0.0``.
    port : int
        Port; 0: any that is free.
    """

    def __init__(self, host: str, port: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            set_heartbeat(self._socket)
            self._socket.linger = 0
            self._socket.maxmsgsize = MAX_MESSAGE_BYTES
            self._socket.router_mandatory = True  # a caller that is gone shows
            self._socket.ipv6 = ":" in host
            self._socket.bind(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
            self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServiceSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; what has not been sent is dropped. May be called twice."""
        self._socket.close()
        self._context.term()

    def receive(self, timeout_s: float) -> list[tuple[Caller, Any]]:
        """Give the messages that are there, waiting up to `timeout_s` for the first one."""
        messages: list[tuple[Caller, Any]] = []
        deadline = time.monotonic() + timeout_s
        while len(messages) < _MOST_AT_ONCE:
            left_s = 0.0 if messages else max(0.0, deadline - time.monotonic())
            if not self._socket.poll(int(left_s * 1000)):
                break
            frames = self._socket.recv_multipart()
            try:
                if len(frames) != 2:
                    raise WireError(f"{len(frames)} frames, should be 2")
                messages.append((frames[0], decode(frames[1])))
            except WireError as error:
                _log.warning("a message that cannot be read was left out: %s", error)
        return messages

    def send(self, caller: Caller, message: Any) -> bool:
        """Send a message to a caller; False if it is gone, or takes nothing any more."""
        try:
            self._socket.send_multipart([caller, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True
