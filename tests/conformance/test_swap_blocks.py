"""swap_blocks between host memory of the caller and a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from llm_datadist import CacheDesc, DataType, KvCache, KvCacheManager, Placement
from llm_datadist.views import tensor_view
from tests.conformance.expectations import invalid
from tests.datadist_member import payload

TENSORS, BLOCKS, STRIDE = 2, 10, 96
TABLE = {3: 4, 0: 0, 1: 1, 2: 2, 5: 6, 6: 7, 7: 8, 9: 9}


class HostCache(NamedTuple):
    """A cache in arrays of the test."""

    arrays: list[npt.NDArray[np.uint8]]
    cache: KvCache


def host_cache(tensors: int = TENSORS, shape: tuple[int, int] = (BLOCKS, STRIDE), seed: int = 2) -> HostCache:
    arrays = [payload(seed, tensor, shape[0] * shape[1]).reshape(shape) for tensor in range(tensors)]
    described = CacheDesc(tensors, shape, DataType.DT_UINT8, Placement.HOST)
    return HostCache(arrays, KvCache.create_cpu_cache(described, [array.ctypes.data for array in arrays]))


def device_cache(
    manager: KvCacheManager, tensors: int = TENSORS, shape: tuple[int, int] = (BLOCKS, STRIDE), seed: int = 1
) -> KvCache:
    cache = manager.allocate_blocks_cache(CacheDesc(tensors, shape, DataType.DT_UINT8))
    for tensor in range(tensors):
        tensor_view(cache, tensor)[:] = payload(seed, tensor, shape[0] * shape[1]).reshape(shape)
    return cache


def test_C136_swap_out(manager: KvCacheManager) -> None:
    host, device = host_cache(), device_cache(manager)
    manager.swap_blocks(device, host.cache, TABLE)
    for tensor in range(TENSORS):
        before = payload(1, tensor, BLOCKS * STRIDE).reshape(BLOCKS, STRIDE)
        wanted = payload(2, tensor, BLOCKS * STRIDE).reshape(BLOCKS, STRIDE)
        for source, block in TABLE.items():
            wanted[block] = before[source]
        np.testing.assert_array_equal(host.arrays[tensor], wanted)
        np.testing.assert_array_equal(tensor_view(device, tensor), before)


def test_C137_swap_in(manager: KvCacheManager) -> None:
    host, device = host_cache(), device_cache(manager)
    manager.swap_blocks(device, host.cache, TABLE)
    for tensor in range(TENSORS):
        tensor_view(device, tensor)[:] = 0
    manager.swap_blocks(host.cache, device, {block: source for source, block in TABLE.items()})
    for tensor in range(TENSORS):
        wanted = payload(1, tensor, BLOCKS * STRIDE).reshape(BLOCKS, STRIDE)
        wanted[[block for block in range(BLOCKS) if block not in TABLE]] = 0
        np.testing.assert_array_equal(tensor_view(device, tensor), wanted)


def test_C138_none_and_other_types(manager: KvCacheManager) -> None:
    right: list[Any] = [device_cache(manager), host_cache().cache, {0: 0}]
    for position in range(3):
        for wrong, error in ((None, AttributeError), ("x", TypeError)):
            with pytest.raises(error):
                manager.swap_blocks(*right[:position], wrong, *right[position + 1 :])
    with pytest.raises(TypeError):
        manager.swap_blocks(right[0], right[1], {"0": 0})  # type: ignore[dict-item]


def test_C139_caches_that_do_not_fit(manager: KvCacheManager) -> None:
    host, device = host_cache(), device_cache(manager)
    invalid(manager.swap_blocks, device, host_cache(shape=(BLOCKS, STRIDE + 1)).cache, {0: 0}, match="must be equal")
    invalid(manager.swap_blocks, device, host_cache(tensors=1).cache, {0: 0}, match="must be equal")
    for wrong in ({BLOCKS: 0}, {0: BLOCKS}, {-1: 0}, {0: -1}, {1: 1, 0: BLOCKS}):
        invalid(manager.swap_blocks, device, host.cache, wrong, match=r"must be in \[0,")
    invalid(manager.swap_blocks, host.cache, host_cache().cache, {0: 0}, match="is not support")
    invalid(manager.swap_blocks, device, device_cache(manager), {0: 0}, match="is not support")
    two_devices = KvCache.create_cpu_cache(host.cache.cache_desc, host.cache.per_device_tensor_addrs * 2)
    invalid(manager.swap_blocks, device, two_devices, {0: 0})
    manager.deallocate_cache(device)
    invalid(manager.swap_blocks, device, host.cache, {0: 0})
    np.testing.assert_array_equal(host.arrays, host_cache().arrays)


def test_C140_nothing_to_swap(manager: KvCacheManager) -> None:
    host, device = host_cache(), device_cache(manager)
    manager.swap_blocks(device, host.cache, {})
    manager.swap_blocks(host.cache, device, {})
    np.testing.assert_array_equal(host.arrays, host_cache().arrays)
