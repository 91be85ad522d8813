"""The client's half of a link over data connections."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

from llm_datadist.control.loop import ControlLoop
from llm_datadist.engine.dialer import Dialer
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Identity
from llm_datadist.transports import private_memory, rendezvous, tcp
from llm_datadist.transports.base import End, Grant


class Joined(NamedTuple):
    """What a client has when it waits for the server's last word.

    Attributes
    ----------
    end : End
        What this process does to the server.
    grant : Grant
        What the server may do to the caches of this process.
    connection : socket
        That of the link.
    """

    end: End
    grant: Grant
    connection: socket.socket


class DialingEnd(tcp.TcpEnd):
    """The client's end, which makes the connections that it needs."""

    def __init__(self, dialer: Dialer, *, summed: bool, private_memory: str | None) -> None:
        super().__init__(dialer.dial_forward, summed=summed, private_memory=private_memory)
        self._dialer = dialer

    def close(self, deadline_ns: int) -> bool:
        self._dialer.close()
        return super().close(deadline_ns)


def join(
    loop: ControlLoop,
    address: tuple[str, int],
    token: bytes,
    identity: Identity,
    grants: Grants,
    *,
    summed: bool,
    deadline: float,
) -> Joined:
    """Make the connections of a link, up to the server's last word.

    Raises
    ------
    OSError
        The server cannot be reached or gave the link up, or the deadline (clock of ``time.monotonic``) passed; nothing
        is left open.
    """
    dialer = Dialer(loop, address, token)
    private = private_memory.DATA_SERVER if identity.cache_manager else None
    end = DialingEnd(dialer, summed=summed, private_memory=private)
    connections: list[socket.socket] = []
    grant = None
    try:
        connection = tcp.connect(address, token, tcp.LINK, deadline)
        connections.append(connection)
        tcp.expect(connection, rendezvous.GRANTED, deadline)
        for purpose in (tcp.FORWARD, tcp.REVERSE):  # both are under way before the first one is waited for
            connections.append(tcp.connect(address, token, purpose, deadline))
        for stream in connections[1:]:
            tcp.expect(stream, tcp.READY, deadline)
        grant = grants.tcp(True)
        grant.offer = dialer.dial_reverse
        dialer.serve(end, grant)
        end.add_channel(tcp.detached(connections[1]))
        grant.serve(tcp.detached(connections[2]))
        connection.sendall(rendezvous.MAPPED)
        return Joined(end, grant, connection)
    except BaseException:
        tcp.close_all(connections)
        end.close(time.monotonic_ns())
        if grant is not None:
            grant.revoke()
        raise
