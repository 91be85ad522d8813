"""Views of the tensors of a cache: the same memory, the same life."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import numpy as np
import pytest

from llm_datadist import CacheDesc, DataType, KvCache, LLMDataDist, LLMException, LLMRole, LLMStatusCode, Placement
from llm_datadist.introspection import pool_statistics
from llm_datadist.views import dlpack_view, tensor_view
from tests.datadist_member import make_options

NUMPY_TYPES = {
    DataType.DT_FLOAT: "float32",
    DataType.DT_FLOAT16: "float16",
    DataType.DT_INT8: "int8",
    DataType.DT_INT16: "int16",
    DataType.DT_INT32: "int32",
    DataType.DT_INT64: "int64",
    DataType.DT_UINT8: "uint8",
    DataType.DT_UINT16: "uint16",
    DataType.DT_UINT32: "uint32",
    DataType.DT_UINT64: "uint64",
    DataType.DT_DOUBLE: "float64",
    DataType.DT_BOOL: "bool",
}
SHAPE = (2, 3, 5)


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    instance = LLMDataDist(LLMRole.DECODER, 1)
    instance.init(make_options(LLMRole.DECODER))
    yield instance
    gc.collect()
    instance.finalize()


def allocate(datadist: LLMDataDist, data_type: DataType = DataType.DT_FLOAT16) -> KvCache:
    return datadist.kv_cache_manager.allocate_cache(CacheDesc(3, SHAPE, data_type))


@pytest.mark.parametrize(("data_type", "name"), [*NUMPY_TYPES.items(), (DataType.DT_BF16, "uint16")])
def test_tensor_view_is_the_memory_of_the_cache(datadist: LLMDataDist, data_type: DataType, name: str) -> None:
    cache = allocate(datadist, data_type)
    view = tensor_view(cache, 2)
    assert (view.shape, view.dtype, view.flags.writeable) == (SHAPE, np.dtype(name), True)
    assert view.ctypes.data == cache.per_device_tensor_addrs[0][2]
    view[:] = (np.arange(30) % 2).reshape(SHAPE)
    assert ctypes.string_at(cache.per_device_tensor_addrs[0][2], view.nbytes) == view.tobytes()
    assert tensor_view(cache, 2)[1, 2, 4] == 1


@pytest.mark.parametrize(("data_type", "name"), NUMPY_TYPES.items())
def test_numpy_takes_dlpack(datadist: LLMDataDist, data_type: DataType, name: str) -> None:
    cache = allocate(datadist, data_type)
    tensor_view(cache, 1)[1, 2, 3] = 1
    array = np.from_dlpack(dlpack_view(cache, 1))
    assert (array.shape, array.dtype, array[1, 2, 3]) == (SHAPE, np.dtype(name), 1)
    assert array.ctypes.data == cache.per_device_tensor_addrs[0][1]


@pytest.mark.parametrize("data_type", [*NUMPY_TYPES, DataType.DT_BF16])
def test_torch_takes_dlpack(datadist: LLMDataDist, data_type: DataType) -> None:
    torch = pytest.importorskip("torch")
    cache = allocate(datadist, data_type)
    tensor = torch.from_dlpack(dlpack_view(cache))
    assert tuple(tensor.shape) == SHAPE
    assert tensor.dtype is getattr(torch, "bfloat16" if data_type is DataType.DT_BF16 else NUMPY_TYPES[data_type])
    assert tensor.data_ptr() == cache.per_device_tensor_addrs[0][0]
    tensor[1, 0, 0] = 1
    assert tensor_view(cache)[1, 0, 0] == (0x3F80 if data_type is DataType.DT_BF16 else 1)


@pytest.mark.parametrize("make", [tensor_view, lambda cache: np.from_dlpack(dlpack_view(cache))])
def test_a_view_keeps_the_cache_allocated(datadist: LLMDataDist, make: object) -> None:
    view = make(allocate(datadist))[0]
    gc.collect()
    assert pool_statistics(datadist).caches == 1
    del view
    gc.collect()
    assert pool_statistics(datadist).caches == 0


def test_a_view_that_outlives_the_instance_still_has_memory() -> None:
    instance = LLMDataDist(LLMRole.DECODER, 1)
    instance.init(make_options(LLMRole.DECODER))
    view = tensor_view(allocate(instance))
    view[:] = 7
    instance.finalize()
    assert (view == 7).all()


def test_dlpack_copy_is_independent(datadist: LLMDataDist) -> None:
    torch = pytest.importorskip("torch")
    cache = allocate(datadist, DataType.DT_UINT8)
    tensor_view(cache)[:] = 5
    copied = torch.utils.dlpack.from_dlpack(dlpack_view(cache).__dlpack__(copy=True, max_version=(1, 0)))
    tensor_view(cache)[:] = 6
    assert copied[0, 0, 0] == 5


def test_dlpack_is_on_the_cpu(datadist: LLMDataDist) -> None:
    view = dlpack_view(allocate(datadist))
    assert view.__dlpack_device__() == (1, 0)
    view.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match=r"dl_device is \(2, 0\)"):
        view.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match="stream is 1"):
        view.__dlpack__(stream=1)


@pytest.mark.parametrize("make", [tensor_view, dlpack_view])
class TestRefusals:
    @pytest.mark.parametrize("index", [-1, 3])
    def test_tensor_index_out_of_range(self, datadist: LLMDataDist, make: object, index: int) -> None:
        with pytest.raises(
            LLMException, match=rf"tensor_index {index} is out of range, should be in \[0, 3\)"
        ) as raised:
            make(allocate(datadist), index)
        assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID

    @pytest.mark.parametrize("index", [-1, 1])
    def test_device_index_out_of_range(self, datadist: LLMDataDist, make: object, index: int) -> None:
        with pytest.raises(LLMException, match=f"device_index {index} is out of range") as raised:
            make(allocate(datadist), 0, index)
        assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID

    def test_wrong_types(self, datadist: LLMDataDist, make: object) -> None:
        with pytest.raises(TypeError, match="cache only support KvCache"):
            make("cache")
        with pytest.raises(TypeError, match="cache only support KvCache"):
            make(None)
        with pytest.raises(TypeError, match="tensor_index only support int"):
            make(allocate(datadist), 1.0)
        with pytest.raises(TypeError, match="device_index only support int"):
            make(allocate(datadist), 0, "0")

    def test_strings_have_no_view(self, datadist: LLMDataDist, make: object) -> None:
        with pytest.raises(LLMException, match="DT_STRING has no view") as raised:
            make(allocate(datadist, DataType.DT_STRING))
        assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID

    def test_memory_of_the_caller_has_no_view(self, make: object) -> None:
        description = CacheDesc(1, SHAPE, DataType.DT_FLOAT16, Placement.HOST)
        with pytest.raises(LLMException, match="only support a device cache") as raised:
            make(KvCache.create_cpu_cache(description, [4096]))
        assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID

    def test_deallocated_cache(self, datadist: LLMDataDist, make: object) -> None:
        cache = allocate(datadist)
        datadist.kv_cache_manager.deallocate_cache(cache)
        with pytest.raises(LLMException) as raised:
            make(cache)
        assert raised.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

    def test_finalized_instance(self, make: object) -> None:
        instance = LLMDataDist(LLMRole.DECODER, 1)
        instance.init(make_options(LLMRole.DECODER))
        cache = allocate(instance)
        instance.finalize()
        with pytest.raises(LLMException) as raised:
            make(cache)
        assert raised.value.status_code is LLMStatusCode.LLM_FAILED
