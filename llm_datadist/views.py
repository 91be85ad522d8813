"""Tensors of a cache as NumPy arrays and DLPack objects, without a copy.

A view shows the memory of the cache itself: what is written through it is what a peer pulls, and what a pull brings
shows in it. It keeps its `KvCache` object alive, so that the cache is not deallocated for lack of a holder. Do not call
`KvCacheManager.deallocate_cache` or `LLMDataDist.finalize` while a view is in use: the memory is then given to other
caches, and the view reads and writes theirs.

This module is an addition to the documented interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llm_datadist import _dlpack
from llm_datadist.arguments import check_int32, check_isinstance
from llm_datadist.cache_desc import Placement
from llm_datadist.data_type import DataType
from llm_datadist.kv_cache import KvCache
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    import sys

    import numpy.typing as npt

    if sys.version_info >= (3, 13):
        from types import CapsuleType
    else:
        from typing_extensions import CapsuleType

__all__ = ["DlpackView", "dlpack_view", "tensor_view"]


class _Element(NamedTuple):
    """How the two worlds name a type of elements."""

    numpy_name: str
    dlpack_code: int
    bits: int


_ELEMENTS = {
    DataType.DT_FLOAT: _Element("float32", _dlpack.FLOAT, 32),
    DataType.DT_FLOAT16: _Element("float16", _dlpack.FLOAT, 16),
    DataType.DT_INT8: _Element("int8", _dlpack.INT, 8),
    DataType.DT_INT16: _Element("int16", _dlpack.INT, 16),
    DataType.DT_INT32: _Element("int32", _dlpack.INT, 32),
    DataType.DT_INT64: _Element("int64", _dlpack.INT, 64),
    DataType.DT_UINT8: _Element("uint8", _dlpack.UINT, 8),
    DataType.DT_UINT16: _Element("uint16", _dlpack.UINT, 16),
    DataType.DT_UINT32: _Element("uint32", _dlpack.UINT, 32),
    DataType.DT_UINT64: _Element("uint64", _dlpack.UINT, 64),
    DataType.DT_DOUBLE: _Element("float64", _dlpack.FLOAT, 64),
    DataType.DT_BOOL: _Element("bool", _dlpack.BOOL, 8),
    # NumPy has no bfloat16. Bits shown as integers cannot be mistaken for values; shown as float16 they could.
    DataType.DT_BF16: _Element("uint16", _dlpack.BFLOAT, 16),
}


def tensor_view(cache: KvCache, tensor_index: int = 0, device_index: int = 0) -> npt.NDArray[Any]:
    """Give a tensor of a cache as a NumPy array over the memory of the cache.

    Parameters
    ----------
    cache : KvCache
        A cache of this process that is allocated.
    tensor_index : int
        In ``[0, num_tensors)``.
    device_index : int
        Position of the device in the list of device ids; 0 for a process with one device.

    Returns
    -------
    numpy.ndarray
        Writable, of the shape and type of ``cache.cache_desc``; DT_BF16 is shown as its bits, in uint16.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    LLMException
        LLM_PARAM_INVALID: an index is out of range, the cache is one of `KvCache.create_cpu_cache` (its memory is the
        caller's, who can wrap it without help), or its type is DT_STRING. LLM_KV_CACHE_NOT_EXIST: it was deallocated.

    Examples
    --------
    >>> from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
    >>> from llm_datadist.views import tensor_view
    >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
    >>> datadist.init({"ge.exec.deviceId": "0"})
    >>> cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16))
    >>> view = tensor_view(cache, tensor_index=1)
    >>> view[:] = 1.5
    >>> datadist.kv_cache_manager.get_cache_tensors(cache, 1)[0].numpy()[3, 127].item()
    1.5
    >>> del view
    >>> datadist.finalize()
    """
    import numpy as np

    memory = _memory(cache, tensor_index, device_index)
    description = cache.cache_desc
    array = np.frombuffer(memory, _ELEMENTS[description.data_type].numpy_name).reshape(description.shape)
    return np.asarray(_HeldArray(array, cache))


def dlpack_view(cache: KvCache, tensor_index: int = 0, device_index: int = 0) -> DlpackView:
    """Give a tensor of a cache for ``torch.from_dlpack``, ``numpy.from_dlpack`` and the like.

    Takes and raises what `tensor_view` does. DT_BF16 becomes bfloat16, which PyTorch knows and NumPy refuses.
    """
    return DlpackView(cache, _memory(cache, tensor_index, device_index))


class DlpackView:
    """A tensor of a cache that speaks the DLPack protocol; made by `dlpack_view`.

    Any number of tensors may be made of it. Each keeps the `KvCache` object alive by itself.
    """

    __slots__ = ("_cache", "_memory")

    def __init__(self, cache: KvCache, memory: memoryview) -> None:
        self._cache = cache
        self._memory = memory

    def __dlpack_device__(self) -> tuple[int, int]:
        return _dlpack.CPU_DEVICE

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """Make the capsule that a consumer takes; the arguments are those of the Python array API standard.

        Raises
        ------
        BufferError
            A device other than the CPU is wanted.
        ValueError
            `stream` is given; memory of the CPU has none.
        """
        if stream is not None:
            raise ValueError(f"stream is {stream!r}, should be None for memory of the CPU")
        if dl_device is not None and tuple(dl_device) != _dlpack.CPU_DEVICE:
            raise BufferError(f"dl_device is {dl_device!r}, the tensor is in memory of the CPU {_dlpack.CPU_DEVICE!r}")
        description = self._cache.cache_desc
        element = _ELEMENTS[description.data_type]
        return _dlpack.make_capsule(
            bytearray(self._memory) if copy else self._memory,
            self._cache,
            element.dlpack_code,
            element.bits,
            tuple(description.shape),
            versioned=max_version is not None and max_version[0] >= 1,
            copied=bool(copy),
        )


class _HeldArray:
    """Keeps a cache alive as the base of an array, by way of NumPy's array interface."""

    def __init__(self, array: npt.NDArray[Any], cache: KvCache) -> None:
        self.__array_interface__ = array.__array_interface__
        self._holds = (array, cache)


def _memory(cache: KvCache, tensor_index: int, device_index: int) -> memoryview:
    """Check the arguments of a view, and give the bytes of the tensor."""
    check_isinstance("cache", cache, KvCache, allow_none=False)
    check_int32("tensor_index", tensor_index)
    check_int32("device_index", device_index)
    description = cache.cache_desc
    if description.placement is not Placement.DEVICE:
        raise InvalidArgument("cache only support a device cache, but got a host cache: its memory is the caller's own")
    if description.data_type not in _ELEMENTS:
        raise InvalidArgument(f"data type {description.data_type} has no view, only numbers and DT_BOOL have one")
    if not 0 <= tensor_index < description.num_tensors:
        raise InvalidArgument(
            f"tensor_index {tensor_index} is out of range, should be in [0, {description.num_tensors})"
        )
    manager = cache._manager
    assert manager is not None, "every device cache has one"
    devices = manager._engine.tensor_memory(manager._engine_id(cache), tensor_index)
    if not 0 <= device_index < len(devices):
        raise InvalidArgument(f"device_index {device_index} is out of range, the cache is on {len(devices)} devices")
    return devices[device_index]
