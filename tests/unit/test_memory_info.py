"""Values about registered memory."""

from __future__ import annotations

import pytest

from llm_datadist import MemInfo, Memtype, RegisterMemStatus
from llm_datadist.memory_info import PushType, int_to_mem_status_dict


def test_members() -> None:
    assert [(member.name, member.value) for member in RegisterMemStatus] == [
        ("OK", 0),
        ("PREPARING", 1),
        ("FAILED", 2),
    ]
    assert [(member.name, member.value) for member in Memtype] == [("MEM_TYPE_DEVICE", 0), ("MEM_TYPE_HOST", 1)]
    assert [(member.name, member.value) for member in PushType] == [
        ("NO_CACHE_KEY", 0),
        ("BLOCKS_CACHE_KEY", 1),
        ("CACHE_KEY_BY_ID", 2),
    ]
    assert int_to_mem_status_dict == {number: RegisterMemStatus(number) for number in range(3)}


def test_a_range() -> None:
    info = MemInfo(Memtype.MEM_TYPE_HOST, 4096, 512)
    assert (info.mem_type, info.addr, info.size) == (Memtype.MEM_TYPE_HOST, 4096, 512)
    assert str(info) == repr(info) == "MemInfo(mem_type=Memtype.MEM_TYPE_HOST, addr=4096, size=512)"
    with pytest.raises(AttributeError):
        info.addr = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 1, 1),
        (None, 1, 1),
        (Memtype.MEM_TYPE_HOST, "1", 1),
        (Memtype.MEM_TYPE_HOST, 1, 1.0),
        (Memtype.MEM_TYPE_HOST, None, 1),
        (Memtype.MEM_TYPE_HOST, 1, None),
    ],
)
def test_wrong_types(arguments: tuple[object, object, object]) -> None:
    with pytest.raises(TypeError, match="only support"):
        MemInfo(*arguments)  # type: ignore[arg-type]
