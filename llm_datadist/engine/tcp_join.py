"""The client's half of a link with data connections."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

from llm_datadist.control.loop import ControlLoop
from llm_datadist.engine.dialer import Dialer
from llm_datadist.engine.grants import Grants
from llm_datadist.transports import rendezvous, tcp
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


def join(
    loop: ControlLoop,
    address: tuple[str, int],
    token: bytes,
    grants: Grants,
    deadline: float,
    *,
    one_sided: bool = False,
) -> Joined:
    """Make the connections of a link, up to the server's last word.

    Raises
    ------
    OSError
        The server cannot be reached or gave the link up, or the deadline (clock of ``time.monotonic``) passed; nothing
        is left open.
    """
    dialer = Dialer(loop, address, token)
    end, grant = grants.data_link(dialer.dial_forward, dialer.close, peer_writes=True, one_sided=one_sided)
    connections: list[socket.socket] = []
    try:
        connection = tcp.connect(address, token, tcp.LINK, deadline)
        connections.append(connection)
        tcp.expect(connection, rendezvous.GRANTED, deadline)
        for purpose in (tcp.FORWARD, tcp.REVERSE):  # both are under way before the first one is waited for
            connections.append(tcp.connect(address, token, purpose, deadline))
        for stream in connections[1:]:
            tcp.expect(stream, tcp.READY, deadline)
        grant.offer_by(dialer.dial_reverse)
        dialer.serve(end, grant)
        end.add_channel(tcp.detached(connections[1]))
        grant.serve(tcp.detached(connections[2]))
        end.prepare(int(deadline * 1e9))
        connection.sendall(rendezvous.MAPPED)
        return Joined(end, grant, connection)
    except BaseException:
        tcp.close_all(connections)
        end.close(time.monotonic_ns())
        grant.revoke()
        raise
