"""copy_cache and copy_blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from llm_datadist import CacheDesc, DataType, KvCache, KvCacheManager, Placement
from llm_datadist.views import tensor_view
from tests.conformance.expectations import invalid
from tests.conformance.remote import payload_slot, slot, target, untouched
from tests.datadist_member import payload

TENSORS, SLOTS, STRIDE = 4, 4, 256


def filled(manager: KvCacheManager, seed: int = 1, tensors: int = TENSORS, shape: Any = (SLOTS, STRIDE)) -> KvCache:
    cache = target(manager, tensors, shape)
    for tensor in range(tensors):
        tensor_view(cache, tensor)[:] = payload(seed, tensor, int(np.prod(shape))).reshape(shape)
    return cache


def snapshot(cache: KvCache) -> list[bytes]:
    return [tensor_view(cache, tensor).tobytes() for tensor in range(cache.cache_desc.num_tensors)]


def test_C127_a_slot_to_another_cache(manager: KvCacheManager) -> None:
    source, mine = filled(manager), target(manager)
    manager.copy_cache(mine, source, 2, 1)
    for tensor in range(TENSORS):
        assert slot(mine, tensor, 2) == payload_slot(1, tensor, 1)
        assert untouched(mine, tensor, 0, 1, 3)


def test_C128_offset_and_size(manager: KvCacheManager) -> None:
    source, mine = filled(manager), target(manager)
    manager.copy_cache(mine, source, 2, 1, offset=32, size=64)
    for tensor in range(TENSORS):
        assert slot(mine, tensor, 2) == b"\xaa" * 32 + payload_slot(1, tensor, 1)[32:96] + b"\xaa" * 160
        assert untouched(mine, tensor, 0, 1, 3)


def test_C129_wrong_numbers(manager: KvCacheManager) -> None:
    source, mine = filled(manager), target(manager)
    for size in (0, -2):
        invalid(manager.copy_cache, mine, source, size=size)
    with pytest.raises(ValueError, match="out of range"):
        manager.copy_cache(mine, source, offset=-1)
    invalid(manager.copy_cache, mine, source, offset=STRIDE)
    invalid(manager.copy_cache, mine, source, offset=STRIDE - 8, size=9)
    invalid(manager.copy_cache, mine, source, SLOTS, 0)
    invalid(manager.copy_cache, mine, source, 0, SLOTS)
    assert all(untouched(mine, tensor) for tensor in range(TENSORS))


def test_C130_different_caches(manager: KvCacheManager) -> None:
    source = filled(manager)
    invalid(manager.copy_cache, target(manager, tensors=2), source)
    invalid(manager.copy_cache, target(manager, shape=(SLOTS, STRIDE // 2)), source)
    wide = target(manager, shape=(SLOTS, 2 * STRIDE))
    manager.copy_cache(wide, source, 3, 2)
    assert slot(wide, 1, 3) == payload_slot(1, 1, 2) + b"\xaa" * STRIDE


def test_C131_types_and_placement(manager: KvCacheManager) -> None:
    cache = target(manager)
    host = KvCache.create_cpu_cache(CacheDesc(1, [4, 8], DataType.DT_FLOAT16, Placement.HOST), [4096])
    invalid(manager.copy_cache, host, "wrong", match="Only support device cache")
    with pytest.raises(TypeError):
        manager.copy_cache("wrong", cache)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.copy_cache(cache, cache, req_id="1")  # type: ignore[arg-type]


def test_C132_within_one_cache(manager: KvCacheManager) -> None:
    cache = filled(manager)
    manager.copy_cache(cache, cache, 2, 1)
    for tensor in range(TENSORS):
        assert slot(cache, tensor, 2) == slot(cache, tensor, 1) == payload_slot(1, tensor, 1)
    before = snapshot(cache)
    manager.copy_cache(cache, cache, 3, 3)
    assert snapshot(cache) == before


def test_C133_copy_blocks(manager: KvCacheManager) -> None:
    cache = filled(manager)
    manager.copy_blocks(cache, {1: [2, 3]})
    for tensor in range(TENSORS):
        wanted = [payload_slot(1, tensor, source) for source in (0, 1, 1, 1)]
        assert [slot(cache, tensor, block) for block in range(SLOTS)] == wanted


def test_C134_wrong_blocks(manager: KvCacheManager) -> None:
    cache = filled(manager, shape=(10, 64))
    before = snapshot(cache)
    for wrong in ({10: [0]}, {1: [10]}, {1: [2], 10: [0]}):
        invalid(manager.copy_blocks, cache, wrong)
    with pytest.raises(ValueError, match="out of range"):
        manager.copy_blocks(cache, {-1: [0]})
    for wrong_type in ({"1": [0]}, {1: 0}, {1: (0,)}, {1: ["0"]}):
        with pytest.raises(TypeError, match="only support"):
            manager.copy_blocks(cache, wrong_type)  # type: ignore[arg-type]
    manager.copy_blocks(cache, {})
    manager.copy_blocks(cache, {1: []})
    assert snapshot(cache) == before


def test_C135_four_threads(manager: KvCacheManager) -> None:
    source, mine = filled(manager, shape=(64, 128)), target(manager, shape=(64, 128))

    def copy_quarter(quarter: int) -> None:
        for index in range(quarter, 64, 4):
            manager.copy_cache(mine, source, index, 63 - index)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(copy_quarter, range(4)))
    for tensor in range(TENSORS):
        assert (tensor_view(mine, tensor) == tensor_view(source, tensor)[::-1]).all()


def test_C135_blocks_from_four_threads(manager: KvCacheManager) -> None:
    cache = filled(manager, shape=(64, 128), tensors=1)
    wanted = tensor_view(cache).copy()
    wanted[32:] = wanted[:32]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda block: manager.copy_blocks(cache, {block: [block + 32]}), range(32)))
    assert (tensor_view(cache) == wanted).all()
