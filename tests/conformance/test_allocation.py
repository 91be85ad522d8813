"""allocate_cache and allocate_blocks_cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCacheManager,
    LLMDataDist,
    LLMException,
    LLMRole,
    Placement,
)
from llm_datadist.introspection import pool_statistics
from llm_datadist.views import tensor_view
from tests.conformance.conftest import Linked, Start
from tests.conformance.expectations import INVALID_ID, NOT_EXIST, OUT_OF_MEMORY, invalid, refused
from tests.conformance.remote import payload_slot, slot, target
from tests.own_instance import desc

PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
PLACEHOLDER = CacheKey(1, INVALID_ID)
MIB = 1 << 20
SIZE_CLASSES = [(2 * MIB, 256, 8192), (10 * MIB, 8192, 8 * MIB), (66 * MIB, 8192, 64 * MIB)]


def used_bytes() -> int:
    assert LLMDataDist.llm_engine_instance is not None
    return pool_statistics(LLMDataDist.llm_engine_instance).used


def test_C101_ids_and_addresses(manager: KvCacheManager) -> None:
    cache, other = (manager.allocate_cache(desc(2, [4, 256])) for _ in range(2))
    assert (cache.cache_id, other.cache_id) == (1, 2)
    assert [len(addresses) for addresses in cache.per_device_tensor_addrs] == [2]
    addresses = sorted(cache.per_device_tensor_addrs[0] + other.per_device_tensor_addrs[0])
    assert all(address % 512 == 0 for address in addresses)
    assert all(second - first >= 4 * 256 * 2 for first, second in zip(addresses, addresses[1:]))


def test_C102_the_description_is_the_given_object(manager: KvCacheManager) -> None:
    given = desc(2, [4, 256])
    assert manager.allocate_cache(given).cache_desc is given


def test_C103_ids_start_again(start: Start) -> None:
    for _ in range(2):
        datadist = start(PROMPT)
        assert datadist.kv_cache_manager.allocate_cache(desc(1, [1, 4])).cache_id == 1
        datadist.finalize()


def test_C104_types(manager: KvCacheManager) -> None:
    for wrong in (None, 1):
        with pytest.raises(TypeError):
            manager.allocate_cache(wrong)  # type: ignore[arg-type]
    for keys in ([1], CacheKey(1, 2), {}):
        with pytest.raises(TypeError):
            manager.allocate_cache(desc(1, [1, 4]), keys)  # type: ignore[arg-type]
    assert manager.allocate_cache(desc(1, [1, 4]), (CacheKey(1, 2),)).cache_id > 0


def test_C105_no_tensors_and_host_memory(manager: KvCacheManager) -> None:
    invalid(manager.allocate_cache, desc(0, [4, 8]), match="num_tensors should be bigger than zero")
    host = CacheDesc(1, [4, 8], DataType.DT_FLOAT16, Placement.HOST)
    invalid(manager.allocate_cache, host, match="Only support allocate device cache")


def test_C106_dimensions(manager: KvCacheManager) -> None:
    manager.allocate_cache(desc(1, [1] * 31))
    for shape in ([1] * 32, [0, 4], [4, -1]):
        invalid(manager.allocate_cache, desc(1, shape))


@pytest.mark.parametrize("role", [DECODER, MIX])
def test_C107_only_a_prompt_has_keys(start: Start, role: LLMRole) -> None:
    manager = start(role).kv_cache_manager
    invalid(manager.allocate_cache, desc(1, [1, 4]), [CacheKey(1, 2)], match="cache_keys is not supported by")
    assert manager.allocate_cache(desc(1, [1, 4])).cache_id > 0


def test_C108_too_much_memory(start: Start) -> None:
    manager = start(PROMPT, pool_bytes=MIB).kv_cache_manager
    key = CacheKey(1, 2)
    refused(OUT_OF_MEMORY, manager.allocate_cache, desc(2, [1, MIB]), [key])
    assert manager.allocate_cache(desc(2, [1, 1024]), [key]).per_device_tensor_addrs


def test_C109_the_whole_memory_a_thousand_times(start: Start) -> None:
    manager = start(PROMPT, pool_bytes=MIB).kv_cache_manager
    for count in range(1000):
        parts = [manager.allocate_cache(desc(1, [1, 1024 * (1 + count % 7)])) for _ in range(4)]
        for part in parts:
            manager.deallocate_cache(part)
        manager.deallocate_cache(manager.allocate_cache(desc(1, [1, MIB // 2])))


def test_C110_a_bound_key(linked: Linked) -> None:
    linked.prompt.offer(CacheKey(1, 7), seed=3)
    with pytest.raises(LLMException):
        linked.prompt.offer(CacheKey(1, 8), CacheKey(1, 7), seed=4)
    mine = target(linked.manager)
    refused(NOT_EXIST, linked.manager.pull_cache, CacheKey(1, 8), mine)
    linked.manager.pull_cache(CacheKey(1, 7), mine)
    assert slot(mine, 2, 0) == payload_slot(3, 2, 0)


def test_C110_the_memory_of_the_refused_cache_is_free(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(1, [1, 4]), [CacheKey(1, 7)])
    before = used_bytes()
    with pytest.raises(LLMException):
        manager.allocate_cache(desc(1, [1, 4096]), [CacheKey(1, 7)])
    assert used_bytes() == before
    assert cache.per_device_tensor_addrs


def test_C111_names_of_their_own(linked: Linked) -> None:
    keys = [CacheKey(1, 7), CacheKey(1, 7, 1), CacheKey(1, INVALID_ID, 0, 7)]
    for seed, key in enumerate(keys):
        linked.prompt.offer(key, seed=seed)
    mine = target(linked.manager)
    for seed, key in enumerate(keys):
        linked.manager.pull_cache(key, mine)
        assert slot(mine, 0, 0) == payload_slot(seed, 0, 0)


def test_C112_the_last_of_equal_keys_wins(linked: Linked) -> None:
    linked.prompt.offer(CacheKey(1, 7), CacheKey(1, 8), CacheKey(1, 7))
    mine = target(linked.manager)
    linked.manager.pull_cache(CacheKey(1, 7), mine)
    assert slot(mine, 0, 0) == payload_slot(1, 0, 2)


def test_C113_placeholders(linked: Linked) -> None:
    linked.prompt.offer(PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, CacheKey(1, 7))
    mine = target(linked.manager)
    linked.manager.pull_cache(CacheKey(1, 7), mine)
    assert slot(mine, 0, 0) == payload_slot(1, 0, 3)


def test_C114_fewer_and_more_keys_than_slots(linked: Linked) -> None:
    cache = linked.prompt.offer(CacheKey(1, 0), CacheKey(1, 1))
    mine = target(linked.manager)
    for number in (0, 1):
        linked.manager.pull_cache(CacheKey(1, number), mine, number)
        assert slot(mine, 0, number) == payload_slot(1, 0, number)
    linked.manager.pull_cache(CacheKeyByIdAndIndex(1, cache, 3), mine, 3)
    with pytest.raises(LLMException):
        linked.prompt.offer(*(CacheKey(1, number) for number in range(5)))


@pytest.mark.parametrize("role", LLMRole)
def test_C115_blocks_caches_of_all_roles(start: Start, role: LLMRole) -> None:
    manager = start(role).kv_cache_manager
    assert len(manager.allocate_blocks_cache(desc(2, [10, 128])).per_device_tensor_addrs[0]) == 2
    if role is DECODER:
        invalid(
            manager.allocate_blocks_cache,
            desc(2, [10, 128]),
            BlocksCacheKey(1),
            match="blocks_cache_key is not supported by DECODER",
        )
    else:
        assert manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(1)).cache_id > 0


def test_C116_one_blocks_cache_a_model(manager: KvCacheManager) -> None:
    first = manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(1, 5))
    with pytest.raises(LLMException):
        manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(1, 5))
    manager.deallocate_cache(first)
    assert manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(1, 5)).cache_id > 0


def test_C117_a_placeholder_beside_a_blocks_cache(manager: KvCacheManager) -> None:
    blocks = manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(0))
    assert manager.allocate_cache(desc(1, [1, 4]), [CacheKey(0, INVALID_ID)]).cache_id != blocks.cache_id


def buffer_pool(classes: Any) -> dict[str, str]:
    names = ("total_size", "blk_size", "max_buf_size")
    return {"llm.BufPoolCfg": json.dumps({"buf_cfg": [dict(zip(names, numbers)) for numbers in classes]})}


def test_C118_size_classes(start: Start) -> None:
    manager = start(PROMPT, pool_bytes=128 * MIB, changes=buffer_pool(SIZE_CLASSES)).kv_cache_manager
    caches = [manager.allocate_cache(desc(1, [1, nbytes // 2])) for nbytes in (4096, 4 * MIB, 32 * MIB)]
    for number, cache in enumerate(caches):
        tensor_view(cache)[:] = number
    assert [int(tensor_view(cache).max()) for cache in caches] == [0, 1, 2]
    refused(OUT_OF_MEMORY, manager.allocate_cache, desc(1, [1, 40 * MIB]))


WRONG_CLASSES = {
    "empty": [],
    "total is no multiple of the block": [(2 * MIB + 1, 256, 8192)],
    "total over uint32": [(2**33, 8192, 8 * MIB)],
    "block 0": [(2 * MIB, 0, 8192)],
    "block no power of two": [(3 * MIB, 768, 8192)],
    "block over 2 MiB": [(64 * MIB, 4 * MIB, 8 * MIB)],
    "block over the largest buffer": [(2 * MIB, 8192, 4096)],
    "largest buffer is the total": [(2 * MIB, 256, 2 * MIB)],
    "largest buffer over the total": [(2 * MIB, 256, 4 * MIB)],
    "classes do not grow": [(2 * MIB, 256, 8192), (4 * MIB, 256, 8192)],
    "negative": [(-2 * MIB, 256, 8192)],
    "no number": [("2097152", 256, 8192)],
    "no maximum": [(2 * MIB, 256)],
}


@pytest.mark.parametrize("classes", WRONG_CLASSES.values(), ids=WRONG_CLASSES)
def test_C119_wrong_size_classes(options: Callable[..., dict[str, str]], classes: Any) -> None:
    datadist = LLMDataDist(DECODER, 1)
    invalid(datadist.init, options(DECODER, buffer_pool(classes)))


def test_C120_two_devices(start: Start) -> None:
    manager = start(DECODER, changes={"ge.exec.deviceId": "0;1"}).kv_cache_manager
    cache = manager.allocate_cache(desc(3, [4, 256]))
    assert [len(addresses) for addresses in cache.per_device_tensor_addrs] == [3, 3]
    assert len({address for addresses in cache.per_device_tensor_addrs for address in addresses}) == 6
