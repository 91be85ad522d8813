"""Data types of tensors and their counterparts in NumPy.

The NumPy tables `valid_np_dtypes`, `dtype_to_np_dtype` and `np_dtype_to_dtype` are made at their first use, so that
NumPy is not imported before it is needed.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    valid_np_dtypes: list[type[np.generic]]
    dtype_to_np_dtype: dict[DataType, type[np.generic]]
    np_dtype_to_dtype: dict[type[np.generic] | np.dtype[Any], DataType]


class DataType(Enum):
    """Type of the elements of a tensor.

    Examples
    --------
    >>> from llm_datadist.data_type import ELEMENT_NBYTES, DataType, dtype_to_np_dtype
    >>> ELEMENT_NBYTES[DataType.DT_BF16]
    2
    >>> dtype_to_np_dtype[DataType.DT_FLOAT]
    <class 'numpy.float32'>
    """

    DT_FLOAT = 0
    DT_FLOAT16 = 1
    DT_INT8 = 2
    DT_INT32 = 3
    DT_UINT8 = 4
    DT_INT16 = 6
    DT_UINT16 = 7
    DT_UINT32 = 8
    DT_INT64 = 9
    DT_UINT64 = 10
    DT_DOUBLE = 11
    DT_BOOL = 12
    DT_STRING = 13
    DT_BF16 = 27


# Bytes of one element; a string counts with its descriptor.
ELEMENT_NBYTES: dict[DataType, int] = {
    DataType.DT_FLOAT: 4,
    DataType.DT_FLOAT16: 2,
    DataType.DT_INT8: 1,
    DataType.DT_INT32: 4,
    DataType.DT_UINT8: 1,
    DataType.DT_INT16: 2,
    DataType.DT_UINT16: 2,
    DataType.DT_UINT32: 4,
    DataType.DT_INT64: 8,
    DataType.DT_UINT64: 8,
    DataType.DT_DOUBLE: 8,
    DataType.DT_BOOL: 1,
    DataType.DT_STRING: 16,
    DataType.DT_BF16: 2,
}

# Number of each type inside an engine.
python_dtype_2_dwrapper_dtype: dict[DataType, int] = {member: member.value for member in DataType}

_NUMPY_NAMES = {
    DataType.DT_FLOAT: "float32",
    DataType.DT_FLOAT16: "float16",
    DataType.DT_INT8: "int8",
    DataType.DT_INT32: "int32",
    DataType.DT_UINT8: "uint8",
    DataType.DT_INT16: "int16",
    DataType.DT_UINT16: "uint16",
    DataType.DT_UINT32: "uint32",
    DataType.DT_INT64: "int64",
    DataType.DT_UINT64: "uint64",
    DataType.DT_DOUBLE: "float64",
    DataType.DT_BOOL: "bool_",
    DataType.DT_STRING: "bytes_",
    DataType.DT_BF16: "float16",  # as a container of 16 bits
}


def get_python_dtype_from_wrapper_dtype(wrapper_dtype: int) -> DataType:
    """Give the data type of a number of the engine.

    Raises
    ------
    ValueError
        No data type has this number.
    """
    return DataType(wrapper_dtype)


def __getattr__(name: str) -> Any:
    if name not in ("valid_np_dtypes", "dtype_to_np_dtype", "np_dtype_to_dtype"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_numpy_tables())
    return globals()[name]


def _numpy_tables() -> dict[str, object]:
    import numpy as np

    forth = {member: getattr(np, numpy_name) for member, numpy_name in _NUMPY_NAMES.items()}
    back: dict[object, DataType] = {}
    for member, scalar_type in forth.items():
        if member is not DataType.DT_BF16:
            # Arrays carry a dtype, programs also name the scalar type; both are equal but have different hashes.
            back[scalar_type] = member
            back[np.dtype(scalar_type)] = member
    valid = [scalar_type for member, scalar_type in forth.items() if member is not DataType.DT_BF16]
    return {"valid_np_dtypes": valid, "dtype_to_np_dtype": forth, "np_dtype_to_dtype": back}
