"""How a manager of caches reaches its engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.cache_handle import CPU_CACHE_ID, CacheHandle

if TYPE_CHECKING:
    from llm_datadist.engine.engine import Engine
    from llm_datadist.engine.several_devices import SeveralDevices


class EngineAccess:
    """Base of what managers are put together from.

    Parameters
    ----------
    llm_engine : Engine
        Engine of the instance.
    """

    _engine: Engine | SeveralDevices

    def __init__(self, llm_engine: Engine | SeveralDevices) -> None:
        self._engine = llm_engine

    def _engine_id(self, cache: CacheHandle) -> int:
        """Give the id that the engine knows a cache by; caches of another instance get one that it does not know."""
        return cache._cache_id if cache._manager is self else CPU_CACHE_ID

    def _tensor_contents(self, cache: CacheHandle, tensor_index: int) -> list[memoryview]:
        """Give the bytes of a tensor that exists, or a copy of them, one view a device."""
        return self._engine.tensor_contents(self._engine_id(cache), tensor_index)

    def _tensor_memory(self, cache: CacheHandle, tensor_index: int) -> list[memoryview]:
        """Give the bytes of a tensor that exists, writable, one view a device."""
        return self._engine.tensor_memory(self._engine_id(cache), tensor_index)

    def _copy_range(
        self,
        call: str,
        cache: CacheHandle,
        tensor_index: int,
        device_index: int,
        offset: int,
        data: memoryview,
        into_cache: bool,
    ) -> None:
        """Copy between a tensor that exists, if the cache does, and contiguous memory of the host."""
        import numpy as np

        host = np.asarray(data).ctypes.data  # `data` keeps the memory where it is
        self._engine.copy_range(
            call, self._engine_id(cache), tensor_index, device_index, offset, host, data.nbytes, into_cache
        )
