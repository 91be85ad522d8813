"""Where one member of a communicator waits for the others: on a Unix socket, at an address over TCP, or both."""

from __future__ import annotations

import errno
import logging
import socket
from typing import Callable

from llm_datadist.control.loop import ControlLoop
from llm_datadist.engine.meeting_points import MeetingPoints
from llm_datadist.engine.membership import Membership
from llm_datadist.transports import rendezvous

_log = logging.getLogger("llm_datadist.link")


class WaitingPlace:
    """The listeners of one communicator. Everything in here runs in the control thread.

    Parameters
    ----------
    membership : Membership
        Says where.
    loop : ControlLoop
        Watches the Unix socket.
    points : MeetingPoints
        Has the listeners over TCP.
    on_member : callable
        Told of everybody who comes, and has the connection then.

    Attributes
    ----------
    on_tcp : bool
        Whether members are waited for over TCP now.
    trouble : str
        Why they are not, though they should be; else empty.
    """

    def __init__(
        self,
        membership: Membership,
        loop: ControlLoop,
        points: MeetingPoints,
        on_member: Callable[[socket.socket], None],
    ) -> None:
        self.on_tcp = False
        self.trouble = ""
        self._membership = membership
        self._loop = loop
        self._points = points
        self._on_member = on_member
        self._listener: socket.socket | None = None
        self._name_was_taken = False

    @property
    def on_unix(self) -> bool:
        """Whether members are waited for on the Unix socket now."""
        return self._listener is not None

    def open(self) -> bool:
        """Open what is not open yet; tells whether there was something. A place that is taken is left for later.

        Raises
        ------
        OSError
            A listener cannot be made, and trying again is of no use.
        """
        places, before = self._membership.places, (self.on_unix, self.on_tcp)
        if places.unix and not self.on_unix:
            self._listen()
        if places.own is not None and not self.on_tcp:
            self._enter(places.own)
        return (self.on_unix, self.on_tcp) != before

    def _listen(self) -> None:
        rank = self._membership.rank
        try:
            self._listener = rendezvous.listen_at(self._membership.meeting_name(rank))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if not self._name_was_taken:
                self._name_was_taken = True
                _log.warning("%s: another process waits as rank %d", self._membership.title, rank)
            return
        self._loop.watch(self._listener, self._on_connection)

    def _enter(self, address: tuple[str, int]) -> None:
        try:
            self._points.enter(address, self._membership.digest(), self._on_member)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, f"{error.strerror} ({address[0]}, port {address[1]})") from error
            if not self.trouble:
                self.trouble = f"port {address[1]} of {address[0]}, where this process should listen, is in use"
                _log.warning("%s: %s", self._membership.title, self.trouble)
            return
        self.on_tcp, self.trouble = True, ""

    def _on_connection(self) -> None:
        assert self._listener is not None
        try:
            connection = rendezvous.accept(self._listener)
        except BlockingIOError:
            return
        except rendezvous.ForeignProcess as error:
            _log.warning("%s: refused a connection: %s", self._membership.title, error)
            return
        self._on_member(connection)

    def expect_nobody(self) -> None:
        """Take no member any more, but further data connections of those that were taken over TCP."""
        if self._listener is not None:
            self._loop.unwatch(self._listener)
            self._listener.close()
            self._listener = None
        self._points.expect_nobody(self._membership.digest())

    def close(self) -> None:
        """Leave; may be called twice."""
        self.expect_nobody()
        self._points.leave(self._membership.digest())
        self.on_tcp = False
