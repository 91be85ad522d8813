"""A cache as programs hold it: an id, a description and the addresses of the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_datadist.arguments import check_isinstance
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.cache_handle import CPU_CACHE_ID, CacheHandle
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    from llm_datadist.kv_cache_manager import KvCacheManager


class KvCache(CacheHandle):
    """Handle of a cache; made by `KvCacheManager` or by `create_cpu_cache`.

    An allocated cache is deallocated when its handle dies, so keep the handle as long as the memory is in use.

    Parameters
    ----------
    cache_id : int
        Id of the cache, int64.
    cache_desc : CacheDesc
        What was allocated.
    per_device_tensor_addrs : list of (list of int or range)
        Addresses of the tensors on each device.
    kv_cache_manager : KvCacheManager or None
        Manager that allocated the cache; None for memory of the caller.
    """

    _manager: KvCacheManager | None

    def __init__(
        self,
        cache_id: int,
        cache_desc: CacheDesc,
        per_device_tensor_addrs: Sequence[Sequence[int]],
        kv_cache_manager: KvCacheManager | None,
    ) -> None:
        self._given_addrs = per_device_tensor_addrs
        super().__init__(cache_id, cache_desc, kv_cache_manager)

    @property
    def per_device_tensor_addrs(self) -> list[list[int]]:
        """Addresses in this process, one list a device and one address a tensor; ``[]`` after deallocation."""
        addrs = self._given_addrs
        if addrs and type(addrs[0]) is range:  # lists are made for those who look: an allocation need not wait for them
            self._given_addrs = addrs = [list(of_device) for of_device in addrs]
        return addrs  # type: ignore[return-value]

    @classmethod
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: list[int] | list[list[int]]) -> KvCache:
        """Wrap host memory that the caller owns; works without an initialised instance.

        Parameters
        ----------
        cache_desc : CacheDesc
            Description with placement HOST.
        addrs : list of int, or list of list of int
            Address of each tensor; or one such list for each device. The caller keeps the memory alive.

        Returns
        -------
        KvCache
            With the id -1.

        Raises
        ------
        TypeError
            An argument of the wrong type; None is an AttributeError as well.
        LLMException
            LLM_PARAM_INVALID: placement is not HOST; `addrs` is empty, mixes both forms, or has not one address for
            each tensor.

        Examples
        --------
        >>> import numpy as np
        >>> from llm_datadist import CacheDesc, DataType, KvCache, Placement
        >>> desc = CacheDesc(2, (4, 128), DataType.DT_FLOAT16, Placement.HOST)
        >>> tensors = [np.zeros(desc.shape, np.float16) for _ in range(desc.num_tensors)]
        >>> cache = KvCache.create_cpu_cache(desc, [tensor.ctypes.data for tensor in tensors])
        >>> cache.cache_id, cache.per_device_tensor_addrs == [[tensor.ctypes.data for tensor in tensors]]
        (-1, True)
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        if cache_desc.placement is not Placement.HOST:
            raise InvalidArgument(f"placement must be HOST for a cpu cache, but is {cache_desc.placement}")
        check_isinstance("addrs", addrs, list, allow_none=False)
        if not addrs:
            raise InvalidArgument("addrs is empty, should have an address for each tensor")
        nested = isinstance(addrs[0], list)
        for index, item in enumerate(addrs):
            _check_addresses(f"addrs[{index}]", item, nested, cache_desc.num_tensors)
        if not nested:
            _check_count("addrs", len(addrs), cache_desc.num_tensors)
        return cls(CPU_CACHE_ID, cache_desc, addrs if nested else [addrs], None)  # type: ignore[arg-type, list-item]

    def _addresses(self) -> list[list[int]]:
        return self.per_device_tensor_addrs

    def _mark_deallocated(self) -> None:
        self._held = False
        self._given_addrs = []

    def __repr__(self) -> str:
        return f"KvCache(cache_id = {self._cache_id}, num_devices = {len(self._given_addrs)})"

    def __del__(self) -> None:
        manager = self._manager
        if manager is None or not self._held:
            return
        try:
            manager._drop(self._cache_id)
        except Exception:
            pass  # nobody could be told; finalize frees the memory


def _check_addresses(name: str, item: object, nested: bool, num_tensors: int) -> None:
    """Check one element of `addrs`: an address, or the addresses of one device."""
    check_isinstance(name, item, [list, int], allow_none=False)
    if isinstance(item, list):
        check_isinstance(name, item, list, int)
        _check_count(name, len(item), num_tensors)
    if isinstance(item, list) is not nested:
        raise InvalidArgument(f"elements of addrs should be consistent: all int or all list, but {name} is {item}")


def _check_count(name: str, count: int, num_tensors: int) -> None:
    if count != num_tensors:
        raise InvalidArgument(f"{name} has {count} addresses for {num_tensors} tensors, the numbers should be equal")
