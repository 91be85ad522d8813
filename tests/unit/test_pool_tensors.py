"""Tensors of the program in pool memory, and views of the caches of the cache-manager mode."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llm_datadist import Cache, DataType, LLMDataDist, LLMRole, Placement, datadist
from llm_datadist.pool_tensors import PoolTensor, allocate_tensor
from llm_datadist.views import dlpack_view, tensor_view
from tests.recording_engine import RecordingEngine
from tests.recording_manager import HOST, cpu_cache, desc, refused

MANAGER = {
    "llm.EnableCacheManager": "1",
    "llm.MemPoolConfig": '{"memory_size": 65536}',
}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingEngine]:
    engine = RecordingEngine()
    monkeypatch.setattr(datadist, "_open_engine", lambda options: engine)
    yield engine
    datadist._shutdown_handler()


@pytest.fixture
def instance(engine: RecordingEngine) -> LLMDataDist:
    instance = LLMDataDist(LLMRole.MIX, 1)
    instance.init(MANAGER)
    return instance


def test_a_tensor_is_memory_of_the_pool(engine: RecordingEngine, instance: LLMDataDist) -> None:
    tensor = allocate_tensor(instance, [2, 3], DataType.DT_FLOAT)
    assert engine.calls == [("reserve_memory", (24, False))]
    assert isinstance(tensor, PoolTensor)
    assert tensor.address in engine.reserved
    assert (tensor.nbytes, tensor.shape, tensor.data_type) == (24, (2, 3), DataType.DT_FLOAT)
    assert repr(tensor) == f"PoolTensor(address={tensor.address:#x}, shape=(2, 3), data_type=DataType.DT_FLOAT)"
    array = tensor.numpy()
    assert (array.shape, array.dtype, array.ctypes.data) == ((2, 3), np.float32, tensor.address)
    array[1, 2] = 7
    assert tensor.numpy()[1, 2] == 7
    shared = np.from_dlpack(tensor)
    assert (shared.shape, shared.dtype, shared.ctypes.data) == ((2, 3), np.float32, tensor.address)
    assert allocate_tensor(instance, (4,), DataType.DT_BF16).numpy().dtype == np.uint16


@pytest.mark.parametrize("make", [lambda tensor: tensor, PoolTensor.numpy, np.from_dlpack])
def test_the_last_view_frees_the_memory(engine: RecordingEngine, instance: LLMDataDist, make: Any) -> None:
    tensor = allocate_tensor(instance, (2, 3), DataType.DT_INT8)
    view = make(tensor)
    del tensor
    gc.collect()
    assert engine.names() == ["reserve_memory"]
    part = view if isinstance(view, PoolTensor) else view[1:]
    del view
    gc.collect()
    assert engine.names() == ["reserve_memory"]
    del part
    gc.collect()
    assert engine.names() == ["reserve_memory", "release_memory"]
    assert engine.reserved == {}


def test_nothing_is_freed_after_finalize_or_in_a_child(
    engine: RecordingEngine, instance: LLMDataDist, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = allocate_tensor(instance, (2,), DataType.DT_INT8)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        del tensor
        gc.collect()
    tensor = allocate_tensor(instance, (2,), DataType.DT_INT8)
    instance.finalize()
    del tensor
    gc.collect()
    assert "release_memory" not in engine.names()


def test_the_pool_must_be_there(engine: RecordingEngine, instance: LLMDataDist) -> None:
    refused("you should config memory pool firstly", allocate_tensor, instance, (2,), DataType.DT_INT8, HOST)
    instance.finalize()
    instance.init({**MANAGER, "llm.HostMemPoolConfig": '{"memory_size": 65536}'})
    on_host = allocate_tensor(instance, (2,), DataType.DT_INT8, placement=HOST)
    assert engine.calls[-1] == ("reserve_memory", (2, True))
    del on_host
    instance.finalize()
    instance.init({"ge.exec.deviceId": "0"})
    allocate_tensor(instance, (2,), DataType.DT_INT8, Placement.DEVICE)
    refused("Only support allocate device cache", allocate_tensor, instance, (2,), DataType.DT_INT8, HOST)


def test_what_cannot_be_allocated(engine: RecordingEngine, instance: LLMDataDist) -> None:
    for args, match in (
        ((None, (2,), DataType.DT_INT8), "datadist only support LLMDataDist"),
        ((instance, 2, DataType.DT_INT8), "shape only support list or tuple"),
        ((instance, (2.0,), DataType.DT_INT8), "shape inner type only support int"),
        ((instance, (2,), 2), "data_type only support DataType"),
        ((instance, (2,), DataType.DT_INT8, 1), "placement only support Placement"),
    ):
        with pytest.raises(TypeError, match=match):
            allocate_tensor(*args)  # type: ignore[arg-type]
    for shape in ((), [1] * 32, (0,), (2, -1), (2**62, 4)):
        refused("shape", allocate_tensor, instance, shape, DataType.DT_INT32)
    refused("has no view", allocate_tensor, instance, (2,), DataType.DT_STRING)
    instance.finalize()
    with pytest.raises(RuntimeError, match="llm datadist is not initialized"):
        allocate_tensor(instance, (2,), DataType.DT_INT8)
    assert engine.names() == ["close"]


# ---- views of caches


def test_caches_have_views(engine: RecordingEngine, instance: LLMDataDist) -> None:
    memory = bytearray(2048)
    engine.tensor = memoryview(memory)
    manager = instance.cache_manager
    for cache in (manager.allocate_cache(desc()), manager.register_blocks_cache(desc(4, placement=HOST), [1, 2, 3, 4])):
        view = tensor_view(cache, 3)
        assert (view.shape, view.dtype) == ((4, 256), np.float16)
        view[:] = cache.cache_id
        assert np.from_dlpack(dlpack_view(cache, 3))[3, 255] == cache.cache_id
        assert engine.calls[-1] == ("tensor_memory", (cache.cache_id, 3))


def test_memory_that_the_manager_does_not_know_has_no_view(instance: LLMDataDist) -> None:
    refused("only support a device cache", tensor_view, cpu_cache())
    with pytest.raises(TypeError, match="cache only support KvCache or Cache"):
        tensor_view(1)  # type: ignore[arg-type]
    refused(
        "tensor_index 4 is out of range", tensor_view, Cache(1, desc(), [1], instance.cache_manager, False, False), 4
    )
