"""What peers are granted: one for each link, of the kind that its transport needs."""

from __future__ import annotations

from llm_datadist.engine.caches import CacheTable
from llm_datadist.transports.data_service import DataService
from llm_datadist.transports.serving_threads import ServingThreads
from llm_datadist.transports.shared_memory import SharedMemoryGrant
from llm_datadist.transports.tcp import TcpGrant


class Grants:
    """Makes the grants of one engine, and owns the threads of its data servers.

    Parameters
    ----------
    caches : CacheTable
        What is granted.
    cache_manager : bool
        Whether both ends of a link pull and push, and caches may be memory of the program.
    """

    def __init__(self, caches: CacheTable, cache_manager: bool) -> None:
        self._caches = caches
        self._both_ways = cache_manager
        self._threads = ServingThreads()
        self._service: DataService | None = None
        if cache_manager:
            self._service = DataService(caches.device.segment, caches.directory, caches.lock, self._threads)

    def shared_memory(self, peer_writes: bool) -> SharedMemoryGrant:
        """Let a peer on this host map the pool; writable if it pushes."""
        return SharedMemoryGrant(
            self._caches.device.segment,
            self._caches.directory,
            self._caches.lock,
            peer_writes=peer_writes or self._both_ways,
            service=self._service,
        )

    def tcp(self, peer_writes: bool) -> TcpGrant:
        """Answer requests of a peer that cannot map memory."""
        return TcpGrant(
            self._caches.device.segment,
            self._caches.directory,
            self._caches.lock,
            self._threads,
            peer_writes=peer_writes or self._both_ways,
        )

    def close(self, timeout_s: float) -> bool:
        """End the data servers; every grant was revoked before. Tells whether they have ended in time."""
        if not self._threads.close(timeout_s):
            return False
        if self._service is not None:
            self._service.close()
        return True
