"""Tensors as programs see them: a description, and data that NumPy can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_datadist import data_type as data_types
from llm_datadist.arguments import check_isinstance
from llm_datadist.data_type import ELEMENT_NBYTES, DataType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TEXT_KINDS = "SU"  # of NumPy types: bytes and str


class TensorDesc:
    """Type and shape of a tensor.

    Parameters
    ----------
    dtype : DataType
        Type of the elements.
    shape : list or tuple of int
        Shape.

    Raises
    ------
    TypeError
        An argument of the wrong type.

    Examples
    --------
    >>> from llm_datadist import DataType, TensorDesc
    >>> print(TensorDesc(DataType.DT_FLOAT16, (2, 3)))
    TensorDesc(dtype=DataType.DT_FLOAT16, shape=[2, 3])
    """

    def __init__(self, dtype: DataType, shape: list[int] | tuple[int, ...]) -> None:
        check_isinstance("dtype", dtype, DataType, allow_none=False)
        check_isinstance("shape", shape, [list, tuple], int, allow_none=False)
        self._dtype = dtype
        self._shape = list(shape)

    @property
    def dtype(self) -> DataType:
        """Type of the elements."""
        return self._dtype

    @property
    def shape(self) -> list[int]:
        """Shape; a new list each time."""
        return list(self._shape)

    def __str__(self) -> str:
        return f"TensorDesc(dtype={self._dtype}, shape={self._shape})"


class Tensor:
    """Data of one tensor with their description.

    `KvCacheManager.get_cache_tensors` gives tensors over the memory of a cache, which keep the `KvCache` object alive.

    Parameters
    ----------
    data : numpy.ndarray or Tensor
        C-contiguous array, or another tensor; the data are copied.
    tensor_desc : TensorDesc, optional
        What the data are; derived from the array if not given. The elements of a DT_BF16 tensor come as float16 that
        hold the 16 bits.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    RuntimeError
        The array is not C-contiguous, no data type has its NumPy type, or it does not fit the description.

    Examples
    --------
    >>> import numpy as np
    >>> from llm_datadist import DataType, Tensor, TensorDesc
    >>> Tensor(np.arange(3, dtype=np.int32)).numpy().tolist()
    [0, 1, 2]
    >>> bits = np.array([0x3F80, 0x4000], np.uint16).view(np.float16)
    >>> Tensor(bits, TensorDesc(DataType.DT_BF16, [2])).numpy().tolist()
    [1.0, 2.0]
    """

    _array: npt.NDArray[Any]  # DT_BF16 as float16 that hold the bits
    _desc: TensorDesc
    _owner: object  # of the memory, if that is not the array itself

    def __init__(self, data: npt.NDArray[Any] | Tensor, tensor_desc: TensorDesc | None = None) -> None:
        import numpy as np

        check_isinstance("data", data, [np.ndarray, Tensor], allow_none=False)
        check_isinstance("tensor_desc", tensor_desc, TensorDesc)
        if isinstance(data, Tensor):
            array, described = data._array, data._desc
        else:
            array, described = data, None
        self._desc = tensor_desc or described or _derive_desc(array)
        _check_fits(array, self._desc)
        self._array = np.array(array, order="C")
        self._owner = None

    @classmethod
    def _over(cls, memory: memoryview, desc: TensorDesc, owner: object) -> Tensor:
        """Make a tensor over memory that is not copied, and keep its owner alive."""
        import numpy as np

        tensor = cls.__new__(cls)
        tensor._array = np.frombuffer(memory, _container(desc.dtype)).reshape(desc.shape)
        tensor._desc = desc
        tensor._owner = owner
        return tensor

    def numpy(self, copy: bool = False) -> npt.NDArray[Any]:
        """Give the data as an array of the described shape.

        Parameters
        ----------
        copy : bool
            True: an array with memory of its own. False: a view, valid as long as the tensor lives; of a tensor of a
            cache it shows the memory of the cache.

        Returns
        -------
        numpy.ndarray
            Of the type in `dtype_to_np_dtype`. DT_BF16 gives the values as float32, always in memory of its own.

        Raises
        ------
        TypeError
            `copy` is no bool.
        RuntimeError
            A DT_STRING tensor without ``copy=True``.
        """
        import numpy as np

        check_isinstance("copy", copy, bool)
        if self._desc.dtype is DataType.DT_STRING and not copy:
            raise RuntimeError("numpy() of a DT_STRING tensor needs copy=True")
        if self._desc.dtype is DataType.DT_BF16:
            # The 16 bits are the upper half of a float32.
            bits = self._array.view(np.uint16).astype(np.uint32)
            bits <<= np.uint32(16)
            return bits.view(np.float32)
        return self._array.copy() if copy else self._array.view()

    def __str__(self) -> str:
        return f"Tensor({self.numpy(copy=True)}, {self._desc})"


def _container(dtype: DataType) -> type[np.generic] | str:
    """Give the NumPy type that the elements of a cache's tensor are seen through."""
    if dtype is DataType.DT_STRING:
        return f"S{ELEMENT_NBYTES[dtype]}"
    return data_types.dtype_to_np_dtype[dtype]


def _derive_desc(array: npt.NDArray[Any]) -> TensorDesc:
    if array.dtype.kind in _TEXT_KINDS:
        return TensorDesc(DataType.DT_STRING, array.shape)
    dtype = data_types.np_dtype_to_dtype.get(array.dtype)
    if dtype is None:
        names = ", ".join(cls.__name__ for cls in data_types.valid_np_dtypes)
        raise RuntimeError(f"data has type {array.dtype}, which no data type has; should be text or one of {names}")
    return TensorDesc(dtype, array.shape)


def _check_fits(array: npt.NDArray[Any], desc: TensorDesc) -> None:
    if not array.flags.c_contiguous:
        raise RuntimeError("data is not C-contiguous, use numpy.ascontiguousarray first")
    if list(array.shape) != desc.shape:
        raise RuntimeError(f"data has shape {list(array.shape)}, tensor_desc says {desc.shape}")
    if desc.dtype is DataType.DT_STRING:
        fits = array.dtype.kind in _TEXT_KINDS
    else:
        fits = array.dtype == data_types.dtype_to_np_dtype[desc.dtype]
    if not fits:
        expected = data_types.dtype_to_np_dtype[desc.dtype].__name__
        raise RuntimeError(f"data has type {array.dtype}, tensor_desc says {desc.dtype}, which needs {expected}")
