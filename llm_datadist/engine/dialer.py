"""Further data connections of a link, made by the side that opened it, while the link lives."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from typing import Callable

from llm_datadist.control.loop import ControlLoop
from llm_datadist.transports import tcp
from llm_datadist.transports.base import End, Grant

_log = logging.getLogger("llm_datadist.link")

_SECONDS = 5.0  # for one attempt


class Dialer:
    """Makes connections in the control thread, one at a time for each direction.

    Parameters
    ----------
    loop : ControlLoop
        Waits for the server.
    address : (str, int)
        Data port of the server.
    token : bytes
        Of the link.
    """

    def __init__(self, loop: ControlLoop, address: tuple[str, int], token: bytes) -> None:
        self._loop = loop
        self._address = address
        self._token = token
        self._dialing: dict[bytes, socket.socket | None] = {}  # by purpose; None before the control thread comes to it
        self._takers: dict[bytes, Callable[[int], None]] = {}
        self._missing: set[bytes] = set()  # purposes of `dial_both`
        self._on_both: Callable[[OSError | None], None] | None = None
        self._closed = False

    def serve(self, end: End, grant: Grant) -> None:
        """Say who gets the connections."""
        self._takers = {tcp.FORWARD: end.add_channel, tcp.REVERSE: grant.serve}

    def dial_forward(self) -> None:
        """Make a connection over which this side asks; from any thread, does not block."""
        self._begin(tcp.FORWARD)

    def dial_reverse(self) -> None:
        """Make a connection over which the server asks; from any thread, does not block."""
        self._begin(tcp.REVERSE)

    def dial_both(self, on_end: Callable[[OSError | None], None]) -> None:
        """Make a connection for each direction, and tell in the control thread when both are there, or one failed.

        `serve` comes first. Nothing is told after `close`.
        """
        self._missing, self._on_both = {tcp.FORWARD, tcp.REVERSE}, on_end
        self.dial_forward()
        self.dial_reverse()

    def close(self) -> None:
        """Break off what is under way; in the control thread, or when it has ended. May be called twice."""
        self._closed = True
        self._on_both = None
        for purpose in list(self._dialing):
            self._end(purpose)

    def _begin(self, purpose: bytes) -> None:
        if self._closed or self._dialing.setdefault(purpose, None) is not None:
            return
        self._loop.call(lambda: self._connect(purpose))

    # ---- in the control thread

    def _connect(self, purpose: bytes) -> None:
        if self._closed or self._dialing.get(purpose) is not None:
            return
        try:
            family, _, _, _, address = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)[0]
            connection = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self._fail(purpose, error)
            return
        self._dialing[purpose] = connection
        connection.setblocking(False)
        code = connection.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            self._fail(purpose, OSError(code, os.strerror(code)))
            return
        self._loop.at(time.monotonic() + _SECONDS, lambda: self._expire(purpose, connection))
        self._loop.watch_writable(connection, lambda: self._introduce(purpose, connection))

    def _introduce(self, purpose: bytes, connection: socket.socket) -> None:
        self._loop.unwatch(connection)
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            if code:
                raise OSError(code, os.strerror(code))
            tcp.tune(connection)
            connection.send(tcp.preamble(self._token, purpose))
        except OSError as error:
            self._fail(purpose, error)
            return
        self._loop.watch(connection, lambda: self._on_word(purpose, connection))

    def _on_word(self, purpose: bytes, connection: socket.socket) -> None:
        try:
            word = connection.recv(1)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if word != tcp.READY:
            self._fail(purpose, ConnectionError("the server does not take it"))
            return
        self._loop.unwatch(connection)
        del self._dialing[purpose]
        descriptor = connection.detach()
        try:
            self._takers[purpose](descriptor)
        except ValueError as error:  # there are enough, or the link is closed
            os.close(descriptor)
            _log.debug("a data connection is not needed: %s", error)
        self._report(purpose, None)

    def _expire(self, purpose: bytes, connection: socket.socket) -> None:
        if self._dialing.get(purpose) is connection:
            self._fail(purpose, TimeoutError(f"no answer within {_SECONDS} s"))

    def _fail(self, purpose: bytes, error: OSError) -> None:
        _log.warning("no data connection to %s:%d: %s", *self._address, error)
        self._end(purpose)
        self._report(purpose, error)

    def _report(self, purpose: bytes, error: OSError | None) -> None:
        self._missing.discard(purpose)
        on_end = self._on_both
        if on_end is not None and (error is not None or not self._missing):
            self._on_both = None
            on_end(error)

    def _end(self, purpose: bytes) -> None:
        connection = self._dialing.pop(purpose, None)
        if connection is not None:
            self._loop.unwatch(connection)
            connection.close()
