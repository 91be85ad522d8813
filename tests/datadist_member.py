"""What tests let members do with `llm_datadist`: functions for `Member.call`, each with the member's state first.

Caches are named by their id, and their contents by a seed: `payload` gives the same bytes in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    KvCacheManager,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.introspection import pool_statistics
from llm_datadist.views import tensor_view

MIB = 1 << 20
State = dict


def payload(seed: int, tensor_index: int, nbytes: int) -> np.ndarray:
    """Bytes that stand in a tensor after `fill`."""
    return np.random.default_rng([seed, tensor_index]).integers(0, 256, nbytes, np.uint8)


def make_options(
    role: LLMRole,
    *,
    port: int | None = None,
    pool_bytes: int = 64 * MIB,
    sync_kv_timeout: int | None = None,
    ge_options: dict[str, str] | None = None,
) -> dict[str, str]:
    """Options of `LLMDataDist.init`; a PROMPT needs the port to listen on."""
    config = LLMConfig()
    config.device_id = 0
    config.mem_utilization = 1.0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(pool_bytes), **(ge_options or {})}
    if role is LLMRole.PROMPT:
        config.listen_ip_info = f"127.0.0.1:{port}"
    if sync_kv_timeout is not None:
        config.sync_kv_timeout = sync_kv_timeout
    return config.generate_options()


def init_datadist(state: State, role: LLMRole, cluster_id: int, **options: Any) -> None:
    """Make an instance and initialise it; the keyword arguments are those of `make_options`."""
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(make_options(role, **options))
    state["datadist"] = datadist
    state["caches"] = {}


def finalize(state: State) -> None:
    state["caches"].clear()
    state["datadist"].finalize()


def link(state: State, cluster_id: int, port: int, timeout: int = 3000) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
    return state["datadist"].link_clusters([cluster_info(cluster_id, port)], timeout)


def unlink(
    state: State, cluster_id: int, port: int, timeout: int = 3000, force: bool = False
) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
    return state["datadist"].unlink_clusters([cluster_info(cluster_id, port)], timeout, force)


def check_link(state: State, cluster_id: int) -> None:
    state["datadist"].check_link_status(cluster_id)


def cluster_info(cluster_id: int, port: int) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", port)
    return info


def allocate(
    state: State,
    num_tensors: int,
    shape: Sequence[int],
    data_type: DataType = DataType.DT_UINT8,
    keys: Sequence[CacheKey] = (),
) -> int:
    """Allocate a cache and give its id."""
    return _remember(state, manager(state).allocate_cache(CacheDesc(num_tensors, tuple(shape), data_type), list(keys)))


def allocate_blocks(
    state: State,
    num_tensors: int,
    shape: Sequence[int],
    data_type: DataType = DataType.DT_UINT8,
    key: BlocksCacheKey | None = None,
) -> int:
    """Allocate a blocks cache and give its id."""
    return _remember(state, manager(state).allocate_blocks_cache(CacheDesc(num_tensors, tuple(shape), data_type), key))


def deallocate(state: State, cache_id: int) -> None:
    manager(state).deallocate_cache(state["caches"].pop(cache_id))


def remove_key(state: State, key: CacheKey) -> None:
    manager(state).remove_cache_key(key)


def fill(state: State, cache_id: int, seed: int) -> None:
    """Write the payload of `seed` into every tensor of a cache."""
    cache = state["caches"][cache_id]
    for index in range(cache.cache_desc.num_tensors):
        tensor = _bytes_of(cache, index)
        tensor[:] = payload(seed, index, tensor.size)


def clear(state: State, cache_id: int) -> None:
    """Write zeros into every tensor of a cache."""
    cache = state["caches"][cache_id]
    for index in range(cache.cache_desc.num_tensors):
        _bytes_of(cache, index)[:] = 0


def read(state: State, cache_id: int, tensor_index: int) -> bytes:
    """Bytes of one whole tensor."""
    return _bytes_of(state["caches"][cache_id], tensor_index).tobytes()


def pull_cache(state: State, key: CacheKey | CacheKeyByIdAndIndex, cache_id: int, *args: Any, **kwargs: Any) -> None:
    manager(state).pull_cache(key, state["caches"][cache_id], *args, **kwargs)


def pull_blocks(
    state: State, key: BlocksCacheKey, cache_id: int, source: list[int], target: list[int], **kwargs: Any
) -> None:
    manager(state).pull_blocks(key, state["caches"][cache_id], source, target, **kwargs)


def pool_used(state: State) -> int:
    """Bytes of the pool that are allocated."""
    return pool_statistics(state["datadist"]).used


def manager(state: State) -> KvCacheManager:
    return state["datadist"].kv_cache_manager


def _remember(state: State, cache: KvCache) -> int:
    state["caches"][cache.cache_id] = cache
    return cache.cache_id


def _bytes_of(cache: KvCache, tensor_index: int) -> np.ndarray:
    return tensor_view(cache, tensor_index).reshape(-1).view(np.uint8)
