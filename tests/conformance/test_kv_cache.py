"""KvCache: host caches, and what becomes of a cache that nobody refers to."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest

from llm_datadist import CacheDesc, DataType, KvCache, KvCacheManager, LLMException, LLMRole, Placement
from tests.conformance.conftest import Start
from tests.conformance.expectations import invalid
from tests.own_instance import desc

HOST = CacheDesc(2, [4, 8], DataType.DT_FLOAT16, Placement.HOST)


def test_C094_a_host_cache() -> None:
    cache = KvCache.create_cpu_cache(HOST, [10, 20])
    assert (cache.cache_id, cache.per_device_tensor_addrs) == (-1, [[10, 20]])


def test_C095_a_host_cache_of_several_devices() -> None:
    cache = KvCache.create_cpu_cache(HOST, [[10, 20], [30, 40]])
    assert cache.per_device_tensor_addrs == [[10, 20], [30, 40]]
    assert "num_devices = 2" in repr(cache)


def test_C096_its_description() -> None:
    invalid(KvCache.create_cpu_cache, desc(2, [4, 8]), [10, 20], match="placement must be HOST")
    with pytest.raises(AttributeError):
        KvCache.create_cpu_cache(None, [10, 20])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        KvCache.create_cpu_cache(1, [10, 20])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("addresses", "error", "text"),
    [
        ((10, 20), TypeError, "only support"),
        ([], LLMException, ""),
        (["a"], TypeError, "only support"),
        ([["a", "b"]], TypeError, "only support"),
        ([10, [10, 20]], LLMException, "should be consistent"),
        ([[10, 20], 10], LLMException, "should be consistent"),
        ([10], LLMException, "should be equal"),
        ([[10]], LLMException, "should be equal"),
    ],
)
def test_C097_its_addresses(addresses: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text or None) as raised:
        KvCache.create_cpu_cache(HOST, addresses)
    assert isinstance(raised.value, LLMException) is (error is LLMException)


def test_C098_repr() -> None:
    cache = KvCache.create_cpu_cache(HOST, [10, 20])
    assert repr(cache) == str(cache) == "KvCache(cache_id = -1, num_devices = 1)"


def test_C099_the_last_reference_frees_the_memory(start: Start) -> None:
    manager: KvCacheManager = start(LLMRole.DECODER, pool_bytes=1 << 20).kv_cache_manager
    for _ in range(8):
        assert manager.allocate_cache(desc(1, [1, 300 * 1024])).per_device_tensor_addrs


def test_C100_a_cache_that_outlives_its_instance(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    datadist = start(LLMRole.DECODER)
    cache = datadist.kv_cache_manager.allocate_cache(desc(1, [1, 4]))
    datadist.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del cache
        gc.collect()
    assert capfd.readouterr() == ("", "")
