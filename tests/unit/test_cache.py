"""`Cache`: the handle of the cache-manager mode, and memory of the caller."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from llm_datadist import Cache, CacheDesc, DataType, Placement
from tests.recording_manager import asked, desc, make_manager, refused

HOST_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16, Placement.HOST)


def test_memory_of_the_caller_is_a_blocks_cache() -> None:
    cache = Cache.create_cpu_cache(HOST_DESC, [1, 2])
    assert (cache.cache_id, cache.cache_desc, cache.tensor_addrs) == (-1, HOST_DESC, [1, 2])
    assert cache.is_blocks_cache is True
    expected = "Cache(cache_id = -1, device_tensor_addrs = 2, is_blocks_cache = True)"
    assert str(cache) == repr(cache) == expected


def test_a_description_that_cannot_be_wrapped() -> None:
    with pytest.raises(AttributeError, match="cache_desc only support CacheDesc"):
        Cache.create_cpu_cache(None, "no list")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cache_desc only support CacheDesc"):
        Cache.create_cpu_cache(1, "no list")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="addrs only support list"):
        Cache.create_cpu_cache(desc(2), "no list")  # type: ignore[arg-type]
    refused("placement must be HOST", Cache.create_cpu_cache, desc(2), [1])


@pytest.mark.parametrize("addrs", [(1, 2), None, 5, ["a", 2], [[1, 2]], [1, None], [1.0, 2.0]])
def test_addresses_of_wrong_types(addrs: Any) -> None:
    with pytest.raises(TypeError, match="only support"):
        Cache.create_cpu_cache(HOST_DESC, addrs)


@pytest.mark.parametrize("addrs", [[], [1], [1, 2, 3]])
def test_another_number_of_addresses(addrs: list[int]) -> None:
    refused("should be equal", Cache.create_cpu_cache, HOST_DESC, addrs)


def test_the_id_is_an_int64() -> None:
    for cache_id in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="out of range"):
            Cache(cache_id, HOST_DESC, [], None, False, False)
    with pytest.raises(TypeError, match="only support"):
        Cache("1", HOST_DESC, [], None, False, False)  # type: ignore[arg-type]


def test_a_handle_that_dies_frees_nothing() -> None:
    manager = make_manager()
    cache = manager.allocate_cache(desc())
    registered = manager.register_cache(desc(1), [4096])
    del cache, registered
    gc.collect()
    assert asked(manager) == []
