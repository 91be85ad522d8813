"""Shared memory as a transport: the puller maps the peer's pool and copies by itself.

Each side grants the other four segments: its pool, its directory (read-only for the peer), its ledger, and a claim page
made for that link alone. The server's pool is read-only for the client, who pulls from it; the client's is writable for
the server, who pushes into it. From then on a transfer needs nothing from the peer's process, not even that it runs.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Callable

from llm_datadist._directory import Claims, Directory
from llm_datadist._push import PeerTarget
from llm_datadist._segment import Segment
from llm_datadist.transports import private_memory, rendezvous
from llm_datadist.transports.data_service import DataService

NAME = "shared_memory"
NUM_DESCRIPTORS = 4


class SharedMemoryEnd(PeerTarget):
    """One end of a link: pulls out of the peer's pool, and pushes into it if it is mapped writable."""

    name = NAME
    private_memory: str | None = None  # the way to registered memory of the peer; None in KV mode, which has none

    def begin_preparing(self, on_end: Callable[[], None]) -> None:
        """Nothing is missing once the memory is mapped."""
        on_end()

    def prepare(self, deadline_ns: int) -> None:
        """Do nothing."""

    def open_channel(self, connection: socket.socket) -> None:
        """See to it that there is a data channel, if private memory of the peer is reached through its data server.

        Raises
        ------
        OSError
            The peer is gone, or no socket can be made.
        """
        if self.private_memory != private_memory.DATA_SERVER or self.channels:
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            rendezvous.send_descriptors(connection, rendezvous.CHANNEL, [theirs.fileno()])
            self.add_channel(os.dup(ours.fileno()))


def attach(descriptors: list[int], *, pool_writable: bool, connection: socket.socket | None = None) -> SharedMemoryEnd:
    """Map what a peer granted; takes over the descriptors, also when it fails.

    With the connection to the peer, its private memory is reached through the kernel where that may be done.

    Raises
    ------
    ValueError
        The segments are not what they should be.
    OSError
        The kernel refuses a mapping.
    """
    left = list(descriptors)
    segments: list[Segment] = []
    try:
        for writable in (pool_writable, False, True, True):
            segments.append(Segment.attach(left.pop(0), writable=writable))
        pool, directory, ledger, claims = segments
        end = SharedMemoryEnd(pool, directory, ledger, claims)
    except BaseException:
        for segment in segments:
            segment.close()
        for descriptor in left:
            os.close(descriptor)
        raise
    if connection is not None:
        end.private_memory = _way_to_private_memory(end, connection)
    return end


def _way_to_private_memory(end: SharedMemoryEnd, connection: socket.socket) -> str:
    pid, pidfd = rendezvous.open_process(connection)
    end.watch_process(pidfd)
    if private_memory.may_use_kernel() and pid and end.reach_process(pid):
        return private_memory.PROCESS_VM
    return private_memory.DATA_SERVER


class SharedMemoryGrant:
    """What one peer may reach: lets it map the pool, and honours its claims until it is revoked.

    Parameters
    ----------
    pool : Segment
        The device's pool.
    directory : Directory
        Caches and keys in that pool.
    lock : threading.Lock
        Guards the directory.
    peer_writes : bool
        Whether the peer pushes into the pool; else it gets a descriptor that is open for reading.
    service : DataService or None
        Serves the peer's data channels; None where there is no registered memory.
    """

    name = NAME

    def __init__(
        self,
        pool: Segment,
        directory: Directory,
        lock: threading.Lock,
        *,
        peer_writes: bool,
        service: DataService | None = None,
    ) -> None:
        self._service = service
        self._channels: list[socket.socket] = []
        self._directory = directory
        self._lock = lock
        self._pool = pool
        self._peer_writes = peer_writes
        self._claims = Claims()
        self._revoked = False
        with lock:
            directory.add_claims(self._claims)

    def send(self, connection: socket.socket, step: bytes) -> None:
        """Send the byte of a handshake step, and descriptors of everything that the peer maps."""
        if self._peer_writes:
            self._claims.watch(rendezvous.open_process(connection)[1])
        shared = (self._directory.segment, self._directory.ledger, self._claims.segment)
        pool = os.dup(self._pool.fileno()) if self._peer_writes else _reopen_for_reading(self._pool.fileno())
        try:
            rendezvous.send_descriptors(connection, step, [pool, *(segment.fileno() for segment in shared)])
        finally:
            os.close(pool)

    def serve(self, descriptor: int) -> None:
        """Serve a data channel of the peer; takes over the descriptor. In the control thread."""
        channel = socket.socket(fileno=descriptor)
        if self._service is None or self._revoked:
            channel.close()
            return
        self._channels.append(channel)
        self._service.serve(channel)

    def offer_by(self, offer: Callable[[], None]) -> None:
        """Do nothing: there are none to offer."""

    def offer_channel(self) -> None:
        """Do nothing: a peer on this host opens its channels by itself."""

    @property
    def busy(self) -> bool:
        return not self._revoked and self._claims.busy

    def revoke(self) -> None:
        with self._lock:
            if self._revoked:
                return
            self._revoked = True
            self._directory.drop_claims(self._claims)  # and closes them, once the peer touches nothing any more
        if self._service is not None:
            for channel in self._channels:
                self._service.stop(channel)


def _reopen_for_reading(descriptor: int) -> int:
    """Open a segment again, so that no writable mapping can be made through the new descriptor."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
