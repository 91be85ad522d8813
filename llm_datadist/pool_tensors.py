"""Tensors of the program in the memory pool of an instance.

A cache that is registered over memory of the pool (`CacheManager.register_cache`) moves by the fastest way that a link
has: peers on the same host map the pool, which they cannot do with other memory of the program.

This module is an addition to the documented interface.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from llm_datadist.allocation_arguments import check_dimensions
from llm_datadist.arguments import check_isinstance
from llm_datadist.cache_desc import Placement, tensor_nbytes
from llm_datadist.data_type import DataType
from llm_datadist.datadist import LLMDataDist
from llm_datadist.held_tensor import DlpackView, check_element, held_array

if TYPE_CHECKING:
    import numpy.typing as npt

    from llm_datadist.engine.engine import Engine

__all__ = ["PoolTensor", "allocate_tensor"]


def allocate_tensor(
    datadist: LLMDataDist, shape: Sequence[int], data_type: DataType, placement: Placement = Placement.DEVICE
) -> PoolTensor:
    """Allocate a tensor in the pool of an instance.

    Parameters
    ----------
    datadist : LLMDataDist
        An initialised instance, with a pool of the placement.
    shape : list or tuple of int
        1 to 31 positive dimensions.
    data_type : DataType
        Any but DT_STRING.
    placement : Placement
        Which pool; in KV mode there is that of DEVICE only.

    Returns
    -------
    PoolTensor
        Its memory is freed when neither it nor a view of it is left. The contents are undefined.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    RuntimeError
        The instance is not initialised.
    LLMException
        LLM_PARAM_INVALID: there is no such pool, or the shape or type cannot be allocated. LLM_OUT_OF_MEMORY, in KV
        mode LLM_DEVICE_OUT_OF_MEMORY: no room.

    Examples
    --------
    ::

        keys_and_values = [allocate_tensor(datadist, (512, 128), DataType.DT_FLOAT16) for _ in range(2)]
        tensors = [torch.from_dlpack(tensor) for tensor in keys_and_values]
        desc = CacheDesc(2, (512, 128), DataType.DT_FLOAT16)
        cache = manager.register_blocks_cache(desc, [tensor.data_ptr() for tensor in tensors], BlocksCacheKey(1))
    """
    check_isinstance("datadist", datadist, LLMDataDist, allow_none=False)
    engine = cast("Engine", datadist._require_engine())
    check_isinstance("shape", shape, [list, tuple], int, allow_none=False)
    check_isinstance("data_type", data_type, DataType, allow_none=False)
    check_isinstance("placement", placement, Placement, allow_none=False)
    manager = datadist._manager
    assert manager is not None
    manager._check_pool(placement)
    check_dimensions(len(shape))
    check_element(data_type)
    nbytes = tensor_nbytes(shape, data_type)
    return PoolTensor(_Reservation(engine, nbytes, placement is Placement.HOST), shape, data_type)


class PoolTensor(DlpackView):
    """A tensor in the memory pool; made by `allocate_tensor`.

    It speaks the DLPack protocol, for ``torch.from_dlpack`` and the like; DT_BF16 becomes bfloat16 then. Every view
    keeps the memory by itself. Unregister a cache over it before the last view dies.
    """

    __slots__ = ("_reservation",)

    def __init__(self, reservation: _Reservation, shape: Sequence[int], data_type: DataType) -> None:
        super().__init__(reservation.memory, shape, data_type, reservation)
        self._reservation = reservation

    @property
    def address(self) -> int:
        """Address of the first byte in this process."""
        return self._reservation.address

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self._reservation.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        """Type of the elements."""
        return self._data_type

    def numpy(self) -> npt.NDArray[Any]:
        """Give the tensor as a writable array over its memory; DT_BF16 is shown as its bits, in uint16."""
        return held_array(self._memory, self._shape, self._data_type, self._owner)

    def __repr__(self) -> str:
        return f"PoolTensor(address={self.address:#x}, shape={self._shape}, data_type={self._data_type})"


class _Reservation:
    """Memory of the pool, given back when the object dies."""

    __slots__ = ("_engine", "_pid", "address", "memory", "nbytes")

    def __init__(self, engine: Engine, nbytes: int, host: bool) -> None:
        self._pid = 0  # what the destructor of a half-made object finds
        self._engine = engine
        self.nbytes = nbytes
        self.address = engine.reserve_memory(nbytes, host=host)
        self._pid = os.getpid()
        self.memory = engine.memory(self.address, nbytes)

    def __del__(self) -> None:
        # A forked child owns no memory of the pool, and a finalised instance has none.
        if self._pid == os.getpid() and self._engine.is_open:
            try:
                self._engine.release_memory(self.address)
            except Exception:
                pass  # nobody could be told; finalize frees the memory
