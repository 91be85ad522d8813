"""A connector that links at the first request for a remote, and anew after any error.

It keeps no lock: threads that want the same remote race for its link, and take whatever the library answers.
"""

from __future__ import annotations

import time

from llm_datadist import BlocksCacheKey, LLMException, LLMRole, LLMStatusCode
from tests.clients.instances import cluster_at, open_instance
from tests.clients.kv_tensors import KvTensors

LINK_MS = 2000
DEADLINE_S = 15.0
BACK_OFF_S = 0.02  # before the next try to link
LINKED = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)


class NotPulled(Exception):
    """The remote was not there, or did not have the blocks, until the deadline."""


class OnDemandConnector:
    """One process: what it has registered can be pulled, and it pulls from others.

    Parameters
    ----------
    role : LLMRole
        A label.
    cluster_id : int
        Of this process.
    cache : KvTensors
        Registered as the blocks cache of model 0.
    port : int, optional
        Where others link to.
    """

    def __init__(self, role: LLMRole, cluster_id: int, cache: KvTensors, port: int | None = None) -> None:
        self.cache = cache
        self.events: list[str] = []  # codes of the links and pulls that failed
        self._datadist = open_instance(role, cluster_id, port)
        self._manager = self._datadist.cache_manager
        self._handle = self._manager.register_blocks_cache(cache.desc, cache.addresses, BlocksCacheKey(cluster_id))
        self._linked: set[int] = set()

    def close(self) -> None:
        self._datadist.finalize()

    def pull(self, cluster_id: int, port: int, remote_blocks: list[int], local_blocks: list[int]) -> None:
        """Pull blocks of the cluster that listens at a port."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if not self._link(cluster_id, port):
                time.sleep(BACK_OFF_S)
                continue
            try:
                self._manager.pull_blocks(BlocksCacheKey(cluster_id), self._handle, remote_blocks, local_blocks)
            except LLMException as error:
                self.events.append(error.status_code.name)
                self._unlink(cluster_id, port)
            else:
                return
        raise NotPulled(f"cluster {cluster_id} at port {port}: {self.events[-20:]}")

    def _link(self, cluster_id: int, port: int) -> bool:
        if cluster_id in self._linked:
            return True
        _, (code,) = self._datadist.link_clusters([cluster_at(cluster_id, port)], LINK_MS)
        if code in LINKED:
            self._linked.add(cluster_id)
        else:
            self.events.append(code.name)
        return code in LINKED

    def _unlink(self, cluster_id: int, port: int) -> None:
        self._linked.discard(cluster_id)
        _, (code,) = self._datadist.unlink_clusters([cluster_at(cluster_id, port)], LINK_MS, force=True)
        self.events.append(f"unlink {code.name}")
