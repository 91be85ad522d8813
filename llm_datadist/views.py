"""Tensors of a cache as NumPy arrays and DLPack objects, without a copy.

A view shows the memory of the cache itself: what is written through it is what a peer pulls, and what a pull brings
shows in it. It keeps its `KvCache` object alive, so that the cache is not deallocated for lack of a holder. Do not
deallocate the cache or call `LLMDataDist.finalize` while a view is in use: the memory is then given to other caches,
and the view reads and writes theirs. A registered `Cache` is memory of the program, which keeps it alive.

This module is an addition to the documented interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_datadist.arguments import check_int32, check_isinstance
from llm_datadist.cache import Cache
from llm_datadist.held_tensor import DlpackView, check_element, held_array
from llm_datadist.kv_cache import KvCache
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DlpackView", "dlpack_view", "tensor_view"]


def tensor_view(cache: KvCache | Cache, tensor_index: int = 0, device_index: int = 0) -> npt.NDArray[Any]:
    """Give a tensor of a cache as a NumPy array over the memory of the cache.

    Parameters
    ----------
    cache : KvCache or Cache
        A cache of this process that is allocated or registered.
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
        LLM_PARAM_INVALID: an index is out of range, the cache is one of `create_cpu_cache` (its memory is the caller's,
        who can wrap it without help), or its type is DT_STRING. LLM_KV_CACHE_NOT_EXIST: it was deallocated.

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
    memory = _memory(cache, tensor_index, device_index)
    description = cache.cache_desc
    return held_array(memory, description.shape, description.data_type, cache)


def dlpack_view(cache: KvCache | Cache, tensor_index: int = 0, device_index: int = 0) -> DlpackView:
    """Give a tensor of a cache for ``torch.from_dlpack``, ``numpy.from_dlpack`` and the like.

    Takes and raises what `tensor_view` does. DT_BF16 becomes bfloat16, which PyTorch knows and NumPy refuses.
    """
    memory = _memory(cache, tensor_index, device_index)
    description = cache.cache_desc
    return DlpackView(memory, description.shape, description.data_type, cache)


def _memory(cache: KvCache | Cache, tensor_index: int, device_index: int) -> memoryview:
    """Check the arguments of a view, and give the bytes of the tensor."""
    check_isinstance("cache", cache, [KvCache, Cache], allow_none=False)
    check_int32("tensor_index", tensor_index)
    check_int32("device_index", device_index)
    description = cache.cache_desc
    manager = cache._manager
    if manager is None:
        raise InvalidArgument("cache only support a device cache, but got a host cache: its memory is the caller's own")
    check_element(description.data_type)
    if not 0 <= tensor_index < description.num_tensors:
        raise InvalidArgument(
            f"tensor_index {tensor_index} is out of range, should be in [0, {description.num_tensors})"
        )
    devices = manager._tensor_memory(cache, tensor_index)
    if not 0 <= device_index < len(devices):
        raise InvalidArgument(f"device_index {device_index} is out of range, the cache is on {len(devices)} devices")
    return devices[device_index]
