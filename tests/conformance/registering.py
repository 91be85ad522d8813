"""Instances in cache-manager mode that register memory of their program: in this process, and in another one.

The functions with a state are for `Member.call`. Tensors are NumPy arrays of bytes, one row a slot, and `payload` of
`tests.datadist_member` says what is in them.
"""

from __future__ import annotations

import ctypes
import json
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    DataType,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    Placement,
)
from llm_datadist._acl import Device, DeviceMemory
from llm_datadist.pool_tensors import allocate_tensor
from tests.conformance.backends import Backend
from tests.conformance.expectations import outcome
from tests.conformance.remote import SENTINEL, SHAPE
from tests.datadist_member import MIB, payload
from tests.processes import Member

State = dict[str, Any]


class Registered(NamedTuple):
    """A cache and the tensors that it is over."""

    cache: Cache
    tensors: list[np.ndarray]

    def slot(self, tensor: int, index: int) -> bytes:
        return bytes(self.tensors[tensor][index].tobytes())

    def untouched(self, tensor: int, *indices: int) -> bool:
        """Whether these slots, or the whole tensor, still have only sentinels."""
        rows = self.tensors[tensor][list(indices) or slice(None)]
        return bool((rows == SENTINEL).all())


def make_options(
    *,
    port: int | None = None,
    sync_kv_timeout: int = 5000,
    remote_access: bool = False,
    device_pool: int = 4 * MIB,
    host_pool: int = 0,
) -> dict[str, str]:
    """Options of `LLMDataDist.init`; with a port the instance listens."""
    config = LLMConfig()
    config.device_id = 0
    config.sync_kv_timeout = sync_kv_timeout
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = remote_access
    if port is not None:
        config.listen_ip_info = f"127.0.0.1:{port}"
    if device_pool:
        config.mem_pool_cfg = json.dumps({"memory_size": device_pool})
    if host_pool:
        config.host_mem_pool_cfg = json.dumps({"memory_size": host_pool})
    return config.generate_options()


def register(
    datadist: LLMDataDist,
    backend: Backend,
    tensors: int = 4,
    shape: tuple[int, int] = SHAPE,
    *,
    seed: int | None = None,
    keys: Sequence[CacheKey] = (),
    blocks: bool = False,
    blocks_key: BlocksCacheKey | None = None,
    placement: Placement = Placement.DEVICE,
    accessible: bool | None = None,
) -> Registered:
    """Register fresh tensors with the bytes of a seed, or with sentinels; with `blocks` or a key as a blocks cache."""
    if backend.private is None:
        arrays = [allocate_tensor(datadist, shape, DataType.DT_UINT8).numpy() for _ in range(tensors)]
    elif backend.device == "ascend" and placement is Placement.DEVICE:
        arrays = [on_device(shape) for _ in range(tensors)]
    else:
        arrays = [np.empty(shape, np.uint8) for _ in range(tensors)]
    for index, array in enumerate(arrays):
        array[:] = SENTINEL if seed is None else payload(seed, index, array.size).reshape(shape)
    desc = CacheDesc(tensors, shape, DataType.DT_UINT8, placement)
    addresses, manager = [array.ctypes.data for array in arrays], datadist.cache_manager
    if blocks or blocks_key is not None:
        cache = manager.register_blocks_cache(desc, addresses, blocks_key, accessible)
    else:
        cache = manager.register_cache(desc, addresses, list(keys), accessible)
    return Registered(cache, arrays)


def on_device(shape: tuple[int, int]) -> np.ndarray:
    """Take memory of the device that lives as long as the array, which looks into it as the simulator allows."""
    device = Device(0)
    memory = DeviceMemory(device, shape[0] * shape[1])
    seen = (ctypes.c_uint8 * memory.size).from_address(memory.address)
    weakref.finalize(seen, lambda: (memory.close(), device.close())).atexit = False
    return np.frombuffer(seen, np.uint8, shape[0] * shape[1]).reshape(shape)


# ---- in the other process


def start_instance(state: State, backend: Backend, role: LLMRole, cluster_id: int, **options: Any) -> None:
    os.environ.update(backend.environment)
    datadist = LLMDataDist(role, cluster_id)
    datadist.init({**make_options(**options), **backend.options})
    state.update(datadist=datadist, backend=backend, registered={})


def finalize(state: State) -> None:
    state["registered"].clear()
    state["datadist"].finalize()
    for name in state["backend"].environment:
        del os.environ[name]


def register_there(state: State, *args: Any, **kwargs: Any) -> int:
    made = register(state["datadist"], state["backend"], *args, **kwargs)
    state["registered"][made.cache.cache_id] = made
    return made.cache.cache_id


def register_one_tensor_many_times(state: State, times: int, shape: tuple[int, int]) -> int:
    """Register a cache that is larger than its memory: all of its tensors are the same."""
    one = register(state["datadist"], state["backend"], 1, shape)
    desc = CacheDesc(times, shape, DataType.DT_UINT8)
    cache = state["datadist"].cache_manager.register_cache(desc, one.cache.tensor_addrs * times)
    state["registered"][cache.cache_id] = Registered(cache, one.tensors)
    return cache.cache_id


def read_slot(state: State, cache_id: int, tensor: int, index: int) -> bytes:
    return state["registered"][cache_id].slot(tensor, index)


def untouched(state: State, cache_id: int, tensor: int, *indices: int) -> bool:
    return state["registered"][cache_id].untouched(tensor, *indices)


def manager_outcome(state: State, call: str, *args: Any, **kwargs: Any) -> Any:
    """Give the code that a call of the manager ends with. An argument that is a `There` becomes that cache."""
    arguments = [state["registered"][one.cache_id].cache if isinstance(one, There) else one for one in args]
    return outcome(getattr(state["datadist"].cache_manager, call), *arguments, **kwargs)


def datadist_call(state: State, call: str, *args: Any) -> Any:
    return getattr(state["datadist"], call)(*args)


class There(NamedTuple):
    """A registered cache of the other process."""

    cache_id: int


class RegisteringRemote:
    """An instance in cache-manager mode that lives in a process of its own and listens."""

    def __init__(self, member: Member, backend: Backend, role: LLMRole, cluster_id: int, port: int, **options: Any):
        self.member = member
        self.cluster_id = cluster_id
        self.port = port
        self.call(start_instance, backend, role, cluster_id, port=port, **options)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.member.call(function, *args, **kwargs)

    def register(self, *args: Any, **kwargs: Any) -> There:
        """Register fresh tensors there; the arguments are those of `register` behind the backend."""
        return There(self.call(register_there, *args, **kwargs))

    def slot(self, there: There, tensor: int, index: int) -> bytes:
        return bytes(self.call(read_slot, there.cache_id, tensor, index))

    def untouched(self, there: There, tensor: int, *indices: int) -> bool:
        return bool(self.call(untouched, there.cache_id, tensor, *indices))

    def outcome(self, call: str, *args: Any, **kwargs: Any) -> Any:
        """Give the code that a call of its manager ends with."""
        return self.call(manager_outcome, call, *args, **kwargs)

    def finalize(self) -> None:
        if self.member.exitcode is None:
            self.call(finalize)
