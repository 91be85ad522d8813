"""Torch tensors over memory that belongs to somebody else: caches, and any address that a program knows.

Nothing is copied, and no tensor made of an address owns its memory: nothing is freed when the tensor dies, and it
dangles when the memory goes. Keep the cache, do not deallocate it, and do not finalise its instance while a tensor over
it is in use. torch is imported when a function is called, not with this module.

This module is an addition to the documented interface.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_datadist.arguments import INT64_MAX, check_isinstance, check_list_int64, check_list_uint64
from llm_datadist.cache import Cache
from llm_datadist.data_type import DataType
from llm_datadist.kv_cache import KvCache
from llm_datadist.status import LLMException, LLMStatusCode
from llm_datadist.views import dlpack_view

if TYPE_CHECKING:
    import torch

__all__ = ["create_cpu_tensors", "create_npu_tensors", "create_tensors"]

_DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)
_DTYPE_OF = {
    DataType.DT_FLOAT: "float32",
    DataType.DT_FLOAT16: "float16",
    DataType.DT_INT8: "int8",
    DataType.DT_INT16: "int16",
    DataType.DT_INT32: "int32",
    DataType.DT_INT64: "int64",
    DataType.DT_UINT8: "uint8",
    DataType.DT_DOUBLE: "float64",
    DataType.DT_BOOL: "bool",
    DataType.DT_BF16: "bfloat16",
}
_PLAIN_FORMAT = 2  # number that torch_npu gives to tensors whose elements lie in the order of their indices


def create_npu_tensors(shape: Sequence[int], dtype: torch.dtype, addrs: Sequence[int]) -> list[torch.Tensor]:
    """Give device memory as tensors on the NPU that is current in torch (``torch.npu.set_device``).

    Takes what ``torchair.llm_datadist.create_npu_tensors`` takes. Needs torch_npu, and calls constructors of it that
    are not public.

    Parameters
    ----------
    shape : list or tuple of int
        Shape of each tensor; dimensions > 0.
    dtype : torch.dtype
        bool, uint8, int8, int16, int32, int64, float16, bfloat16, float32, float64, complex64 or complex128. Other
        types of one byte: make uint8 tensors and ``view`` them.
    addrs : list or tuple of int
        Device address of each tensor, uint64. Nobody checks what lies there.

    Returns
    -------
    list of torch.Tensor
        One contiguous tensor for each address.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        The type is none of these, a dimension is not positive, or an address is no uint64.
    RuntimeError
        torch_npu is missing, lacks the constructors, or fails.
    """
    nbytes = _check(shape, dtype, addrs)
    construct_storage, construct_tensor, device = _npu_constructors()
    tensors = []
    for address in addrs:
        metadata = {
            "data_ptr": address,
            "nbytes": nbytes,
            "device": device,
            "dtype": dtype,
            "size": tuple(shape),
            "stride": _contiguous_strides(shape),
            "storage_offset": 0,
            "npu_format": _PLAIN_FORMAT,
        }
        try:
            tensors.append(construct_tensor(metadata, construct_storage(address, device, nbytes)))
        except Exception as error:
            raise RuntimeError(f"torch_npu made no tensor of {nbytes} bytes at {address:#x}: {error}") from error
    return tensors


def create_cpu_tensors(shape: Sequence[int], dtype: torch.dtype, addrs: Sequence[int]) -> list[torch.Tensor]:
    """Give host memory as tensors, as `create_npu_tensors` does with device memory.

    Parameters
    ----------
    shape : list or tuple of int
        Shape of each tensor; dimensions > 0.
    dtype : torch.dtype
        As for `create_npu_tensors`.
    addrs : list or tuple of int
        Address of each tensor in this process: readable, writable, a multiple of the size of an element.

    Returns
    -------
    list of torch.Tensor
        One contiguous tensor for each address.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        The type is none of these, a dimension is not positive, or an address is 0, no uint64, or not aligned.

    Examples
    --------
    ::

        cache = manager.allocate_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16))
        keys, values = create_cpu_tensors((4, 128), torch.float16, cache.per_device_tensor_addrs[0])
    """
    import torch

    nbytes = _check(shape, dtype, addrs)
    for index, address in enumerate(addrs):
        if address == 0 or address % dtype.itemsize:
            raise ValueError(f"addrs[{index}] is {address:#x}, should be a multiple of {dtype.itemsize} and not 0")
    return [
        torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype).reshape(tuple(shape))
        for address in addrs
    ]


def create_tensors(cache: KvCache | Cache, device_index: int = 0) -> list[torch.Tensor]:
    """Give all tensors of a cache, on whatever device its memory is.

    Tensors in host memory keep the handle of the cache alive, and so the cache of the KV mode; those on an NPU and
    those of `create_cpu_cache` do not.

    Parameters
    ----------
    cache : KvCache or Cache
        A cache of this process.
    device_index : int
        Position of the device in the list of device ids; 0 for a process with one device.

    Returns
    -------
    list of torch.Tensor
        One for each tensor of the cache, of the shape and type of its description.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        torch has no such type on an NPU (unsigned integers of more than one byte).
    RuntimeError
        The cache is on an NPU, and torch_npu cannot show it.
    LLMException
        LLM_PARAM_INVALID: the type is DT_STRING, or the index is out of range. LLM_KV_CACHE_NOT_EXIST: the cache was
        deallocated.
    """
    import torch

    check_isinstance("cache", cache, [KvCache, Cache], allow_none=False)
    description = cache.cache_desc
    if cache._manager is None:
        return create_cpu_tensors(description.shape, _torch_dtype(description.data_type), cache._addresses()[0])
    try:
        views = [dlpack_view(cache, index, device_index) for index in range(description.num_tensors)]
    except LLMException as error:
        if error.status_code is not LLMStatusCode.LLM_FEATURE_NOT_ENABLED:
            raise
        # The host does not see the memory of the pool.
        dtype = _torch_dtype(description.data_type)
        return create_npu_tensors(description.shape, dtype, cache._addresses()[device_index])
    return [torch.utils.dlpack.from_dlpack(view) for view in views]


def _check(shape: Sequence[int], dtype: torch.dtype, addrs: Sequence[int]) -> int:
    """Check the arguments and give the bytes of one tensor."""
    import torch

    check_isinstance("shape", shape, [list, tuple], int, allow_none=False)
    check_isinstance("dtype", dtype, torch.dtype, allow_none=False)
    check_isinstance("addrs", addrs, [list, tuple], int, allow_none=False)
    if str(dtype).partition(".")[2] not in _DTYPES:
        raise ValueError(f"dtype is {dtype}, should be one of {', '.join(_DTYPES)}")
    check_list_int64("shape", shape)
    if not all(dimension > 0 for dimension in shape):
        raise ValueError(f"shape is {list(shape)}, each dimension should be greater than 0")
    check_list_uint64("addrs", addrs)
    nbytes: int = math.prod(shape) * dtype.itemsize
    if nbytes > INT64_MAX:
        raise ValueError(f"shape {list(shape)} of {dtype} is too large, its bytes do not fit into int64")
    return nbytes


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


def _torch_dtype(data_type: DataType) -> torch.dtype:
    import torch

    if data_type not in _DTYPE_OF:
        raise ValueError(
            f"data type {data_type} has no tensors here, only these have: {', '.join(map(str, _DTYPE_OF))}"
        )
    dtype: torch.dtype = getattr(torch, _DTYPE_OF[data_type])
    return dtype


def _npu_constructors() -> tuple[Any, Any, torch.device]:
    """Give torch_npu's constructor of storage, that of tensors, and the device that is current in torch."""
    import torch

    try:
        import torch_npu
    except ImportError as error:
        raise RuntimeError(f"tensors on an NPU need torch_npu, which cannot be imported: {error}") from error
    names = ("_construct_storage_from_data_pointer", "_construct_NPU_Tensor_From_Storage_And_Metadata")
    found = [getattr(torch_npu._C, name, None) for name in names]
    if None in found:
        version = getattr(torch_npu, "__version__", "of an unknown version")
        raise RuntimeError(f"torch_npu {version} has no {names[found.index(None)]}, which tensors on an NPU need")
    return found[0], found[1], torch.device("npu", torch_npu.npu.current_device())
