"""Caches of the cache-manager mode in one process: allocated, registered, given back, copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    LLMException,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
)
from llm_datadist.v2.cache_manager import CacheManager
from llm_datadist.views import tensor_view
from tests.conformance.conftest import Start
from tests.conformance.expectations import NOT_EXIST, invalid, refused

DEVICE, HOST = Placement.DEVICE, Placement.HOST
OUT_OF_MEMORY = LLMStatusCode.LLM_OUT_OF_MEMORY
SHAPE = (4, 256)
NO_POOL = "you should config memory pool firstly"


def desc(num_tensors: int = 2, shape: Any = SHAPE, placement: Placement = DEVICE) -> CacheDesc:
    return CacheDesc(num_tensors, shape, DataType.DT_UINT8, placement)


@pytest.fixture
def manager(start_manager: Start) -> CacheManager:
    """A manager with a pool of either placement."""
    return start_manager(device_pool=1 << 20, host_pool=1 << 20).cache_manager


# ---- allocation


@pytest.mark.parametrize("placement", [DEVICE, HOST])
def test_C237_memory_of_a_pool(start_manager: Start, placement: Placement) -> None:
    pools = {"device_pool": 0, "host_pool": 0}
    manager = start_manager(**pools).cache_manager
    for allocate in (manager.allocate_cache, manager.allocate_blocks_cache):
        invalid(allocate, desc(placement=placement), match=NO_POOL)


@pytest.mark.parametrize("placement", [DEVICE, HOST])
def test_C237_caches_of_a_pool(start_manager: Start, placement: Placement) -> None:
    other = HOST if placement is DEVICE else DEVICE
    pool = {"device_pool" if placement is DEVICE else "host_pool": 1 << 20}
    manager = start_manager(**{"device_pool": 0, **pool}).cache_manager
    invalid(manager.allocate_cache, desc(placement=other), match=NO_POOL)
    plain = manager.allocate_cache(desc(placement=placement), [CacheKey(0, 1)])  # in every role
    blocks = manager.allocate_blocks_cache(desc(placement=placement), BlocksCacheKey(0))
    assert (plain.cache_id, blocks.cache_id) == (1, 2)
    assert (plain.is_blocks_cache, blocks.is_blocks_cache) == (False, True)
    addresses = plain.tensor_addrs + blocks.tensor_addrs
    assert len(set(addresses)) == 4
    assert all(type(address) is int and address % 512 == 0 for address in addresses)
    tensor_view(blocks, 1)[:] = 5
    assert repr(plain) == "Cache(cache_id = 1, device_tensor_addrs = 2, is_blocks_cache = False)"
    refused(OUT_OF_MEMORY, manager.allocate_cache, desc(2, (1, 1 << 20), placement))
    manager.allocate_cache(desc(placement=placement))


def test_C237_keys(manager: CacheManager) -> None:
    key = CacheKey(0, 1)
    manager.allocate_cache(desc(), [key])
    for keys in ([CacheKey(9, 1)], [CacheKey(0, 2), CacheKey(0, 2)], [CacheKey(0, number) for number in range(5, 10)]):
        invalid(manager.allocate_cache, desc(), keys)
    manager.allocate_blocks_cache(desc(), BlocksCacheKey(0, 3))
    invalid(manager.allocate_blocks_cache, desc(), BlocksCacheKey(0, 3))
    manager.remove_cache_key(key)
    manager.remove_cache_key(key)
    manager.allocate_cache(desc(), [key])
    with pytest.raises(TypeError):
        manager.remove_cache_key(BlocksCacheKey(0, 3))  # type: ignore[arg-type]


def test_C237_remove_cache_key_without_a_pool(start_manager: Start) -> None:
    manager = start_manager(device_pool=0).cache_manager
    with pytest.raises(TypeError):
        manager.remove_cache_key(1)
    refused(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, manager.remove_cache_key, CacheKey(0, 1))


def test_C238_each_kind_has_its_deallocation(manager: CacheManager) -> None:
    plain, blocks = manager.allocate_cache(desc()), manager.allocate_blocks_cache(desc())
    invalid(manager.deallocate_cache, blocks, match="can not be blocks cache")
    invalid(manager.deallocate_blocks_cache, plain, match="should be blocks cache")
    assert plain.tensor_addrs
    assert blocks.tensor_addrs
    for deallocate, cache in ((manager.deallocate_cache, plain), (manager.deallocate_blocks_cache, blocks)):
        for _ in range(2):
            deallocate(cache)
            assert cache.tensor_addrs == []
        with pytest.raises(TypeError):
            deallocate(1)  # type: ignore[arg-type]
    refused(NOT_EXIST, manager.copy_cache, plain, plain)
    refused(NOT_EXIST, manager.copy_blocks, blocks, {0: [1]})


# ---- registration


def test_C239_addresses(manager: CacheManager) -> None:
    tensors = [np.zeros(SHAPE, np.uint8) for _ in range(2)]
    good = [tensor.ctypes.data for tensor in tensors]
    for addresses in (good[:1], good * 2, [], [good[0], 0]):
        invalid(manager.register_cache, desc(), addresses)
    invalid(manager.register_blocks_cache, desc(), [])
    for register in (manager.register_cache, manager.register_blocks_cache):
        for wrong in (tuple(good), None, good[0], [good[0], "1"]):
            with pytest.raises(TypeError):
                register(desc(), wrong)  # type: ignore[operator]
        with pytest.raises(TypeError):
            register(None, good)  # type: ignore[operator]
        with pytest.raises(TypeError):
            register(desc(), good, remote_accessible=1)  # type: ignore[operator]
    cache = manager.register_cache(desc(), good)
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (1, good, False)
    manager.unregister_cache(cache.cache_id)
    manager.unregister_cache(cache.cache_id)
    manager.unregister_cache(-1)
    with pytest.raises(TypeError):
        manager.unregister_cache("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range"):
        manager.unregister_cache(2**63)


def test_C239_keys_are_free_again(manager: CacheManager) -> None:
    tensor = np.zeros(SHAPE, np.uint8)
    at, key, blocks_key = [tensor.ctypes.data], CacheKey(0, 1), BlocksCacheKey(0, 1)
    plain, blocks = manager.register_cache(desc(1), at, [key]), manager.register_blocks_cache(desc(1), at, blocks_key)
    for _ in range(2):
        invalid(manager.register_cache, desc(1), at, [key])
        invalid(manager.register_blocks_cache, desc(1), at, blocks_key)
        manager.unregister_cache(plain.cache_id)
        manager.unregister_cache(blocks.cache_id)
        plain = manager.register_cache(desc(1), at, [key])
        blocks = manager.register_blocks_cache(desc(1), at, blocks_key)


# ---- copies


def test_C244_copies_know_the_kinds(manager: CacheManager) -> None:
    plain, blocks = manager.allocate_cache(desc()), manager.allocate_blocks_cache(desc())
    invalid(manager.copy_cache, plain, blocks, match="can not be blocks cache")
    invalid(manager.copy_cache, blocks, plain, match="can not be blocks cache")
    invalid(manager.copy_blocks, plain, {0: [1]}, match="should be blocks cache")
    host = manager.allocate_blocks_cache(desc(placement=HOST))
    plain_host = manager.allocate_cache(desc(placement=HOST))
    invalid(manager.swap_blocks, plain_host, blocks, {0: 1}, match="should be blocks cache")
    invalid(manager.swap_blocks, host, plain, {0: 1}, match="should be blocks cache")
    with pytest.raises(ValueError, match="out of range"):
        manager.copy_cache(plain, plain, req_id=-1)


def test_C244_copies_copy(manager: CacheManager) -> None:
    plain, blocks = manager.allocate_cache(desc()), manager.allocate_blocks_cache(desc())
    mine = [np.zeros(SHAPE, np.uint8) for _ in range(2)]
    host = Cache.create_cpu_cache(desc(placement=HOST), [tensor.ctypes.data for tensor in mine])
    for tensor in range(2):
        for cache in (plain, blocks):
            tensor_view(cache, tensor)[:] = np.arange(1, 5, dtype=np.uint8)[:, None] + 10 * tensor
    manager.copy_cache(plain, plain, 3, 0, offset=16, size=32, req_id=7)
    manager.copy_blocks(blocks, {0: [2, 3]})
    manager.swap_blocks(src_cache=blocks, dst_cache=host, src_to_dst={3: 0})
    mine[0][1] = 99
    manager.swap_blocks(host, blocks, {1: 1})
    assert tensor_view(plain, 1)[3].tolist() == [14] * 16 + [11] * 32 + [14] * 208
    assert [int(row[0]) for row in tensor_view(blocks, 0)] == [1, 99, 1, 1]
    assert [int(row[0]) for row in tensor_view(blocks, 1)] == [11, 0, 11, 11]
    assert [[int(row[0]) for row in tensor] for tensor in mine] == [[1, 99, 0, 0], [11, 0, 0, 0]]


# ---- descriptions


@pytest.mark.parametrize(
    ("infos", "what"),
    [
        (1, "mem_infos"),
        ([MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64), None], r"\[1\]"),
        ([MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)] * 2 + [MemInfo(Memtype.MEM_TYPE_HOST, 4096, 64)], r"\[2\]"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 64), "address"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 0), "size"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, -1), "size"),
    ],
)
def test_C249_memory_that_cannot_be_remapped(manager: CacheManager, infos: Any, what: str) -> None:
    invalid(manager.remap_registered_memory, infos, match=what)


def test_C249_memory_that_can_be_remapped(manager: CacheManager) -> None:
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 64)
    assert repr(info) == str(info) == "MemInfo(mem_type=Memtype.MEM_TYPE_DEVICE, addr=4096, size=64)"
    manager.remap_registered_memory(info)
    manager.remap_registered_memory(mem_infos=[info, info])
    for arguments in ((0, 4096, 64), (Memtype.MEM_TYPE_HOST, "1", 64), (Memtype.MEM_TYPE_HOST, 1, 6.4)):
        with pytest.raises(TypeError):
            MemInfo(*arguments)  # type: ignore[arg-type]


def test_C250_a_cache_of_host_memory() -> None:
    cache = Cache.create_cpu_cache(desc(2, placement=HOST), [1, 2])
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (-1, [1, 2], True)
    assert repr(cache) == str(cache) == "Cache(cache_id = -1, device_tensor_addrs = 2, is_blocks_cache = True)"
    assert not isinstance(cache, KvCache)


@pytest.mark.parametrize(
    ("description", "addresses", "error", "match"),
    [
        (None, [1, 2], AttributeError, None),
        (1, [1, 2], TypeError, "only support"),
        (desc(2, placement=HOST), [[1, 2]], TypeError, "inner type only support"),
        (desc(2, placement=HOST), (1, 2), TypeError, "only support"),
        (desc(2, placement=HOST), ["1", 2], TypeError, "inner type only support"),
        (desc(2), ["1"], TypeError, "inner type only support"),
        (desc(2), [1], LLMException, "placement must be HOST"),
        (desc(2, placement=HOST), [1], LLMException, "should be equal"),
        (desc(2, placement=HOST), [], LLMException, "should be equal"),
    ],
)
def test_C250_arguments(description: Any, addresses: Any, error: type[Exception], match: str | None) -> None:
    with pytest.raises(error, match=match):
        Cache.create_cpu_cache(description, addresses)
