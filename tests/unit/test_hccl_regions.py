"""Registered memory and communicators that it is bound to: what is refused, and the order in which they end."""

from __future__ import annotations

import json
import time

import pytest

from llm_datadist._acl import Device, DeviceMemory
from llm_datadist._hccl import HcclError
from llm_datadist._hccl_gets import OneSidedExchange
from llm_datadist._hccl_regions import OneSidedCommunicator, RegisteredMemory
from tests.on_simulator import Connection, counter, on_simulator, pair_on_simulator, soon

MIB = 1 << 20


def rank_table() -> str:
    devices = [{"device_id": str(number), "rank_id": str(number)} for number in range(2)]
    server = {"server_id": "a server", "device": devices}
    return json.dumps({"version": "1.0", "status": "completed", "server_count": "1", "server_list": [server]})


@on_simulator(MISUSE="error")
def test_a_region_is_registered_once_and_no_other_may_overlap_it() -> None:
    device, other = Device(0), Device(1)
    memory = DeviceMemory(device, 4 * MIB)
    registered = RegisteredMemory(device, memory)
    assert (registered.address, registered.size) == (memory.address, 4 * MIB)
    with pytest.raises(ValueError, match=rf"\[{memory.address:#x}, .*overlaps \[{memory.address:#x}, ") as refused:
        RegisteredMemory(device, memory)
    assert f"{memory.address + 4 * MIB:#x}" in str(refused.value)
    assert counter("calls.HcclRegisterGlobalMem") == 1
    with pytest.raises(HcclError, match="HcclRegisterGlobalMem failed with 1"):
        RegisteredMemory(other, memory)  # HCCL knows better whose it is
    registered.close()
    registered.close()
    RegisteredMemory(device, memory).close()
    assert counter("calls.HcclDeregisterGlobalMem") == 2
    memory.close()
    device.close()
    other.close()
    assert counter("live.registrations") == 0


@on_simulator(MISUSE="error")
def test_what_is_bound_stays_registered() -> None:
    device = Device(0)
    memory = DeviceMemory(device, 2 * MIB)
    registered = RegisteredMemory(device, memory)
    communicator = OneSidedCommunicator(device, rank_table(), 0, "a link", 1, 5, registered)
    assert (communicator.rank, communicator.name, communicator.async_error()) == (0, "a link", 0)
    with pytest.raises(HcclError, match="HcclDeregisterGlobalMem failed with 1"):
        registered.close()
    with pytest.raises(HcclError, match="HcclCommInitClusterInfoMemConfig failed with 1"):
        OneSidedCommunicator(device, rank_table(), 0, "a link", 1, 5, registered)  # the name is taken
    assert communicator.destroy(soon())
    assert communicator.destroy(soon())
    with pytest.raises(ValueError, match="destroyed"):
        communicator.prepare(1)
    registered.close()
    with pytest.raises(ValueError, match="not registered"):
        OneSidedCommunicator(device, rank_table(), 0, "a link", 1, 5, registered)
    memory.close()
    device.close()
    assert (counter("live.communicators"), counter("live.registrations"), counter("live.allocations")) == (0, 0, 0)


@on_simulator()
def test_what_is_dropped_ends_in_the_right_order() -> None:
    device = Device(0)
    memory = DeviceMemory(device, 2 * MIB)
    registered = RegisteredMemory(device, memory)
    communicator = OneSidedCommunicator(device, rank_table(), 0, "a link", 1, 5, registered)
    del registered, memory  # the communicator keeps them
    assert (counter("live.communicators"), counter("live.registrations")) == (1, 1)
    del communicator
    assert (counter("live.communicators"), counter("live.registrations"), counter("live.allocations")) == (0, 0, 0)
    device.close()


@on_simulator()
def test_arguments_are_checked_before_hccl_sees_them() -> None:
    device, other = Device(0), Device(1)
    memory = DeviceMemory(device, 2 * MIB)
    registered = RegisteredMemory(device, memory)
    for arguments, message in (
        ((device, "", 0, "name", 1, 1), "rank table of 0 bytes"),
        ((device, "{}\0", 0, "name", 1, 1), "rank table of 3 bytes"),
        ((device, " " * (1 << 16), 0, "name", 1, 1), "rank table of 65536 bytes"),
        ((device, "{}", 2, "name", 1, 1), "rank 2"),
        ((device, "{}", 0, "n" * 128, 1, 1), "1 to 127"),
        ((device, "{}", 0, "name", 0, 1), "0 MiB"),
        ((other, "{}", 0, "name", 1, 1), "not registered on the device"),
    ):
        with pytest.raises(ValueError, match=message):
            OneSidedCommunicator(*arguments, registered)
    assert counter("calls.HcclCommInitClusterInfoMemConfig") == 0
    registered.close()
    memory.close()
    device.close()
    other.close()


@on_simulator(variant="no_onesided")
def test_an_installation_without_the_functions_says_so() -> None:
    device = Device(0)
    memory = DeviceMemory(device, 2 * MIB)
    with pytest.raises(ValueError, match="no one-sided transfers"):
        RegisteredMemory(device, memory)
    memory.close()
    device.close()


def come_late(peer: Connection) -> None:
    """Prepare when the other rank has waited in vain."""
    device = Device(1)
    memory = DeviceMemory(device, 2 * MIB)
    registered = RegisteredMemory(device, memory)
    communicator = OneSidedCommunicator(device, rank_table(), 1, "a link", 1, 5, registered)
    peer.recv()
    communicator.prepare(10)
    peer.send("prepared")
    peer.recv()
    assert communicator.destroy(soon()), communicator.failure
    registered.close()
    memory.close()
    device.close()


def wait_in_vain(peer: Connection) -> None:
    device = Device(0)
    memory = DeviceMemory(device, 2 * MIB)
    registered = RegisteredMemory(device, memory)
    communicator = OneSidedCommunicator(device, rank_table(), 0, "a link", 1, 5, registered)
    with pytest.raises(ValueError, match="0 s"):
        communicator.prepare(0)
    began = time.monotonic()
    with pytest.raises(HcclError) as late:
        communicator.prepare(1)
    assert late.value.code == 9
    assert 0.9 < time.monotonic() - began < 2.0
    peer.send("come")
    communicator.prepare(10)
    communicator.prepare(10)  # does nothing
    assert peer.recv() == "prepared"
    exchange = OneSidedExchange(device, memory)
    with pytest.raises(ValueError, match="cannot be"):
        exchange.adopt_bound(communicator, 1 << 63, 1)
    exchange.adopt_bound(communicator, memory.address, memory.size)
    exchange.open()
    assert exchange.ready
    exchange.close()
    peer.send("end")
    registered.close()
    memory.close()
    device.close()
    assert (counter("live.communicators"), counter("live.streams")) == (0, 0)


def test_a_partner_that_is_late_can_be_waited_for_again() -> None:
    pair_on_simulator(wait_in_vain, come_late)
