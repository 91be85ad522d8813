"""Device and host memory: sizes, addresses, what a device has, and bytes that arrive."""

from __future__ import annotations

import ctypes
import signal

import pytest

from tests.ascend_simulator.acl import (
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    HUGE_FIRST,
    HUGE_ONLY,
    NORMAL_ONLY,
    Acl,
)
from tests.ascend_simulator.programs import SANITIZE

MIB = 1 << 20


def addresses(acl: Acl):
    acl.start()
    small = [acl.malloc(size) for size in (1, 64, 4096, 100_000)]
    huge = [acl.malloc(size) for size in (MIB + 1, 2 * MIB, 5 * MIB)]
    return small, huge, [acl.host(size) for size in (1, 100, 4096)]


@pytest.mark.parametrize("offset", [0, 64])
def test_addresses_are_aligned_as_promised_and_no_better(program, offset):
    small, huge, host = program(HUGE_OFFSET=offset).call(addresses)
    assert {address % 128 for address in small + host} == {64}
    assert {address % (2 * MIB) for address in huge} == {offset}
    assert len({address >> 30 for address in small + huge}) == 1


def test_bases_differ_between_processes(program):
    assert program().call(addresses)[0] != program().call(addresses)[0]


def charges(acl: Acl):
    acl.start()
    before = acl.free_memory()
    out = []
    for name, size, policy in [
        ("aclrtMalloc", 2 * MIB, HUGE_FIRST),
        ("aclrtMallocAlign32", 2 * MIB, HUGE_FIRST),
        ("aclrtMallocAlign32", 1, HUGE_FIRST),
        ("aclrtMalloc", 4096, NORMAL_ONLY),
        ("aclrtMallocAlign32", 1, HUGE_ONLY),
        ("aclrtMallocAlign32", 2 * MIB, 0x1000),
    ]:
        address = acl.out(name, ctypes.c_void_p, size, policy)
        out.append(before - acl.free_memory())
        acl.ok("aclrtFree", address)
    return out, before - acl.free_memory()


def test_sizes_are_charged_as_the_device_takes_them(program):
    assert program().call(charges) == ([4 * MIB, 2 * MIB, 4096, 8192, 2 * MIB, 2 * MIB], 0)


def ask_too_much(acl: Acl):
    acl.start()
    before = acl.free_memory()
    pointer = ctypes.c_void_p()
    held = acl.malloc(10 * MIB)
    codes = [acl.aclrtMalloc(ctypes.byref(pointer), size, HUGE_FIRST) for size in (7 * MIB, 1 << 62, 0)]
    acl.ok("aclrtFree", held)
    return codes, before - acl.free_memory(), acl.out("aclrtMallocAlign32", ctypes.c_void_p, 16 * MIB, HUGE_FIRST) != 0


def test_out_of_memory(program):
    assert program(HBM_MIB=16).call(ask_too_much) == ([207001, 207001, 100000], 0, True)


def allocate_often(acl: Acl):
    acl.start()
    before = acl.free_memory()
    held = []
    for i in range(1000):
        held.append(acl.malloc((i * 7919) % 300_000 + 1, i % 3 if i % 10 else HUGE_FIRST))
        if len(held) > 4:
            acl.ok("aclrtFree", held.pop(i % 3))
    for address in held:
        acl.ok("aclrtFree", address)
    return before - acl.free_memory()


def test_memory_does_not_shrink(program):
    assert program(HBM_MIB=32, QUARANTINE_MIB=4).call(allocate_often) == 0


def round_trip(acl: Acl, sizes: list[int]):
    acl.start()
    wrong = []
    for size in sizes:
        first, second, source, target = acl.malloc(size), acl.malloc(size), acl.host(size), acl.host(size)
        pattern = (bytes(range(251)) * (size // 251 + 1))[:size]
        ctypes.memmove(source, pattern, size)
        acl.ok("aclrtMemcpy", first, size, source, size, HOST_TO_DEVICE)
        acl.ok("aclrtMemcpy", second, size, first, size, DEVICE_TO_DEVICE)
        acl.ok("aclrtMemcpy", target, size, second, size, DEVICE_TO_HOST)
        if ctypes.string_at(target, size) != pattern:
            wrong.append(size)
    return wrong


def test_bytes_arrive(program):
    assert program().call(round_trip, [1, 63, 64, 65, 4095, 4097, 2 * MIB + 1, 100 * MIB]) == []


def odd_addresses(acl: Acl):
    acl.start()
    memory = acl.malloc(1000)
    acl.poke(memory, bytes(range(250)) * 4)
    acl.ok("aclrtMemcpy", memory + 501, 99, memory + 3, 99, DEVICE_TO_DEVICE)
    return acl.peek(memory + 501, 99) == bytes(range(3, 102))


def test_synchronous_copies_take_any_address(program):
    assert program().call(odd_addresses)


def limits(acl: Acl):
    acl.start()
    memory, host = acl.malloc(64), ctypes.create_string_buffer(128)
    codes = [
        acl.aclrtMemcpy(memory, 63, host, 64, HOST_TO_DEVICE),
        acl.aclrtMemcpy(None, 0, None, 0, HOST_TO_DEVICE),
        acl.aclrtMemcpy(memory, 64, memory, 64, DEVICE_TO_DEVICE),
        acl.aclrtMemcpy(memory, 64, host, 64, 6),
        acl.aclrtMemcpy(None, 64, host, 64, HOST_TO_DEVICE),
        acl.aclrtMemset(memory, 63, 1, 64),
    ]
    return codes, acl.peek(memory, 64)


def test_arguments_of_copies(program):
    assert program().call(limits) == ([107000, 0, 0, 100000, 100000, 107000], b"\xa5" * 64)


def fill(acl: Acl):
    acl.start()
    memory, stream = acl.malloc(1000), acl.stream()
    acl.ok("aclrtMemset", memory, 1000, 7, 500)
    acl.ok("aclrtMemsetAsync", memory + 500, 500, 8, 499, stream)
    acl.sync(stream)
    return acl.peek(memory, 1000)


def test_fills(program):
    assert program().call(fill) == b"\x07" * 500 + b"\x08" * 499 + b"\xa5"


def recognise(acl: Acl):
    acl.start(1)
    memory, pinned, plain = acl.malloc(3 * MIB), acl.host(64), ctypes.create_string_buffer(64)
    attributes = (ctypes.c_uint32 * 7)()
    seen = []
    for address in (memory + 5, pinned, ctypes.addressof(plain)):
        acl.ok("aclrtPointerGetAttributes", address, attributes)
        seen.append(tuple(attributes[:3]))
    base, size = ctypes.c_void_p(), ctypes.c_size_t()
    acl.ok("aclrtMemGetAddressRange", memory + 77, ctypes.byref(base), ctypes.byref(size))
    return (
        seen,
        base.value == memory,
        size.value,
        acl.aclrtMemGetAddressRange(pinned, ctypes.byref(base), ctypes.byref(size)),
    )


def test_pointers_are_recognised(program):
    seen, base, size, host = program().call(recognise)
    assert seen == [(1, 1, 2 * MIB), (0, 0, 4096), (0, 2, 0)]
    assert (base, size, host) == (True, 3 * MIB, 107000)


def register(acl: Acl):
    acl.start()
    area = ctypes.create_string_buffer(5 * 4096)
    page = -(-ctypes.addressof(area) // 4096) * 4096
    attributes = (ctypes.c_uint32 * 7)()
    pinned = 0x10000000
    codes = [
        acl.aclrtHostRegisterV2(page + 64, 4096, pinned),
        acl.aclrtHostRegisterV2(page, 8192, pinned),
        acl.aclrtHostRegisterV2(page + 4096, 8192, pinned),
    ]
    acl.ok("aclrtPointerGetAttributes", page + 100, attributes)
    return codes, attributes[1], [acl.aclrtHostUnregister(page), acl.aclrtHostUnregister(page + 8192)]


def test_registered_host_memory(program):
    assert program(MISUSE="error").call(register) == ([107000, 0, 507910], 0, [0, 507911])


def hold(acl: Acl, device: int, mib: int):
    acl.start(device)
    return acl.malloc(mib * MIB)


def free_on(acl: Acl, device: int):
    acl.start(device)
    return acl.free_memory() // MIB


def free_again(acl: Acl):
    return acl.free_memory() // MIB


def test_processes_share_the_memory_of_a_device(program):
    holder, reader = program(HBM_MIB=64), program(HBM_MIB=64, ASCEND_RT_VISIBLE_DEVICES="1,3")
    holder.call(hold, 3, 40)
    assert reader.call(free_on, 1) == 24
    third = program(HBM_MIB=64)
    assert third.call(free_on, 2) == 64
    holder.kill()
    assert reader.call(free_again) == 64
    reader.kill()  # the table outlives whoever made it
    assert third.call(free_again) == 64
    late = program(HBM_MIB=64)
    late.call(hold, 2, 8)
    assert third.call(free_again) == 56


def touch(acl: Acl, offset: int):
    acl.start()
    memory = acl.malloc(256)
    ctypes.memset(memory + offset, 0, 1)


@pytest.mark.skipif(SANITIZE == "thread", reason="ThreadSanitizer handles the signal itself")
def test_host_that_touches_device_memory_crashes_and_is_told_what_it_touched(program):
    errors = program().aborts(touch, 100, by=signal.SIGSEGV)
    assert "host_deref" in errors
    assert "256 bytes" in errors
    assert "device 0" in errors


def look(acl: Acl):
    acl.start()
    memory = acl.malloc(256)
    ctypes.memset(memory, 3, 256)
    return acl.peek(memory, 256)


def test_host_visible_memory(program):
    assert program(HOST_VISIBLE=1).call(look) == b"\x03" * 256


def reuse(acl: Acl):
    acl.start()
    first = acl.malloc(4096)
    acl.poke(first, b"x" * 4096)
    acl.ok("aclrtFree", first)
    second = acl.malloc(4096)
    return first == second, acl.peek(second, 4096) == b"\xa5" * 4096


@pytest.mark.parametrize(("quarantine", "same"), [(0, True), (64, False)])
def test_freed_memory_rests_before_it_is_used_again(program, quarantine, same):
    assert program(QUARANTINE_MIB=quarantine).call(reuse) == (same, True)
