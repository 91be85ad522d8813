"""What handles of caches have in common: an id, a description, and the manager that gave them."""

from __future__ import annotations

from llm_datadist.arguments import check_int64
from llm_datadist.cache_desc import CacheDesc

CPU_CACHE_ID = -1  # of every cache of create_cpu_cache; no cache of an engine has it


class CacheHandle:
    """Base of `KvCache` and `Cache`.

    Parameters
    ----------
    cache_id : int
        Id of the cache, int64.
    cache_desc : CacheDesc
        What it consists of.
    manager : object or None
        Manager that gave the handle; None for memory of the caller.
    """

    _manager: object | None = None  # what the destructor of a half-made object finds

    def __init__(self, cache_id: int, cache_desc: CacheDesc, manager: object | None) -> None:
        self._cache_id = check_int64("cache_id", cache_id)
        self._cache_desc = cache_desc
        self._held = True
        self._manager = manager

    @property
    def cache_id(self) -> int:
        """Id: 1, 2, 3, ... in each initialised instance; -1 for memory of the caller."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The description that the cache was made with."""
        return self._cache_desc

    def _addresses(self) -> list[list[int]]:
        """List the addresses of the tensors on each device; no device after deallocation."""
        raise NotImplementedError
