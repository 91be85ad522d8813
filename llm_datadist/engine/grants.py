"""What links are made of on this side: what a peer is granted, and with data connections the end that asks it too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

from llm_datadist._segment import Segment
from llm_datadist.engine.caches import CacheTable
from llm_datadist.transports import hccl as hccl_transport
from llm_datadist.transports import private_memory, tcp
from llm_datadist.transports.base import End, Grant
from llm_datadist.transports.data_service import DataService
from llm_datadist.transports.serving_threads import ServingThreads
from llm_datadist.transports.shared_memory import SharedMemoryGrant
from llm_datadist.transports.tcp import TcpEnd, TcpGrant

if TYPE_CHECKING:
    from llm_datadist.transports.hccl.hccl_device import HcclDevice

_COMMUNICATORS_SECONDS = 5.0  # to be taken down


class DataLink(NamedTuple):
    """Both ends, on this side, of a link with data connections.

    Attributes
    ----------
    end : End
        What this process does to the peer.
    grant : Grant
        What the peer may do to the caches of this process.
    """

    end: End
    grant: Grant


class Grants:
    """Makes the ends and grants of one engine, and owns the threads of its data servers.

    Parameters
    ----------
    caches : CacheTable
        What is granted.
    cache_manager : bool
        Whether both ends of a link pull and push, and caches may be memory of the program.
    summed : bool
        Whether bytes over data connections are summed and compared.
    hccl : HcclDevice or None
        Moves the bytes of links with data connections, if the caches are on a device that HCCL connects; the grants
        close it.

    Attributes
    ----------
    data_transport : str
        What links with data connections are called, unless they are one-sided.
    """

    def __init__(
        self, caches: CacheTable, cache_manager: bool, *, summed: bool = False, hccl: HcclDevice | None = None
    ) -> None:
        self._caches = caches
        self._both_ways = cache_manager
        self._summed = summed
        self._hccl = hccl
        self._threads = ServingThreads()
        self._service: DataService | None = None
        self.data_transport = tcp.NAME if hccl is None else hccl_transport.NAME
        if cache_manager and hccl is None:
            self._service = DataService(self._segment, caches.directory, caches.lock, self._threads)

    @property
    def _segment(self) -> Segment:
        """The pool, where it is shared memory."""
        pool = self._caches.device.segment
        assert isinstance(pool, Segment)
        return pool

    def shared_memory(self, peer_writes: bool) -> SharedMemoryGrant:
        """Let a peer on this host map the pool; writable if it pushes."""
        return SharedMemoryGrant(
            self._segment,
            self._caches.directory,
            self._caches.lock,
            peer_writes=peer_writes or self._both_ways,
            service=self._service,
        )

    def data_link(
        self,
        want_channel: Callable[[], None],
        on_close: Callable[[], None] | None = None,
        *,
        peer_writes: bool,
        one_sided: bool = False,
    ) -> DataLink:
        """Begin a link with a peer that cannot map memory.

        Parameters
        ----------
        want_channel : callable
            See to it that there will be another data connection; must not block.
        on_close : callable, optional
            Called when the end is closed.
        peer_writes : bool
            Whether the peer may push.
        one_sided : bool
            Whether one end copies alone; the two ends have agreed on it.
        """
        private = private_memory.DATA_SERVER if self._both_ways else None
        granted = (self._caches.device.segment, self._caches.directory, self._caches.lock, self._threads)
        writes = peer_writes or self._both_ways
        if self._hccl is None:
            end = TcpEnd(want_channel, on_close, summed=self._summed, private_memory=private)
            return DataLink(end, TcpGrant(*granted, peer_writes=writes))
        from llm_datadist.transports.hccl.end import data_link

        ends = data_link(self._hccl, want_channel, on_close, private, granted, peer_writes=writes, one_sided=one_sided)
        return DataLink(*ends)

    def close(self, timeout_s: float) -> bool:
        """End the data servers; every grant was revoked before. Tells whether they have ended in time."""
        if not self._threads.close(timeout_s):
            return False
        if self._service is not None:
            self._service.close()
        return self._hccl is None or self._hccl.close(_COMMUNICATORS_SECONDS)
