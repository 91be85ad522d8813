"""Memory as NumPy arrays and DLPack tensors that keep its owner alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_datadist import _dlpack
from llm_datadist.data_type import DataType
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    import sys

    import numpy.typing as npt

    if sys.version_info >= (3, 13):
        from types import CapsuleType
    else:
        from typing_extensions import CapsuleType


class _Element(NamedTuple):
    """How the two worlds name a type of elements."""

    numpy_name: str
    dlpack_code: int
    bits: int


ELEMENTS = {
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


def check_element(data_type: DataType) -> None:
    """Check that elements of a type can be shown."""
    if data_type not in ELEMENTS:
        raise InvalidArgument(f"data type {data_type} has no view, only numbers and DT_BOOL have one")


def held_array(memory: memoryview, shape: Sequence[int], data_type: DataType, owner: object) -> npt.NDArray[Any]:
    """Give memory as an array that keeps `owner` alive; so does every array that is made of it."""
    import numpy as np

    array = np.frombuffer(memory, ELEMENTS[data_type].numpy_name).reshape(shape)
    return np.asarray(_HeldArray(array, owner))


class DlpackView:
    """A tensor that speaks the DLPack protocol; made by `llm_datadist.views.dlpack_view`.

    Any number of tensors may be made of it. Each keeps the cache object alive by itself.
    """

    __slots__ = ("_data_type", "_memory", "_owner", "_shape")

    def __init__(self, memory: memoryview, shape: Sequence[int], data_type: DataType, owner: object) -> None:
        self._memory = memory
        self._shape = tuple(shape)
        self._data_type = data_type
        self._owner = owner

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
        element = ELEMENTS[self._data_type]
        return _dlpack.make_capsule(
            bytearray(self._memory) if copy else self._memory,
            self._owner,
            element.dlpack_code,
            element.bits,
            self._shape,
            versioned=max_version is not None and max_version[0] >= 1,
            copied=bool(copy),
        )


class _HeldArray:
    """Keeps an object alive as the base of an array, by way of NumPy's array interface."""

    def __init__(self, array: npt.NDArray[Any], owner: object) -> None:
        self.__array_interface__ = array.__array_interface__
        self._holds = (array, owner)
