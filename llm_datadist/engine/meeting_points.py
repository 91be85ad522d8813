"""Listeners over TCP that the communicators of a process share: whom a connection is for stands in its first bytes."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Callable

from llm_datadist.control.loop import ControlLoop
from llm_datadist.engine.entrance import Entrance
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.meeting_places import Address
from llm_datadist.engine.set_ups import take_stream
from llm_datadist.transports import tcp

_log = logging.getLogger("llm_datadist.link")

# Takes a member that has come, and has its connection then.
OnMember = Callable[[socket.socket], None]
# Takes a data connection of a link that is being made, with its purpose.
OnStream = Callable[[socket.socket, bytes], None]


class MeetingPoints:
    """A listener for each address that communicators meet at. Everything in here runs in the control thread.

    It stays open as long as a communicator needs it: peers make further data connections to it while their links live.

    Parameters
    ----------
    loop : ControlLoop
        Watches the listeners.
    table : LinkTable
        Has the links that data connections are for.
    """

    def __init__(self, loop: ControlLoop, table: LinkTable) -> None:
        self._loop = loop
        self._table = table
        self._entrances: dict[Address, Entrance] = {}
        self._addresses: dict[bytes, Address] = {}  # of each communicator
        self._takers: dict[bytes, OnMember] = {}  # of each communicator that still expects somebody
        self._set_ups: dict[bytes, OnStream] = {}  # by the token of the link

    def enter(self, address: Address, meeting: bytes, on_member: OnMember) -> None:
        """Wait at an address for members of a communicator.

        Parameters
        ----------
        address : (str, int)
            Address of this host, and port.
        meeting : bytes
            Names the communicator, `llm_datadist.transports.rendezvous.TOKEN_BYTES` long.
        on_member : callable
            Told of every one that comes.

        Raises
        ------
        OSError
            Nobody can listen there; EADDRINUSE: another process does.
        """
        if address not in self._entrances:
            host, port = address
            listener = tcp.listen(host, (port, port))
            entrance = Entrance(self._loop, listener, tcp.accept, tcp.PREAMBLE_BYTES, self._on_arrival)
            entrance.open()
            self._entrances[address] = entrance
        self._addresses[meeting] = address
        self._takers[meeting] = on_member

    def expect_nobody(self, meeting: bytes) -> None:
        """Take no members of a communicator any more; its links may still get data connections."""
        self._takers.pop(meeting, None)

    def leave(self, meeting: bytes) -> None:
        """Leave an address, which is closed behind the last one; may be called twice."""
        self._takers.pop(meeting, None)
        address = self._addresses.pop(meeting, None)
        if address is not None and address not in self._addresses.values():
            self._entrances.pop(address).close()

    @contextlib.contextmanager
    def expecting(self, token: bytes, on_stream: OnStream) -> Iterator[None]:
        """Take the data connections of a link that is being made."""
        self._set_ups[token] = on_stream
        try:
            yield
        finally:
            del self._set_ups[token]

    def close(self) -> None:
        """Close every listener. The control loop has ended."""
        for meeting in list(self._addresses):
            self.leave(meeting)

    def _on_arrival(self, connection: socket.socket, preamble: bytes) -> None:
        token, purpose = tcp.read_preamble(preamble) or (b"", b"")
        link = self._table.accepted_with(token) if purpose in (tcp.FORWARD, tcp.REVERSE) else None
        if purpose == tcp.MEMBER and token in self._takers:
            self._takers[token](connection)
        elif purpose in (tcp.FORWARD, tcp.REVERSE) and token in self._set_ups:
            self._set_ups[token](connection, purpose)
        elif link is not None:
            take_stream(connection, purpose, link.end, link.grant)
        else:
            if purpose != tcp.MEMBER:  # a member may be earlier or later than this one
                _log.warning("refused a connection from %s to where members meet", tcp.peer_name(connection))
            connection.close()
