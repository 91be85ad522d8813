"""Enumerations and numbers."""

from __future__ import annotations

import numpy as np
import pytest

from llm_datadist import CacheDesc, DataType, LLMRole, LLMStatusCode, Memtype, Placement, RegisterMemStatus
from llm_datadist.data_type import dtype_to_np_dtype, get_python_dtype_from_wrapper_dtype, np_dtype_to_dtype
from llm_datadist.status import code_2_status
from llm_datadist.v2.llm_types import int_to_mem_status_dict

# Offsets from 0x5010B000 of the codes that have one.
CODES = {
    1: "WAIT_PROCESS_TIMEOUT",
    2: "KV_CACHE_NOT_EXIST",
    3: "REPEAT_REQUEST",
    4: "REQUEST_ALREADY_COMPLETED",
    5: "PARAM_INVALID",
    6: "ENGINE_FINALIZED",
    7: "NOT_YET_LINK",
    8: "ALREADY_LINK",
    9: "LINK_FAILED",
    10: "UNLINK_FAILED",
    11: "NOTIFY_PROMPT_UNLINK_FAILED",
    12: "CLUSTER_NUM_EXCEED_LIMIT",
    13: "PROCESSING_LINK",
    14: "DEVICE_OUT_OF_MEMORY",
    15: "PREFIX_ALREADY_EXIST",
    16: "PREFIX_NOT_EXIST",
    17: "SEQ_LENOVERLIMIT",
    18: "NO_FREE_BLOCK",
    19: "BLOCKS_OUT_OF_MEMORY",
    24: "EXIST_LINK",
    25: "FEATURE_NOT_ENABLED",
    26: "TIMEOUT",
    27: "LINK_BUSY",
    28: "OUT_OF_MEMORY",
}
OTHER_CODES = {
    "SUCCESS": 0,
    "FAILED": 0xFFFFFFFF,
    "DEVICE_MEM_ERROR": 507053,
    "SUSPECT_REMOTE_ERROR": 507057,
    "UNKNOWN_ERROR": -1,
}

DATA_TYPES = {  # value, bytes per element
    "DT_FLOAT": (0, 4),
    "DT_FLOAT16": (1, 2),
    "DT_INT8": (2, 1),
    "DT_INT32": (3, 4),
    "DT_UINT8": (4, 1),
    "DT_INT16": (6, 2),
    "DT_UINT16": (7, 2),
    "DT_UINT32": (8, 4),
    "DT_INT64": (9, 8),
    "DT_UINT64": (10, 8),
    "DT_DOUBLE": (11, 8),
    "DT_BOOL": (12, 1),
    "DT_STRING": (13, 16),
    "DT_BF16": (27, 2),
}


def test_C009_numbers_of_the_status_codes() -> None:
    expected = {f"LLM_{name}": 0x5010B000 + offset for offset, name in CODES.items()}
    expected.update({f"LLM_{name}": number for name, number in OTHER_CODES.items()})
    assert {code.name: code.value for code in LLMStatusCode} == expected
    assert len(LLMStatusCode) == 29


def test_C010_a_status_code_prints_with_its_class() -> None:
    code = LLMStatusCode.LLM_FAILED
    assert str(code) == f"{code}" == "LLMStatusCode.LLM_FAILED"


def test_C011_a_number_gives_its_status_code() -> None:
    assert LLMStatusCode(0x5010B002) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_C012_numbers_without_a_status_code() -> None:
    assert code_2_status(0) is LLMStatusCode.LLM_SUCCESS
    for number in (12345, *range(0x5010B014, 0x5010B018)):
        assert code_2_status(number) is LLMStatusCode.LLM_FAILED


def test_C013_roles() -> None:
    assert {role.name: role.value for role in LLMRole} == {"PROMPT": 1, "DECODER": 2, "MIX": 3}
    assert LLMRole.PROMPT == 1


def test_C014_placements() -> None:
    assert {placement.name: placement.value for placement in Placement} == {"HOST": 0, "DEVICE": 1}


def test_C015_data_types() -> None:
    assert {data_type.name: data_type.value for data_type in DataType} == {
        name: value for name, (value, _) in DATA_TYPES.items()
    }
    with pytest.raises(ValueError, match="5"):
        DataType(5)


@pytest.mark.parametrize("name", DATA_TYPES)
def test_C016_bytes_of_a_tensor(name: str) -> None:
    assert CacheDesc(1, [2, 3], DataType[name]).size == 6 * DATA_TYPES[name][1]


def test_C017_numpy_types() -> None:
    assert np_dtype_to_dtype[np.dtype("float16")] is DataType.DT_FLOAT16
    assert np.dtype(dtype_to_np_dtype[DataType.DT_BF16]) == np.float16


def test_C018_data_types_by_number() -> None:
    assert get_python_dtype_from_wrapper_dtype(0) is DataType.DT_FLOAT
    with pytest.raises(ValueError, match="99"):
        get_python_dtype_from_wrapper_dtype(99)


def test_C019_registered_memory() -> None:
    assert {member.name: member.value for member in RegisterMemStatus} == {"OK": 0, "PREPARING": 1, "FAILED": 2}
    assert {member.name: member.value for member in Memtype} == {"MEM_TYPE_DEVICE": 0, "MEM_TYPE_HOST": 1}
    assert RegisterMemStatus.OK != 0, "no number"
    assert int_to_mem_status_dict == {number: RegisterMemStatus(number) for number in range(3)}
