"""The tensors of a cache as arrays of the host, whether or not the host can see them.

The model of the demo computes on the host. In memory of the host its arrays are the cache. On a device they are a copy,
and the device copies what they hold into the cache before it is pulled, and out of it afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llm_datadist import CacheDesc, KvCache, KvCacheManager, LLMException, LLMStatusCode, Placement
from llm_datadist.device_copies import copy_from_cache, copy_to_cache
from llm_datadist.views import tensor_view

Arrays = Sequence[npt.NDArray[np.float16]]


class CacheMemory(Protocol):
    """A cache and its tensors; `slots` are indices of their first dimension.

    Attributes
    ----------
    arrays : sequence of numpy.ndarray
        One for each tensor; valid while the cache is allocated.
    """

    arrays: Arrays

    def store(self, slots: Sequence[int], rows: int) -> float:
        """See to it that the cache holds the first rows of each slot as the arrays do; gives the seconds it took."""

    def fetch(self, slots: Sequence[int], rows: int) -> float:
        """See to it that the arrays hold the first rows of each slot as the cache does; gives the seconds it took."""


def memory_of(manager: KvCacheManager, cache: KvCache) -> CacheMemory:
    """Give the memory of a cache of that manager."""
    try:
        return SeenMemory(cache)
    except LLMException as error:
        if error.status_code is not LLMStatusCode.LLM_FEATURE_NOT_ENABLED:
            raise
    return CopiedMemory(manager, cache)


class SeenMemory:
    """Arrays over the cache itself."""

    def __init__(self, cache: KvCache) -> None:
        self.arrays: Arrays = [tensor_view(cache, index) for index in range(cache.cache_desc.num_tensors)]

    def store(self, slots: Sequence[int], rows: int) -> float:
        return 0.0

    def fetch(self, slots: Sequence[int], rows: int) -> float:
        return 0.0


class CopiedMemory:
    """Arrays beside a cache that the host cannot see."""

    def __init__(self, manager: KvCacheManager, cache: KvCache) -> None:
        desc = cache.cache_desc
        shape = tuple(desc.shape)
        self._manager = manager
        self._cache = cache
        self.arrays: Arrays = [np.zeros(shape, np.float16) for _ in range(desc.num_tensors)]
        on_host = CacheDesc(desc.num_tensors, shape, desc.data_type, Placement.HOST)
        self._on_host = KvCache.create_cpu_cache(on_host, [array.ctypes.data for array in self.arrays])

    def store(self, slots: Sequence[int], rows: int) -> float:
        started = time.perf_counter()
        if self._are_whole(rows):
            self._manager.swap_blocks(self._on_host, self._cache, {slot: slot for slot in slots})
        else:
            for tensor, array in enumerate(self.arrays):
                for slot in slots:
                    copy_to_cache(self._cache, tensor, array[slot, :rows], offset=slot * array[slot].nbytes)
        return time.perf_counter() - started

    def fetch(self, slots: Sequence[int], rows: int) -> float:
        started = time.perf_counter()
        if self._are_whole(rows):
            self._manager.swap_blocks(self._cache, self._on_host, {slot: slot for slot in slots})
        else:
            for tensor, array in enumerate(self.arrays):
                for slot in slots:
                    copy_from_cache(self._cache, tensor, array[slot, :rows], offset=slot * array[slot].nbytes)
        return time.perf_counter() - started

    def _are_whole(self, rows: int) -> bool:
        return rows == self._cache.cache_desc.shape[1]  # one call copies the slots of all tensors then
