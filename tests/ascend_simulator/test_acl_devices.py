"""Devices, contexts and threads: who may do what where."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

import pytest

from tests.ascend_simulator.acl import DEVICE_TO_DEVICE, HOST_TO_DEVICE, Acl
from tests.ascend_simulator.programs import in_thread


def see_devices(acl: Acl):
    acl.ok("aclInit", None)
    count = acl.out("aclrtGetDeviceCount", ctypes.c_uint32)
    physical = []
    for user in range(count):
        number = ctypes.c_int32()
        acl.ok("aclrtGetPhyDevIdByUserDevId", user, ctypes.byref(number))
        physical.append(number.value)
    return physical


@pytest.mark.parametrize(
    ("visible", "physical"),
    [
        ("2,5", [2, 5]),
        ("1,3,2,4", [1, 3]),
        ("1,x,2", [1]),
        ("", []),
        ("1, 2", [1]),
        ("3,3", [3]),
        ("6,9", [6]),
        ("0,1,2,", [0, 1, 2]),
    ],
)
def test_visible_devices_are_renumbered_until_the_first_bad_entry(program, visible, physical):
    assert program(ASCEND_RT_VISIBLE_DEVICES=visible).call(see_devices) == physical


def test_all_devices_are_visible(program):
    assert program(DEVICES=3).call(see_devices) == [0, 1, 2]


def set_bad_device(acl: Acl):
    acl.ok("aclInit", None)
    return acl.aclrtSetDevice(1), acl.message(), acl.aclrtSetDevice(-1), acl.aclrtResetDevice(0)


def test_bad_device(program):
    code, text, negative, unset = program(DEVICES=1).call(set_bad_device)
    assert (code, negative, unset) == (107001, 107001, 107001)
    assert "there are 1 visible devices" in text


def threads_and_contexts(acl: Acl):
    acl.start(1)
    context = acl.out("aclrtGetCurrentContext", ctypes.c_void_p)
    number = ctypes.c_int32()

    def on_fresh_thread():
        codes = [acl.aclrtGetDevice(ctypes.byref(number)), acl.aclrtMalloc(ctypes.byref(ctypes.c_void_p()), 64, 0)]
        acl.ok("aclrtSetCurrentContext", context)
        return codes, acl.out("aclrtGetDevice", ctypes.c_int32)

    return in_thread(on_fresh_thread)


def test_context_belongs_to_the_thread(program):
    assert program(MISUSE="error").call(threads_and_contexts) == ([107002, 107002], 1)


def count_references(acl: Acl):
    acl.start()
    acl.ok("aclrtSetDevice", 0)
    acl.ok("aclrtResetDevice", 0)
    code = acl.aclrtMalloc(ctypes.byref(ctypes.c_void_p()), 64, 0)
    acl.ok("aclrtSetDevice", 0)
    address = acl.malloc(64)
    acl.ok("aclrtFree", address)
    acl.ok("aclrtResetDevice", 0)
    acl.ok("aclrtResetDevice", 0)
    return code, acl.aclrtResetDevice(0)


def test_reset_takes_the_context_from_the_thread_and_a_reference_from_the_process(program):
    assert program(MISUSE="error").call(count_references) == (107002, 107001)


def use_across_threads(acl: Acl):
    acl.start()
    address, host, stream = acl.malloc(4096), acl.host(4096), acl.stream()
    ctypes.memset(host, 9, 4096)

    def elsewhere():
        acl.ok("aclrtSetDevice", 0)
        acl.ok("aclrtMemcpyAsync", address, 4096, host, 4096, HOST_TO_DEVICE, stream)
        acl.sync(stream)
        got = acl.peek(address, 4096)
        acl.ok("aclrtFree", address)
        return got

    return in_thread(elsewhere)


def test_what_one_thread_makes_another_uses_and_frees(program):
    assert program().call(use_across_threads) == b"\x09" * 4096


def use_two_devices(acl: Acl):
    acl.ok("aclInit", None)
    results = {}

    def use(device: int):
        acl.ok("aclrtSetDevice", device)
        address, host, stream = acl.malloc(1 << 20), acl.host(1 << 20), acl.stream()
        ctypes.memset(host, 16 + device, 1 << 20)
        for _ in range(50):
            acl.ok("aclrtMemcpyAsync", address, 1 << 20, host, 1 << 20, HOST_TO_DEVICE, stream)
            acl.sync(stream)
        results[device] = acl.peek(address, 1 << 20) == bytes([16 + device]) * (1 << 20)
        results[f"device {device}"] = acl.out("aclrtGetDevice", ctypes.c_int32)

    threads = [threading.Thread(target=use, args=(device,)) for device in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_devices_at_once(program):
    assert program().call(use_two_devices) == {0: True, 1: True, "device 0": 0, "device 1": 1}


def use_explicit_context(acl: Acl):
    acl.start()
    default = acl.out("aclrtGetCurrentContext", ctypes.c_void_p)
    stream = acl.stream()
    context = acl.out("aclrtCreateContext", ctypes.c_void_p, 0)
    foreign = acl.aclrtStreamQuery(stream, ctypes.byref(ctypes.c_int32()))
    codes = [acl.aclrtDestroyContext(default), acl.aclrtDestroyContext(context), acl.aclrtDestroyContext(context)]
    acl.ok("aclrtSetCurrentContext", default)
    return foreign, codes, acl.aclrtStreamQuery(stream, ctypes.byref(ctypes.c_int32()))


def test_stream_of_another_context(program):
    assert program(MISUSE="error").call(use_explicit_context) == (107003, [107000, 0, 107000], 0)


def cross_devices(acl: Acl, enable: bool):
    acl.start(1)
    there = acl.malloc(4096)
    acl.poke(there, b"z" * 4096)
    acl.ok("aclrtSetDevice", 0)
    here, stream = acl.malloc(4096), acl.stream()
    can = ctypes.c_int32()
    acl.ok("aclrtDeviceCanAccessPeer", ctypes.byref(can), 0, 1)
    enabled = acl.aclrtDeviceEnablePeerAccess(1, 0) if enable else 0
    code = acl.aclrtMemcpyAsync(here, 4096, there, 4096, DEVICE_TO_DEVICE, stream)
    acl.sync(stream)
    return can.value, enabled, code, acl.peek(here, 1)


@pytest.mark.parametrize(
    ("links", "enable", "outcome"),
    [
        ("all", True, (1, 0, 0, b"z")),
        ("all", False, (1, 0, 107000, b"\xa5")),
        ("1-2", True, (0, 207021, 107000, b"\xa5")),
        ("2-3,0-1", True, (1, 0, 0, b"z")),
    ],
)
def test_copy_between_devices(program, links, enable, outcome):
    assert program(HCCS=links, MISUSE="error").call(cross_devices, enable) == outcome


def ask_attributes(acl: Acl):
    acl.ok("aclInit", None)
    value = ctypes.c_int64()
    return [(acl.aclrtGetDeviceInfo(2, which, ctypes.byref(value)), value.value) for which in (301, 402, 403, 404)]


def test_attributes(program):
    assert program(HBM_MIB=64).call(ask_attributes) == [(0, 64 << 20), (0, 2), (207000, 2), (207000, 2)]
    in_pod = program(SOC="Ascend910_9391", SERVER=3).call(ask_attributes)
    assert [code for code, _ in in_pod] == [0] * 4
    assert in_pod[3] == (0, 3)


def leave_behind(acl: Acl, what: str):
    acl.start()
    {"memory": lambda: acl.malloc(64), "stream": acl.stream, "event": acl.event}[what]()
    code, text = acl.aclrtResetDevice(0), acl.message()
    acl.ok("aclrtSetDevice", 0)
    return (
        code,
        text,
        acl.free_memory(),
        acl.count("live.allocations"),
        acl.count("live.streams"),
        acl.count("live.events"),
    )


@pytest.mark.parametrize("what", ["memory", "stream", "event"])
def test_leaks_are_told_and_cleared_up(program, what):
    code, text, free, *alive = program(MISUSE="error", HBM_MIB=16).call(leave_behind, what)
    assert code == 107000
    assert " 1 " in text
    assert (free, alive) == (16 << 20, [0, 0, 0])


def open_files() -> set[str]:
    files = set()
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
            files.add(os.readlink(f"/proc/self/fd/{each}"))
    return files


def finalize_everything(acl: Acl):
    before = open_files()
    acl.start()
    address, host, stream = acl.malloc(1 << 20), acl.host(1 << 20), acl.stream()
    acl.ok("aclrtMemcpyAsync", address, 1 << 20, host, 1 << 20, HOST_TO_DEVICE, stream)
    acl.ok("aclrtIpcMemGetExportKey", acl.malloc(2 << 20), 2 << 20, ctypes.create_string_buffer(65), 65, 0)
    code = acl.aclFinalize()
    after = open_files()
    names = {Path(f"/proc/self/task/{task}/comm").read_text()[:4] for task in os.listdir("/proc/self/task")}
    mapped = "llmdd-sim" in Path("/proc/self/maps").read_text()
    return code, after - before, "sim-" in names, mapped


def test_nothing_is_left_after_finalize(program):
    assert program(MISUSE="error").call(finalize_everything) == (107000, set(), False, False)
