"""A connector without prompts and decoders: every process listens, links to all others and pulls from all of them.

All links of a process are set up by one call, as many at the same time as a call takes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from tests.clients.instances import cluster_at, open_instance
from tests.clients.kv_tensors import KvTensors

WINDOW = 16  # clusters in one call
LINK_MS = 10_000
# Two that link to each other at the same time have one link in the end, and either may come second.
LINKED = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)

Peer = tuple[int, int]  # cluster id, port
Table = tuple[int, list[int], list[int]]  # cluster id, its blocks, own blocks


class MeshConnector:
    """One of equals.

    Parameters
    ----------
    cluster_id, port : int
        Of this process.
    cache : KvTensors
        Registered as the blocks cache of model 0.
    """

    def __init__(self, cluster_id: int, port: int, cache: KvTensors) -> None:
        self.cache = cache
        self._datadist = open_instance(LLMRole.MIX, cluster_id, port, enable_remote_cache_accessible=True)
        self._manager = self._datadist.cache_manager
        self._handle = self._manager.register_blocks_cache(cache.desc, cache.addresses, BlocksCacheKey(cluster_id))

    def close(self) -> None:
        self._datadist.finalize()

    def link(self, peers: list[Peer]) -> None:
        clusters = [cluster_at(*peer) for peer in peers]
        for at in range(0, len(clusters), WINDOW):
            _, codes = self._datadist.link_clusters(clusters[at : at + WINDOW], LINK_MS)
            assert set(codes) <= set(LINKED), codes

    def unlink(self, peers: list[Peer]) -> None:
        clusters = [cluster_at(*peer) for peer in peers]
        for at in range(0, len(clusters), WINDOW):
            _, codes = self._datadist.unlink_clusters(clusters[at : at + WINDOW], LINK_MS)
            assert set(codes) == {LLMStatusCode.LLM_SUCCESS}, codes

    def pull(self, tables: list[Table]) -> None:
        """Pull from many at the same time."""
        with ThreadPoolExecutor(len(tables)) as threads:
            for done in [threads.submit(self._pull, *table) for table in tables]:
                done.result()

    def _pull(self, cluster_id: int, remote_blocks: list[int], blocks: list[int]) -> None:
        self._manager.pull_blocks(BlocksCacheKey(cluster_id), self._handle, remote_blocks, blocks)
