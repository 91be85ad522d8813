"""One of the two processes: an instance in cache-manager mode, and memory for one message at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_datadist import BlocksCacheKey, Cache, LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.introspection import describe_links
from llm_datadist.tools.bench.case import Case
from llm_datadist.views import tensor_view

POOL, REGISTERED = "pool", "registered"  # where the caches lie

_HOST = "127.0.0.1"
_TIMEOUT_MS = 10_000
_PAGE_SHIFT = 16  # unit of the pool
_SLACK_BYTES = 2 << 20  # of a pool, beyond the bytes of its caches

Arrays = list[npt.NDArray[Any]]


class Endpoint:
    """An initialised instance.

    Parameters
    ----------
    cluster_id : int
        Its id.
    memory : str
        ``"pool"`` or ``"registered"``.
    pool_bytes : int
        Bytes of the largest message.
    port : int or None
        Where to listen.
    """

    def __init__(self, cluster_id: int, memory: str, pool_bytes: int, tensors: int, port: int | None = None) -> None:
        config = LLMConfig()
        config.device_id = 0
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = True
        config.sync_kv_timeout = _TIMEOUT_MS
        if memory == POOL:
            unit = 1 << _PAGE_SHIFT
            units = -(-(pool_bytes + tensors * unit + _SLACK_BYTES) // unit)
            config.mem_pool_cfg = json.dumps({"memory_size": units * unit, "page_shift": _PAGE_SHIFT})
        if port is not None:
            config.listen_ip_info = f"{_HOST}:{port}"
        self._memory = memory
        self._cluster_id = cluster_id
        self._datadist = LLMDataDist(LLMRole.MIX, cluster_id)
        self._datadist.init(config.generate_options())
        self.manager = self._datadist.cache_manager

    def close(self) -> None:
        self._datadist.finalize()

    def link(self, cluster_id: int, port: int) -> None:
        """Link to the other process."""
        info = LLMClusterInfo()
        info.remote_cluster_id = cluster_id
        info.append_local_ip_info(_HOST, 0)
        info.append_remote_ip_info(_HOST, port)
        status, _ = self._datadist.link_clusters([info], _TIMEOUT_MS)
        if status != LLMStatusCode.LLM_SUCCESS:
            raise RuntimeError(f"the two processes could not be linked: {status.name}")

    @property
    def transport(self) -> str:
        """How bytes move on the link."""
        return describe_links(self._datadist)[0].transport

    @contextmanager
    def cache(self, case: Case, *, filled: bool) -> Iterator[tuple[Cache, Arrays]]:
        """Hold a cache for a message, and its tensors as arrays: with the pattern of a message, or with zeros."""
        cache, tensors = self._register(case) if self._memory == REGISTERED else self._allocate(case)
        try:
            for number, tensor in enumerate(tensors):
                tensor[...] = pattern(number) if filled else 0
            yield cache, tensors
        finally:
            if self._memory == REGISTERED:
                self.manager.unregister_cache(cache.cache_id)
            elif cache.is_blocks_cache:
                self.manager.deallocate_blocks_cache(cache)
            else:
                self.manager.deallocate_cache(cache)

    def _allocate(self, case: Case) -> tuple[Cache, Arrays]:
        if case.block_bytes is None:
            cache = self.manager.allocate_cache(case.desc)
        else:
            cache = self.manager.allocate_blocks_cache(case.desc, self._blocks_key())
        return cache, [tensor_view(cache, number) for number in range(case.tensors)]

    def _register(self, case: Case) -> tuple[Cache, Arrays]:
        tensors: Arrays = [np.empty(case.desc.shape, np.uint8) for _ in range(case.tensors)]
        addresses = [tensor.ctypes.data for tensor in tensors]
        if case.block_bytes is None:
            return self.manager.register_cache(case.desc, addresses), tensors
        return self.manager.register_blocks_cache(case.desc, addresses, self._blocks_key()), tensors

    def _blocks_key(self) -> BlocksCacheKey:
        return BlocksCacheKey(self._cluster_id, 0)


def pattern(tensor: int) -> int:
    """Byte that fills a tensor of a message."""
    return tensor % 255 + 1


def has_arrived(tensors: Arrays) -> bool:
    """Tell whether tensors hold a message."""
    return all(bool((tensor == pattern(number)).all()) for number, tensor in enumerate(tensors))
