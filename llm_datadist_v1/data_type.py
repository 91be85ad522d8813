"""Data types, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.data_type import (
    DataType,
    dtype_to_np_dtype,
    get_python_dtype_from_wrapper_dtype,
    np_dtype_to_dtype,
    python_dtype_2_dwrapper_dtype,
    valid_np_dtypes,
)

__all__ = [
    "DataType",
    "dtype_to_np_dtype",
    "get_python_dtype_from_wrapper_dtype",
    "np_dtype_to_dtype",
    "python_dtype_2_dwrapper_dtype",
    "valid_np_dtypes",
]
