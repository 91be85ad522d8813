"""deallocate_cache, remove_cache_key, get_cache_tensors."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, KvCache, KvCacheManager, LLMRole, Placement
from llm_datadist.views import tensor_view
from tests.conformance.conftest import Linked, Start
from tests.conformance.expectations import NOT_EXIST, invalid, refused
from tests.conformance.remote import target
from tests.own_instance import desc

HOST_CACHE = KvCache.create_cpu_cache(CacheDesc(1, [4, 8], DataType.DT_FLOAT16, Placement.HOST), [4096])


def test_C121_deallocate(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(2, [4, 8]))
    manager.deallocate_cache(cache)
    assert cache.per_device_tensor_addrs == []
    manager.deallocate_cache(cache)
    with pytest.raises(AttributeError):
        manager.deallocate_cache(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.deallocate_cache(1)  # type: ignore[arg-type]
    invalid(manager.deallocate_cache, HOST_CACHE, match="Only support device cache")


def test_C122_a_deallocated_cache_is_unknown(linked: Linked) -> None:
    manager = linked.manager
    gone, other = target(manager), target(manager)
    manager.deallocate_cache(gone)
    linked.prompt.offer(CacheKey(1, 7))
    refused(NOT_EXIST, manager.get_cache_tensors, gone)
    refused(NOT_EXIST, manager.copy_cache, other, gone)
    refused(NOT_EXIST, manager.copy_cache, gone, other)
    refused(NOT_EXIST, manager.pull_cache, CacheKey(1, 7), gone)


def test_C123_remove_cache_key(start: Start) -> None:
    datadist = start(LLMRole.PROMPT)
    manager = datadist.kv_cache_manager
    cache = manager.allocate_cache(desc(1, [1, 8]), [CacheKey(1, 7)])
    manager.remove_cache_key(CacheKey(1, 8))
    for _ in range(2):
        manager.remove_cache_key(CacheKey(1, 7))
    manager.deallocate_cache(manager.allocate_cache(desc(1, [1, 8]), [CacheKey(1, 7)]))
    assert cache.per_device_tensor_addrs
    with pytest.raises(TypeError):
        manager.remove_cache_key(BlocksCacheKey(1))  # type: ignore[arg-type]
    datadist.finalize()
    decoder = start(LLMRole.DECODER).kv_cache_manager
    invalid(decoder.remove_cache_key, CacheKey(1, 7), match="is not supported by")
    invalid(decoder.remove_cache_key, "no key", match="is not supported by")


@pytest.mark.parametrize(
    ("data_type", "shown"),
    [
        (DataType.DT_FLOAT16, np.float16),
        (DataType.DT_BF16, np.float32),
        (DataType.DT_INT8, np.int8),
        (DataType.DT_FLOAT, np.float32),
    ],
)
def test_C124_tensors_have_the_shape(manager: KvCacheManager, data_type: DataType, shown: type) -> None:
    cache = manager.allocate_cache(desc(2, [4, 8], data_type))
    tensor_view(cache, 1)[:] = 0x3F80 if data_type is DataType.DT_BF16 else 1
    (tensor,) = manager.get_cache_tensors(cache, 1)
    values = tensor.numpy()
    assert (values.shape, values.dtype) == ((4, 8), shown)
    assert (values == 1).all()


def test_C125_tensor_index(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(2, [4, 8]))
    for index in (-1, 2):
        invalid(manager.get_cache_tensors, cache, index, match="out of range")
    with pytest.raises(TypeError):
        manager.get_cache_tensors(cache, "0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range"):
        manager.get_cache_tensors(cache, 2**31)


def test_C126_addresses_are_memory(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(1, [4, 8], DataType.DT_UINT8))
    ctypes.memset(cache.per_device_tensor_addrs[0][0], 0x5A, 32)
    assert (manager.get_cache_tensors(cache)[0].numpy() == 0x5A).all()
