"""Device memory shared by two processes of one server."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest

from tests.ascend_simulator.acl import DEFAULT, DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, Acl

MIB = 1 << 20
POOL = 8 * MIB
state: dict[str, int | bytes] = {}  # of the process


def export(acl: Acl, device: int = 0, flags: int = 1, size: int = POOL) -> bytes:
    acl.start(device)
    state["pool"] = acl.malloc(size)
    acl.ok("aclrtMemset", state["pool"], size, 0x11, size)
    key = ctypes.create_string_buffer(65)
    acl.ok("aclrtIpcMemGetExportKey", state["pool"], size, key, 65, flags)
    return key.value


def allow(acl: Acl, key: bytes, pid: int):
    return acl.aclrtIpcMemSetImportPid(key, (ctypes.c_int32 * 1)(pid), 1)


def own_pid(acl: Acl, device: int = 0) -> int:
    acl.start(device)
    return acl.out("aclrtDeviceGetBareTgid", ctypes.c_int32)


def import_key(acl: Acl, key: bytes, flags: int = 0):
    imported = ctypes.c_void_p()
    code = acl.aclrtIpcMemImportByKey(ctypes.byref(imported), key, flags)
    state["imported"] = imported.value or 0
    return code, acl.message() if code else ""


def copy_through_import(acl: Acl, size: int = POOL, timeout_ms: int = 20000):
    """Read the whole pool, then write a part of it."""
    own, stream = acl.malloc(size), acl.stream()
    acl.ok("aclrtMemcpyAsync", own, size, state["imported"], size, DEVICE_TO_DEVICE, stream)
    code = acl.aclrtSynchronizeStreamWithTimeout(stream, timeout_ms)
    got = acl.peek(own, size)
    acl.ok("aclrtMemset", own, size, 0x22, size)
    acl.ok("aclrtMemcpyAsync", state["imported"] + MIB, MIB, own, MIB, DEVICE_TO_DEVICE, stream)
    acl.sync(stream)
    acl.ok("aclrtDestroyStream", stream)
    acl.ok("aclrtFree", own)
    return code, got == b"\x11" * size


def read_pool(acl: Acl):
    pool = acl.peek(state["pool"], POOL)
    return pool == b"\x11" * MIB + b"\x22" * MIB + b"\x11" * (POOL - 2 * MIB)


def close_key(acl: Acl, key: bytes):
    return acl.aclrtIpcMemClose(key), acl.message()


def free_pool(acl: Acl):
    before = acl.free_memory()
    code = acl.aclrtFree(state["pool"])
    return code, acl.free_memory() - before, acl.aclrtResetDevice(0)


@pytest.mark.parametrize(("device", "flags"), [(0, 0), (1, 1)])
def test_read_and_write_through_an_import(program, device, flags):
    owner, importer = program(), program()
    key = owner.call(export)
    assert len(key) == 64
    importer.call(own_pid, device)
    assert importer.call(import_key, key, flags) == (0, "")
    assert importer.call(copy_through_import) == (0, True)
    assert owner.call(read_pool)
    assert importer.call(close_key, key)[0] == 0
    assert owner.call(close_key, key)[0] == 0
    assert owner.call(free_pool) == (0, POOL, 0)


def test_white_list(program):
    owner, importer, other = program(), program(), program()
    key = owner.call(export, 0, 0)
    pid = importer.call(own_pid)
    assert pid == importer.pid
    other.call(own_pid)
    assert importer.call(import_key, key)[0] == 207006
    assert owner.call(allow, key, pid) == 0
    assert importer.call(import_key, key)[0] == 0
    code, text = other.call(import_key, key)
    assert code == 207006
    assert "white list" in text


def refused_exports(acl: Acl):
    acl.start()
    pool, key = acl.malloc(4 * MIB), ctypes.create_string_buffer(65)
    return [
        acl.aclrtIpcMemGetExportKey(pool, 4 * MIB, key, 64, 0),
        acl.aclrtIpcMemGetExportKey(pool, 4 * MIB, key, 65, 2),
        acl.aclrtIpcMemGetExportKey(pool, 0, key, 65, 0),
        acl.aclrtIpcMemGetExportKey(acl.host(4096), 4096, key, 65, 0),
        acl.aclrtIpcMemGetExportKey(pool + 2 * MIB, 2 * MIB, key, 65, 0),
        acl.aclrtIpcMemSetAttr(key.value, 0, 1),
        acl.aclrtIpcMemImportByKey(ctypes.byref(ctypes.c_void_p()), key.value, 2),
        acl.aclrtIpcMemImportByKey(ctypes.byref(ctypes.c_void_p()), b"short", 0),
        acl.aclrtIpcMemImportByKey(ctypes.byref(ctypes.c_void_p()), b"x" * 64, 0),
    ]


def test_arguments(program):
    codes = program(MISUSE="error").call(refused_exports)
    assert codes == [107000, 107000, 100000, 107000, 0, 207000, 107000, 107000, 507022]


def restricted(acl: Acl):
    """What an import from another device does not serve."""
    own, host, stream, remote = acl.malloc(4096), acl.host(4096), acl.stream(), state["imported"]
    return [
        acl.aclrtMemcpy(remote, 64, host, 64, HOST_TO_DEVICE),
        acl.aclrtMemcpy(own, 64, remote, 64, DEVICE_TO_DEVICE),
        acl.aclrtMemcpyAsync(own, 64, remote, 64, DEFAULT, stream),
        acl.aclrtMemcpyAsync(host, 64, remote, 64, DEVICE_TO_HOST, stream),
        acl.aclrtMemcpyAsync(own, 64, remote, 64, DEVICE_TO_DEVICE, stream),
    ]


def test_restrictions_across_devices(program):
    owner, near, far = program(), program(MISUSE="error"), program(MISUSE="error")
    key = owner.call(export)
    near.call(own_pid, 0)
    far.call(own_pid, 2)
    near.call(import_key, key)
    code, text = far.call(import_key, key)
    assert code == 107000
    assert "neither flag 1" in text
    assert far.call(import_key, key, 1)[0] == 0
    assert near.call(restricted) == [0, 0, 0, 0, 0]
    assert far.call(restricted) == [107000, 107000, 107000, 107000, 0]


def test_no_link_between_the_devices(program):
    owner, importer = program(HCCS="0-1"), program(HCCS="0-1")
    key = owner.call(export)
    importer.call(own_pid, 2)
    assert importer.call(import_key, key, 1)[0] == 207021


def test_order_of_release(program):
    owner, importer = program(MISUSE="error"), program(MISUSE="error")
    key = owner.call(export)
    importer.call(own_pid)
    for _ in range(2):
        assert importer.call(import_key, key)[0] == 0
    code, text = owner.call(close_key, key)
    assert code == 107000
    assert "2 imports" in text
    assert [importer.call(close_key, key)[0] for _ in range(3)] == [0, 0, 107000]
    assert owner.call(close_key, key)[0] == 0
    assert importer.call(import_key, key)[0] == 107000


def test_key_of_another_world(program):
    owner, importer = program(), program(WORLD="elsewhere")
    key = owner.call(export)
    importer.call(own_pid)
    assert importer.call(import_key, key)[0] == 507022


def copy_slowly(acl: Acl, timeout_ms: int):
    size = POOL
    own, stream = acl.malloc(size), acl.stream()
    acl.set("PIECE_KIB", 1)
    begin = time.monotonic()
    code = 0
    while not code and time.monotonic() - begin < timeout_ms / 1000:
        acl.ok("aclrtMemcpyAsync", own, size, state["imported"], size, DEVICE_TO_DEVICE, stream)
        code = acl.aclrtSynchronizeStreamWithTimeout(stream, timeout_ms)
        state["copies"] = int(state.get("copies", 0)) + 1
    return code, time.monotonic() - begin


def start_copying(acl: Acl, key: bytes):
    import_key(acl, key)
    own, stream = acl.malloc(POOL), acl.stream()
    acl.ok("aclrtMemcpyAsync", own, POOL, state["imported"], POOL, DEVICE_TO_DEVICE, stream)
    while not acl.count("fault.exec.copy"):
        time.sleep(0.001)
    return state["imported"]


def test_importer_is_killed_during_a_copy(program):
    owner, importer = program(), program(FAULTS="exec.copy=hang")
    key = owner.call(export)
    importer.call(own_pid)
    assert importer.call(start_copying, key)
    importer.kill()
    assert owner.call(close_key, key)[0] == 0
    assert owner.call(free_pool) == (0, POOL, 0)


@pytest.mark.parametrize(("options", "code"), [({}, 507057), ({"DEAD_PEER_CODE": 507053}, 507053)])
def test_owner_is_killed_during_copies(program, options, code):
    owner, importer = program(), program(**options)
    key = owner.call(export)
    importer.call(own_pid)
    assert importer.call(import_key, key)[0] == 0
    importer.start(copy_slowly, 20000)
    owner.kill()
    got, took = importer.result()
    assert got == code
    assert took < 21
    assert importer.call(copy_again) == code
    assert importer.call(close_key, key)[0] == 0
    assert importer.call(import_key, key)[0] == 507022


def copy_again(acl: Acl):
    own, stream = acl.malloc(64), acl.stream()
    acl.ok("aclrtMemcpyAsync", own, 64, state["imported"], 64, DEVICE_TO_DEVICE, stream)
    return acl.aclrtSynchronizeStreamWithTimeout(stream, 5000)


def test_stopped_owner_is_read(program):
    """An owner that only stands still has its memory, and reading it needs nothing of its processor."""
    owner, importer = program(), program()
    key = owner.call(export)
    importer.call(own_pid)
    importer.call(import_key, key)
    os.kill(owner.pid, signal.SIGSTOP)
    try:
        assert importer.call(copy_through_import) == (0, True)
    finally:
        os.kill(owner.pid, signal.SIGCONT)


def close_under_copy(acl: Acl, key: bytes):
    acl.ok("aclrtMemcpyAsync", acl.malloc(64), 64, state["imported"], 64, DEVICE_TO_DEVICE, acl.stream())
    return close_key(acl, key)


def test_import_is_closed_under_a_copy(program):
    owner, importer = program(), program(MISUSE="error", MIN_DELAY_US=200_000)
    key = owner.call(export)
    importer.call(own_pid)
    importer.call(import_key, key)
    code, text = importer.call(close_under_copy, key)
    assert code == 107000
    assert "used by a queued aclrtMemcpyAsync" in text
