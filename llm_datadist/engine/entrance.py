"""A place where strangers connect: reads how each one introduces itself, and forgets those who do not."""

from __future__ import annotations

import logging
import socket
import time
from typing import Callable

from llm_datadist.control.loop import ControlLoop
from llm_datadist.transports.rendezvous import ForeignProcess

_log = logging.getLogger("llm_datadist.link")

_STRANGER_SECONDS = 5.0  # for a connection to introduce itself
_REST_SECONDS = 0.1  # when a connection cannot be accepted
_MAX_STRANGERS = 512  # at one time; as many communicators of one process may come at the same moment


class Entrance:
    """Accepts connections at one listener. Everything in here runs in the control thread.

    Parameters
    ----------
    loop : ControlLoop
        Watches the listener and the strangers.
    listener : socket
        Does not block. Belongs to the entrance from now on.
    accept : callable
        Takes the next connection from the listener; it does not block.
    introduction_bytes : int
        What a stranger sends first.
    on_arrival : callable
        Told of a connection and its introduction, and has the connection then. A closed one is not announced.
    """

    def __init__(
        self,
        loop: ControlLoop,
        listener: socket.socket,
        accept: Callable[[socket.socket], socket.socket],
        introduction_bytes: int,
        on_arrival: Callable[[socket.socket, bytes], None],
    ) -> None:
        self.listener = listener
        self._loop = loop
        self._accept = accept
        self._introduction_bytes = introduction_bytes
        self._on_arrival = on_arrival
        self._strangers: dict[socket.socket, bytes] = {}  # and what each has said so far

    def open(self) -> None:
        """Accept connections from now on."""
        self._loop.watch(self.listener, self._on_connection)

    def close(self) -> None:
        """Accept nobody any more, and forget who has not introduced himself; may be called twice."""
        if self.listener.fileno() >= 0:
            self._loop.unwatch(self.listener)
            self.listener.close()
        for stranger in list(self._strangers):
            self._forget(stranger)

    def _on_connection(self) -> None:
        try:
            stranger = self._accept(self.listener)
        except BlockingIOError:
            return  # gone again
        except ForeignProcess as error:
            _log.warning("refused a connection: %s", error)
            return
        except OSError as error:
            self._rest(error)
            return
        if len(self._strangers) >= _MAX_STRANGERS:
            self._forget(next(iter(self._strangers)))  # the one that has been silent for longest
        self._strangers[stranger] = b""
        self._loop.watch(stranger, lambda: self._on_words(stranger))
        self._loop.at(time.monotonic() + _STRANGER_SECONDS, lambda: self._forget(stranger))

    def _rest(self, error: OSError) -> None:
        """Accept nobody for a moment: without descriptors whoever waits would be announced again and again."""
        _log.warning("cannot accept a connection, the next attempt is in %s s: %s", _REST_SECONDS, error)
        for stranger in list(self._strangers):
            self._forget(stranger)  # ZeroMQ's listener, which does not rest, needs descriptors too
        self._loop.unwatch(self.listener)
        self._loop.at(time.monotonic() + _REST_SECONDS, self._go_on)

    def _go_on(self) -> None:
        if self.listener.fileno() >= 0:
            self.open()

    def _on_words(self, stranger: socket.socket) -> None:
        said = self._strangers[stranger]
        try:
            more = stranger.recv(self._introduction_bytes - len(said))
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:
            self._forget(stranger)
            return
        said += more
        self._strangers[stranger] = said
        if len(said) == self._introduction_bytes:
            del self._strangers[stranger]
            self._loop.unwatch(stranger)
            self._on_arrival(stranger, said)

    def _forget(self, stranger: socket.socket) -> None:
        if self._strangers.pop(stranger, None) is not None:
            self._loop.unwatch(stranger)
            stranger.close()
