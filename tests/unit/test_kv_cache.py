"""Handles of caches: memory of the caller, and what becomes of a cache when its handle dies."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import pytest

from llm_datadist import CacheDesc, DataType, KvCache, KvCacheManager, LLMException, LLMRole, LLMStatusCode, Placement
from tests.recording_engine import RecordingEngine

HOST_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16, Placement.HOST)
DEVICE_DESC = CacheDesc(2, [4, 8], DataType.DT_FLOAT16)


def test_one_list_of_addresses_is_one_device() -> None:
    cache = KvCache.create_cpu_cache(HOST_DESC, [10, 20])
    assert cache.cache_id == -1
    assert cache.cache_desc is HOST_DESC
    assert cache.per_device_tensor_addrs == [[10, 20]]
    assert str(cache) == repr(cache) == "KvCache(cache_id = -1, num_devices = 1)"


def test_lists_of_addresses_are_devices() -> None:
    addrs = [[10, 20], [30, 0]]
    cache = KvCache.create_cpu_cache(HOST_DESC, addrs)
    assert cache.per_device_tensor_addrs is addrs
    assert repr(cache) == "KvCache(cache_id = -1, num_devices = 2)"


def test_a_description_that_cannot_be_wrapped() -> None:
    with pytest.raises(AttributeError, match="cache_desc only support"):
        KvCache.create_cpu_cache(None, [10, 20])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cache_desc only support"):
        KvCache.create_cpu_cache(1, "no list")  # type: ignore[arg-type]
    with pytest.raises(LLMException, match="placement must be HOST") as caught:
        KvCache.create_cpu_cache(DEVICE_DESC, "no list")  # type: ignore[arg-type]
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("addrs", [(10, 20), None, 5, ["a", 20], [["a", "b"]], [[10, "b"]], [None, None], [(10, 20)]])
def test_addresses_of_wrong_types(addrs: Any) -> None:
    with pytest.raises(TypeError, match="only support"):
        KvCache.create_cpu_cache(HOST_DESC, addrs)


def test_no_addresses_at_all_is_two_kinds_of_error() -> None:
    with pytest.raises(AttributeError):
        KvCache.create_cpu_cache(HOST_DESC, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("addrs", "match"),
    [
        ([], "empty"),
        ([10, [10, 20]], "should be consistent"),
        ([[10, 20], 10], "should be consistent"),
        ([10], "should be equal"),
        ([10, 20, 30], "should be equal"),
        ([[10]], "should be equal"),
        ([[10, 20], [30]], "should be equal"),
        ([10, [10]], "should be equal"),
    ],
)
def test_addresses_that_do_not_fit(addrs: Any, match: str) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        KvCache.create_cpu_cache(HOST_DESC, addrs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_the_id_is_an_int64() -> None:
    for cache_id in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="out of range"):
            KvCache(cache_id, DEVICE_DESC, [], None)
    with pytest.raises(TypeError, match="only support"):
        KvCache("1", DEVICE_DESC, [], None)  # type: ignore[arg-type]


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


@pytest.fixture
def manager(engine: RecordingEngine) -> KvCacheManager:
    return KvCacheManager(engine, LLMRole.PROMPT)  # type: ignore[arg-type]


def test_a_cache_ends_with_its_handle(engine: RecordingEngine, manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(DEVICE_DESC)
    assert engine.held == {1}
    del cache
    gc.collect()
    assert engine.held == set()
    assert engine.names() == ["allocate", "deallocate_later"]


def test_a_deallocated_cache_does_not_end_twice(engine: RecordingEngine, manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(DEVICE_DESC)
    manager.deallocate_cache(cache)
    assert cache.per_device_tensor_addrs == []
    assert repr(cache) == "KvCache(cache_id = 1, num_devices = 0)"
    manager.deallocate_cache(cache)
    del cache
    gc.collect()
    assert engine.names() == ["allocate", "deallocate"]


def test_a_handle_that_outlives_the_instance_does_nothing(engine: RecordingEngine, manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(DEVICE_DESC)
    manager._close()
    del cache
    gc.collect()
    assert engine.names() == ["allocate"]


def test_a_handle_in_a_forked_child_does_nothing(
    engine: RecordingEngine, manager: KvCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = manager.allocate_cache(DEVICE_DESC)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        del cache
        gc.collect()
    assert engine.names() == ["allocate"]


def test_a_destructor_lets_nothing_out() -> None:
    # Exceptions of destructors are printed and go nowhere else, so it takes a process of its own to see them.
    code = """
from llm_datadist import CacheDesc, DataType, KvCache
class Manager:
    def _drop(self, cache_id): raise ValueError(cache_id)
cache = KvCache(1, CacheDesc(1, [1], DataType.DT_INT8), [[512]], Manager())
del cache
try:
    KvCache("1", None, [], None)
except TypeError:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")
