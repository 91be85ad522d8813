"""Checks that a handle is of the kind that a call needs."""

from __future__ import annotations

from llm_datadist.arguments import check_isinstance
from llm_datadist.cache import Cache
from llm_datadist.cache_desc import Placement
from llm_datadist.cache_handle import CacheHandle
from llm_datadist.kv_cache import KvCache
from llm_datadist.status import InvalidArgument


def check_device_cache(name: str, cache: object) -> None:
    """Check for a `KvCache` in device memory."""
    check_isinstance(name, cache, KvCache, allow_none=False)
    assert isinstance(cache, KvCache)
    check_on_device(name, cache)


def check_on_device(name: str, cache: CacheHandle) -> None:
    """Check that a cache is in device memory."""
    if cache.cache_desc.placement is not Placement.DEVICE:
        raise InvalidArgument(f"Only support device cache, but placement of {name} is {cache.cache_desc.placement}")


def check_plain_cache(name: str, cache: object) -> None:
    """Check for a `Cache` whose slots are sequences."""
    check_isinstance(name, cache, Cache, allow_none=False)
    assert isinstance(cache, Cache)
    if cache.is_blocks_cache:
        raise InvalidArgument(f"{name} can not be blocks cache, but is {cache}")


def check_blocks_cache(name: str, cache: object) -> None:
    """Check for a `Cache` whose slots are blocks."""
    check_isinstance(name, cache, Cache, allow_none=False)
    assert isinstance(cache, Cache)
    if not cache.is_blocks_cache:
        raise InvalidArgument(f"{name} should be blocks cache, but is {cache}")


def check_plain_device_cache(name: str, cache: object) -> None:
    """Check for a `Cache` whose slots are sequences, in device memory."""
    check_plain_cache(name, cache)
    assert isinstance(cache, Cache)
    check_on_device(name, cache)


def check_blocks_device_cache(name: str, cache: object) -> None:
    """Check for a `Cache` whose slots are blocks, in device memory."""
    check_blocks_cache(name, cache)
    assert isinstance(cache, Cache)
    check_on_device(name, cache)
