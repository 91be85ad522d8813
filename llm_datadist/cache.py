"""A cache of the cache-manager mode as programs hold it: an id, a description and the addresses of the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_datadist.arguments import check_isinstance
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.cache_handle import CPU_CACHE_ID, CacheHandle
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    from llm_datadist.cache_manager_access import CacheManagerAccess


class Cache(CacheHandle):
    """Handle of a cache; made by `CacheManager` or by `create_cpu_cache`.

    Nothing happens when a handle dies: a cache lives until it is deallocated or unregistered, or the instance is
    finalised.

    Parameters
    ----------
    cache_id : int
        Id of the cache, int64.
    cache_desc : CacheDesc
        What was allocated or registered.
    tensor_addrs : list of int or range
        Address of each tensor.
    cache_manager : CacheManager or None
        Manager that gave the handle; None for memory that it does not know.
    is_registered : bool
        Whether the memory is the caller's.
    is_blocks_cache : bool
        Whether dimension 0 counts the blocks of paged attention.
    """

    _manager: CacheManagerAccess | None

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        tensor_addrs: Sequence[int],
        cache_manager: CacheManagerAccess | None,
        is_registered: bool,
        is_blocks_cache: bool,
    ) -> None:
        super().__init__(cache_id, cache_desc, cache_manager)
        self._given_addrs = tensor_addrs
        self._is_registered = is_registered
        self._is_blocks_cache = is_blocks_cache

    @property
    def tensor_addrs(self) -> list[int]:
        """Addresses in this process, one a tensor; ``[]`` after deallocation."""
        addrs = self._given_addrs
        if type(addrs) is not list:  # as in KvCache
            self._given_addrs = addrs = list(addrs)
        return addrs

    @property
    def is_blocks_cache(self) -> bool:
        """Whether dimension 0 counts the blocks of paged attention."""
        return self._is_blocks_cache

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int]) -> Cache:
        """Wrap host memory that the caller owns, for `CacheManager.swap_blocks`; works without an instance.

        Parameters
        ----------
        cache_desc : CacheDesc
            Description with placement HOST.
        addrs : list of int
            Address of each tensor. The caller keeps the memory alive.

        Returns
        -------
        Cache
            A blocks cache with the id -1.

        Raises
        ------
        TypeError
            An argument of the wrong type; None is an AttributeError as well.
        LLMException
            LLM_PARAM_INVALID: placement is not HOST, or `addrs` has not one address for each tensor.

        Examples
        --------
        >>> from llm_datadist import Cache, CacheDesc, DataType, Placement
        >>> Cache.create_cpu_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16, Placement.HOST), [4096, 8192])
        Cache(cache_id = -1, device_tensor_addrs = 2, is_blocks_cache = True)
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        check_isinstance("addrs", addrs, list, int, allow_none=False)
        if cache_desc.placement is not Placement.HOST:
            raise InvalidArgument(f"placement must be HOST for a cpu cache, but is {cache_desc.placement}")
        if len(addrs) != cache_desc.num_tensors:
            raise InvalidArgument(
                f"addrs has {len(addrs)} addresses for {cache_desc.num_tensors} tensors, the numbers should be equal"
            )
        return cls(CPU_CACHE_ID, cache_desc, addrs, None, is_registered=False, is_blocks_cache=True)

    def _addresses(self) -> list[list[int]]:
        return [self.tensor_addrs] if self._given_addrs else []

    def _mark_deallocated(self) -> None:
        self._held = False
        self._given_addrs = []

    def __repr__(self) -> str:
        return (
            f"Cache(cache_id = {self._cache_id}, device_tensor_addrs = {len(self._given_addrs)},"
            f" is_blocks_cache = {self._is_blocks_cache})"
        )
