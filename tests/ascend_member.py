"""What tests let a process with a simulated device do: functions for `Member.call`, with the member's state first.

The instance is in cache-manager mode and takes both parts. Its caches are blocks caches, each tensor of them counts as
a layer. The host does not see the device's memory, so bytes are copied there and back.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferWithCacheKeyConfig,
)
from llm_datadist.devices.ascend.memory_figures import memory_figures
from llm_datadist.views import tensor_view
from tests import on_simulator
from tests.datadist_member import cluster_info, payload
from tests.leaks import resources

State = dict[str, Any]
Bytes = npt.NDArray[np.uint8]
MIB = 1 << 20
HOST = "127.0.0.1"


class Shape(NamedTuple):
    """Of a cache: tensors, blocks of each, bytes of a block."""

    tensors: int
    blocks: int
    nbytes: int

    def content(self, seed: int) -> Bytes:
        """Bytes that a cache of this shape has after `allocate` with a seed."""
        size = self.blocks * self.nbytes
        return np.stack([payload(seed, tensor, size) for tensor in range(self.tensors)]).reshape(self)


def open_instance(
    state: State,
    cluster_id: int,
    port: int,
    device_pool: int = 8 * MIB,
    host_pool: int = 0,
    timeout_ms: int = 10_000,
) -> None:
    config = LLMConfig()
    config.device_id = 0
    config.sync_kv_timeout = timeout_ms
    config.enable_cache_manager = config.enable_remote_cache_accessible = True
    config.listen_ip_info = f"{HOST}:{port}"
    config.mem_pool_cfg = json.dumps({"memory_size": device_pool})
    if host_pool:
        config.host_mem_pool_cfg = json.dumps({"memory_size": host_pool})
    state["datadist"] = LLMDataDist(LLMRole.MIX, cluster_id)
    state["datadist"].init(config.generate_options())
    state["caches"] = {}


def close_instance(state: State) -> None:
    state["caches"].clear()
    state["datadist"].finalize()


def link(state: State, *peers: tuple[int, int], timeout_ms: int = 10_000) -> list[LLMStatusCode]:
    return list(state["datadist"].link_clusters([_info(*peer) for peer in peers], timeout_ms)[1])


def unlink(state: State, *peers: tuple[int, int]) -> list[LLMStatusCode]:
    return list(state["datadist"].unlink_clusters([_info(*peer) for peer in peers], 10_000)[1])


def _info(cluster_id: int, port: int) -> LLMClusterInfo:
    return cluster_info(cluster_id, port)


# ---- caches


def allocate(
    state: State,
    shape: Shape,
    seed: int,
    placement: Placement = Placement.DEVICE,
    model: int | None = None,
    plain: bool = False,
) -> int:
    """Allocate a blocks cache, or a plain one; gives its id."""
    desc = CacheDesc(shape.tensors, shape[1:], DataType.DT_UINT8, placement)
    manager, own = state["datadist"].cache_manager, state["datadist"].cluster_id
    if plain:
        cache = manager.allocate_cache(desc)
    else:
        cache = manager.allocate_blocks_cache(desc, None if model is None else BlocksCacheKey(own, model))
    state["caches"][cache.cache_id] = cache
    content = shape.content(seed)
    for tensor in range(shape.tensors):
        if placement is Placement.HOST:
            tensor_view(cache, tensor)[:] = content[tensor]
        else:
            _pool(state).write(cache.tensor_addrs[tensor], content[tensor].tobytes())
    return int(cache.cache_id)


def deallocate(state: State, cache_id: int) -> None:
    cache = state["caches"].pop(cache_id)
    manager = state["datadist"].cache_manager
    (manager.deallocate_blocks_cache if cache.is_blocks_cache else manager.deallocate_cache)(cache)


def content_of(state: State, cache_id: int) -> Bytes:
    """Copy all bytes of a cache."""
    cache: Cache = state["caches"][cache_id]
    desc = cache.cache_desc
    shape = (desc.num_tensors, *desc.shape)
    if desc.placement is Placement.HOST:
        return np.stack([tensor_view(cache, tensor) for tensor in range(desc.num_tensors)])
    nbytes = int(np.prod(desc.shape))
    tensors = [_pool(state).read(address, nbytes) for address in cache.tensor_addrs]
    return np.frombuffer(b"".join(tensors), np.uint8).reshape(shape)


def addresses(state: State, cache_id: int) -> list[int]:
    return list(state["caches"][cache_id].tensor_addrs)


def _pool(state: State) -> Any:
    return state["datadist"]._engine._caches.device


# ---- transfers


class Plan(NamedTuple):
    """Blocks of some tensors that go from one cache to another."""

    source_tensors: range
    target_tensors: range
    source: list[int]
    target: list[int]

    def apply(self, source: Bytes, target: Bytes) -> None:
        for come, go in zip(self.source_tensors, self.target_tensors):
            target[go, self.target] = source[come, self.source]


def pull_blocks(state: State, cluster_id: int, model: int, cache_id: int, plan: Plan) -> LLMStatusCode:
    return _outcome(
        state["datadist"].cache_manager.pull_blocks,
        BlocksCacheKey(cluster_id, model),
        state["caches"][cache_id],
        plan.source,
        plan.target,
        src_layer_range=plan.source_tensors,
        dst_layer_range=plan.target_tensors,
        tensor_num_per_layer=1,
    )


def push_blocks(state: State, cluster_id: int, model: int, cache_id: int, plan: Plan) -> LLMStatusCode:
    return _outcome(
        state["datadist"].cache_manager.push_blocks,
        BlocksCacheKey(cluster_id, model),
        state["caches"][cache_id],
        plan.source,
        plan.target,
        src_layer_range=plan.source_tensors,
        dst_layer_range=plan.target_tensors,
        tensor_num_per_layer=1,
    )


def pull_many(state: State, cluster_id: int, model: int, cache_id: int, plans: Sequence[Plan]) -> set[LLMStatusCode]:
    return {pull_blocks(state, cluster_id, model, cache_id, plan) for plan in plans}


def push_many(state: State, cluster_id: int, model: int, cache_id: int, plans: Sequence[Plan]) -> set[LLMStatusCode]:
    return {push_blocks(state, cluster_id, model, cache_id, plan) for plan in plans}


def pull_slot(state: State, cluster_id: int, there: int, cache_id: int, size: int = -1) -> LLMStatusCode:
    """Pull slot 0 of a remote cache, given by its id, into slot 0 of a local one."""
    manager = state["datadist"].cache_manager
    key, cache = CacheKeyByIdAndIndex(cluster_id, there, 0), state["caches"][cache_id]
    return _outcome(manager.pull_cache, key, cache, size=size, tensor_num_per_layer=1)


def push_slot(state: State, cluster_id: int, there: int, cache_id: int) -> LLMStatusCode:
    manager = state["datadist"].cache_manager
    key, cache = CacheKeyByIdAndIndex(cluster_id, there, 0), state["caches"][cache_id]
    return _outcome(manager.push_cache, key, cache, tensor_num_per_layer=1)


class Computing(LayerSynchronizer):
    """Writes each layer, two tensors of it, just before it may be read."""

    def __init__(self, state: State, cache: Cache, content: Bytes) -> None:
        self._state, self._cache, self._content = state, cache, content

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        for tensor in (2 * layer_index, 2 * layer_index + 1):
            _pool(self._state).write(self._cache.tensor_addrs[tensor], self._content[tensor].tobytes())
        return True


def push_layers(state: State, cluster_id: int, model: int, cache_id: int, shape: Shape, seed: int, plan: Plan) -> Any:
    """Compute the content of a seed layer by layer, and push blocks of each layer as soon as it is there."""
    cache = state["caches"][cache_id]
    layers = range(shape.tensors // 2)
    config = TransferWithCacheKeyConfig(BlocksCacheKey(cluster_id, model), layers, layers)
    task = state["datadist"].cache_manager.transfer_cache_async(
        cache, Computing(state, cache, shape.content(seed)), [config], plan.source, plan.target
    )
    return task.get_results(20_000)


def _outcome(call: Any, *args: Any, **kwargs: Any) -> LLMStatusCode:
    try:
        call(*args, **kwargs)
    except LLMException as error:
        return error.status_code
    return LLMStatusCode.LLM_SUCCESS


# ---- what a test looks at


def counter(state: State, name: str) -> int:
    return on_simulator.counter(name)


def set_faults(state: State, faults: str) -> None:
    on_simulator.set_knob("FAULTS", faults)


def free_memory(state: State) -> int:
    """Bytes of the device that nobody has taken."""
    return memory_figures(_pool(state).device).free


def wait_until_free(state: State, nbytes: int) -> None:
    """Wait until the device has as much free: communicators are taken down in a thread of their own."""
    deadline = time.monotonic() + 10.0
    while free_memory(state) < nbytes:
        assert time.monotonic() < deadline, f"{nbytes - free_memory(state)} bytes are not given back"


def claim_pages(state: State) -> int:
    """Count the pages in which linked peers say what they touch."""
    gc.collect()
    return sum("llm_datadist:claims" in name for name in resources() if name.startswith("descriptor"))


def holdings(state: State) -> tuple[int, set[str]]:
    """Name what this process has: free bytes of the device, and threads, descriptors and shared memory by kind."""
    gc.collect()
    deallocate(state, allocate(state, Shape(1, 1, 1), 1))  # also closes what the last link has left
    kinds: dict[str, int] = {}
    for name in resources():
        kind = name.split()[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    live = {name: on_simulator.counter(f"live.{name}") for name in ("streams", "events", "allocations")}
    return free_memory(state), {f"{name}: {count}" for name, count in {**kinds, **live}.items()}


def holdings_like(state: State, wanted: tuple[int, set[str]]) -> tuple[int, set[str]]:
    """Wait until this process has what it should have; gives what it has in the end."""
    deadline = time.monotonic() + 5.0
    while (found := holdings(state)) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def hold_the_interpreter(state: State, seconds: float) -> None:
    """Compute in pure Python without handing the lock over."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            pass
    finally:
        sys.setswitchinterval(interval)
