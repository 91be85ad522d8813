"""Rank tables of links, handed to the simulator of HCCL by both sides: its parser is a strict one of its own."""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist.devices.ascend.rank_table import LocalPart, make_local_part, merge_parts, read_local_part
from tests.processes import Member

build = pytest.importorskip("tests.ascend_simulator.build")

Members = Callable[[str], Member]

A2, A3 = "Ascend910B3", "Ascend910_9391"
DEVICES = (2, 5)
NAME = b"link between two devices"


def loopback(host: int) -> str:
    """An address of this host that no other run of the tests uses."""
    return f"127.{20 + os.getpid() % 200}.{os.getpid() // 200 % 250}.{host}"


# ---- in a process


def open_device(state: dict[str, Any], library: str, world: str, soc: str, device: int) -> None:
    """Start the simulator as a program starts the vendor's library."""
    os.environ.update(LLMDD_SIM_WORLD=world, LLMDD_SIM_SOC=soc)
    state["acl"] = acl = ctypes.CDLL(library)
    acl.aclGetRecentErrMsg.restype = acl.aclrtGetSocName.restype = ctypes.c_char_p
    assert acl.aclInit(None) == 0
    assert acl.aclrtSetDevice(device) == 0
    state["device"] = device


def make_part(state: dict[str, Any], **facts: Any) -> str:
    """Make the part of this process of what the runtime says."""
    acl, physical_id = state["acl"], ctypes.c_int32()
    assert acl.aclrtGetPhyDevIdByUserDevId(state["device"], ctypes.byref(physical_id)) == 0
    part = make_local_part(acl.aclrtGetSocName().decode(), physical_id.value, **facts)
    state["part"] = part
    return part.to_json()


def make_communicator(
    state: dict[str, Any], sent: str | LocalPart, environment: dict[str, str]
) -> tuple[str, int, int, str]:
    """Merge the parts and hand the table to HCCL; gives text, rank, code, and what the library says of it."""
    peer = sent if isinstance(sent, LocalPart) else read_local_part(sent)
    table = merge_parts(state["part"], peer, environment)
    acl, communicator = state["acl"], ctypes.c_void_p()
    assert acl.aclrtSetDevice(state["device"]) == 0  # of this thread
    config = configuration()
    code = acl.HcclCommInitClusterInfoMemConfig(table.text.encode(), table.rank, config, ctypes.byref(communicator))
    reason = (acl.aclGetRecentErrMsg() or b"").decode() if code else ""
    if communicator:
        rank = ctypes.c_uint32()
        assert acl.HcclGetRankId(communicator, ctypes.byref(rank)) == 0
        assert rank.value == table.rank
        assert acl.HcclCommDestroy(communicator) == 0
    return table.text, table.rank, code, reason


def configuration() -> ctypes.Array[ctypes.c_char]:
    """A configuration of a communicator, version 5, with a name and a staging buffer of 1 MiB."""
    block = ctypes.create_string_buffer(300)
    for offset, value, nbytes in ((0, 300, 8), (8, 0xF0F0F0F0, 4), (12, 5, 4), (24, 1, 4), (28, 0xFFFFFFFF, 4)):
        block[offset : offset + nbytes] = value.to_bytes(nbytes, "little")
    block[32 : 32 + len(NAME)] = NAME
    block[292:300] = b"\xff" * 8
    return block


# ---- the tests


@pytest.fixture(scope="module")
def library() -> str:
    return str(build.library())


@pytest.mark.parametrize(
    ("soc", "facts", "environment"),
    [
        (A2, [{}, {}], {}),
        (A2, [{"device_ip": "198.51.100.20"}, {"device_ip": "2001:db8::25"}], {"HCCL_INTRA_ROCE_ENABLE": "1"}),
        # The simulator reaches another server at the address of the device, so it must be one of this host.
        (A2, [{"server_id": "b", "device_ip": loopback(1)}, {"server_id": "a", "device_ip": loopback(2)}], {}),
        (A3, [{"super_device_id": 11, "super_pod_id": 0}, {"super_device_id": 12, "super_pod_id": 0}], {}),
        (A3, [{"super_device_id": 11, "super_pod_id": 0, "device_ip": "198.51.100.20"}, {}], {}),
        (
            A3,
            [
                {"server_id": "10.0.0.9", "super_device_id": 11, "super_pod_id": 0, "device_ip": loopback(3)},
                {"server_id": "10.0.0.10", "super_device_id": 12, "super_pod_id": 0, "device_ip": loopback(4)},
            ],
            {},
        ),
        (
            A3,
            [
                {"server_id": "a", "super_device_id": 11, "super_pod_id": 1, "device_ip": loopback(5)},
                {"server_id": "b", "super_device_id": 11, "super_pod_id": 0, "device_ip": loopback(6)},
            ],
            {},
        ),
    ],
)
def test_hccl_takes_the_table(
    members: Members, library: str, soc: str, facts: list[dict[str, Any]], environment: dict[str, str]
) -> None:
    world = f"{os.getpid()}.{uuid.uuid4().hex[:12]}"
    sides = [members("one"), members("other")]
    for side, device in zip(sides, DEVICES):
        side.call(open_device, library, world, soc, device)
    parts = [side.call(make_part, **fact) for side, fact in zip(sides, facts)]
    answers = [side.call(make_communicator, sent, environment) for side, sent in zip(sides, (parts[1], parts[0]))]
    assert [(code, reason) for _, _, code, reason in answers] == [(0, "")] * 2
    assert answers[0][0] == answers[1][0]
    assert sorted(rank for _, rank, _, _ in answers) == [0, 1]


def test_a_table_that_hccl_does_not_take(members: Members, library: str) -> None:
    """The test above can fail: what no rule of ours has looked at is refused there."""
    side = members("one")
    side.call(open_device, library, uuid.uuid4().hex[:12], A2, DEVICES[0])
    side.call(make_part, server_id="s")
    _, _, code, reason = side.call(make_communicator_of_long_name)
    assert code != 0
    assert "server_id" in reason


def make_communicator_of_long_name(state: dict[str, Any]) -> tuple[str, int, int, str]:
    state["part"] = state["part"]._replace(server_id="s" * 65)
    return make_communicator(state, state["part"]._replace(device_id="5"), {})
