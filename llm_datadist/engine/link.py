"""One link to one remote cluster: its state and everything that it owns on this side."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from concurrent.futures import Future
from typing import NamedTuple

from llm_datadist.engine.link_state import LinkEvent, LinkState, LinkStatus
from llm_datadist.transports.base import End, Grant

_log = logging.getLogger("llm_datadist.link")

_CLOSE_SECONDS = 1.0  # a running copy looks up at least every millisecond


class Identity(NamedTuple):
    """What this process says about itself in a handshake.

    Attributes
    ----------
    cluster_id : int
        uint64.
    instance : bytes
        Random name of this run of the process.
    host : str
        See `llm_datadist.transports.rendezvous.host_identity`.
    cache_manager : bool
        Whether this process is in cache-manager mode: links carry pulls and pushes in both directions then.
    """

    cluster_id: int
    instance: bytes
    host: str
    cache_manager: bool


class ClusterAddress(NamedTuple):
    """A remote cluster as a link call names it.

    Attributes
    ----------
    remote_cluster_id : int
        uint64.
    local, remote : tuple of (int or str, int)
        Address (IPv4 in little-endian integer form, IPv6 as text) and port, one for each device.
    """

    remote_cluster_id: int
    local: tuple[tuple[int | str, int], ...]
    remote: tuple[tuple[int | str, int], ...]


class Link:
    """A link from the moment its set-up starts to the moment this side has given it up.

    Attributes
    ----------
    cluster_id : int
        Of the remote cluster; identifies the link.
    token : bytes
        Names this very link in messages, so that a late one cannot touch its successor.
    instance : bytes
        Which run of the remote process it is.
    address : ClusterAddress or None
        What the client linked to; None on the server's side.
    communicator : int or None
        Id of the communicator that the link belongs to; None if it was made by ``link_clusters``.
    end : End
        What this process does to the peer: the client pulls, the server pushes.
    grant : Grant
        What the peer may do to the caches of this process.
    connection : socket
        Kept open as long as the link; the kernel closes it when a process dies.
    reason : str
        Why it has the transport that it has.
    farewell : Future of bytes
        What the peer says to an unlink that was started here: `GONE` or `BUSY` of `llm_datadist.transports.rendezvous`,
        or nothing (b"") if it was lost.
    """

    def __init__(
        self,
        cluster_id: int,
        token: bytes,
        instance: bytes,
        end: End,
        grant: Grant,
        connection: socket.socket,
        address: ClusterAddress | None = None,
        communicator: int | None = None,
        reason: str = "",
    ) -> None:
        self.cluster_id = cluster_id
        self.token = token
        self.instance = instance
        self.end = end
        self.grant = grant
        self.connection = connection
        self.address = address
        self.communicator = communicator
        self.reason = reason
        self.farewell: Future[bytes] = Future()
        self.status = LinkStatus()
        self.status.handle(LinkEvent.SET_UP)

    @property
    def state(self) -> LinkState:
        return self.status.state

    @property
    def opened_here(self) -> bool:
        """Whether this process is the client."""
        return self.address is not None

    @property
    def busy(self) -> bool:
        """Whether a transfer in either direction uses the link right now."""
        return self.end.busy or self.grant.busy

    def open_channel(self) -> None:
        """See to it that transfers reach registered memory of the peer."""
        if self.state is not LinkState.LINKED:
            return
        try:
            self.end.open_channel(self.connection)
        except (OSError, ValueError) as error:
            _log.warning("no data channel to cluster %d: %s", self.cluster_id, error)

    def lose_peer(self) -> None:
        """Take in that the peer is gone: running transfers fail at once, its claims no longer hold memory."""
        self.status.handle(LinkEvent.PEER_LOST)
        self.end.mark_dead()
        self.grant.revoke()
        self.hear_farewell(b"")

    def hear_farewell(self, word: bytes) -> None:
        """Take the peer's answer to an unlink; only the first one counts."""
        if not self.farewell.done():
            self.farewell.set_result(word)

    def start_unlink(self, *, peer_is_idle: bool = False) -> bool:
        """Go to UNLINKING and let no new transfer start; False, and nothing changed, if one uses the link.

        With `peer_is_idle` the peer has said that no transfer of its own runs; what this side has not heard of the end
        of one yet does not count.
        """
        if self.state is LinkState.LINKED:
            if not peer_is_idle and self.grant.busy:
                return False
            if not self.end.begin_close():
                return False
        self.status.handle(LinkEvent.TAKE_DOWN)
        return True

    def keep(self) -> None:
        """Take `start_unlink` back: the other side uses the link."""
        self.status.handle(LinkEvent.KEPT)
        self.end.reopen()
        self.farewell = Future()
        if self.end.dead:  # it said so and died
            self.status.handle(LinkEvent.PEER_LOST)

    def close(self) -> None:
        """Give up what this side holds. The caller has taken the connection out of the control loop."""
        self.end.close(time.monotonic_ns() + int(_CLOSE_SECONDS * 1e9))
        self.grant.revoke()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # the peer learns of it even if a forked child has a copy
        self.connection.close()
        if self.state is LinkState.UNLINKING:
            self.status.handle(LinkEvent.CLOSED)
