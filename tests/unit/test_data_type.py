"""Roles, placements and data types, and the tables beside them."""

from __future__ import annotations

import enum
import subprocess
import sys

import numpy as np
import pytest

from llm_datadist import CacheDesc, DataType, LLMRole, Placement
from llm_datadist import data_type as data_types
from llm_datadist.data_type import get_python_dtype_from_wrapper_dtype, python_dtype_2_dwrapper_dtype

# value, bytes of an element, NumPy type
TYPES = {
    "DT_FLOAT": (0, 4, np.float32),
    "DT_FLOAT16": (1, 2, np.float16),
    "DT_INT8": (2, 1, np.int8),
    "DT_INT32": (3, 4, np.int32),
    "DT_UINT8": (4, 1, np.uint8),
    "DT_INT16": (6, 2, np.int16),
    "DT_UINT16": (7, 2, np.uint16),
    "DT_UINT32": (8, 4, np.uint32),
    "DT_INT64": (9, 8, np.int64),
    "DT_UINT64": (10, 8, np.uint64),
    "DT_DOUBLE": (11, 8, np.float64),
    "DT_BOOL": (12, 1, np.bool_),
    "DT_STRING": (13, 16, np.bytes_),
    "DT_BF16": (27, 2, np.float16),
}


def test_roles_and_placements_are_numbers_that_print_with_their_class() -> None:
    assert {role.name: int(role) for role in LLMRole} == {"PROMPT": 1, "DECODER": 2, "MIX": 3}
    assert {place.name: int(place) for place in Placement} == {"HOST": 0, "DEVICE": 1}
    assert LLMRole.PROMPT == 1
    assert (str(LLMRole.PROMPT), f"{Placement.DEVICE}") == ("LLMRole.PROMPT", "Placement.DEVICE")


def test_data_types_have_their_values() -> None:
    assert {member.name: member.value for member in DataType} == {name: row[0] for name, row in TYPES.items()}
    assert not issubclass(DataType, enum.IntEnum)
    assert str(DataType.DT_FLOAT16) == "DataType.DT_FLOAT16"


@pytest.mark.parametrize("data_type", DataType)
def test_a_description_counts_bytes_by_data_type(data_type: DataType) -> None:
    assert CacheDesc(1, [2, 3], data_type).size == 6 * TYPES[data_type.name][1]


@pytest.mark.parametrize("data_type", DataType)
def test_numpy_types_go_forth_and_back(data_type: DataType) -> None:
    numpy_type = TYPES[data_type.name][2]
    assert data_types.dtype_to_np_dtype[data_type] is numpy_type
    assert numpy_type in data_types.valid_np_dtypes
    expected = DataType.DT_FLOAT16 if data_type is DataType.DT_BF16 else data_type
    assert data_types.np_dtype_to_dtype[np.dtype(numpy_type)] is expected
    assert data_types.np_dtype_to_dtype[numpy_type] is expected


def test_numbers_of_the_engine() -> None:
    for member in DataType:
        assert get_python_dtype_from_wrapper_dtype(python_dtype_2_dwrapper_dtype[member]) is member
    assert get_python_dtype_from_wrapper_dtype(0) is DataType.DT_FLOAT
    for number in (5, 99):
        with pytest.raises(ValueError, match=str(number)):
            get_python_dtype_from_wrapper_dtype(number)


def test_the_tables_are_made_when_they_are_asked_for() -> None:
    code = (
        "import sys; from llm_datadist import data_type; assert 'numpy' not in sys.modules;"
        "from llm_datadist.data_type import np_dtype_to_dtype; assert 'numpy' in sys.modules;"
        "assert data_type.np_dtype_to_dtype is np_dtype_to_dtype"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_table'"):
        data_types.no_such_table  # noqa: B018
