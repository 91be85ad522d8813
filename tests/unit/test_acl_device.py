"""Devices and their memory: opened once, given back once, on any thread, and nothing of the caller's is changed."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist._acl import AclError, Device, DeviceMemory, Event, PinnedMemory, Stream, device_count
from llm_datadist._ascend_copies import AscendCopier
from llm_datadist.devices.ascend import detection
from tests.on_simulator import counter, on_simulator, raw, set_knob, soon

MIB = 1 << 20
NO_CONTEXT = 107002


def in_thread(function: Callable[[], Any]) -> Any:
    """Result of the function on a thread that never called ACL."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def current_device() -> int:
    """Device of this thread, or the negative code."""
    number = ctypes.c_int32()
    code = raw().aclrtGetDevice(ctypes.byref(number))
    raw().aclGetRecentErrMsg()
    return -code if code else number.value


@on_simulator()
def test_a_device_says_what_it_is() -> None:
    device = Device(3)
    assert (device.device_id, device.physical_id, device.soc_name) == (3, 3, "Ascend910B3")
    free, total = device.memory_info()
    assert 0 < free <= total
    assert device.simulator is not None
    assert detection.is_available()
    device.close()
    device.close()
    with pytest.raises(AclError, match="closed"):
        device.memory_info()


@on_simulator(ASCEND_RT_VISIBLE_DEVICES="2,5,x,6")
def test_a_list_of_visible_devices_is_honoured() -> None:
    assert device_count() == 2
    devices = [Device(number) for number in range(2)]
    assert [device.physical_id for device in devices] == [2, 5]
    for device in devices:
        device.close()
    with pytest.raises(AclError) as refused:
        Device(2)
    assert refused.value.code == 107001
    assert "2,5,x,6" in str(refused.value)
    with pytest.raises(LLMException, match=r"device 2 is not visible.*2,5,x,6.*107001") as unavailable:
        detection.require_device(2)
    assert unavailable.value.status_code == LLMStatusCode.LLM_PARAM_INVALID


@on_simulator(DEVICES=0)
def test_no_device_is_told_from_no_driver() -> None:
    assert not detection.is_available()
    with pytest.raises(LLMException, match="no NPU is visible.*ASCEND_RT_VISIBLE_DEVICES is not set"):
        detection.require_device(0)


@on_simulator(FAULTS="aclInit=code(500000)")
def test_no_driver_is_told_with_the_number() -> None:
    with pytest.raises(LLMException, match=r"driver is missing.*aclInit failed with 500000"):
        detection.require_device(0)
    with pytest.raises(AclError, match="500000"):
        Device(0)
    assert counter("fault.aclInit") == 1, "the outcome is kept"


@on_simulator()
def test_somebody_else_may_have_started_the_runtime() -> None:
    assert raw().aclInit(None) == 0
    device = Device(0)
    device.close()
    count = ctypes.c_uint32()
    assert raw().aclrtGetDeviceCount(ctypes.byref(count)) == 0, "and it goes on for them"


def uses_of(device: Device, memory: DeviceMemory) -> list[Callable[[], object]]:
    copier = AscendCopier(device)
    return [
        device.memory_info,
        lambda: copier.write(memory.address, b"some bytes", soon()),
        lambda: copier.close(soon()),
        lambda: Stream(device).close(),
        lambda: Event(device).close(),
        lambda: PinnedMemory(device, 100).close(),
        lambda: DeviceMemory(device, 100).close(),
        lambda: Device(device.device_id).close(),
    ]


@on_simulator()
def test_the_device_of_the_callers_thread_stays() -> None:
    devices = [Device(0), Device(1)]
    memories = [DeviceMemory(device, 2 * MIB) for device in devices]

    def uses() -> list[int]:
        seen = [current_device()]
        assert raw().aclrtSetDevice(1) == 0
        for device, memory in zip(devices, memories):
            for use in uses_of(device, memory):
                use()
                seen.append(current_device())
        assert raw().aclrtResetDevice(1) == 0
        return seen

    first, *others = in_thread(uses)
    assert first == -NO_CONTEXT
    assert set(others) == {1}
    for memory in memories:
        memory.close()
    for device in devices:
        device.close()
    # A thread that had none is not disturbed by the next device, though the last one is gone.
    third = Device(2)
    third.memory_info()
    third.close()


@on_simulator()
def test_memory_goes_from_thread_to_thread() -> None:
    device = Device(0)
    copier = AscendCopier(device)
    memory = in_thread(lambda: DeviceMemory(device, 2 * MIB))
    assert in_thread(lambda: copier.write(memory.address, b"abc", soon())) == 0
    back = bytearray(3)
    assert in_thread(lambda: copier.read(memory.address, back, soon())) == 0
    assert back == b"abc"
    in_thread(memory.close)
    assert copier.close(soon())
    in_thread(device.close)
    assert counter("live.allocations") == 0


@on_simulator()
def test_the_last_reference_may_go_on_any_thread() -> None:
    device = Device(0)
    things = [DeviceMemory(device, 1), PinnedMemory(device, 1), Stream(device), Event(device)]
    in_thread(things.clear)
    gc.collect()
    in_thread(lambda: None)
    assert device.memory_info()[0] == device.memory_info()[1]
    assert counter("live.streams") == counter("live.events") == 0
    device.close()


@on_simulator()
def test_a_device_is_given_back_when_its_last_thing_is_gone() -> None:
    device = Device(0)
    memory, stream = DeviceMemory(device, 1), Stream(device)
    device.close()
    assert counter("calls.aclrtResetDevice") == 0
    with pytest.raises(AclError, match="closed"):
        Stream(device)
    memory.close()
    memory.close()
    assert memory.address == 0
    stream.close()
    stream.close()
    assert counter("calls.aclrtResetDevice") == counter("calls.aclrtSetDevice") == 1


@on_simulator()
def test_two_devices_do_not_disturb_each_other() -> None:
    wrong: list[str] = []

    def uses(number: int) -> None:
        device = Device(number)
        memory = DeviceMemory(device, 2 * MIB)
        copier = AscendCopier(device)
        data = bytes([number + 1]) * 100_000
        for _ in range(20):
            back = bytearray(len(data))
            copier.write(memory.address, data, soon())
            copier.read(memory.address, back, soon())
            if back != data:
                wrong.append(f"device {number}")
        copier.close(soon())
        memory.close()
        device.close()

    threads = [threading.Thread(target=uses, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("variant", ["", "old"])
def test_a_pool_begins_and_ends_at_huge_pages(variant: str) -> None:
    on_simulator(variant)(pool_pages)()


def pool_pages() -> None:
    device = Device(0)
    free = device.memory_info()[0]
    for offset in (0, 64):  # what the runtime promises is 64
        set_knob("HUGE_OFFSET", offset)
        for nbytes in (1, 2 * MIB, 2 * MIB + 1):
            memory = DeviceMemory(device, nbytes)
            assert memory.address % (2 * MIB) == 0
            assert memory.size % (2 * MIB) == 0
            assert memory.size >= nbytes
            memory.close()
    assert device.memory_info()[0] == free
    device.close()


@on_simulator(HBM_MIB=64)
def test_memory_that_is_not_there_is_refused_and_costs_nothing() -> None:
    device = Device(0)
    free = device.memory_info()[0]
    asked = counter("calls.aclrtMallocAlign32")
    with pytest.raises(ValueError, match="0 bytes"):
        DeviceMemory(device, 0)
    with pytest.raises(ValueError, match="0 bytes"):
        PinnedMemory(device, 0)
    assert counter("calls.aclrtMallocAlign32") == asked, "zero is refused before the runtime is asked"
    with pytest.raises(AclError) as refused:
        DeviceMemory(device, 65 * MIB)
    assert refused.value.code == 207001
    assert refused.value.function == "aclrtMallocAlign32"
    assert refused.value.text
    assert device.memory_info()[0] == free
    for _ in range(300):
        DeviceMemory(device, 2 * MIB).close()
    assert device.memory_info()[0] == free
    device.close()


@on_simulator()
def test_memory_without_peer_access_will_do() -> None:
    device = Device(0)
    set_knob("FAULTS", "aclrtMallocAlign32#1=code(207000)")
    DeviceMemory(device, 1).close()
    device.close()


@on_simulator()
def test_pinned_memory_is_a_buffer() -> None:
    device = Device(0)
    memory = PinnedMemory(device, 100)
    view = memoryview(memory)
    view[:3] = b"abc"
    memory.close()
    assert bytes(view[:3]) == b"abc", "it stays as long as somebody looks at it"
    view.release()
    with pytest.raises(BufferError, match="closed"):
        memoryview(memory)
    device.close()
    assert counter("calls.aclrtFreeHost") == 1


@on_simulator()
def test_a_forked_child_gets_an_error_and_not_a_hang() -> None:
    device = Device(0)
    memory, stream = DeviceMemory(device, 1), Stream(device)
    copier = AscendCopier(device)
    child = os.fork()
    if child == 0:
        uses: list[Callable[[], object]] = [
            device.memory_info,
            lambda: Device(1),
            lambda: Stream(device),
            lambda: copier.write(memory.address, b"a", soon()),
            lambda: stream.synchronise(soon()),
        ]
        refusals = 0
        for use in uses:
            try:
                use()
            except AclError as error:
                refusals += "forked" in str(error)
        memory.close()
        stream.close()
        device.close()
        del memory, stream, device, copier
        gc.collect()
        os._exit(0 if refusals == len(uses) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert copier.write(memory.address, b"a", soon()) == 0, "the parent goes on"
    assert copier.close(soon())
    memory.close()
    stream.close()
    device.close()
