"""Arrays of the host into tensors of a cache, and back, wherever the cache lies.

A cache on a device cannot be viewed (`llm_datadist.views`); its bytes are copied, by the device and with a deadline.
The same calls copy memory where the cache is on the host, so that a program need not know. Tensors of torch on the CPU
are given as ``tensor.numpy()``. Whole blocks of all tensors are copied with fewer calls by ``swap_blocks``.

This module is an addition to the documented interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.arguments import check_int32, check_isinstance, check_uint64
from llm_datadist.cache import Cache
from llm_datadist.kv_cache import KvCache
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    import sys
    from typing import Any, Union

    import numpy.typing as npt

    if sys.version_info >= (3, 12):
        from collections.abc import Buffer
    else:
        from typing_extensions import Buffer

    HostBytes = Union[Buffer, npt.NDArray[Any]]

__all__ = ["copy_from_cache", "copy_to_cache"]


def copy_to_cache(
    cache: KvCache | Cache, tensor_index: int, array: HostBytes, *, offset: int = 0, device_index: int = 0
) -> None:
    """Copy bytes of the host into a tensor of a cache. Returns when they are there.

    Parameters
    ----------
    cache : KvCache or Cache
        A cache of this process that is allocated or registered.
    tensor_index : int
        In ``[0, num_tensors)``.
    array : numpy.ndarray or any other buffer
        C-contiguous. Its bytes count, not its shape or its type.
    offset : int
        Byte of the tensor at which they begin, uint64. Any number is right; multiples of 64 are faster on a device.
    device_index : int
        Position of the device in the list of device ids; 0 for a process with one device.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        An integer is out of the range of its width.
    LLMException
        LLM_PARAM_INVALID: an index is out of range, the bytes do not lie inside of the tensor, `array` is not
        contiguous, or the cache is one of `create_cpu_cache`. LLM_KV_CACHE_NOT_EXIST: it was deallocated.
        LLM_WAIT_PROCESS_TIMEOUT, in cache-manager mode LLM_TIMEOUT: not finished within sync_kv_timeout. LLM_FAILED:
        the device reports an error.

    Examples
    --------
    >>> import numpy as np
    >>> from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
    >>> from llm_datadist.device_copies import copy_from_cache, copy_to_cache
    >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
    >>> datadist.init({"ge.exec.deviceId": "0"})
    >>> cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16))
    >>> copy_to_cache(cache, 1, np.full((1, 128), 1.5, np.float16), offset=3 * 128 * 2)
    >>> row = np.empty(128, np.float16)
    >>> copy_from_cache(cache, 1, row, offset=3 * 128 * 2)
    >>> row[127].item()
    1.5
    >>> datadist.finalize()
    """
    _copy("copy_to_cache", cache, tensor_index, array, offset, device_index, into_cache=True)


def copy_from_cache(
    cache: KvCache | Cache, tensor_index: int, array: HostBytes, *, offset: int = 0, device_index: int = 0
) -> None:
    """Fill a buffer of the host with bytes of a tensor of a cache; takes and raises what `copy_to_cache` does.

    Parameters
    ----------
    cache, tensor_index, offset, device_index
        As for `copy_to_cache`.
    array : numpy.ndarray or any other buffer
        Writable and C-contiguous; all of it is filled.
    """
    _copy("copy_from_cache", cache, tensor_index, array, offset, device_index, into_cache=False)


def _copy(
    call: str,
    cache: KvCache | Cache,
    tensor_index: int,
    array: HostBytes,
    offset: int,
    device_index: int,
    *,
    into_cache: bool,
) -> None:
    check_isinstance("cache", cache, [KvCache, Cache], allow_none=False)
    check_int32("tensor_index", tensor_index)
    check_uint64("offset", offset)
    check_int32("device_index", device_index)
    manager = cache._manager
    if manager is None:
        raise InvalidArgument("cache only support a device cache, but got a host cache: its memory is the caller's own")
    tensors = cache.cache_desc.num_tensors
    if not 0 <= tensor_index < tensors:
        raise InvalidArgument(f"tensor_index {tensor_index} is out of range, should be in [0, {tensors})")
    data = _bytes_of(array, writable=not into_cache)
    manager._copy_range(call, cache, tensor_index, device_index, offset, data, into_cache)


def _bytes_of(array: HostBytes, *, writable: bool) -> memoryview:
    data = memoryview(array)  # type: ignore[arg-type]
    if not data.c_contiguous:
        raise InvalidArgument(f"array should be C-contiguous, but its strides are {data.strides}")
    if writable and data.readonly:
        raise InvalidArgument("array should be writable, but is read-only")
    return data
